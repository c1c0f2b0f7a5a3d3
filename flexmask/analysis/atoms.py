"""Bool expressions solved for one index: which positions along the axis they keep, as runs, or why that is no interval.

An atom, a comparison of integers, is written `sum >= 0` and solved for the one monomial in which the index occurs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import NotInterval
from ..ir import BOOL, FALSE, FLOAT, INT, TRUE, Expr, K, Q, const, make, search, show, simplify, uses
from .linear import ZERO, Linear, divide, linear
from .pieces import Algebra, Runs
from .prove import integer_comparison, negation

# An expression may be split into cases (min, max, abs, where) this many times, and no union may grow beyond this many runs
_MOST_CASES = 64
_MOST_RUNS = 12


@dataclass(frozen=True)
class Solved:
    """The kept positions as runs, right where each of `tables` ascends along its last axis."""

    runs: Runs
    tables: frozenset[int] = frozenset()


class Solver:
    """Solves bool expressions for the index of one axis. `unsorted` names tables known not to ascend."""

    def __init__(self, algebra: Algebra, unsorted: frozenset[int] = frozenset()):
        self.algebra, self.axis, self.prover = algebra, algebra.axis, algebra.prover
        self.unsorted = unsorted
        self._known: dict[Expr, Solved | NotInterval] = {}
        self._cases = 0

    def solve(self, p: Expr) -> Solved:
        """Raises NotInterval where the kept positions have no interval form."""
        if p not in self._known:
            try:
                self._known[p] = self._solve(p)
            except NotInterval as reason:
                self._known[p] = reason
        found = self._known[p]
        if isinstance(found, NotInterval):
            raise found
        return found

    def _solve(self, p: Expr) -> Solved:
        if p is TRUE:
            return Solved(self.algebra.everything())
        if p is FALSE:
            return Solved(())
        if not uses(p, self.axis.index):
            return Solved(self.algebra.where(p))
        if p.op in _CONNECTIVES:
            return self._connective(p)
        if p.op == "cast" and p.args[0].kind != FLOAT:
            return self.solve(make("ne", (p.args[0], ZERO)))
        if integer_comparison(p):
            return self._comparison(p)
        raise self._scattered(p)

    def _connective(self, p: Expr) -> Solved:
        if p.op in ("and", "or"):
            return self._join(p.op, self.solve(p.args[0]), self.solve(p.args[1]))
        if p.op == "not":
            inner = p.args[0]
            if inner.op == "cast" and inner.args[0].kind != FLOAT:
                return self.solve(make("eq", (inner.args[0], ZERO)))
            if inner.op not in _CONNECTIVES and not integer_comparison(inner):
                raise self._scattered(inner)
            return self.solve(negation(inner))
        if p.op == "xor":
            return self._either(*p.args)
        return self._choice(*p.args)

    def _either(self, x: Expr, y: Expr) -> Solved:
        """Just one of x and y: by their ends where both are single runs and that takes fewer, else by cases."""
        first, second = self.solve(x), self.solve(y)
        cases = self._choice(x, negation(y), y)
        if len(first.runs) == len(second.runs) == 1:
            by_ends = self.algebra.differ(first.runs[0], second.runs[0])
            if len(by_ends) < len(cases.runs):
                return Solved(by_ends, first.tables | second.tables)
        return cases

    def _choice(self, c: Expr, x: Expr, y: Expr) -> Solved:
        yes = self._join("and", self.solve(c), self.solve(x))
        return self._join("or", yes, self._join("and", self.solve(negation(c)), self.solve(y)))

    def _join(self, op: str, x: Solved, y: Solved) -> Solved:
        runs = (self.algebra.intersect if op == "and" else self.algebra.unite)(x.runs, y.runs)
        if len(runs) > _MOST_RUNS:
            raise NotInterval(f"needs {len(runs)} pieces")
        return Solved(runs, x.tables | y.tables)

    # comparisons

    def _comparison(self, p: Expr) -> Solved:
        if {a.kind for a in p.args} == {BOOL}:
            return self.solve(_of_bools(p))
        difference = linear(p.args[1]) - linear(p.args[0])
        try:
            if p.op == "eq":
                return self._join("and", self._at_least_zero(difference), self._at_least_zero(difference.scaled(-1)))
            if p.op == "ne":
                above, below = difference.shifted(-1), difference.scaled(-1).shifted(-1)
                return self._join("or", self._at_least_zero(below), self._at_least_zero(above))
            return self._at_least_zero(difference.shifted(-1 if p.op == "lt" else 0))
        except NotInterval as reason:
            raise NotInterval(reason.reason, reason.culprit or show(p)) from None

    def _at_least_zero(self, x: Linear) -> Solved:
        """The positions where the sum is >= 0."""
        found = [m for m in x.terms if uses(m, self.axis.index)]
        if not found:
            return self.solve(_condition(x))
        for m in found:
            if m.op in _CHOICES:
                return self._by_cases(x, m)
        if len(found) > 1:
            return self._several(x, found)
        m, c = found[0], x.terms[found[0]]
        rest = x.without(m)
        if m is self.axis.index:
            return self._affine(c, rest)
        if m.op == "floordiv" and self.prover.positive(m.args[1]) and not uses(m.args[1], self.axis.index):
            return self._bucket(m, c, rest)
        if m.op == "mul":
            return self._scaled(m, c, rest)
        if m.op == "load":
            return self._table(m, c, rest)
        raise self._scattered(m)

    def _affine(self, c: int, rest: Linear) -> Solved:
        """c * index + rest >= 0."""
        if c > 0:
            return Solved(self.algebra.since(_ceiling(rest.scaled(-1), c).expr()))
        return Solved(self.algebra.until(divide(rest, -c).shifted(1).expr()))

    def _bucket(self, m: Expr, c: int, rest: Linear) -> Solved:
        """c * (x // d) + rest >= 0: a bound on x itself, a multiple of d."""
        x, d = linear(m.args[0]), m.args[1]
        if c > 0:
            return self._at_least_zero(x - linear(_ceiling(rest.scaled(-1), c).expr() * d))
        return self._at_least_zero(linear(divide(rest, -c).shifted(1).expr() * d) - x.shifted(1))

    def _scaled(self, m: Expr, c: int, rest: Linear) -> Solved:
        """c * (index * d) + rest >= 0 with d of known sign."""
        index, d = m.args if m.args[0] is self.axis.index else m.args[::-1]
        if index is not self.axis.index or uses(d, index):
            raise self._scattered(m)
        if self.prover.positive(-d):
            c, d = -c, -d
        if not self.prover.positive(d):
            raise NotInterval(f"the sign of {show(d)} is not known")
        step = const(abs(c)) * d
        if c > 0:
            return Solved(self.algebra.since(linear(rest.expr() // step).scaled(-1).expr()))
        return Solved(self.algebra.until(linear(rest.expr() // step).shifted(1).expr()))

    def _table(self, m: Expr, c: int, rest: Linear) -> Solved:
        """c * T[.., index] + rest >= 0, where T ascends: a prefix or suffix, found by search."""
        *lead, last = m.args
        if last is not self.axis.index or any(uses(i, Q, K) for i in lead) or m.kind != INT:
            raise self._scattered(m)
        if m.value in self.unsorted:
            raise NotInterval(f"{show(m)} does not ascend, so what it keeps is scattered", show(m))
        tables = frozenset((m.value,))
        if c > 0:
            first = search(m.value, "left", *lead, _ceiling(rest.scaled(-1), c).expr())
            return Solved(self.algebra.since(first), tables)
        end = search(m.value, "right", *lead, divide(rest, -c).expr())
        return Solved(self.algebra.until(end), tables)

    def _several(self, x: Linear, found: list[Expr]) -> Solved:
        """The index in several monomials: solvable where a remainder, written out, cancels the others."""
        for m in found:
            if m.op == "mod" and m.args[1].op == "const" and m.args[1].value > 0:
                quotient = linear(m.args[0]) - linear((m.args[0] // m.args[1]) * m.args[1])
                opened = x.without(m).plus(quotient, x.terms[m])
                if sum(uses(n, self.axis.index) for n in opened.terms) < len(found):
                    return self._at_least_zero(opened)
        raise self._scattered(found[0] if len({*found} - {self.axis.index}) > 1 else _other(found, self.axis.index))

    def _by_cases(self, x: Linear, m: Expr) -> Solved:
        """min, max, abs and where around the index, split into what they choose from."""
        self._cases += 1
        if self._cases > _MOST_CASES:
            raise NotInterval("too many cases of min, max, abs and where")
        rest, c = x.without(m), x.terms[m]
        if m.op == "where":
            condition, yes, no = m.args
            chosen = [
                self._join("and", self.solve(p), self._at_least_zero(rest.plus(linear(a), c)))
                for p, a in ((condition, yes), (negation(condition), no))
            ]
            return self._join("or", *chosen)
        parts = (linear(m.args[0]), linear(m.args[0]).scaled(-1)) if m.op == "abs" else tuple(map(linear, m.args))
        both = (c > 0) == (m.op == "min")
        return self._join("and" if both else "or", *(self._at_least_zero(rest.plus(part, c)) for part in parts))

    def _scattered(self, m: Expr) -> NotInterval:
        """Why `m` gives no interval."""
        one = show(m)
        if m.op == "mod":
            return NotInterval(f"{one} is periodic, so what it keeps is scattered", one)
        if m.op == "load":
            places = "each (q_idx, kv_idx) apart" if uses(m, Q) and uses(m, K) else f"each {self.axis.index.value} apart"
            return NotInterval(f"{one} decides {places}", one)
        if m.op in ("lt", "le", "eq", "ne"):
            return NotInterval(f"{one} compares floating-point numbers", one)
        return NotInterval(f"{one} cannot be solved for {self.axis.index.value}", one)


_CONNECTIVES = ("and", "or", "not", "xor", "where")
_CHOICES = ("min", "max", "abs", "where")


def _other(found: list[Expr], index: Expr) -> Expr:
    return next((m for m in found if m is not index), index)


def _of_bools(p: Expr) -> Expr:
    """A comparison of two bools as a connective."""
    x, y = p.args
    if p.op in ("eq", "ne"):
        return make("xor", (negation(x) if p.op == "eq" else x, y))
    return make("and", (negation(x), y)) if p.op == "lt" else make("or", (negation(x), y))


def _condition(x: Linear) -> Expr:
    """`x >= 0` as a comparison without minus signs."""
    low = Linear({m: -c for m, c in x.terms.items() if c < 0}, max(-x.constant, 0))
    high = Linear({m: c for m, c in x.terms.items() if c > 0}, max(x.constant, 0))
    if low.constant == 1 and low.terms:
        return simplify(low.shifted(-1).expr() < high.expr())
    return simplify(low.expr() <= high.expr())


def _ceiling(x: Linear, d: int) -> Linear:
    """ceil(x / d) for d > 0."""
    return divide(x, d) if d == 1 else divide(x.shifted(d - 1), d)
