"""Interval arithmetic on tensors: every operation of the IR on ranges of values, vectorised over boxes.

Numbers are Spans, closed ranges [lo, hi] in float64. Integers are exact up to 2**48; a span that reaches further is unbounded, as
int64 might wrap around. Floats are widened after every operation by more than any rounding of float32 arithmetic. A Span with an
infinite end may stand for anything, NaN included, so nothing is concluded from comparing floats with it.
Bools are Truths: whether the box may hold a true and may hold a false position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

# integers within this bound are kept; float64 adds up MOST_TERMS of them without rounding
_EXACT, MOST_TERMS = float(2**48), 31
# float32 rounds within 2**-24 of a value; GPU intrinsics such as tanh within about 2**-10
_ROUNDING, _INTRINSIC, _TINY = 1e-6, 2e-3, 1e-37
_LARGEST, LARGEST_DOUBLE = 3e38, 1e308
# float32 holds every integer up to here
_EXACT_IN_FLOAT32 = float(2**24)
_INF = math.inf
# by how much a cast rounds, and beyond what it overflows
PRECISION = {
    "float16": (1e-3, 6e4, 1e-7),
    "bfloat16": (1e-2, _LARGEST, _TINY),
    "float32": (_ROUNDING, _LARGEST, _TINY),
    "float64": (0.0, LARGEST_DOUBLE, 0.0),
}


@dataclass(frozen=True)
class Span:
    lo: torch.Tensor
    hi: torch.Tensor


@dataclass(frozen=True)
class Truth:
    true: torch.Tensor
    false: torch.Tensor

    def negated(self) -> Truth:
        return Truth(self.false, self.true)


def as_span(x: Span | Truth) -> Span:
    return x if isinstance(x, Span) else Span((~x.false).double(), x.true.double())


def as_truth(x: Span | Truth) -> Truth:
    """Bool of a number: may it be nonzero, may it be zero."""
    return x if isinstance(x, Truth) else Truth((x.lo != 0) | (x.hi != 0), (x.lo <= 0) & (x.hi >= 0))


def integers(lo: torch.Tensor, hi: torch.Tensor) -> Span:
    """Integer bounds as they come out of float64 arithmetic: where one may be inexact or undefined, int64 may have wrapped around."""
    sound = (lo >= -_EXACT) & (hi <= _EXACT)
    return Span(torch.where(sound, lo, -_INF), torch.where(sound, hi, _INF))


def floats(lo: torch.Tensor, hi: torch.Tensor, relative: float = _ROUNDING, absolute: float = _TINY, largest: float = _LARGEST) -> Span:
    """Float bounds widened for rounding; anything undefined or overflowing makes the whole span unbounded."""
    lo, hi = lo - (lo.abs() * relative + absolute), hi + (hi.abs() * relative + absolute)
    sound = (lo >= -largest) & (hi <= largest)
    return Span(torch.where(sound, lo, -_INF), torch.where(sound, hi, _INF))


def rounded(x: Span) -> Span:
    """Integers as float32 may hold them."""
    wide = floats(x.lo, x.hi)
    fits = (x.lo >= -_EXACT_IN_FLOAT32) & (x.hi <= _EXACT_IN_FLOAT32)
    return Span(torch.where(fits, x.lo, wide.lo), torch.where(fits, x.hi, wide.hi))


def anything(like: torch.Tensor) -> Span:
    end = torch.full((), _INF, dtype=torch.float64, device=like.device)
    return Span(-end, end)


def times(x: Span, factor: int) -> Span:
    ends = (x.lo * factor, x.hi * factor)
    return integers(*(ends if factor > 0 else ends[::-1]))


def compare(op: str, x: Span, y: Span, finite_only: bool) -> Truth:
    """x `op` y; with `finite_only` (floats) an unbounded span may be NaN, for which every comparison may go either way."""
    if op in ("eq", "ne"):
        may = (x.lo <= y.hi) & (y.lo <= x.hi)
        found = Truth(may, ~((x.lo == x.hi) & (y.lo == y.hi) & (x.lo == y.lo)))
        found = found if op == "eq" else found.negated()
    else:
        found = Truth(x.lo < y.hi, x.hi >= y.lo) if op == "lt" else Truth(x.lo <= y.hi, x.hi > y.lo)
    if not finite_only:
        return found
    doubtful = unbounded(x) | unbounded(y)
    return Truth(found.true | doubtful, found.false | doubtful)


def _and(x: Truth, y: Truth) -> Truth:
    return Truth(x.true & y.true, x.false | y.false)


def _or(x: Truth, y: Truth) -> Truth:
    return Truth(x.true | y.true, x.false & y.false)


def _xor(x: Truth, y: Truth) -> Truth:
    return Truth((x.true & y.false) | (x.false & y.true), (x.true & y.true) | (x.false & y.false))


CONNECTIVES: dict[str, Callable[..., Truth]] = {"and": _and, "or": _or, "xor": _xor, "not": Truth.negated}


def choose(condition: Truth, x: Span | Truth, y: Span | Truth) -> Span | Truth:
    if isinstance(x, Truth) and isinstance(y, Truth):
        return _or(_and(condition, x), _and(condition.negated(), y))
    x, y = as_span(x), as_span(y)
    lo = torch.where(condition.true, torch.where(condition.false, torch.minimum(x.lo, y.lo), x.lo), y.lo)
    return Span(lo, torch.where(condition.true, torch.where(condition.false, torch.maximum(x.hi, y.hi), x.hi), y.hi))


def _corners(op: Callable[..., torch.Tensor], x: Span, y: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Extremes of an operation that is monotone in each argument; an undefined corner (0 * inf) spoils the box."""
    ends = [op(a, b) for a in (x.lo, x.hi) for b in (y.lo, y.hi)]
    lo = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
    return lo, torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))


