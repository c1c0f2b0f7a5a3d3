"""A small prover for integer inequalities: `True` is a proof, `False` is "not proved".

It knows the ranges of indices, lengths and signed scalars, floor division, remainders, min, max, where and `search` (of tables that
ascend), and it may be told facts. It looks a fixed number of steps deep, so that it always answers in well under a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from ..ir import BOOL, FALSE, INT, KV_LEN, Q_LEN, TRUE, Expr, K, Q, make, simplify, walk
from .linear import Linear, linear
from .samples import Samples

# steps of one proof: how deep, how many; and of all proofs about one mask together
_DEPTH = 3
_STEPS = 100
_BUDGET = 400
# monomials that are bounded by their range or by nothing
_OPAQUE = ("index", "scalar", "load", "mul", "cast", "pow")
_LAST = {Q: Q_LEN, K: KV_LEN}
Range = tuple[int | None, int | None]


@lru_cache(maxsize=8192)
def negation(p: Expr) -> Expr:
    """Not `p`, with the `not` pushed to the leaves."""
    if p.op in ("and", "or"):
        return simplify(make("or" if p.op == "and" else "and", (negation(p.args[0]), negation(p.args[1]))))
    if p.op == "xor":
        return simplify(make("xor", (negation(p.args[0]), p.args[1])))
    if p.op == "where":
        return simplify(make("where", (p.args[0], negation(p.args[1]), negation(p.args[2]))))
    if p.op == "eq" and {a.kind for a in p.args} == {BOOL}:
        return make("xor", p.args)
    if p.op in ("lt", "le") and integer_comparison(p):
        return simplify(make("le" if p.op == "lt" else "lt", p.args[::-1]))
    return simplify(make("not", (p,)))


def conjuncts(p: Expr) -> list[Expr]:
    """The parts of a conjunction, left to right."""
    return conjuncts(p.args[0]) + conjuncts(p.args[1]) if p.op == "and" else [] if p is TRUE else [p]


def integer_comparison(p: Expr) -> bool:
    return p.op in ("lt", "le", "eq", "ne") and all(a.kind in (INT, BOOL) for a in p.args)


@lru_cache(maxsize=8192)
def inequalities(p: Expr) -> tuple[Linear, ...]:
    """Linear forms that are all >= 0 where `p` holds (some of its consequences)."""
    if p.op == "and":
        return inequalities(p.args[0]) + inequalities(p.args[1])
    if not integer_comparison(p) or p.op == "ne":
        return ()
    difference = linear(p.args[1]) - linear(p.args[0])
    if p.op == "eq":
        return (difference, difference.scaled(-1))
    return (difference.shifted(-1 if p.op == "lt" else 0),)


@lru_cache(maxsize=8192)
def _below(e: Expr) -> frozenset[Expr]:
    return frozenset(walk(e))


class Prover:
    """Proves inequalities given the signs (-1, 0, 1) of the integer scalars, by number; scalars beyond the tuple have no known sign.

    >>> from flexmask.ir import KV_LEN, K, Q, scalar
    >>> Prover((1,)).le(Q - scalar(0, "int"), Q), Prover().le(Q - scalar(0, "int"), Q), Prover().le(K + 1, KV_LEN)
    (True, False, True)
    """

    def __init__(self, signs: tuple[int, ...] = (), budget: int = _BUDGET, samples: Samples | None = None):
        self.signs, self._samples = signs, samples or Samples(signs)
        self._proved: dict[tuple[Expr, Expr, tuple[Expr, ...]], bool] = {}
        self._ranges: dict[Expr, Range] = {}
        self._found: dict[tuple[frozenset[tuple[Expr, int]], int, tuple[Expr, ...], int], bool] = {}
        self._steps = 0
        self._budget = budget

    def again(self, budget: int = _BUDGET) -> Prover:
        """One that has as many steps to spend, and knows the same points."""
        return Prover(self.signs, budget, self._samples)

    def le(self, x: Expr, y: Expr, facts: tuple[Expr, ...] = ()) -> bool:
        """Whether x <= y is proved where all `facts` hold."""
        key = (x, y, facts)
        if key not in self._proved:
            self._proved[key] = x is y or self.nonnegative(linear(y) - linear(x), facts)
        return self._proved[key]

    def same(self, x: Expr, y: Expr) -> bool:
        return x is y or linear(x) == linear(y)

    def nonnegative(self, x: Linear, facts: Sequence[Expr] = ()) -> bool:
        if self.never_negative(x):
            return True
        if self._samples.refute(x, facts):
            return False
        self._steps = _STEPS
        return self._search(x, tuple(facts), _DEPTH)

    def holds(self, p: Expr, facts: tuple[Expr, ...] = ()) -> bool:
        """Whether the bool expression `p` is proved where all `facts` hold."""
        if p is TRUE or p in facts:
            return True
        if p.op in ("and", "or"):
            parts = (self.holds(a, facts) for a in p.args)
            return all(parts) if p.op == "and" else any(parts)
        if not integer_comparison(p):
            return False
        if p.op == "ne":
            difference = linear(p.args[1]) - linear(p.args[0])
            return self.nonnegative(difference.shifted(-1), facts) or self.nonnegative(difference.scaled(-1).shifted(-1), facts)
        return all(self.nonnegative(x, facts) for x in inequalities(p))

    def exclusive(self, p: Expr, r: Expr) -> bool:
        """Whether p and r are proved never to hold together."""
        if p is FALSE or r is FALSE or negation(p) is r or negation(r) is p:
            return True
        return self.holds(negation(r), (p,)) or self.holds(negation(p), (r,))

    def _search(self, x: Linear, facts: tuple[Expr, ...], depth: int) -> bool:
        if self.never_negative(x):
            return True
        if depth == 0:
            return False
        key = (frozenset(x.terms.items()), x.constant, facts, depth)
        if key not in self._found:
            self._steps -= 1
            self._budget -= 1
            if self._steps < 0 or self._budget < 0:
                return False
            self._found[key] = self._searched(x, facts, depth)
        return self._found[key]

    def _searched(self, x: Linear, facts: tuple[Expr, ...], depth: int) -> bool:
        forms = tuple(f for fact in facts for f in inequalities(fact))
        if self._hopeless(x, forms):
            return False
        if any(all(self._search(y, facts, depth - 1) for y in goals) for goals in self._weaker(x, forms)):
            return True
        return any(self._by_cases(x, m, facts, depth) for m in x.terms if m.op == "where")

    def _by_cases(self, x: Linear, m: Expr, facts: tuple[Expr, ...], depth: int) -> bool:
        """x >= 0 proved for either outcome of the choice `m`."""
        condition, yes, no = m.args
        cases = ((yes, condition), (no, negation(condition)))
        rest, c = x.without(m), x.terms[m]
        return all(self._search(rest.plus(linear(value), c), (*facts, given), depth - 1) for value, given in cases)

    def _hopeless(self, x: Linear, facts: tuple[Linear, ...]) -> bool:
        """Whether some monomial is unbounded on the side that matters and nothing else in sight could make up for it."""
        for m, c in x.terms.items():
            if m.op not in _OPAQUE or (m in _LAST and c < 0) or self.range_of(m)[0 if c > 0 else 1] is not None:
                continue
            others = [n for n in x.terms if n is not m] + [n for fact in facts for n in fact.terms]
            if not any(m in _below(n) for n in others):
                return True
        return not x.terms

    def _lowest(self, x: Linear) -> int | None:
        """A lower bound of `x` from the ranges of its monomials alone."""
        total = x.constant
        for m, c in x.terms.items():
            low, high = self.range_of(m)
            bound = low if c > 0 else high
            if bound is None:
                return None
            total += c * bound
        return total

    def never_negative(self, x: Linear) -> bool:
        """Whether x >= 0 follows from the ranges of its monomials alone."""
        lowest = self._lowest(x)
        return lowest is not None and lowest >= 0

    def range_of(self, m: Expr) -> Range:
        """Bounds (lowest, highest) of a monomial that hold whatever the lengths and captures are."""
        if m not in self._ranges:
            self._ranges[m] = self._range(m)
        return self._ranges[m]

    def _range(self, m: Expr) -> Range:
        if m.op == "const":
            return m.value, m.value
        if m.op == "index":
            return (1 if m in (Q_LEN, KV_LEN) else 0), None
        if m.op == "scalar":
            sign = self.signs[m.value] if m.value < len(self.signs) and m.kind == INT else None
            return {None: (None, None), 1: (1, None), 0: (0, 0), -1: (None, -1)}[sign]
        if m.op in ("search", "abs"):
            return 0, None
        if m.op == "sign":
            return -1, 1
        if m.op == "mod" and self.positive(m.args[1]):
            return 0, m.args[1].value - 1 if m.args[1].op == "const" else None
        if m.op in ("min", "max", "where"):
            return self._chosen_range(m)
        if m.op == "floordiv" and m.args[1].op == "const" and m.args[1].value > 0:
            low, high = self._range_of_sum(m.args[0])
            return (None if low is None else low // m.args[1].value, None if high is None else high // m.args[1].value)
        if m.op == "mul":
            lows = [self._lowest(linear(a)) for a in m.args]
            return (lows[0] * lows[1] if all(low is not None and low >= 0 for low in lows) else None), None  # type: ignore[operator]
        return None, None

    def _range_of_sum(self, e: Expr) -> Range:
        x = linear(e)
        low, high = self._lowest(x), self._lowest(x.scaled(-1))
        return low, None if high is None else -high

    def _chosen_range(self, m: Expr) -> Range:
        """Of min, max and where: a bound of either argument may do, or takes both."""
        lows, highs = zip(*map(self._range_of_sum, m.args[-2:]), strict=True)
        known_lows, known_highs = [x for x in lows if x is not None], [x for x in highs if x is not None]
        low = max(known_lows, default=None) if m.op == "max" else None if None in lows else min(known_lows)
        high = min(known_highs, default=None) if m.op == "min" else None if None in highs else max(known_highs)
        return low, high

    def positive(self, x: Expr) -> bool:
        lowest = self._lowest(linear(x))
        return lowest is not None and lowest > 0

    def _weaker(self, x: Linear, facts: tuple[Linear, ...]) -> Iterator[list[Linear]]:
        """Goals that each imply `x >= 0`, easier to see; a list's goals are all needed."""
        yield from self._pairs(x)
        for m, c in x.terms.items():
            yield from self._opened(x, m, c)
        for fact in facts:
            if any(c * x.terms.get(m, 0) > 0 for m, c in fact.terms.items()):
                yield [x - fact]

    def _opened(self, x: Linear, m: Expr, c: int) -> Iterator[list[Linear]]:
        """One monomial replaced by something it is bounded by."""
        rest = x.without(m)
        if m in _LAST and c < 0:
            yield [rest.plus(linear(_LAST[m]).shifted(-1), c)]
        elif m.op == "floordiv" and m.args[1].op == "const":
            inner, d = linear(m.args[0]), m.args[1].value
            yield [rest.scaled(d).plus(inner.shifted(1 - d) if c > 0 else inner, c)]
        elif m.op == "mod" and c < 0 and self.positive(m.args[1]):
            yield [rest.plus(linear(m.args[1]).shifted(-1), c)]
        elif m.op in ("min", "max"):
            parts = [rest.plus(linear(a), c) for a in m.args]
            # c * min(a, b) is one of two values: c > 0 needs both, c < 0 either
            yield from [parts] if (c > 0) == (m.op == "min") else [[parts[0]], [parts[1]]]
        elif m.op == "abs":
            parts = [rest.plus(linear(m.args[0]), c), rest.plus(linear(m.args[0]), -c)]
            yield from [parts] if c < 0 else [[parts[0]], [parts[1]]]
        elif m.op == "search":
            yield from ([rest.plus(bound, c)] for bound in _own_place(m, above=c < 0))

    def _pairs(self, x: Linear) -> Iterator[list[Linear]]:
        """`x // d - y // d` and differences of table look-ups: monotone, so x >= y is enough."""
        rising = [(m, c) for m, c in x.terms.items() if c > 0 and m.op in ("floordiv", "search")]
        for m, c in rising:
            for n, d in x.terms.items():
                if c + d == 0 and n.op == m.op:
                    rest = x.without(m).without(n)
                    gap = self._monotone_gap(m, n)
                    if gap is not None:
                        yield [rest, gap]

    def _monotone_gap(self, m: Expr, n: Expr) -> Linear | None:
        """What has to be >= 0 for m >= n."""
        gap = linear(m.args[-1]) - linear(n.args[-1])
        if m.op == "floordiv":
            return linear(m.args[0]) - linear(n.args[0]) if m.args[1] is n.args[1] and self.positive(m.args[1]) else None
        if m.value[0] != n.value[0] or m.args[:-1] != n.args[:-1]:
            return None
        return gap.shifted(-1) if (m.value[1], n.value[1]) == ("left", "right") else gap


def _own_place(m: Expr, above: bool) -> list[Linear]:
    """A bound from above (below) of a search for a table's own entry at x: ascending, it has x entries before that one at most."""
    target = linear(m.args[-1])
    for load in target.terms:
        if load.op == "load" and load.value == m.value[0] and load.args[:-1] == m.args[:-1] and load.args[-1] in (Q, K):
            if target.terms != {load: 1}:
                return []
            counts_it = target.constant >= (0 if m.value[1] == "right" else 1)
            place = linear(load.args[-1])
            return [place] if above and not counts_it else [place.shifted(1)] if counts_it and not above else []
    return []


def where(condition: Expr, x: Expr, y: Expr) -> Expr:
    return x if x is y else simplify(make("where", (condition, x, y)))
