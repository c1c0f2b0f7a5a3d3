"""Interval rules for floats, and their comparison. Ends are computed as floats themselves, and widened by more than all rounding.

Where no end is NaN (and the conditions hold) no value is, and NaN in an end means that nothing is known; comparisons are written so
that this comes out by itself.
"""

from __future__ import annotations

from collections.abc import Callable

from ..ir import Expr, const, make
from .box_spans import Span, Truth, conditions, provided

# float32 rounds within 2**-24 of a value, and holds every integer up to 2**24; GPU intrinsics such as tanh are within about 2**-10
ROUNDING, INTRINSIC, TINY, LARGEST = 1e-6, 2e-3, 1e-37, 3e38
EXACT_INTEGERS = 2**24


def widened(x: Span, relative: float = ROUNDING, absolute: float = TINY) -> Span:
    """The span with room for rounding, given that it is finite."""
    lo, hi = (make("abs", (end,)) * const(relative) + const(absolute) for end in (x.lo, x.hi))
    lo, hi = x.lo - lo, x.hi + hi
    finite = (const(-LARGEST) <= lo, hi <= const(LARGEST))
    return Span(lo, hi, given=tuple(dict.fromkeys((*x.given, *finite))))


def from_integers(x: Span, dtype: str = "") -> Span:
    """Integers as floats: cast to a dtype, or as arithmetic with floats takes them, given that no dtype rounds them."""
    x = x if dtype else x.within(-EXACT_INTEGERS, EXACT_INTEGERS)
    return cast_float(x, dtype or "float32")


def to_integers(x: Span, dtype: str) -> Span:
    """Floats cut off to integers, given that they are not too large."""
    most = 2**30
    given = (*x.given, const(float(-most)) <= x.lo, x.hi <= const(float(most)))
    return Span(make("cast", (x.lo,), dtype), make("cast", (x.hi,), dtype), -most, most, given)


def _both(op: str) -> Callable[[Span, Span], Span]:
    return lambda x, y: Span(make(op, (x.lo, y.lo)), make(op, (x.hi, y.hi)), given=conditions((x, y)))


def _each(op: str) -> Callable[[Span], Span]:
    return lambda x: Span(make(op, (x.lo,)), make(op, (x.hi,)), given=x.given)


def _neg(x: Span) -> Span:
    return Span(-x.hi, -x.lo, given=x.given)


def _abs(x: Span) -> Span:
    lo = make("max", (make("max", (x.lo, -x.hi)), const(0.0)))
    return Span(lo, make("max", (-x.lo, x.hi)), given=x.given)


def _corners(op: str, x: Span, y: Span) -> Span:
    corners = [make(op, (a, b)) for a in (x.lo, x.hi) for b in (y.lo, y.hi)]
    lo, hi = (make(e, (make(e, (corners[0], corners[1])), make(e, (corners[2], corners[3])))) for e in ("min", "max"))
    return widened(Span(lo, hi, given=conditions((x, y))))


def _quotient(x: Span, y: Span) -> Span:
    """Given that the divisor is positive."""
    return _corners("truediv", x, Span(y.lo, y.hi, given=(*y.given, const(0.0) < y.lo)))


def _increasing(op: str) -> Callable[[Span], Span]:
    return lambda x: widened(_each(op)(x), INTRINSIC, INTRINSIC)


FLOAT_RULES: dict[str, Callable[..., Span]] = {
    "add": lambda x, y: widened(_both("add")(x, y)), "sub": lambda x, y: widened(_both("add")(x, _neg(y))),
    "mul": lambda x, y: _corners("mul", x, y), "truediv": _quotient, "neg": _neg, "abs": _abs, "min": _both("min"), "max": _both("max"),
    **{op: _each(op) for op in ("floor", "ceil", "trunc", "round", "sign")},
    **{op: _increasing(op) for op in ("exp", "exp2", "log", "log2", "sqrt", "tanh", "sigmoid", "erf")},
}  # fmt: skip


def cast_float(x: Span, dtype: str) -> Span:
    """Rounding keeps order."""
    return Span(make("cast", (x.lo,), dtype), make("cast", (x.hi,), dtype), given=x.given)


def compare_floats(op: str, x: Span | None, y: Span | None) -> Truth:
    """x `op` y, with nothing concluded from NaN."""
    if x is None or y is None:
        return Truth(const(True), const(False))
    if op in ("eq", "ne"):
        some = ~(x.hi < y.lo) & ~(y.hi < x.lo)
        equal = Truth(some, (x.hi <= y.lo) & (y.hi <= x.lo))
        return provided(equal if op == "eq" else equal.negated(), conditions((x, y)))
    opposite: Expr = make("le" if op == "lt" else "lt", (y.hi, x.lo))
    return provided(Truth(~opposite, make(op, (x.hi, y.lo))), conditions((x, y)))
