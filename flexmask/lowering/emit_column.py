"""A score mod and its derivative as the text of device functions for tiles that have keys down and queries across.

`score_column(tables, numbers, b, h, kv_idx)` computes what depends on no query, `score_row(tables, numbers, b, h, q_idx)` what depends on
the query, on no key, and takes some computing: both may run before there are scores, each place in one thread. Then
`score_pair(tables, numbers, column, row, score, b, h, q_idx, kv_idx)` computes the changed score and its derivative, which share what they
can. Indices are int32: b and h numbers, kv_idx [BLOCK_KV, 1], q_idx [1, BLOCK_Q], for `score_row` [BLOCK_Q].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir import FLOAT, SCORE, Expr, K, Q, derivative, uses, walk
from .body import Body, write_function, write_result, write_tuple
from .captures import CaptureSpec, Scope
from .emit import _comment, _shown
from .rules import Value, number_value

# operations that cost less than to hand on their results
_CHEAP = frozenset({
    "index", "const", "scalar", "add", "sub", "mul", "neg", "abs", "min", "max", "cast", "lt", "le", "eq", "ne", "and", "or", "xor", "not",
    "where", "bitand", "bitor", "bitxor", "lshift", "rshift",
})  # fmt: skip

# operations on pairs in the text of a score and its derivative, beyond which their values crowd the registers
_MANY = 64


def crowds_registers(expr: Expr) -> bool:
    """Whether a score or its derivative needs, for each pair, very many operations, or ones that work in float64 or in loops.

    >>> from flexmask.ir import parse
    >>> [crowds_registers(parse(text)) for text in ("tanh(score)", "sin(score)", "score + sin(float32(q_idx))")]
    [False, True, False]
    """
    leaves: dict[Expr, frozenset[Expr]] = {}
    for node in (n for root in (expr, derivative(expr, SCORE)) for n in walk(root)):
        leaves[node] = frozenset({node} & {Q, K, SCORE}).union(*(leaves[a] for a in node.args))
    pairs = [node for node, found in leaves.items() if node.args and (SCORE in found or {Q, K} <= found)]
    return len(pairs) > _MANY or any(map(_is_wide, pairs))


def _is_wide(node: Expr) -> bool:
    if node.op == "pow":
        exponent = node.args[1]
        return exponent.op != "const" or exponent.value not in (1, 2, 3, 4)
    return node.op in ("sin", "cos", "search") or (node.op in ("mod", "floordiv") and node.kind == FLOAT)


def emit_column(name: str, expr: Expr, captures: CaptureSpec) -> str:
    """The text of `score_column`, `score_row` and `score_pair` for `expr`; `name` is the user's name for the mod, for the docstrings.

    The first two return tuples of values, the third (changed score, its derivative), float32, broadcastable to [BLOCK_KV, BLOCK_Q].
    Raises BackendError for the lengths, which the functions are not given.

    >>> from flexmask.ir import parse
    >>> print(emit_column("twice", parse("2.0 * score"), CaptureSpec()).split("\\n\\n\\n")[2])
    @triton.jit
    def score_pair(tables, numbers, column, row, score, b, h, q_idx, kv_idx):
        \"\"\"`twice` and its derivative: 2.0 * score\"\"\"
        return (2.0 * score, tl.full((1, 1), 2.0, tl.float32))
    """
    title, roots = _comment(name)[:80], [expr, derivative(expr, SCORE)]
    scope = Scope(captures.identifiers.values())
    column = _Early.of("column", "kv_idx", _apart(roots, Q, lambda node: True), captures, scope)
    row = _Early.of("row", "q_idx", _apart(roots, K, _needs_work), captures, scope)
    body = Body(captures, ("b", "h", "q_idx", "kv_idx", "score"), frozenset(), column.given | row.given)
    lines = column.unpacked + row.unpacked + body.lines(roots)
    results = write_tuple([write_result(body.done[node], "score") for node in roots])
    head = "score_pair(tables, numbers, column, row, score, b, h, q_idx, kv_idx)"
    pair_text = write_function(head, f"`{title}` and its derivative: {_shown(expr, captures)}", lines, results)
    return "\n\n\n".join([column.text(f"What `{title}` needs of keys."), row.text(f"What `{title}` needs of queries."), pair_text])


@dataclass(frozen=True)
class _Early:
    """What a function of one index computes: its head and statements, its results, and the values of its nodes once they are unpacked."""

    part: str
    head: str
    lines: list[str]
    results: list[str]
    given: dict[Expr, Value]

    @classmethod
    def of(cls, part: str, index: str, nodes: list[Expr], captures: CaptureSpec, scope: Scope) -> _Early:
        """`nodes` from `index`; variables take their names from `scope` when they are unpacked."""
        body = Body(captures, ("b", "h", index), frozenset(nodes), {})
        lines = body.lines(nodes)
        results, given = [], {}
        for node in nodes:
            value = body.done[node]
            result = number_value(value) if part == "row" else value  # shared memory holds no bools
            results.append(result.text)
            given[node] = Value(scope.take(value.text, "value"), result.type)
        return cls(part, f"score_{part}(tables, numbers, b, h, {index})", lines, results, given)

    @property
    def unpacked(self) -> list[str]:
        """The statement that names the function's results again."""
        names = [value.text for value in self.given.values()]
        return [f"{write_tuple(names, bare=len(names) > 1)} = {self.part}"] if names else []

    def text(self, doc: str) -> str:
        return write_function(self.head, doc, self.lines, write_tuple(self.results))


def _needs_work(node: Expr) -> bool:
    """Whether a sub-expression depends on the query, and is not computed as fast as it is handed on."""
    return uses(node, Q) and any(n.op not in _CHEAP for n in walk(node))


def _apart(roots: list[Expr], index: Expr, wanted: Callable[[Expr], bool]) -> list[Expr]:
    """The greatest sub-expressions that need computing, depend on neither `index` nor the score, and are `wanted`."""
    varying: set[Expr] = set()
    for node in dict.fromkeys(n for root in roots for n in walk(root)):
        if node in (index, SCORE) or any(a in varying for a in node.args):
            varying.add(node)
    users = [a for root in roots for node in walk(root) if node in varying for a in node.args]
    users += [root for root in roots if root not in varying]
    return [n for n in dict.fromkeys(users) if n not in varying and n.op not in ("index", "const", "scalar") and wanted(n)]
