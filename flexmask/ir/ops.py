"""The one table of operations: how each is written, what kind it yields, and what it means on numbers and on tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Kinds of value. Which machine width a value gets is the lowering's business.
BOOL, INT, FLOAT = "bool", "int", "float"


@dataclass(frozen=True)
class Op:
    """One operation.

    `symbol` is its infix or prefix text ("" = written as a call of `name`); `result` is a kind, or "promote" for
    "float if any argument is, else int"; `python` gives its meaning on Python numbers, `torch` on tensors.
    """

    name: str
    arity: int
    result: str
    symbol: str = ""
    python: Callable[..., Any] | None = None
    torch: Callable[..., Any] | None = None
    commutative: bool = False


def _round_half_even(x: float) -> float:
    return float(round(x))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _rsqrt(x: float) -> float:
    return 1.0 / math.sqrt(x)


def _pow(x: float, y: float) -> Any:
    return x**y


def _sign(x: float) -> float:
    return (x > 0) - (x < 0)


def _where(c: bool, x: float, y: float) -> float:
    return x if c else y


_ROWS = [
    # arithmetic: floor division and modulo are Python's, also for negative operands
    Op("add", 2, "promote", "+", operator.add, torch.add, commutative=True),
    Op("sub", 2, "promote", "-", operator.sub, torch.sub),
    Op("mul", 2, "promote", "*", operator.mul, torch.mul, commutative=True),
    Op("floordiv", 2, "promote", "//", operator.floordiv, torch.floor_divide),
    Op("mod", 2, "promote", "%", operator.mod, torch.remainder),
    Op("truediv", 2, FLOAT, "/", operator.truediv, torch.true_divide),
    Op("pow", 2, "promote", "", _pow, torch.pow),
    Op("neg", 1, "promote", "-", operator.neg, torch.neg),
    Op("abs", 1, "promote", "", abs, torch.abs),
    Op("min", 2, "promote", "", min, torch.minimum, commutative=True),
    Op("max", 2, "promote", "", max, torch.maximum, commutative=True),
    Op("sign", 1, "promote", "", _sign, torch.sign),
    # comparisons; a > b is written b < a
    Op("lt", 2, BOOL, "<", operator.lt, torch.lt),
    Op("le", 2, BOOL, "<=", operator.le, torch.le),
    Op("eq", 2, BOOL, "==", operator.eq, torch.eq, commutative=True),
    Op("ne", 2, BOOL, "!=", operator.ne, torch.ne, commutative=True),
    # bools
    Op("and", 2, BOOL, "&", operator.and_, torch.logical_and, commutative=True),
    Op("or", 2, BOOL, "|", operator.or_, torch.logical_or, commutative=True),
    Op("xor", 2, BOOL, "^", operator.xor, torch.logical_xor, commutative=True),
    Op("not", 1, BOOL, "~", operator.not_, torch.logical_not),
    # bits of integers
    Op("bitand", 2, INT, "&", operator.and_, torch.bitwise_and, commutative=True),
    Op("bitor", 2, INT, "|", operator.or_, torch.bitwise_or, commutative=True),
    Op("bitxor", 2, INT, "^", operator.xor, torch.bitwise_xor, commutative=True),
    Op("invert", 1, INT, "~", operator.invert, torch.bitwise_not),
    Op("lshift", 2, INT, "<<", operator.lshift, torch.bitwise_left_shift),
    Op("rshift", 2, INT, ">>", operator.rshift, torch.bitwise_right_shift),
    # choice
    Op("where", 3, "promote", "", _where, torch.where),
    # real functions
    Op("exp", 1, FLOAT, "", math.exp, torch.exp),
    Op("exp2", 1, FLOAT, "", lambda x: 2.0**x, torch.exp2),
    Op("log", 1, FLOAT, "", math.log, torch.log),
    Op("log2", 1, FLOAT, "", math.log2, torch.log2),
    Op("sqrt", 1, FLOAT, "", math.sqrt, torch.sqrt),
    Op("rsqrt", 1, FLOAT, "", _rsqrt, torch.rsqrt),
    Op("sin", 1, FLOAT, "", math.sin, torch.sin),
    Op("cos", 1, FLOAT, "", math.cos, torch.cos),
    Op("tanh", 1, FLOAT, "", math.tanh, torch.tanh),
    Op("sigmoid", 1, FLOAT, "", _sigmoid, torch.sigmoid),
    Op("erf", 1, FLOAT, "", math.erf, torch.erf),
    Op("floor", 1, "promote", "", math.floor, torch.floor),
    Op("ceil", 1, "promote", "", math.ceil, torch.ceil),
    Op("trunc", 1, "promote", "", math.trunc, torch.trunc),
    Op("round", 1, "promote", "", _round_half_even, torch.round),
    Op("isnan", 1, BOOL, "", math.isnan, torch.isnan),
    Op("isinf", 1, BOOL, "", math.isinf, torch.isinf),
]

OPS: dict[str, Op] = {row.name: row for row in _ROWS}

# dtypes a mod may cast to, by name, and the kind each yields. Narrow integers wrap around, so they are refused.
CASTS: dict[str, str] = {
    "bool": BOOL,
    "int32": INT,
    "int64": INT,
    "float16": FLOAT,
    "bfloat16": FLOAT,
    "float32": FLOAT,
    "float64": FLOAT,
}


def kind_of_dtype(dtype: torch.dtype) -> str:
    """The kind of a captured tensor's elements: bool, int or float."""
    if dtype == torch.bool:
        return BOOL
    if dtype.is_complex:
        raise TypeError(f"{dtype} captures are not supported; capture the real and imaginary parts apart")
    return FLOAT if dtype.is_floating_point else INT
