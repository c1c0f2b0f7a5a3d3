"""Interval rules on expressions: the ends of an integer operation's values from the ends of its arguments' values.

A Span's ends are expressions of a tile. They hold while the conditions in `given` do; rules add conditions instead of failing where
int64 might wrap around or a divisor might not be positive. Expressions never divide by zero, whether or not the conditions hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..ir import Expr, const, make
from .linear import ONE, ZERO, Linear, linear

# values of which nothing is known; beyond LIMIT sums are not trusted, beyond FACTOR products
WILD, LIMIT, FACTOR = 2**63, 2**48, 2**31


@dataclass(frozen=True)
class Truth:
    """Of a bool in a tile: `some` is False only where it is False everywhere, `every` True only where it is True everywhere."""

    some: Expr
    every: Expr

    def negated(self) -> Truth:
        return Truth(make("not", (self.every,)), make("not", (self.some,)))


@dataclass(frozen=True)
class Span:
    """All values lie in [lo, hi] if every condition in `given` holds; integers lie in [least, most] then, too."""

    lo: Expr
    hi: Expr
    least: int = -WILD
    most: int = WILD
    given: tuple[Expr, ...] = ()

    def within(self, least: int, most: int) -> Span:
        """The same span, given that it lies in [least, most]."""
        given = list(self.given)
        if self.least < least:
            given.append(const(least) <= self.lo)
        if self.most > most:
            given.append(self.hi <= const(most))
        return replace(self, least=max(self.least, least), most=min(self.most, most), given=tuple(dict.fromkeys(given)))


def conditions(spans: Iterable[Span]) -> tuple[Expr, ...]:
    return tuple(dict.fromkeys(g for x in spans for g in x.given))


def point(value: Expr, least: int = -WILD, most: int = WILD) -> Span:
    return Span(value, value, least, most)


def total(parts: Sequence[tuple[Span, int]], constant: int) -> Span:
    """The sum of independent parts times their coefficients, plus a constant."""
    lo, hi = Linear({}, constant), Linear({}, constant)
    least = most = constant
    narrow = []
    for span, c in parts:
        part = span.within(-(LIMIT // abs(c)), LIMIT // abs(c))
        narrow.append(part)
        ends, bounds = (part.lo, part.hi), (c * part.least, c * part.most)
        lo, hi = (x.plus(linear(end), c) for x, end in zip((lo, hi), ends if c > 0 else ends[::-1], strict=True))
        least, most = least + min(bounds), most + max(bounds)
    return Span(lo.expr(), hi.expr(), least, most, conditions(narrow))


def choose(condition: Truth, x: Span, y: Span) -> Span:
    """where(condition, x, y)."""

    def end(op: str, a: Expr, b: Expr) -> Expr:
        either = make("where", (condition.some, make(op, (a, b)), b))
        return a if a is b else make("where", (condition.every, a, either))

    return Span(end("min", x.lo, y.lo), end("max", x.hi, y.hi), min(x.least, y.least), max(x.most, y.most), conditions((x, y)))


def _extreme(op: str, pick: Callable[..., int]) -> Callable[[Span, Span], Span]:
    def rule(x: Span, y: Span) -> Span:
        ends = (make(op, (x.lo, y.lo)), make(op, (x.hi, y.hi)))
        return Span(*ends, pick(x.least, y.least), pick(x.most, y.most), conditions((x, y)))

    return rule


def absolute(x: Span) -> Span:
    x = x.within(-LIMIT, LIMIT)
    lo = make("max", (make("max", (x.lo, -x.hi)), ZERO))
    return Span(lo, make("max", (x.hi, -x.lo)), 0, max(abs(x.least), abs(x.most)), x.given)


def _divisor(d: Span) -> tuple[Span, Expr, Expr]:
    """A divisor, given that it is positive, and its ends as numbers that are."""
    d = d.within(1, LIMIT)
    small, large = (end if end.op == "const" and end.value > 0 else make("max", (end, ONE)) for end in (d.lo, d.hi))
    return d, small, large


def _floordiv(x: Span, y: Span) -> Span:
    x = x.within(-LIMIT, LIMIT)
    d, small, large = _divisor(y)
    lo, hi = x.lo // small, x.hi // small
    if small is not large:
        lo, hi = make("min", (lo, x.lo // large)), make("max", (hi, x.hi // large))
    return Span(lo, hi, min(x.least, 0), max(x.most, 0), conditions((x, d)))


def _mod(x: Span, y: Span) -> Span:
    """Exact while the quotient is the same all over the tile."""
    x = x.within(-LIMIT, LIMIT)
    if y.lo is y.hi and y.lo.op == "const" and y.lo.value < 0:
        return total([(_mod(total([(x, -1)], 0), point(const(-y.lo.value), -y.most, -y.least)), -1)], 0)
    d, small, large = _divisor(y)
    if small is not large:
        return Span(ZERO, large - ONE, 0, d.most, conditions((x, d)))
    same = make("eq", (x.lo // small, x.hi // small))
    lo, hi = make("where", (same, x.lo % small, ZERO)), make("where", (same, x.hi % small, small - ONE))
    return Span(lo, hi, 0, d.most, conditions((x, d)))


def _mul(x: Span, y: Span) -> Span:
    x, y = x.within(-FACTOR, FACTOR), y.within(-FACTOR, FACTOR)
    lowest = [x.lo * y.lo] + [x.hi * y.lo] * (y.least < 0) + [x.lo * y.hi] * (x.least < 0)
    highest = [x.hi * y.hi] + [x.lo * y.hi] * (y.least < 0) + [x.hi * y.lo] * (x.least < 0)
    if x.least < 0 and y.least < 0:
        lowest, highest = [*lowest, x.hi * y.hi], [*highest, x.lo * y.lo]
    reach = max(abs(x.least), abs(x.most)) * max(abs(y.least), abs(y.most))
    least = 0 if x.least >= 0 and y.least >= 0 else -reach
    return Span(_fold("min", lowest), _fold("max", highest), least, reach, conditions((x, y)))


def _fold(op: str, values: list[Expr]) -> Expr:
    result = values[0]
    for value in values[1:]:
        result = make(op, (result, value))
    return result


def _bits(op: str) -> Callable[[Span, Span], Span]:
    """Between numbers that agree in their leading bits all numbers do; the other bits may be anything."""

    def rule(x: Span, y: Span) -> Span:
        x, y = x.within(-LIMIT, LIMIT), y.within(-LIMIT, LIMIT)
        if op == "bitand" and y.lo is y.hi and y.lo.op == "const" and y.least >= 0 and (y.least & (y.least + 1)) == 0:
            return _mod(x, point(const(y.least + 1), y.least + 1, y.least + 1))
        spread = make("bitor", (make("bitxor", (x.lo, x.hi)), make("bitxor", (y.lo, y.hi))))
        given = (*conditions((x, y)), const(0) <= spread)  # no operand changes its sign
        for shift in (1, 2, 4, 8, 16, 32):
            spread = make("bitor", (spread, make("rshift", (spread, const(shift)))))
        base = make(op, (x.lo, y.lo))
        lo, hi = make("bitand", (base, make("invert", (spread,)))), make("bitor", (base, spread))
        least = 0 if x.least >= 0 and y.least >= 0 else -2 * LIMIT
        return Span(lo, hi, least, 2 * LIMIT, given)

    return rule


def _sign(x: Span) -> Span:
    return Span(make("sign", (x.lo,)), make("sign", (x.hi,)), -1, 1, x.given)


# integer operations that are not sums; those that are missing have no bounds
INTEGER_RULES: dict[str, Callable[..., Span]] = {
    "min": _extreme("min", min), "max": _extreme("max", max), "abs": absolute, "sign": _sign,
    "floordiv": _floordiv, "mod": _mod, "mul": _mul,
    "bitand": _bits("bitand"), "bitor": _bits("bitor"), "bitxor": _bits("bitxor"),
    "floor": lambda x: x, "ceil": lambda x: x, "trunc": lambda x: x, "round": lambda x: x,
}  # fmt: skip


def compare(op: str, x: Span | None, y: Span | None) -> Truth:
    """x `op` y for integers; where a condition fails, neither is concluded."""
    if x is None or y is None:
        return Truth(const(True), const(False))
    if op in ("eq", "ne"):
        some = (x.lo <= y.hi) & (y.lo <= x.hi)
        equal = Truth(some, (x.hi <= y.lo) & (y.hi <= x.lo))
        return provided(equal if op == "eq" else equal.negated(), conditions((x, y)))
    return provided(Truth(make(op, (x.lo, y.hi)), make(op, (x.hi, y.lo))), conditions((x, y)))


def provided(truth: Truth, given: Sequence[Expr]) -> Truth:
    for condition in given:
        truth = Truth(truth.some | ~condition, truth.every & condition)
    return truth
