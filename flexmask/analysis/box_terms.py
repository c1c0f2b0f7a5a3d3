"""Terms of a box test: expressions of one axis whose least and greatest value in each block are stored as summary tables."""

from __future__ import annotations

from ..ir import FLOAT, INT, B, Expr, H, K, Q, const, load, substitute, uses, walk

# what a term may not hold inside: two computations of these may differ in the last bit, so that neither vouches for the other
UNSTEADY = frozenset({"exp", "exp2", "log", "log2", "sin", "cos", "tanh", "sigmoid", "erf", "pow"})
# beyond this many terms a test is not worth its summaries
MOST_TERMS = 24


class Terms:
    """The terms found so far, each once, and the loads of their summaries."""

    def __init__(self, tensors: int):
        self.tensors = tensors
        self.found: dict[Expr, tuple[Expr, Expr]] = {}

    def ends(self, term: Expr) -> tuple[Expr, Expr] | None:
        """The least and greatest value of `term`, an expression of one axis, in this block of its axis. None: there are too many terms."""
        if term not in self.found:
            if len(self.found) == MOST_TERMS:
                return None
            number = self.tensors + 2 * len(self.found)
            self.found[term] = (_summary(number, term), _summary(number + 1, term))
        return self.found[term]

    def numbered(self, *tests: Expr) -> tuple[tuple[Expr, ...], tuple[Expr, ...], tuple[Expr, ...]]:
        """(rows, columns, tests): the terms that `tests` still read, by axis, and `tests` with summaries numbered in that order."""
        read = {node for test in tests for node in walk(test)}
        used = [term for term, ends in self.found.items() if not read.isdisjoint(ends)]
        rows, columns = (tuple(t for t in used if uses(t, axis)) for axis in (Q, K))
        table: dict[Expr, Expr] = {}
        for i, term in enumerate((*rows, *columns)):
            for which, end in enumerate(self.found[term]):
                table[end] = _summary(self.tensors + 2 * i + which, term)
        return rows, columns, tuple(substitute(test, table) for test in tests)


def _summary(number: int, term: Expr) -> Expr:
    lead = (B if uses(term, B) else const(0), H if uses(term, H) else const(0))
    return load(number, FLOAT if term.kind == FLOAT else INT, *lead, Q if uses(term, Q) else K)


def steady(e: Expr) -> bool:
    """Whether `e` has the same value wherever it is computed on one device: no float function, and no float sum of products, which
    a compiler may round once or twice."""
    return not any(node.kind == FLOAT and (node.op in UNSTEADY or _fusable(node)) for node in walk(e))


def _fusable(node: Expr) -> bool:
    inner = (a.args[0] if a.op == "neg" else a for a in node.args)
    return node.op in ("add", "sub") and any(a.op == "mul" and a.kind == FLOAT for a in inner)
