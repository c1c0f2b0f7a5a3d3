"""Why a symbol was asked for its value, read off the user's syntax tree, and what to write instead."""

from __future__ import annotations

import ast
import dis
import functools
import linecache
from collections.abc import Callable
from types import FrameType

from .places import positions, user_frame

_SYMBOLIC = "`{}` is symbolic here: a mask or score is traced once, for all indices at the same time"
_IF = "`{}` needs one bool now. Write `torch.where(condition, x, y)`; for a mask, combine conditions with `&`, `|` and `~`."
_AND = "`{}` needs one bool now. Write `{}` between the conditions, each in brackets: `(a) {} (b)`."
_NOT = "`not` needs one bool now. Write `~a`, with the condition in brackets."
_CHAIN = "a chained comparison hides an `and`. Write `(a < b) & (b < c)`."
_BRACKETS = "`&` and `|` bind tighter than comparisons, which makes this a chain. Write `(a < b) & (c < d)`."
_BIT_OPERATORS = (ast.BitAnd, ast.BitOr, ast.BitXor)
_IN = "`in` compares one by one and needs bools. Write `(x == a) | (x == b)`, or capture a bool table and index it."
_EXTREME = "the builtin `{0}` needs one bool now. Write `torch.{1}(a, b)`."
_QUANTIFIER = "the builtin `{0}` needs bools now. Join the conditions with `{1}`."
_ANY_OF_ALL = (
    "Python needs one bool now. Write `torch.where` for `if`, `a & b` for `and`, `a | b` for `or`, `~a` for `not`, "
    "`(a < b) & (b < c)` for a chained comparison, `torch.minimum` / `torch.maximum` for `min` / `max`."
)

# purposes other than a truth value
REMEDIES = {
    "int": "`int()` needs a value now. Use the index as it is, or `.long()` to round a float towards zero.",
    "float": "`float()` needs a value now. Use the number as it is, or `.float()` to convert; for `math.f(x)` write `torch.f(x)`.",
    "index": "a whole number is needed here. To look something up, capture a tensor and index that: `table = torch.tensor(list)`.",
    "range": "`range()` needs a value now. A loop over positions is one expression of `q_idx` and `kv_idx`; write that.",
    "hash": "a dict, set or cache needs a value now. Capture a tensor and index it, or choose with `torch.where`.",
    "round": "the builtin `round` needs a value now. Write `torch.round(x)`.",
    "iter": "it is one number and cannot be iterated over.",
    "len": "it is one number and has no length.",
    "contains": "it is one number and contains nothing. Compare with `==`.",
    "getitem": "it is one number and cannot be indexed. Index the captured tensor: `table[q_idx]`.",
    "setitem": "it is one number and cannot be assigned to. Write `torch.where(condition, new, old)`.",
    "item": "`.item()` needs a value now. Use the number as it is, without `.item()`.",
    "tolist": "`.tolist()` needs a value now. Use the number as it is.",
    "numpy": "`.numpy()` needs a value now. Use torch functions.",
}


def needs_value(purpose: str, expr: str) -> str:
    """The message for a symbolic value that Python wants as a number or bool; `purpose` is a key of the table above or "bool"."""
    remedy = _truth_remedy() if purpose == "bool" else _call_remedy(purpose)
    return f"{_SYMBOLIC.format(expr)}. {remedy[0].upper()}{remedy[1:]}"


def numpy_call(name: str) -> str:
    return f"numpy.{name} cannot be traced. Write `torch.{_TORCH_OF_NUMPY.get(name, name)}`, or compute it outside and capture the tensor."


_TORCH_OF_NUMPY = {"fmin": "minimum", "fmax": "maximum", "clip": "clamp", "absolute": "abs"}


def _call_remedy(purpose: str) -> str:
    """`float` and `index` arrive from `math` and `range` too; the call in the source tells."""
    node, _ = _syntax(user_frame())
    if isinstance(node, ast.Call) and purpose in ("float", "index", "int", "round"):
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id == "math":
            name = node.func.attr
            return f"`math.{name}` needs a value now. Write `torch.{_TORCH_OF_MATH.get(name, name)}`."
        if isinstance(node.func, ast.Name) and node.func.id in ("range", "int", "float"):
            return REMEDIES[node.func.id]
    return REMEDIES[purpose]


