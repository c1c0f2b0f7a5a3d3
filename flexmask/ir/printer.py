"""Text of an expression, and back. The text is Python's own syntax, read with `ast` and a closed list of names, never run."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence

from .expr import INDICES, Expr, const, load, make, scalar, search, walk
from .ops import BOOL, CASTS, OPS

# Python's precedences; an operand is put in brackets when it binds no tighter than its place needs.
_PRECEDENCE = {"|": 2, "^": 3, "&": 4, "<<": 5, ">>": 5, "+": 6, "-": 6, "*": 7, "/": 7, "//": 7, "%": 7}
_COMPARE, _UNARY, _ATOM = 1, 8, 10


# an expression that would print longer than this many nodes shares its repeated parts by name
_LONG = 2000


def show(expr: Expr, names: Mapping[str, str] | None = None) -> str:
    """The expression as text. `names` renames captures and indices, e.g. {"t0": "doc", "s0": "window"}; such text is for people.

    Long texts name a part where it first stands, `(x0 := a + b) * x0`, so that text is never longer than the graph.
    """
    names = names or {}
    shared = _shared(expr)
    text: dict[Expr, tuple[str, int]] = {}
    for node in walk(expr):
        args = [_reference(shared, node, i, text[a]) for i, a in enumerate(node.args)]
        text[node] = _render(node, args, names)
    return text[expr][0]


def _shared(expr: Expr) -> dict[Expr, tuple[str, tuple[Expr, int]]]:
    """Name, and (user, argument number) where it first stands, of each part that a long expression uses more than once."""
    size: dict[Expr, int] = {}
    users: Counter[Expr] = Counter()
    for node in walk(expr):
        size[node] = 1 + sum(size[a] for a in node.args)
        users.update(node.args)
    if size[expr] <= _LONG:
        return {}
    found: dict[Expr, tuple[str, tuple[Expr, int]]] = {}
    seen: set[Expr] = set()
    stack: list[tuple[Expr, Expr, int]] = [(expr, expr, 0)]
    while stack:  # in reading order
        node, user, place = stack.pop()
        if node not in seen:
            seen.add(node)
            if node.args and users[node] > 1:
                found[node] = (f"x{len(found)}", (user, place))
            stack.extend((a, node, i) for i, a in reversed(list(enumerate(node.args))))
    return found


def _reference(shared: dict[Expr, tuple[str, tuple[Expr, int]]], user: Expr, place: int, text: tuple[str, int]) -> tuple[str, int]:
    """How `user` writes its argument: as it is, or by name where it is shared, with its definition where it first stands."""
    name, first = shared.get(user.args[place], (None, None))
    if name is None:
        return text
    return (f"({name} := {text[0]})" if first == (user, place) else name), _ATOM


def _render(node: Expr, args: list[tuple[str, int]], names: Mapping[str, str]) -> tuple[str, int]:
    plain = [a for a, _ in args]
    if node.op == "index":
        return names.get(node.value, node.value), _ATOM
    if node.op == "const":
        return repr(node.value), _UNARY if isinstance(node.value, (int, float)) and node.value < 0 else _ATOM
    if node.op == "scalar":
        return names.get(f"s{node.value}", f"s{node.value}"), _ATOM
    if node.op == "load":
        name = names.get(f"t{node.value}")
        if name and not plain:
            return name, _ATOM  # one number: for people its name says it all
        return f"{name or f't{node.value}'}[{', '.join(plain) or '()'}]", _ATOM
    if node.op == "search":
        number, side = node.value
        return f"{side}({', '.join([names.get(f't{number}', f't{number}'), *plain])})", _ATOM
    if node.op == "cast":
        return f"{node.value}({plain[0]})", _ATOM
    return _render_op(node, args)


def _render_op(node: Expr, args: list[tuple[str, int]]) -> tuple[str, int]:
    symbol = OPS[node.op].symbol
    if not symbol or (node.op == "neg" and node.args[0].op == "const"):  # -3 reads back as a constant
        return f"{node.op}({', '.join(a for a, _ in args)})", _ATOM
    if len(args) == 1:
        return symbol + _bracket(args[0], _UNARY), _UNARY
    level = _PRECEDENCE.get(symbol, _COMPARE)
    # comparisons do not associate in Python (a < b < c is a chain), the others do to the left
    left = level + 1 if level == _COMPARE else level
    return f"{_bracket(args[0], left)} {symbol} {_bracket(args[1], level + 1)}", level


def _bracket(part: tuple[str, int], needed: int) -> str:
    text, level = part
    return text if level >= needed else f"({text})"


def parse(text: str, tensors: Sequence[str] = (), scalars: Sequence[str] = (), variables: Mapping[str, Expr] | None = None) -> Expr:
    """The expression `show` printed. `tensors` and `scalars` give the kinds of t0, t1, ... and s0, s1, ...

    `variables` binds further names (the rule table's pattern variables). Raises ValueError for anything else.
    """
    try:
        return _Reader(tensors, scalars, dict(variables or {})).read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an expression of flexmask: {type(error).__name__}: {error}") from error


_BINARY = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor", ast.LShift: "lshift", ast.RShift: "rshift",
}  # fmt: skip
_COMPARISON = {ast.Lt: "lt", ast.LtE: "le", ast.Eq: "eq", ast.NotEq: "ne"}
_ON_BITS = {"and": "bitand", "or": "bitor", "xor": "bitxor", "not": "invert"}


class _Reader:
    def __init__(self, tensors: Sequence[str], scalars: Sequence[str], variables: dict[str, Expr]):
        self.tensors, self.scalars, self.variables = tensors, scalars, variables

    def read(self, node: ast.expr) -> Expr:
        method = getattr(self, f"_{type(node).__name__}", None)
        if method is None:
            raise ValueError(f"not an expression of flexmask: {ast.unparse(node)}")
        result: Expr = method(node)
        return result

    def _Constant(self, node: ast.Constant) -> Expr:
        if not isinstance(node.value, (bool, int, float)):
            raise ValueError(f"not a number: {node.value!r}")
        return const(node.value)

    def _Name(self, node: ast.Name) -> Expr:
        name = node.id
        if name in self.variables:
            return self.variables[name]
        if name in INDICES:
            return INDICES[name]
        if name in ("inf", "nan"):
            return const(float(name))
        if name[0] == "s" and name[1:].isdigit() and int(name[1:]) < len(self.scalars):
            return scalar(int(name[1:]), self.scalars[int(name[1:])])
        raise ValueError(f"unknown name {name!r}")

    def _NamedExpr(self, node: ast.NamedExpr) -> Expr:
        self.variables[node.target.id] = self.read(node.value)
        return self.variables[node.target.id]

    def _tensor(self, node: ast.expr) -> int:
        if isinstance(node, ast.Name) and node.id[0] == "t" and node.id[1:].isdigit() and int(node.id[1:]) < len(self.tensors):
            return int(node.id[1:])
        raise ValueError(f"not a captured tensor: {ast.unparse(node)}")

    def _Subscript(self, node: ast.Subscript) -> Expr:
        number = self._tensor(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return load(number, self.tensors[number], *(self.read(p) for p in parts))

    def _UnaryOp(self, node: ast.UnaryOp) -> Expr:
        arg = self.read(node.operand)
        if isinstance(node.op, ast.USub):
            return const(-arg.value) if arg.op == "const" and arg.kind != BOOL else make("neg", (arg,))
        if isinstance(node.op, ast.Invert):
            return make("not" if arg.kind == BOOL else "invert", (arg,))
        raise ValueError(f"not an expression of flexmask: {ast.unparse(node)}")

    def _BinOp(self, node: ast.BinOp) -> Expr:
        op = _BINARY.get(type(node.op))
        if op is None:
            raise ValueError(f"not an expression of flexmask: {ast.unparse(node)}")
        args = (self.read(node.left), self.read(node.right))
        if op in _ON_BITS and {a.kind for a in args} != {BOOL}:
            op = _ON_BITS[op]
        return make(op, args)

    def _Compare(self, node: ast.Compare) -> Expr:
        if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARISON:
            raise ValueError(f"not an expression of flexmask: {ast.unparse(node)}")
        return make(_COMPARISON[type(node.ops[0])], (self.read(node.left), self.read(node.comparators[0])))

    def _Call(self, node: ast.Call) -> Expr:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("left", "right"):
            return search(self._tensor(node.args[0]), name, *(self.read(a) for a in node.args[1:]))
        args = tuple(self.read(a) for a in node.args)
        if name in CASTS and len(args) == 1:
            return make("cast", args, name)
        if name in OPS and (not OPS[name].symbol or name == "neg"):
            return make(name, args)
        raise ValueError(f"unknown function {name!r}")
