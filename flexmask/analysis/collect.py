"""Solved conditions as runs, by the algebra: readable bounds, and as few runs as the prover can see."""

from __future__ import annotations

from ..ir import FALSE, TRUE, Expr
from .linear import leaves
from .pieces import Algebra, Runs
from .solved import flipped, is_since, is_until

# no intermediate union may grow beyond this many runs, and no more pairs of runs are intersected
_MOST = 8
_MOST_PAIRS = 16


class Collector:
    """Runs of solved conditions, each worked out once; None where there would be too many."""

    def __init__(self, algebra: Algebra):
        self.algebra, self.index = algebra, algebra.axis.index
        self._known: dict[Expr, Runs | None] = {}

    def runs(self, p: Expr) -> Runs | None:
        if p not in self._known:
            found = self._runs(p)
            self._known[p] = None if found is None or len(found) > _MOST else found
        return self._known[p]

    def _runs(self, p: Expr) -> Runs | None:
        if p is TRUE:
            return self.algebra.everything()
        if p is FALSE:
            return ()
        if self.index not in leaves(p):
            return self.algebra.where(p)
        if is_since(p, self.index):
            return self.algebra.since(p.args[0])
        if is_until(p, self.index):
            return self.algebra.until(p.args[1])
        if p.op == "xor":
            return self._differ(*p.args)
        if p.op == "where":
            return self._choice(*p.args)
        return self._join(p.op, self.runs(p.args[0]), self.runs(p.args[1]))

    def _join(self, op: str, x: Runs | None, y: Runs | None) -> Runs | None:
        if op == "and" and () in (x, y):
            return ()
        if x is None or y is None or (op == "and" and len(x) * len(y) > _MOST_PAIRS):
            return None
        return (self.algebra.intersect if op == "and" else self.algebra.unite)(x, y)

    def _choice(self, c: Expr, x: Expr, y: Expr) -> Runs | None:
        yes = self._join("and", self.runs(c), self.runs(x))
        return self._join("or", yes, self._join("and", self.runs(flipped(c, self.index)), self.runs(y)))

    def _differ(self, x: Expr, y: Expr) -> Runs | None:
        """Just one of x and y: by their ends where both are single runs and that takes fewer, else by cases."""
        first, second = self.runs(x), self.runs(y)
        cases = self._choice(x, flipped(y, self.index), y)
        if first is not None and second is not None and len(first) == len(second) == 1:
            by_ends = self.algebra.differ(first[0], second[0])
            if cases is None or len(by_ends) < len(cases):
                return by_ends
        return cases