_TORCH_OF_MATH = {"fabs": "abs", "pow": "pow", "log2": "log2"}


def _truth_remedy() -> str:
    frame = user_frame()
    node, parents = _syntax(frame)
    if node is not None:
        for test in _CONSTRUCTS:
            found = test(node, parents)
            if found:
                return found
    return _from_bytecode(frame)


def _chained(node: ast.AST, parents: list[ast.AST]) -> str:
    if isinstance(node, ast.Compare) and any(isinstance(op, (ast.In, ast.NotIn)) for op in node.ops):
        return _IN
    if not isinstance(node, ast.Compare) or len(node.ops) == 1:
        return ""
    # `a > 1 & b > 2` is a chain too: Python reads a > (1 & b) > 2
    return _BRACKETS if any(isinstance(c, ast.BinOp) and isinstance(c.op, _BIT_OPERATORS) for c in node.comparators) else _CHAIN


def _called(node: ast.AST, parents: list[ast.AST]) -> str:
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if name in ("min", "max", "sorted"):
        return _EXTREME.format(name, "maximum" if name == "max" else "minimum")
    if name in ("any", "all"):
        return _QUANTIFIER.format(name, "|" if name == "any" else "&")
    return "`bool()` needs a value now. A comparison is a condition already; write `.bool()` to convert." if name == "bool" else ""


def _negated(node: ast.AST, parents: list[ast.AST]) -> str:
    return _NOT if any(isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not) for n in [node, *parents[:1]]) else ""


def _joined(node: ast.AST, parents: list[ast.AST]) -> str:
    joint = node if isinstance(node, ast.BoolOp) else parents[0] if parents else None
    if not isinstance(joint, ast.BoolOp):
        return ""
    word, sign = ("and", "&") if isinstance(joint.op, ast.And) else ("or", "|")
    return _AND.format(word, sign, sign)


def _branched(node: ast.AST, parents: list[ast.AST]) -> str:
    for parent in parents[:1]:
        word = _BRANCHES.get(type(parent))
        if word and getattr(parent, "test", node) is node:
            return _IF.format(word)
    return ""


_BRANCHES: dict[type, str] = {ast.If: "if", ast.IfExp: "if ... else", ast.While: "while", ast.Assert: "assert", ast.comprehension: "if"}
_CONSTRUCTS: list[Callable[[ast.AST, list[ast.AST]], str]] = [_chained, _called, _negated, _joined, _branched]


def _syntax(frame: FrameType | None) -> tuple[ast.AST | None, list[ast.AST]]:
    """The expression that the frame is at, and what encloses it, innermost first; nothing where the source is not at hand."""
    if frame is None:
        return None, []
    line, end_line, column, end_column = positions(frame.f_code, frame.f_lasti)
    tree = _tree(frame.f_code.co_filename, "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    if tree is None or column is None:
        return None, []
    return _at(tree, (line, column, end_line, end_column), [])


@functools.lru_cache(maxsize=8)
def _tree(file: str, source: str) -> ast.AST | None:
    try:
        return ast.parse(source) if source else None
    except SyntaxError:
        return None


def _at(node: ast.AST, span: tuple[int | None, ...], parents: list[ast.AST]) -> tuple[ast.AST | None, list[ast.AST]]:
    """Outermost node with exactly this span."""
    if isinstance(node, ast.expr) and (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset) == span:
        return node, parents
    for child in ast.iter_child_nodes(node):
        found, above = _at(child, span, [node, *parents])
        if found is not None:
            return found, above
    return None, []


def _from_bytecode(frame: FrameType | None) -> str:
    """Without source the instruction tells `not` and `in`; a jump may belong to any construct."""
    if frame is None:
        return _ANY_OF_ALL
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return {"UNARY_NOT": _NOT, "CONTAINS_OP": _IN}.get(name, _ANY_OF_ALL)
