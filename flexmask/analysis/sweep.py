"""Solved conditions as pieces, by their breakpoints: for any combination of any atoms, and without a proof.

In and/or over `bound <= index` (a rise) and `index < bound` (a fall), a kept run can only begin at the first position or at a rise,
and only end at a fall. Whether the condition holds at such a position is a condition free of the index.
"""

from __future__ import annotations

from functools import reduce

from ..ir import FALSE, TRUE, Expr, make, walk
from .facts import MOST_PIECES, Piece
from .linear import ZERO, leaves, linear
from .pieces import Axis
from .prove import Prover
from .solved import both, either, is_since, is_until, normal

# so many rises and falls together may be chained
_MOST_BREAKPOINTS = 40


class Sweep:
    """The breakpoints of the solved condition `p`, and the pieces between them."""

    def __init__(self, p: Expr, axis: Axis, prover: Prover):
        self.index, self.end, self.prover = axis.index, axis.length, prover
        self.whole = normal(p, self.index)
        nodes = list(walk(self.whole))
        rises = dict.fromkeys(n.args[0] for n in nodes if is_since(n, self.index))
        falls = dict.fromkeys(n.args[1] for n in nodes if is_until(n, self.index))
        self._compared: dict[tuple[Expr, Expr], Expr] = {}
        self._held: dict[Expr, Expr] = {}
        self.count = len(rises) + len(falls)
        self.rises: list[Expr] = []
        self.falls: list[Expr] = []
        if self.count <= _MOST_BREAKPOINTS:
            self.rises = [r for r in (ZERO, *rises) if self._may_begin(r)]
            self.falls = [f for f in falls if self.holds(f) is not TRUE]

    def pieces(self, most: int) -> tuple[Piece, ...] | None:
        """A piece for each rise, at most so many: exact, whatever the bounds are."""
        if self.count > _MOST_BREAKPOINTS or len(self.rises) > most:
            return None
        found = [Piece(r, _where(self.holds(r), self._next_fall(r), ZERO)) for r in self.rises]
        return tuple(found) or (Piece(ZERO, ZERO),)

    def first_pieces(self) -> tuple[Piece, ...] | None:
        """The first runs of each row one after the other, one more than may be kept: exact for rows that keep no more than that."""
        if self.count > _MOST_BREAKPOINTS:
            return None
        start = self._first_rise([(self._le(ZERO, r), r) for r in self.rises])
        found: list[Piece] = []
        for _ in range(MOST_PIECES + 1):
            # what these bounds are compared with is left as it is: they are long, and nothing is known of them
            stop = self._first_fall([(make("lt", (start, f)), f) for f in self.falls])
            found.append(Piece(start, stop))
            start = self._first_rise([(make("lt", (stop, r)), r) for r in self.rises])
        return tuple(found)

    def hull(self) -> Piece | None:
        """From the first position that is kept to the last."""
        if self.count > _MOST_BREAKPOINTS:
            return None
        ends = [_where(both((self._le(f, self.end), self.holds(f, -1))), f, ZERO) for f in self.falls]
        last = _where(self.holds(self.end, -1), self.end, ZERO)
        first = self._first_rise([(self._le(ZERO, r), r) for r in self.rises])
        return Piece(first, reduce(_larger, [last, *ends]))

    def holds(self, position: Expr, by: int = 0) -> Expr:
        """Whether the condition holds at position + by."""
        at = linear(position).shifted(by).expr() if by else position
        if at not in self._held:
            self._held[at] = self._at(self.whole, at, {})
        return self._held[at]

    def _at(self, p: Expr, at: Expr, known: dict[Expr, Expr]) -> Expr:
        if self.index not in leaves(p):
            return p
        if p not in known:
            if is_since(p, self.index):
                known[p] = self._le(p.args[0], at)
            elif is_until(p, self.index):
                known[p] = self._lt(at, p.args[1])
            else:
                join = both if p.op == "and" else either
                known[p] = join(self._at(a, at, known) for a in p.args)
        return known[p]

    def _le(self, x: Expr, y: Expr) -> Expr:
        """x <= y as TRUE, FALSE or a comparison, as far as their ranges tell."""
        if (x, y) not in self._compared:
            gap = linear(y) - linear(x)
            if self.prover.never_negative(gap):
                self._compared[x, y] = TRUE
            elif self.prover.never_negative(gap.scaled(-1).shifted(-1)):
                self._compared[x, y] = FALSE
            else:
                self._compared[x, y] = make("le", (x, y))
        return self._compared[x, y]

    def _lt(self, x: Expr, y: Expr) -> Expr:
        return _not(self._le(y, x))

    def _may_begin(self, rise: Expr) -> bool:
        """Whether a run may begin there that does not begin before it as well."""
        if self.holds(rise) is FALSE:
            return False
        return rise is ZERO or not (self._le(rise, ZERO) is TRUE or self._le(self.end, rise) is TRUE or self.holds(rise, -1) is TRUE)

    def _next_fall(self, position: Expr) -> Expr:
        """Where the run that is at the rise `position` ends."""
        return self._first_fall([(self._lt(position, f), f) for f in self.falls])

    def _first_fall(self, later: list[tuple[Expr, Expr]]) -> Expr:
        ends = [_where(both((p, _not(self.holds(f)))), f, self.end) for p, f in later]
        return reduce(_smaller, (e for e in ends if e is not self.end), self.end)

    def _first_rise(self, later: list[tuple[Expr, Expr]]) -> Expr:
        starts = [_where(both((p, self.holds(r))), r, self.end) for p, r in later]
        return reduce(_smaller, (s for s in starts if s is not self.end), self.end)


def _where(p: Expr, x: Expr, y: Expr) -> Expr:
    return x if p is TRUE else y if p is FALSE else make("where", (p, x, y))


def _not(p: Expr) -> Expr:
    return TRUE if p is FALSE else FALSE if p is TRUE else _turned(p)


def _turned(p: Expr) -> Expr:
    if p.op == "le" and p.args[0].kind == p.args[1].kind == "int":
        return make("lt", p.args[::-1])
    return make("not", (p,))


def _smaller(x: Expr, y: Expr) -> Expr:
    return x if x is y else make("min", (x, y))


def _larger(x: Expr, y: Expr) -> Expr:
    return x if x is y else y if x is ZERO else make("max", (x, y))
