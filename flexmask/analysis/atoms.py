"""Bool expressions solved for one index: rewritten so that the index occurs only as `bound <= index` and `index < bound`.

A comparison of integers is written `sum >= 0` and solved for the monomials in which the index occurs. What cannot be solved is
refused, or replaced by something it implies (MAY) or that implies it (MUST).
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import NotInterval
from ..ir import BOOL, FALSE, FLOAT, INT, TRUE, Expr, K, Q, const, make, search, show, substitute
from .linear import ZERO, Linear, divide, leaves, linear
from .pieces import Axis
from .prove import Prover, conjuncts, integer_comparison, negation
from .solved import both, ceiling, condition, either
from .steps import nested_choice, stepped, written_out

EXACT, MAY, MUST = "exact", "may", "must"
# an expression may be split into cases (min, max, abs, where) this many times
_MOST_CASES = 64
_CONNECTIVES = ("and", "or", "not", "xor", "where")
_CHOICES = ("min", "max", "abs", "where")
_Key = tuple[frozenset[tuple[Expr, int]], int, str]


class Solver:
    """Solves bool expressions for the index of one axis.

    The results are right where the tables ascend that their `search` nodes read. `unsorted` names tables that must not be searched.
    """

    def __init__(self, axis: Axis, prover: Prover, unsorted: frozenset[int] | None = frozenset()):
        self.axis, self.index, self.prover, self.unsorted = axis, axis.index, prover, unsorted
        self._known: dict[tuple[Expr, str], Expr | NotInterval] = {}
        self._sums: dict[_Key, Expr | NotInterval] = {}
        self._cases = 0

    def uses(self, e: Expr) -> bool:
        return self.index in leaves(e)

    def solved(self, p: Expr, mode: str = EXACT) -> Expr:
        """`p` (EXACT), something that it implies (MAY), or something that implies it (MUST). EXACT raises NotInterval."""
        key = (p, mode)
        if key not in self._known:
            try:
                self._known[key] = self._solved(p, mode)
            except NotInterval as reason:
                self._known[key] = _instead(reason, mode)
        found = self._known[key]
        if isinstance(found, NotInterval):
            raise found
        return found

    def _solved(self, p: Expr, mode: str) -> Expr:
        if not self.uses(p):
            return p
        if p.op == "and":
            return both(found for found, _ in self.parts(p, mode))
        if p.op == "or":
            return either(self.solved(a, mode) for a in p.args)
        if p.op == "not":
            return self._negated(p.args[0], mode)
        if p.op in ("xor", "where"):
            return self._connective(p, mode)
        if p.op == "cast" and p.args[0].kind != FLOAT:
            return self.solved(make("ne", (p.args[0], ZERO)), mode)
        if integer_comparison(p):
            return self._comparison(p, mode)
        raise self._scattered(p)

    def _negated(self, p: Expr, mode: str) -> Expr:
        if p.op == "cast" and p.args[0].kind != FLOAT:
            return self.solved(make("eq", (p.args[0], ZERO)), mode)
        if p.op not in _CONNECTIVES and not integer_comparison(p):
            raise self._scattered(p)
        return self.solved(negation(p), mode)

    def _connective(self, p: Expr, mode: str) -> Expr:
        """xor and where as they stand, or as a union of cases where something in them has to be replaced."""
        if mode == EXACT:
            return make(p.op, tuple(self.solved(a) for a in p.args))
        c, x, y = p.args if p.op == "where" else (p.args[0], negation(p.args[1]), p.args[1])
        return either(both(self.solved(a, mode) for a in case) for case in ((c, x), (negation(c), y)))

    # conjunctions

    def parts(self, p: Expr, mode: str) -> list[tuple[Expr, Expr]]:
        """The conjuncts of `p` solved, and as written. One that has no form is tried again with what the others say is equal."""
        written = conjuncts(p)
        return [(self.part(part, written, mode), part) for part in written]

    def part(self, part: Expr, written: list[Expr], mode: str) -> Expr:
        try:
            return self.solved(part)
        except NotInterval as reason:
            equal = {m: e for other in written if other is not part for m, e in self._equality(other)}
            replaced = substitute(part, equal) if equal else part
            if replaced is not part:
                try:
                    return self.solved(replaced, mode)
                except NotInterval:
                    pass
            if mode == EXACT:
                raise reason
            return self.solved(part, mode)

    def _equality(self, p: Expr) -> list[tuple[Expr, Expr]]:
        """What `p` says the index, or a look-up at the index, is equal to: an expression free of the index."""
        if p.op != "eq" or not integer_comparison(p):
            return []
        difference = linear(p.args[1]) - linear(p.args[0])
        found = [m for m in difference.terms if self.uses(m)]
        if len(found) != 1 or abs(difference.terms[found[0]]) != 1 or (found[0].op != "load" and found[0] is not self.index):
            return []
        value = difference.without(found[0]).scaled(-difference.terms[found[0]]).expr()
        return [(found[0], self.within(value) if found[0] is self.index else value)]

    def within(self, position: Expr) -> Expr:
        """`position` moved into [0, length), so that tables may be read there."""
        last = self.axis.length - 1
        return make("max", (make("min", (position, last)), ZERO))

    # comparisons

    def _comparison(self, p: Expr, mode: str) -> Expr:
        if {a.kind for a in p.args} == {BOOL}:
            return self.solved(_of_bools(p), mode)
        difference = linear(p.args[1]) - linear(p.args[0])
        try:
            if p.op == "eq":
                return both(self._sum(x, mode) for x in (difference, difference.scaled(-1)))
            if p.op == "ne":
                return either(self._sum(x.shifted(-1), mode) for x in (difference.scaled(-1), difference))
            return self._sum(difference.shifted(-1 if p.op == "lt" else 0), mode)
        except NotInterval as reason:
            raise NotInterval(reason.reason, reason.culprit or show(p)) from None

    def _sum(self, x: Linear, mode: str = EXACT) -> Expr:
        """Where the sum is >= 0."""
        key = (frozenset(x.terms.items()), x.constant, mode)
        if key not in self._sums:
            try:
                self._sums[key] = self._at_least_zero(x) if mode == EXACT else self._loosely(x, mode)
            except NotInterval as reason:
                self._sums[key] = _instead(reason, mode)
        found = self._sums[key]
        if isinstance(found, NotInterval):
            raise found
        return found

    def _at_least_zero(self, x: Linear) -> Expr:
        found = [m for m in x.terms if self.uses(m)]
        if not found:
            return condition(x)
        if self.prover.never_negative(x):
            return TRUE
        if self.prover.never_negative(x.scaled(-1).shifted(-1)):
            return FALSE
        for m in found:
            if m.op in _CHOICES:
                return self._chosen(x, m)
        if len(found) == 1:
            return self._single(x, found[0])
        return self._several(x, found)

    def _loosely(self, x: Linear, mode: str) -> Expr:
        """Something that x >= 0 implies (MAY) or that implies it (MUST)."""
        try:
            return self._sum(x)
        except NotInterval:
            pass
        for m in x.terms:
            if m.op in _CHOICES and self.uses(m):
                return self._by_cases(x, m, mode)
        try:
            return self._sum(self._relaxed(x, mode, lambda low, high: low is not None and high is not None))
        except NotInterval:
            return self._sum(self._relaxed(x, mode, lambda low, high: True))

    def _relaxed(self, x: Linear, mode: str, wanted: Callable[[int | None, int | None], bool]) -> Linear:
        """`x` with the monomials around the index whose range is as wanted at their largest (MAY) or smallest (MUST)."""
        for m, c in x.terms.items():
            if m is not self.index and self.uses(m):
                low, high = self.prover.range_of(m)
                limit = high if (c > 0) == (mode == MAY) else low
                if limit is not None and wanted(low, high):
                    x = x.without(m).shifted(c * limit)
        return x

    def _single(self, x: Linear, m: Expr) -> Expr:
        """The index in one monomial."""
        c, rest = x.terms[m], x.without(m)
        if m is self.index:
            return self._affine(c, rest)
        if m.op == "floordiv" and self.prover.positive(m.args[1]) and not self.uses(m.args[1]):
            return self._bucket(m, c, rest)
        if m.op == "mul":
            return self._scaled(m, c, rest)
        if m.op == "load":
            return self._table(m, c, rest)
        return self._otherwise(x, self._scattered(m))

    def _affine(self, c: int, rest: Linear) -> Expr:
        """c * index + rest >= 0."""
        if c > 0:
            return self._since(ceiling(rest.scaled(-1), c))
        return self._until(divide(rest, -c).shifted(1))

    def _since(self, bound: Linear) -> Expr:
        return make("le", (bound.expr(), self.index))

    def _until(self, bound: Linear) -> Expr:
        return make("lt", (self.index, bound.expr()))

    def _bucket(self, m: Expr, c: int, rest: Linear) -> Expr:
        """c * (x // d) + rest >= 0: a bound on x itself, a multiple of d."""
        x, d = linear(m.args[0]), m.args[1]
        if c > 0:
            return self._sum(x - linear(ceiling(rest.scaled(-1), c).expr() * d))
        return self._sum(linear(divide(rest, -c).shifted(1).expr() * d) - x.shifted(1))

    def _scaled(self, m: Expr, c: int, rest: Linear) -> Expr:
        """c * (index * d) + rest >= 0 with d of known sign."""
        index, d = m.args if m.args[0] is self.index else m.args[::-1]
        if index is not self.index or self.uses(d):
            raise self._scattered(m)
        if self.prover.positive(-d):
            c, d = -c, -d
        if not self.prover.positive(d):
            raise NotInterval(f"the sign of {show(d)} is not known")
        step = const(abs(c)) * d
        if c > 0:
            return self._since(linear(rest.expr() // step).scaled(-1))
        return self._until(linear(rest.expr() // step).shifted(1))

    def _table(self, m: Expr, c: int, rest: Linear) -> Expr:
        """c * T[.., place] + rest >= 0, where T ascends: a bound on the place, found by search."""
        *lead, place = m.args
        if m.kind != INT or any(leaves(i) & {Q, K} for i in lead) or not self.prover.le(ZERO, place):
            raise self._scattered(m)
        if self.unsorted is None or m.value in self.unsorted:
            raise NotInterval(f"{show(m)} does not ascend, so what it keeps is scattered", show(m))
        if c > 0:
            return self._sum(linear(place) - linear(search(m.value, "left", *lead, ceiling(rest.scaled(-1), c).expr())))
        return self._sum(linear(search(m.value, "right", *lead, divide(rest, -c).expr())) - linear(place).shifted(1))

    def _several(self, x: Linear, found: list[Expr]) -> Expr:
        """The index in several monomials: remainders, written out, may cancel the others."""
        opened = written_out(x, self.uses)
        left = [m for m in opened.terms if self.uses(m)]
        if len(left) < len(found):
            return self._sum(opened)
        culprit = found[0] if len({*found} - {self.index}) > 1 else next((m for m in found if m is not self.index), self.index)
        return self._otherwise(x, self._scattered(culprit))

    def _otherwise(self, x: Linear, reason: NotInterval) -> Expr:
        """By cases of a choice deep inside, or as a line with steps in it."""
        for m in x.terms:
            inner = nested_choice(m, self.uses)
            if inner is not None:
                return self._split(x, inner)
        return self._stepped(x, reason)

    def _stepped(self, x: Linear, reason: NotInterval) -> Expr:
        found = stepped(x, self.axis, self.prover, self.within)
        if found is None:
            raise reason
        return found

    # cases

    def _chosen(self, x: Linear, m: Expr) -> Expr:
        try:
            return self._by_cases(x, m, EXACT)
        except NotInterval as reason:
            return self._stepped(x, reason)

    def _count_case(self) -> None:
        self._cases += 1
        if self._cases > _MOST_CASES:
            raise NotInterval("too many cases of min, max, abs and where")

    def _by_cases(self, x: Linear, m: Expr, mode: str) -> Expr:
        """min, max, abs and where around the index, split into what they choose from."""
        self._count_case()
        rest, c = x.without(m), x.terms[m]
        if m.op == "where":
            cases = ((m.args[0], m.args[1]), (negation(m.args[0]), m.args[2]))
            return either(both((self.solved(p, mode), self._sum(rest.plus(linear(a), c), mode))) for p, a in cases)
        parts = (linear(m.args[0]), linear(m.args[0]).scaled(-1)) if m.op == "abs" else tuple(map(linear, m.args))
        join = both if (c > 0) == (m.op == "min") else either
        return join(self._sum(rest.plus(part, c), mode) for part in parts)

    def _split(self, x: Linear, m: Expr) -> Expr:
        """The choice `m`, somewhere inside, replaced by each value it may have."""
        self._count_case()
        if m.op == "where":
            p, yes, no = m.args
        elif m.op == "abs":
            p, yes, no = make("le", (ZERO, m.args[0])), m.args[0], -m.args[0]
        else:
            p, yes, no = make("le", m.args), *(m.args if m.op == "min" else m.args[::-1])
        whole = x.expr()
        cases = ((p, yes), (negation(p), no))
        return either(both((self.solved(q), self._sum(linear(substitute(whole, {m: value}))))) for q, value in cases)

    def _scattered(self, m: Expr) -> NotInterval:
        """Why `m` gives no interval."""
        one = show(m)
        if m.op == "mod":
            return NotInterval(f"{one} is periodic, so what it keeps is scattered", one)
        if m.op == "load":
            places = "each (q_idx, kv_idx) apart" if {Q, K} <= leaves(m) else f"each {self.index.value} apart"
            return NotInterval(f"{one} decides {places}", one)
        if m.op in ("lt", "le", "eq", "ne"):
            return NotInterval(f"{one} compares floating-point numbers", one)
        return NotInterval(f"{one} cannot be solved for {self.index.value}", one)


def _instead(reason: NotInterval, mode: str) -> Expr | NotInterval:
    return reason if mode == EXACT else TRUE if mode == MAY else FALSE


def _of_bools(p: Expr) -> Expr:
    """A comparison of two bools as a connective."""
    x, y = p.args
    if p.op in ("eq", "ne"):
        return make("xor", (negation(x) if p.op == "eq" else x, y))
    return make("and", (negation(x), y)) if p.op == "lt" else make("or", (negation(x), y))
