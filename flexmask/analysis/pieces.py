"""The algebra of kept sets along one axis: unions of guarded half-open intervals whose bounds are expressions.

Sets count only within [0, length): a start of 0 stands for "from the beginning" and a stop of `length` for "to the end", so that
0 is below every start and `length` above every stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations

from ..ir import KV_LEN, Q_LEN, TRUE, Expr, K, Q, make, simplify
from .facts import Piece
from .linear import ZERO
from .prove import Prover, conjuncts, negation, where


@dataclass(frozen=True)
class Axis:
    """The direction solved for: "row" finds the kv_idx kept by a query, "column" the q_idx that keep a key."""

    name: str
    index: Expr
    other: Expr
    length: Expr


ROW = Axis("row", K, Q, KV_LEN)
COLUMN = Axis("column", Q, K, Q_LEN)


@dataclass(frozen=True)
class Run:
    """[start, stop) where all guards hold, else empty; guards are bool expressions free of the axis's index."""

    start: Expr
    stop: Expr
    guards: tuple[Expr, ...] = ()


Runs = tuple[Run, ...]
# compare-and-exchange steps that sort so many values
_SORTING: dict[int, list[tuple[int, int]]] = {
    0: [],
    1: [],
    2: [(0, 1)],
    3: [(0, 1), (1, 2), (0, 1)],
    4: [(0, 1), (2, 3), (0, 2), (1, 3), (1, 2)],
}
_Merge = Callable[[Run, Run], Run | None]


def _all(guards: Iterable[Expr]) -> Expr:
    return reduce(lambda p, r: simplify(make("and", (p, r))), guards, TRUE)


def _minus(guards: tuple[Expr, ...], others: tuple[Expr, ...]) -> tuple[Expr, ...]:
    return tuple(g for g in guards if g not in others)