def _quotient(x: Span, y: Span) -> tuple[torch.Tensor, torch.Tensor]:
    lo, hi = _corners(torch.div, x, y)
    sound = (y.lo > 0) | (y.hi < 0)
    return torch.where(sound, lo, -_INF), torch.where(sound, hi, _INF)


def _floordiv(x: Span, y: Span) -> tuple[torch.Tensor, torch.Tensor]:
    lo, hi = _quotient(x, y)
    return lo.floor(), hi.floor()


def _mod(x: Span, y: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Floor modulo of integers; exact while the quotient is the same over the box."""
    point = (y.lo == y.hi) & (y.lo != 0)
    quotient = torch.floor(x.lo / y.lo)
    same = point & (quotient == torch.floor(x.hi / y.lo)) & torch.isfinite(quotient)
    lowest = torch.where(y.lo > 0, 0.0, torch.where(y.hi < 0, y.lo + 1, -_INF))
    highest = torch.where(y.lo > 0, y.hi - 1, torch.where(y.hi < 0, 0.0, _INF))
    return torch.where(same, x.lo - quotient * y.lo, lowest), torch.where(same, x.hi - quotient * y.lo, highest)


def _abs(x: Span) -> tuple[torch.Tensor, torch.Tensor]:
    crosses = (x.lo < 0) & (x.hi > 0)
    ends = (x.lo.abs(), x.hi.abs())
    return torch.where(crosses, 0.0, torch.minimum(*ends)), torch.maximum(*ends)


def _shift(x: Span, y: Span, op: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    sound = (y.lo >= 0) & (y.hi < 63)
    lo, hi = op(x, Span(torch.exp2(y.lo.clamp(0, 63)).round(), torch.exp2(y.hi.clamp(0, 63)).round()))
    return torch.where(sound, lo, -_INF), torch.where(sound, hi, _INF)


def _bitand(x: Span, y: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """x & y is at most either of them that is not negative, and not negative then."""
    highest = torch.minimum(torch.where(x.lo >= 0, x.hi, _INF), torch.where(y.lo >= 0, y.hi, _INF))
    return torch.where(highest < _INF, 0.0, -_INF), highest


_Bounds = tuple[torch.Tensor, torch.Tensor]
# operations whose bounds are the same formula for integers and floats
ARITHMETIC: dict[str, Callable[..., _Bounds]] = {
    "add": lambda x, y: (x.lo + y.lo, x.hi + y.hi),
    "sub": lambda x, y: (x.lo - y.hi, x.hi - y.lo),
    "mul": lambda x, y: _corners(torch.mul, x, y),
    "neg": lambda x: (-x.hi, -x.lo),
    "min": lambda x, y: (torch.minimum(x.lo, y.lo), torch.minimum(x.hi, y.hi)),
    "max": lambda x, y: (torch.maximum(x.lo, y.lo), torch.maximum(x.hi, y.hi)),
    "abs": _abs,
    "sign": lambda x: (torch.sign(x.lo), torch.sign(x.hi)),
    "invert": lambda x: (-x.hi - 1, -x.lo - 1),
    "truediv": _quotient,
    "floordiv": _floordiv,
    "mod": _mod,
    "lshift": lambda x, y: _shift(x, y, lambda a, b: _corners(torch.mul, a, b)),
    "rshift": lambda x, y: _shift(x, y, _floordiv),
    "bitand": _bitand,
}
ON_FLOATS = {"add", "sub", "mul", "truediv"}
EXACT_ON_FLOATS = {"neg", "min", "max", "abs", "sign"}

INCREASING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp, "exp2": torch.exp2, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf,
    "log": torch.log, "log2": torch.log2, "sqrt": torch.sqrt, "floor": torch.floor, "ceil": torch.ceil,
    "trunc": torch.trunc, "round": torch.round,
}  # fmt: skip
ROUNDINGS = {"floor", "ceil", "trunc", "round"}


def unbounded(x: Span) -> torch.Tensor:
    """Where the span may stand for anything, NaN included."""
    return torch.isinf(x.lo) | torch.isinf(x.hi)


def float_operation(op: str, args: list[Span]) -> Span:
    """An operation that yields a float. Unbounded arguments may be NaN, so they make the result unbounded."""
    doubtful = unbounded(args[0])
    for x in args[1:]:
        doubtful = doubtful | unbounded(x)
    found = _float_bounds(op, args)
    return Span(torch.where(doubtful, -_INF, found.lo), torch.where(doubtful, _INF, found.hi))


def _float_bounds(op: str, args: list[Span]) -> Span:
    if op in EXACT_ON_FLOATS:
        return Span(*ARITHMETIC[op](*args))
    if op in ON_FLOATS:
        return floats(*ARITHMETIC[op](*args))
    if op in ("sin", "cos"):
        one = torch.ones_like(args[0].lo)
        return Span(-1.01 * one, 1.01 * one)
    if op not in INCREASING:
        return anything(args[0].lo)
    ends = (INCREASING[op](args[0].lo), INCREASING[op](args[0].hi))
    return floats(*ends, 0.0, 0.0) if op in ROUNDINGS else floats(*ends, _INTRINSIC, _INTRINSIC)


def cast_float(x: Span, dtype: str) -> Span:
    relative, largest, absolute = PRECISION[dtype]
    return floats(x.lo, x.hi, relative, absolute, largest)
