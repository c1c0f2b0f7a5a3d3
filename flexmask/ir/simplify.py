"""The simplifier: one law a row, applied from the leaves up until nothing changes.

A law is text that `parse` reads. Its variables stand for any expression of a kind: I J L integers, P R bools,
X Y anything, C D integer constants. Laws that fail for NaN are stated for integers only.
tests/ir/test_ir_laws.py checks every row against `evaluate`.
"""

from __future__ import annotations

from functools import lru_cache

from .expr import Expr, const, make, rebuild
from .ops import BOOL, INT, OPS
from .printer import parse

LAWS = [
    # integers
    ("I + 0", "I"),
    ("I - 0", "I"),
    ("I - I", "0"),
    ("I * 1", "I"),
    ("I * 0", "0"),
    ("I // 1", "I"),
    ("I % 1", "0"),
    ("-(-I)", "I"),
    ("I + -J", "I - J"),
    ("I - -J", "I + J"),
    ("I + C + D", "I + (C + D)"),
    ("I - C + D", "I + (D - C)"),
    ("I + C - D", "I + (C - D)"),
    ("I - C - D", "I - (C + D)"),
    ("I + J - J", "I"),
    ("I - J + J", "I"),
    ("I + J - I", "J"),
    ("min(I, I)", "I"),
    ("max(I, I)", "I"),
    ("abs(-I)", "abs(I)"),
    ("abs(I - J)", "max(I - J, J - I)"),
    ("int64(I)", "I"),
    ("int32(I)", "I"),
    # comparisons
    ("I < I", "False"),
    ("I <= I", "True"),
    ("I == I", "True"),
    ("I != I", "False"),
    ("I - J < 0", "I < J"),
    ("I - J <= 0", "I <= J"),
    ("0 < I - J", "J < I"),
    ("0 <= I - J", "J <= I"),
    ("I - J == 0", "I == J"),
    ("I - J != 0", "I != J"),
    ("max(I, J) < L", "(I < L) & (J < L)"),
    ("max(I, J) <= L", "(I <= L) & (J <= L)"),
    ("L < max(I, J)", "(L < I) | (L < J)"),
    ("L <= max(I, J)", "(L <= I) | (L <= J)"),
    ("min(I, J) < L", "(I < L) | (J < L)"),
    ("min(I, J) <= L", "(I <= L) | (J <= L)"),
    ("L < min(I, J)", "(L < I) & (L < J)"),
    ("L <= min(I, J)", "(L <= I) & (L <= J)"),
    # bools
    ("~~P", "P"),
    ("~(I < J)", "J <= I"),
    ("~(I <= J)", "J < I"),
    ("~(X == Y)", "X != Y"),
    ("~(X != Y)", "X == Y"),
    ("P & True", "P"),
    ("P & False", "False"),
    ("P | True", "True"),
    ("P | False", "P"),
    ("P & P", "P"),
    ("P | P", "P"),
    ("P & ~P", "False"),
    ("P | ~P", "True"),
    ("P & (P | R)", "P"),
    ("P | P & R", "P"),
    ("P & R & P", "P & R"),
    ("P ^ P", "False"),
    ("P ^ False", "P"),
    ("P ^ True", "~P"),
    ("bool(P)", "P"),
    # choice
    ("where(True, X, Y)", "X"),
    ("where(False, X, Y)", "Y"),
    ("where(P, X, X)", "X"),
    ("where(P, True, False)", "P"),
    ("where(P, False, True)", "~P"),
    ("where(P, R, False)", "P & R"),
    ("where(P, True, R)", "P | R"),
    ("where(P, R, True)", "~P | R"),
    ("where(P, False, R)", "~P & R"),
]

_VARIABLE_KINDS = {"I": INT, "J": INT, "L": INT, "C": INT, "D": INT, "P": BOOL, "R": BOOL, "X": "any", "Y": "any"}
_CONSTANTS = ("C", "D")


@lru_cache(maxsize=1)
def _laws_by_op() -> dict[str, list[tuple[Expr, Expr]]]:
    """The table read once: the laws for each operation, in order."""
    variables = {name: make("var", (), name, kind) for name, kind in _VARIABLE_KINDS.items()}
    table: dict[str, list[tuple[Expr, Expr]]] = {}
    for left, right in LAWS:
        pattern = parse(left, variables=variables)
        table.setdefault(pattern.op, []).append((pattern, parse(right, variables=variables)))
    return table


@lru_cache(maxsize=4096)
def simplify(expr: Expr) -> Expr:
    """An equal expression, no larger where a law applies. Constants are folded; comparisons of min, max and abs are split."""
    return rebuild(expr, _settle)


@lru_cache(maxsize=16384)
def _settle(node: Expr) -> Expr:
    """`node`, whose arguments are simple already, rewritten until no law applies."""
    folded = _fold(node)
    if folded is not None:
        return folded
    for pattern, result in _laws_by_op().get(node.op, ()):
        bound = _match_either_way(pattern, node)
        if bound is not None:
            return simplify(_instantiate(result, bound))
    return node


def _fold(node: Expr) -> Expr | None:
    """The constant that `node` is, if all its arguments are constants and Python's value is exact."""
    row = OPS.get(node.op)
    if row is None or row.python is None or not all(a.op == "const" for a in node.args):
        return None
    if node.kind == "float" or any(a.kind == "float" for a in node.args):
        return None  # float32 arithmetic belongs to the kernel: folding here would round differently
    try:
        return const(row.python(*(a.value for a in node.args)))
    except (ZeroDivisionError, ValueError, OverflowError):
        return None


def _match_either_way(pattern: Expr, node: Expr) -> dict[str, Expr] | None:
    bound = _match(pattern, node, {})
    if bound is None and pattern.op in OPS and OPS[pattern.op].commutative:
        swapped = make(node.op, (node.args[1], node.args[0]), node.value)
        bound = _match(pattern, swapped, {})
    return bound


def _match(pattern: Expr, node: Expr, bound: dict[str, Expr]) -> dict[str, Expr] | None:
    """Bindings of the pattern's variables, or None. Inner commutative nodes are tried both ways too."""
    if pattern.op == "var":
        return _bind(pattern, node, bound)
    if pattern.op != node.op or pattern.value != node.value or len(pattern.args) != len(node.args) or pattern.kind != node.kind:
        return None if not _promotes(pattern, node) else _match_args(pattern, node.args, bound)
    found = _match_args(pattern, node.args, bound)
    if found is None and pattern.op in OPS and OPS[pattern.op].commutative:
        found = _match_args(pattern, node.args[::-1], bound)
    return found


def _promotes(pattern: Expr, node: Expr) -> bool:
    """A pattern over variables of any kind has no kind of its own (`where(P, X, Y)`)."""
    return pattern.op == node.op == "where" and all(a.kind == "any" for a in pattern.args[1:])


def _match_args(pattern: Expr, args: tuple[Expr, ...], bound: dict[str, Expr]) -> dict[str, Expr] | None:
    for p, a in zip(pattern.args, args, strict=True):
        found = _match(p, a, bound)
        if found is None:
            return None
        bound = found
    return bound


def _bind(variable: Expr, node: Expr, bound: dict[str, Expr]) -> dict[str, Expr] | None:
    name = variable.value
    if name in bound:
        return bound if bound[name] is node else None
    if variable.kind not in ("any", node.kind) or (name in _CONSTANTS and node.op != "const"):
        return None
    return {**bound, name: node}


def _instantiate(result: Expr, bound: dict[str, Expr]) -> Expr:
    return rebuild(result, lambda e: bound[e.value] if e.op == "var" else e)