class Algebra:
    """Intersection and union for one axis. Results are exact; what is proved empty, contained or touching is folded together."""

    def __init__(self, axis: Axis, prover: Prover):
        self.axis, self.prover = axis, prover
        self.end = axis.length
        self._merges: tuple[_Merge, ...] = (self._contained, self._alike, self._choice, self._guarded)

    # sets

    def everything(self) -> Runs:
        return (Run(ZERO, self.end),)

    def since(self, start: Expr) -> Runs:
        return self.tidy((Run(start, self.end),))

    def until(self, stop: Expr) -> Runs:
        return self.tidy((Run(ZERO, stop),))

    def where(self, condition: Expr) -> Runs:
        """All or nothing."""
        return self.tidy((Run(ZERO, self.end, tuple(conjuncts(condition))),))

    def intersect(self, xs: Runs, ys: Runs) -> Runs:
        return self.tidy(tuple(self._meet(x, y) for x in xs for y in ys))

    def unite(self, xs: Runs, ys: Runs) -> Runs:
        return self.tidy(xs + ys)

    def tidy(self, runs: Runs) -> Runs:
        """The same set in fewer runs, as far as the prover sees."""
        left = [r for r in map(self._trimmed, runs) if r is not None]
        while self._merge_one(left):
            pass
        return tuple(left)

    def piece(self, run: Run) -> Piece:
        return Piece(run.start, where(_all(run.guards), run.stop, ZERO))

    def differ(self, x: Run, y: Run) -> Runs:
        """Where just one of two runs holds: every other gap between their sorted ends, at most two runs."""
        from_start = (x.start is ZERO and not x.guards) != (y.start is ZERO and not y.guards)
        ends = [*self._ends(x), *self._ends(y)]
        for i, j in _SORTING[len(ends)]:
            ends[i], ends[j] = self.smallest(ends[i], ends[j]), self.largest(ends[i], ends[j])
        marks = [ZERO, *ends] if from_start else ends
        marks = marks if len(marks) % 2 == 0 else [*marks, self.end]
        return self.tidy(tuple(Run(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True)))

    def _ends(self, run: Run) -> list[Expr]:
        """Where the run's indicator changes, in order; an empty run's ends coincide."""
        if run.guards:
            return [run.start, where(_all(run.guards), self.largest(run.start, run.stop), run.start)]
        if run.start is ZERO or run.stop is self.end:
            return [e for e in (run.start, run.stop) if e is not ZERO and e is not self.end]
        return [run.start, self.largest(run.start, run.stop)]

    # bounds

    def largest(self, x: Expr, y: Expr, facts: tuple[Expr, ...] = ()) -> Expr:
        return self._extreme("max", x, y, facts)

    def smallest(self, x: Expr, y: Expr, facts: tuple[Expr, ...] = ()) -> Expr:
        return self._extreme("min", x, y, facts)

    def _extreme(self, op: str, x: Expr, y: Expr, facts: tuple[Expr, ...]) -> Expr:
        parts: list[Expr] = []
        for new in [*_parts(op, x), *_parts(op, y)]:
            if not any(self._beats(op, old, new, facts) for old in parts):
                parts = [old for old in parts if not self._beats(op, new, old, facts)] + [new]
        return reduce(lambda p, r: make(op, (p, r)), parts)

    def _beats(self, op: str, x: Expr, y: Expr, facts: tuple[Expr, ...]) -> bool:
        """Whether y adds nothing to the min (max) beside x."""
        return self.below(x, y, facts) if op == "min" else self.below(y, x, facts)

    def below(self, x: Expr, y: Expr, facts: tuple[Expr, ...] = ()) -> bool:
        """x <= y is proved, as far as positions in [0, length) can tell: 0 and `length` bound everything."""
        return x is ZERO or y is self.end or self.prover.le(x, y, facts)

    # one run

    def _meet(self, x: Run, y: Run) -> Run:
        guards = x.guards + _minus(y.guards, x.guards)
        return Run(self.largest(x.start, y.start, guards), self.smallest(x.stop, y.stop, guards), guards)

    def _trimmed(self, run: Run) -> Run | None:
        """`run` with bounds that clipping makes needless dropped; None if it is proved empty."""
        guards = self._needed(run.guards)
        if any(self.prover.exclusive(p, r) for p, r in combinations(guards, 2)) or any(self.prover.holds(negation(g)) for g in guards):
            return None
        le = self.prover.le
        start = ZERO if le(run.start, ZERO, guards) else run.start
        stop = self.end if le(self.end, run.stop, guards) else run.stop
        empty = le(stop, start, guards) or le(stop, ZERO, guards) or le(self.end, start, guards)
        return None if empty else Run(start, stop, guards)

    def _needed(self, guards: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """The guards that do not follow from the others."""
        for g in guards:
            others = _minus(guards, (g,))
            if self.prover.holds(g, others):
                guards = others
        return guards

    # two runs

    def _merge_one(self, runs: list[Run]) -> bool:
        """Replace one pair of runs by one run of the same set, the plainest way first."""
        for merge in self._merges:
            for i, j in combinations(range(len(runs)), 2):
                merged = merge(runs[i], runs[j]) or merge(runs[j], runs[i])
                if merged is not None:
                    trimmed = self._trimmed(merged)
                    runs[i : j + 1] = ([] if trimmed is None else [trimmed]) + runs[i + 1 : j]
                    return True
        return False

    def _contained(self, x: Run, y: Run) -> Run | None:
        """x, if y lies within it."""
        inside = self.below(x.start, y.start, y.guards) and self.below(y.stop, x.stop, y.guards)
        return x if inside and all(self.prover.holds(g, y.guards) for g in x.guards) else None

    def _alike(self, x: Run, y: Run) -> Run | None:
        """The union under equal guards, if they share a bound or x provably reaches y."""
        if set(x.guards) != set(y.guards):
            return None
        if self.prover.same(x.start, y.start):
            return replace(x, stop=self.largest(x.stop, y.stop, x.guards))
        if self.prover.same(x.stop, y.stop):
            return replace(x, start=self.smallest(x.start, y.start, x.guards))
        return replace(x, stop=self.largest(x.stop, y.stop, x.guards)) if self._reaches(x, y, x.guards) else None

    def _reaches(self, x: Run, y: Run, facts: tuple[Expr, ...] = ()) -> bool:
        """Whether x.start <= y.start <= x.stop: then the hull is the union, whichever of them is empty."""
        return self.below(x.start, y.start, facts) and self.below(y.start, x.stop, facts)

    def _choice(self, x: Run, y: Run) -> Run | None:
        """Guards that exclude each other make one run whose bounds are chosen."""
        p, r, common = self._differing(x, y)
        if not any(self.prover.exclusive(g, h) for g in conjuncts(p) or [p] for h in conjuncts(r) or [r]):
            return None
        # the shorter condition reads better
        if negation(p) is r and p.op == "not":
            p, r, x, y = r, p, y, x
        either = () if negation(p) is r or negation(r) is p else (simplify(make("or", (p, r))),)
        return Run(where(p, x.start, y.start), where(p, x.stop, y.stop), common + either)

    def _guarded(self, x: Run, y: Run) -> Run | None:
        """The union of runs under different guards that share a bound, or of which x provably reaches y."""
        p, r, common = self._differing(x, y)
        if self._reaches(x, y, (*common, p, r)):
            if r is TRUE and x.stop is self.end:
                return Run(where(p, x.start, y.start), where(p, x.stop, y.stop), common)
            return Run(where(p, x.start, y.start), self._later_stop(x, p, y, r, common), common)
        if self.prover.same(x.start, y.start):
            return Run(x.start, self._later_stop(x, p, y, r, common), common)
        if self.prover.same(x.stop, y.stop):
            start = self.smallest(where(p, x.start, self.end), where(r, y.start, self.end), common)
            return Run(start, x.stop, common)
        return None

    def _later_stop(self, x: Run, p: Expr, y: Run, r: Expr, facts: tuple[Expr, ...]) -> Expr:
        return self.largest(where(p, x.stop, ZERO), where(r, y.stop, ZERO), facts)

    def _differing(self, x: Run, y: Run) -> tuple[Expr, Expr, tuple[Expr, ...]]:
        """What guards x alone, what guards y alone, and what guards both."""
        common = tuple(g for g in x.guards if g in y.guards)
        return _all(_minus(x.guards, common)), _all(_minus(y.guards, common)), common


def _parts(op: str, x: Expr) -> Iterator[Expr]:
    if x.op == op:
        for a in x.args:
            yield from _parts(op, a)
    else:
        yield x
