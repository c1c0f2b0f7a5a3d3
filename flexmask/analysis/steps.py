"""Sums that are a straight line in the index up to bounded noise, such as `kv_idx - 2 * (kv_idx // 5)` or `kv_idx + T[kv_idx] % 3`.

Outside a zone of a few positions, whose place is known, the line decides; within it the sum is tried position by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from ..ir import FALSE, TRUE, Expr, make, substitute, walk
from .linear import ONE, ZERO, Linear, leaves, linear
from .pieces import Axis
from .prove import Prover, where
from .solved import both, ceiling, condition, either, flipped

# how many positions may be tried: where the sum is monotone, which makes one bound, and where it is not, which makes a piece of each
_MOST_COUNTED = 8
_MOST_TRIED = 6
_CHOICES = ("min", "max", "abs", "where")
_ARITHMETIC = ("floordiv", "mod", "mul", "add", "sub", "neg", *_CHOICES)
Uses = Callable[[Expr], bool]


@dataclass(frozen=True)
class _Line:
    """rate * index + base + noise, the noise within [low, high]; one step of the index changes the sum by something in [fall, rise]."""

    rate: Fraction = Fraction(0)
    base: dict[Expr, Fraction] = field(default_factory=dict)
    shift: Fraction = Fraction(0)
    low: Fraction = Fraction(0)
    high: Fraction = Fraction(0)
    fall: int = 0
    rise: int = 0

    def plus(self, other: _Line, c: int) -> _Line:
        base = dict(self.base)
        for m, by in other.base.items():
            base[m] = base.get(m, Fraction(0)) + c * by
        noise = sorted((c * other.low, c * other.high))
        steps = sorted((c * other.fall, c * other.rise))
        return _Line(
            self.rate + c * other.rate, base, self.shift + c * other.shift,
            self.low + noise[0], self.high + noise[1], self.fall + steps[0], self.rise + steps[1],
        )  # fmt: skip

    def divided(self, d: int) -> _Line:
        """Rounded down."""
        base = {m: by / d for m, by in self.base.items()}
        low = self.low / d - Fraction(d - 1, d)
        return _Line(self.rate / d, base, self.shift / d, low, self.high / d, self.fall // d, -(-self.rise // d))


def written_out(x: Linear, uses: Uses) -> Linear:
    """`x` with remainders by constants as differences, y % d == y - d * (y // d), in which terms may cancel."""
    for m, c in x.terms.items():
        if m.op == "mod" and m.args[1].op == "const" and m.args[1].value > 0 and uses(m):
            quotient = linear(m.args[0]) - linear((m.args[0] // m.args[1]) * m.args[1])
            x = x.without(m).plus(quotient, c)
    return x


def nested_choice(m: Expr, uses: Uses) -> Expr | None:
    """A min, max, abs or where that uses the index, inside the arithmetic of `m`."""
    left, seen = [m], set[Expr]()
    while left:  # each part once, however often it is shared
        e = left.pop()
        if e.op not in _ARITHMETIC or e in seen or not uses(e):
            continue
        seen.add(e)
        for a in e.args:
            if a.op in _CHOICES and a.kind == "int" and uses(a):
                return a
        left.extend(reversed(e.args))
    return None


def stepped(x: Linear, axis: Axis, prover: Prover, within: Callable[[Expr], Expr]) -> Expr | None:
    """Where the sum is >= 0, or None where it is no line, or its zone is too wide."""
    line = _best_line(x, axis.index, prover)
    if line is None:
        return None
    if line.rate < 0:
        found = stepped(x.scaled(-1).shifted(-1), axis, prover, within)
        return None if found is None else flipped(found, axis.index)
    if line.rate == 0:
        return _level(line, prover)
    scale = math.lcm(*(f.denominator for f in (line.rate, line.shift, line.low, line.high, *line.base.values())))
    slope = int(line.rate * scale)
    base = Linear({m: int(by * scale) for m, by in line.base.items() if by}, int(line.shift * scale))
    first = ceiling(base.shifted(int(line.high * scale)).scaled(-1), slope).expr()
    zone = -(-int((line.high - line.low) * scale) // slope)
    monotone = line.fall >= 0
    if zone > (_MOST_COUNTED if monotone else _MOST_TRIED):
        return None
    kept = [_at(x, first + j, axis.index, within) for j in range(zone)]
    return _counted(first, kept, axis.index) if monotone else _tried(first, kept, axis.index)


def _level(line: _Line, prover: Prover) -> Expr | None:
    """A sum that only wavers, proved to stay on one side of 0."""
    scale = math.lcm(*(f.denominator for f in (line.shift, line.low, line.high, *line.base.values())))
    base = Linear({m: int(by * scale) for m, by in line.base.items() if by}, int(line.shift * scale))
    if prover.nonnegative(base.shifted(int(line.low * scale))):
        return TRUE
    return FALSE if prover.nonnegative(base.shifted(int(line.high * scale)).scaled(-1).shifted(-1)) else None


def _counted(first: Expr, kept: list[Expr], index: Expr) -> Expr:
    """The sum rises: it is >= 0 from as many positions after `first` as it is not yet so at."""
    bound = linear(first)
    for p in kept:
        bound = bound + linear(where(p, ZERO, ONE))
    return make("le", (bound.expr(), index))


def _tried(first: Expr, kept: list[Expr], index: Expr) -> Expr:
    points = [both((make("le", (_moved(first, j), index)), make("lt", (index, _moved(first, j + 1))), p)) for j, p in enumerate(kept)]
    return either((*points, make("le", (_moved(first, len(kept)), index))))


def _moved(e: Expr, by: int) -> Expr:
    return linear(e).shifted(by).expr()


def _at(x: Linear, position: Expr, index: Expr, within: Callable[[Expr], Expr]) -> Expr:
    """Whether the sum is >= 0 at a position; where it reads tables there, at the nearest valid one."""
    whole = x.expr()
    reads = any(node.op == "load" and index in leaves(node) for node in walk(whole))
    return condition(linear(substitute(whole, {index: within(position) if reads else linear(position).expr()})))


def _best_line(x: Linear, index: Expr, prover: Prover) -> _Line | None:
    def uses(e: Expr) -> bool:
        return index in leaves(e)

    return _line(written_out(x, uses), index, prover) or _line(x, index, prover)


def _line(x: Linear, index: Expr, prover: Prover) -> _Line | None:
    total = _Line(shift=Fraction(x.constant))
    for m, c in x.terms.items():
        part = _line_of(m, index, prover)
        if part is None:
            return None
        total = total.plus(part, c)
    return total


def _line_of(m: Expr, index: Expr, prover: Prover) -> _Line | None:
    if m is index:
        return _Line(rate=Fraction(1), fall=1, rise=1)
    if index not in leaves(m):
        return _Line(base={m: Fraction(1)})
    if m.op == "floordiv" and m.args[1].op == "const" and m.args[1].value > 0:
        inner = _line(linear(m.args[0]), index, prover)
        if inner is not None:
            return inner.divided(m.args[1].value)
    low, high = prover.range_of(m)
    if low is None or high is None:
        return None
    return _Line(low=Fraction(low), high=Fraction(high), fall=low - high, rise=high - low)
