"""Index safety on the host: the range of values an index expression takes, from the ranges of its leaves, in Python integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..ir import BOOL, SCORE, Expr, walk
from .linear import Linear, linear


@dataclass(frozen=True)
class IndexRange:
    """lo <= value <= hi. `exact` where both bounds are taken at some position, so that exceeding a table is an error for sure."""

    lo: int
    hi: int
    exact: bool


def index_range(expr: Expr, leaf_ranges: Mapping[str, tuple[int, int]], scalars: Sequence[int | float] = ()) -> IndexRange | None:
    """The range of the integer expression `expr`, or None where it depends on captured data (or on floating-point numbers).

    `leaf_ranges` gives the inclusive range of "b", "h", "q_idx" and "kv_idx", and of "q_len" and "kv_len" if they occur; every
    range is non-empty; what is computed of the score has none. Raises KeyError for an index without a range.

    >>> from flexmask.ir import K, Q
    >>> index_range(Q - K + 7, {"q_idx": (0, 7), "kv_idx": (0, 7)})
    IndexRange(lo=0, hi=14, exact=True)
    """
    return _Ranges(leaf_ranges, scalars).of(expr)


class _Ranges:
    def __init__(self, leaves: Mapping[str, tuple[int, int]], scalars: Sequence[int | float]):
        self.leaves, self.scalars = leaves, scalars

    def of(self, expr: Expr) -> IndexRange | None:
        return self._sum(linear(expr))

    def _sum(self, x: Linear) -> IndexRange | None:
        lo = hi = x.constant
        exact = self._independent(list(x.terms))
        for m, c in x.terms.items():
            part = self._monomial(m)
            if part is None:
                return None
            lo += c * (part.lo if c > 0 else part.hi)
            hi += c * (part.hi if c > 0 else part.lo)
            exact = exact and part.exact
        return IndexRange(lo, hi, exact)

    def _monomial(self, m: Expr) -> IndexRange | None:
        if m.op == "const":
            return IndexRange(m.value, m.value, True)
        if m.op == "index":
            return IndexRange(*self.leaves[m.value], True)
        if m.op == "scalar":
            value = self.scalars[m.value]
            return IndexRange(value, value, True) if isinstance(value, int) else None
        method = getattr(self, f"_{m.op}", None)
        if method is None or m.kind == BOOL:
            return None
        result: IndexRange | None = method(m)
        return result

    def _independent(self, parts: Sequence[Expr]) -> bool:
        """Whether no index with more than one value occurs in two of `parts`."""
        used = [{n.value for n in walk(p) if n is SCORE or (n.op == "index" and len(set(self.leaves[n.value])) > 1)} for p in parts]
        return sum(map(len, used)) == len(set().union(*used))

    def _min(self, m: Expr) -> IndexRange | None:
        return self._extreme(m, min)

    def _max(self, m: Expr) -> IndexRange | None:
        return self._extreme(m, max)

    def _extreme(self, m: Expr, pick: Callable[[int, int], int]) -> IndexRange | None:
        x, y = map(self.of, m.args)
        if x is None or y is None:
            return None
        return IndexRange(pick(x.lo, y.lo), pick(x.hi, y.hi), x.exact and y.exact and self._independent(m.args))

    def _abs(self, m: Expr) -> IndexRange | None:
        x = self.of(m.args[0])
        if x is None:
            return None
        crosses = x.lo < 0 < x.hi
        # a range that crosses zero need not contain it: 2 * q_idx - 3
        lo = 0 if crosses else min(abs(x.lo), abs(x.hi))
        return IndexRange(lo, max(abs(x.lo), abs(x.hi)), x.exact and (not crosses or self._gapless(m.args[0])))

    def _floordiv(self, m: Expr) -> IndexRange | None:
        x, d = map(self.of, m.args)
        if x is None or d is None or d.lo <= 0 <= d.hi:
            return None
        corners = [n // k for n in (x.lo, x.hi) for k in (d.lo, d.hi)]
        return IndexRange(min(corners), max(corners), x.exact and d.exact and self._independent(m.args))

    def _mod(self, m: Expr) -> IndexRange | None:
        x, d = map(self.of, m.args)
        if x is None or d is None or d.lo <= 0 <= d.hi:
            return None
        if d.lo == d.hi and x.lo // d.lo == x.hi // d.lo:
            ends = (x.lo % d.lo, x.hi % d.lo)
            return IndexRange(min(ends), max(ends), x.exact)
        lo, hi = (0, d.hi - 1) if d.lo > 0 else (d.lo + 1, 0)
        return IndexRange(lo, hi, d.lo == d.hi and x.exact and x.hi - x.lo >= abs(d.lo) - 1 and self._gapless(m.args[0]))

    def _gapless(self, expr: Expr) -> bool:
        """Whether `expr` takes every value of its range: it moves in steps of one along each index in it."""
        return all(m.op == "scalar" or (m.op == "index" and abs(c) == 1) for m, c in linear(expr).terms.items())

    def _mul(self, m: Expr) -> IndexRange | None:
        x, y = map(self.of, m.args)
        if x is None or y is None:
            return None
        corners = [n * k for n in (x.lo, x.hi) for k in (y.lo, y.hi)]
        return IndexRange(min(corners), max(corners), x.exact and y.exact and self._independent(m.args))

    def _where(self, m: Expr) -> IndexRange | None:
        x, y = map(self.of, m.args[1:])
        if x is None or y is None:
            return None
        return IndexRange(min(x.lo, y.lo), max(x.hi, y.hi), False)
