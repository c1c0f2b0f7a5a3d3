"""A few positions that a solved condition keeps at most: read off pairs of bounds that lie a fixed distance apart."""

from __future__ import annotations

from ..ir import FALSE, Expr
from .linear import Linear, leaves, linear
from .pieces import Axis, Runs
from .prove import Prover
from .solved import is_since, is_until, normal

# between two bounds, and in all
_WIDEST = 6
_MOST_POSITIONS = 8
_Positions = frozenset[Expr]


class Cover:
    """Positions that solved conditions keep at most, where they are few."""

    def __init__(self, axis: Axis, prover: Prover):
        self.index, self.prover = axis.index, prover
        self._known: dict[Expr, _Positions | None] = {}

    def of(self, p: Expr) -> tuple[Expr, ...] | None:
        """At most so many positions, outside of which `p` keeps nothing; None if that is not seen."""
        found = self._of(normal(p, self.index))
        return None if found is None else tuple(sorted(found, key=str))

    def of_runs(self, runs: Runs) -> tuple[Expr, ...] | None:
        """The same of runs, by the prover."""
        found: set[Expr] = set()
        for run in runs:
            start = linear(run.start)
            widths = (w for w in range(1, _WIDEST + 1) if self.prover.le(run.stop, start.shifted(w).expr(), run.guards))
            width = next(widths, None)
            if width is None:
                return None
            found.update(start.shifted(j).expr() for j in range(width))
        return tuple(sorted(found, key=str)) if len(found) <= _MOST_POSITIONS else None

    def _of(self, p: Expr) -> _Positions | None:
        if p not in self._known:
            self._known[p] = self._union(p) if p.op == "or" else self._among(p)
        return self._known[p]

    def _union(self, p: Expr) -> _Positions | None:
        parts = [self._of(a) for a in p.args]
        found = frozenset().union(*(part for part in parts if part is not None))
        return None if None in parts or len(found) > _MOST_POSITIONS else found

    def _among(self, p: Expr) -> _Positions | None:
        """Of a conjunction: the smallest cover of any of its parts or of two of its bounds."""
        if p is FALSE:
            return frozenset()
        parts = _flat("and", p)
        starts = [linear(e) for a in parts if is_since(a, self.index) for e in _flat("max", a.args[0])]
        stops = [linear(e) for a in parts if is_until(a, self.index) for e in _flat("min", a.args[1])]
        covers = [self._between(start, stop) for start in starts for stop in stops]
        covers += [self._of(a) for a in parts if a.op == "or" and self.index in leaves(a)]
        return min((c for c in covers if c is not None), key=len, default=None)

    def _between(self, start: Linear, stop: Linear) -> _Positions | None:
        gap = (stop - start).scaled(-1)
        for width in range(_WIDEST + 1):
            if self.prover.never_negative(gap.shifted(width)):
                return frozenset(start.shifted(j).expr() for j in range(width))
        return None


def _flat(op: str, p: Expr) -> list[Expr]:
    return [part for a in p.args for part in _flat(op, a)] if p.op == op else [p]
