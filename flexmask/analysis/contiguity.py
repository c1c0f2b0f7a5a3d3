"""Proofs that neighbouring rows keep touching intervals, so that every run of consecutive rows keeps one interval.

Written for rows; a column form is the same with the roles of q_idx and kv_idx exchanged. Rows that keep nothing are no obstacle,
but the rows on either side of them must touch.
"""

from __future__ import annotations

from ..ir import Expr, make, simplify, substitute, uses
from .facts import Form
from .linear import ZERO, Linear, linear
from .pieces import Axis
from .prove import Prover, inequalities


def contiguous(form: Form, predicate: Expr, axis: Axis, prover: Prover) -> bool:
    """Whether the union of what any run of consecutive rows keeps is proved to be one interval."""
    if form.residue is not None or len(form.pieces) != 1:
        return False
    start, stop = form.pieces[0].start, form.pieces[0].stop
    end = stop.args[1] if stop.op == "where" and stop.args[2] is ZERO else stop
    if not uses(start, axis.other) or not uses(end, axis.other):
        return True  # rows that keep anything share their first (last) column
    trend = _Trend(axis.other, form.sorted_tables, prover)
    return _diagonal(predicate, start, stop, axis, trend, prover) or _sliding(start, stop, axis, trend, prover)


def _diagonal(predicate: Expr, start: Expr, stop: Expr, axis: Axis, trend: _Trend, prover: Prover) -> bool:
    """Row i keeps column i, so neighbours touch. Rows beyond the last column must reach it, or keep nothing."""
    row = axis.other
    if not prover.holds(simplify(substitute(predicate, {axis.index: row}))):
        return False
    return trend.rises(stop) or prover.le(row, stop) or prover.le(row, start)


def _sliding(start: Expr, stop: Expr, axis: Axis, trend: _Trend, prover: Prover) -> bool:
    """Both bounds move one way, and each row begins no later than its neighbour ends.

    Where stop - start is the same for all rows it may be taken as positive: otherwise all rows are empty.
    """
    following = {axis.other: axis.other + 1}
    next_start, next_stop = substitute(start, following), substitute(stop, following)
    width = linear(stop) - linear(start)
    constant_width = not any(uses(m, axis.other) for m in width.terms)
    facts = (make("lt", (start, stop)),) if constant_width else ()
    if trend.rises(start) and trend.rises(stop):
        return prover.le(next_start, stop, facts)
    return trend.falls(start) and trend.falls(stop) and prover.le(start, next_stop, facts)


class _Trend:
    """Whether an expression is proved never to fall (rise) as `index` grows, given that the sorted tables ascend."""

    def __init__(self, index: Expr, sorted_tables: tuple[int, ...], prover: Prover):
        self.index, self.sorted_tables, self.prover = index, sorted_tables, prover

    def rises(self, e: Expr) -> bool:
        return self._goes(linear(e), 1)

    def falls(self, e: Expr) -> bool:
        return self._goes(linear(e), -1)

    def _goes(self, x: Linear, way: int) -> bool:
        """All terms go that way (1 up, -1 down); terms free of the index go both."""
        return all(not uses(m, self.index) or self._monomial(m, way if c > 0 else -way) for m, c in x.terms.items())

    def _monomial(self, m: Expr, way: int) -> bool:
        if m is self.index:
            return way == 1
        if m.op in ("min", "max"):
            return all(self._goes(linear(a), way) for a in m.args)
        if m.op == "floordiv":
            return self.prover.positive(m.args[1]) and not uses(m.args[1], self.index) and self._goes(linear(m.args[0]), way)
        if m.op == "where":
            return self._choice(m, way)
        lead_is_fixed = not any(uses(a, self.index) for a in m.args[:-1])
        if m.op == "search":
            return lead_is_fixed and m.value[0] in self.sorted_tables and self._goes(linear(m.args[-1]), way)
        if m.op == "load":
            return way == 1 and lead_is_fixed and m.value in self.sorted_tables and m.args[-1] is self.index
        return False

    def _choice(self, m: Expr, way: int) -> bool:
        """A choice that goes over once from the smaller to the larger side, which both go that way."""
        condition, yes, no = m.args
        if not (self._goes(linear(yes), way) and self._goes(linear(no), way)):
            return False
        if not uses(condition, self.index):
            return True
        forms = inequalities(condition)
        if condition.op not in ("lt", "le") or len(forms) != 1:
            return False
        # the condition turns true (it rises) or false (it falls) as the index grows
        low, high = (no, yes) if way == 1 else (yes, no)
        return (self._goes(forms[0], 1) and self.prover.le(low, high)) or (self._goes(forms[0], -1) and self.prover.le(high, low))
