"""Bounds of integer expressions, to choose 32 or 64 bits and to leave out checks that cannot fail."""

from __future__ import annotations

from collections.abc import Callable

from ..ir import Expr
from .captures import CaptureSpec

INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)
# indices of batch entries, heads, queries and keys, tiles overhang included; the launcher refuses greater lengths
INDEX = (0, 2**24)
_STORED = {"bool": (0, 1), "uint8": (0, 255), "int8": (-128, 127), "int16": (-(2**15), 2**15 - 1), "uint16": (0, 2**16 - 1),
           "int32": INT32, "uint32": (0, 2**32 - 1)}  # fmt: skip

Range = tuple[int, int]


def range_of(node: Expr, args: list[Range | None], captures: CaptureSpec) -> Range | None:
    """The least and greatest value of an integer node given those of its arguments; None for floats. 64 bits wrap around."""
    if node.kind == "float":
        return None
    if node.kind == "bool":
        return (0, 1)
    low, high = _exact(node, args, captures)
    return (low, high) if INT64[0] <= low and high <= INT64[1] else INT64


def _exact(node: Expr, args: list[Range | None], captures: CaptureSpec) -> Range:
    if node.op == "const":
        return node.value, node.value
    if node.op == "index":
        return INDEX
    if node.op == "scalar":
        return INT32  # a larger one travels as int64, and Triton's promotion keeps whatever it meets wide
    if node.op == "load":
        return _STORED.get(captures.tensors[node.value].dtype, INT64)
    if node.op == "search":
        return 0, INT32[1]
    if node.op == "cast":
        return _cast(node, args[0])
    known = [a for a in args if a is not None]
    rule = _RULES.get(node.op)
    return INT64 if rule is None or len(known) < len(args) else rule(*known)


def _cast(node: Expr, inner: Range | None) -> Range:
    if node.value == "int32":
        return inner if inner is not None and fits(inner, INT32) else INT32
    return inner or INT64


def fits(inner: Range, outer: Range) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _corners(x: Range, y: Range) -> Range:
    products = [a * b for a in x for b in y]
    return min(products), max(products)


def _floordiv(x: Range, y: Range) -> Range:
    if y[0] <= 0:
        reach = max(abs(x[0]), abs(x[1]))
        return -reach, reach
    quotients = [a // b for a in x for b in y]
    return min(quotients), max(quotients)


def _mod(x: Range, y: Range) -> Range:
    if x[0] >= 0 and y[0] > 0:
        return 0, min(x[1], y[1] - 1)
    return min(0, y[0] + 1), max(0, y[1] - 1)


def _abs(x: Range) -> Range:
    return (0 if x[0] <= 0 <= x[1] else min(abs(x[0]), abs(x[1]))), max(abs(x[0]), abs(x[1]))


def _bits(x: Range, y: Range) -> Range:
    """| and ^: as many bits as the wider operand has."""
    width = max(max(abs(a), abs(a + 1)).bit_length() for a in (*x, *y))
    return (0 if x[0] >= 0 and y[0] >= 0 else -(2**width)), 2**width - 1


def _bitand(x: Range, y: Range) -> Range:
    if x[0] >= 0 or y[0] >= 0:
        return 0, min(r[1] for r in (x, y) if r[0] >= 0)
    return _bits(x, y)


def _rshift(x: Range, _: Range) -> Range:
    return min(0, x[0]), max(-1, x[1])


_RULES: dict[str, Callable[..., Range]] = {
    "add": lambda x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": _corners,
    "floordiv": _floordiv,
    "mod": _mod,
    "neg": lambda x: (-x[1], -x[0]),
    "abs": _abs,
    "min": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "max": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "sign": lambda x: (-1, 1),
    "where": lambda _, x, y: (min(x[0], y[0]), max(x[1], y[1])),
    "bitand": _bitand,
    "bitor": _bits,
    "bitxor": _bits,
    "invert": lambda x: (~x[1], ~x[0]),
    "rshift": _rshift,
    "floor": lambda x: x,
    "ceil": lambda x: x,
    "trunc": lambda x: x,
    "round": lambda x: x,
}
