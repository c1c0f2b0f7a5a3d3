"""What torch functions mean on symbols: one row a name. `Tensor.x` is the method where it differs from `torch.x`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import ir
from ..errors import TraceError
from .arithmetic import as_float, cast
from .symbol import Symbol

if TYPE_CHECKING:
    from .recorder import Recorder

IMPURE = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli", "multinomial", "poisson",
    "dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "rrelu", "gumbel_softmax",
    "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_", "manual_seed", "seed",
}  # fmt: skip

# arithmetic's name -> torch's names, with operands in the same order
_SAME = {
    "abs": "abs absolute", "neg": "neg negative", "sign": "sign sgn", "pos": "positive pos",
    "exp": "exp", "exp2": "exp2 special_exp2", "log": "log", "log2": "log2", "sqrt": "sqrt", "rsqrt": "rsqrt", "sin": "sin", "cos": "cos",
    "tanh": "tanh", "sigmoid": "sigmoid expit special_expit", "erf": "erf special_erf",
    "floor": "floor", "ceil": "ceil", "trunc": "trunc fix", "isnan": "isnan", "isinf": "isinf",
    "mul": "mul multiply", "truediv": "true_divide truediv", "floordiv": "floor_divide floordiv", "mod": "remainder mod", "pow": "pow",
    "min": "minimum sym_min", "max": "maximum sym_max",
    "lt": "lt less", "le": "le less_equal", "eq": "eq", "ne": "ne not_equal",
    "logical_and": "logical_and", "logical_or": "logical_or", "logical_xor": "logical_xor", "logical_not": "logical_not sym_not",
    "&": "bitwise_and and", "|": "bitwise_or or", "^": "bitwise_xor xor", "~": "bitwise_not invert",
    "lshift": "bitwise_left_shift lshift", "rshift": "bitwise_right_shift rshift",
}  # fmt: skip
_ARITY = {
    op: 2 if op in ("&", "|", "^") else 1 if op in ("pos", "~", "logical_not") else 2 if op.startswith("logical") else None for op in _SAME
}


def _same(op: str) -> Callable[..., Symbol]:
    arity = _ARITY[op] or ir.OPS[op].arity
    if arity == 1:
        return lambda rec, input: rec.apply(op, input)
    return lambda rec, input, other=None, *, exponent=None: rec.apply(op, input, exponent if other is None else other)


def _greater(op: str) -> Callable[..., Symbol]:
    return lambda rec, input, other: rec.apply(op, other, input)


def _add(rec: Recorder, input: Any, other: Any, *, alpha: Any = 1) -> Symbol:
    return rec.apply("add", input, other if alpha == 1 else rec.apply("mul", other, alpha))


def _sub(rec: Recorder, input: Any, other: Any, *, alpha: Any = 1) -> Symbol:
    return rec.apply("sub", input, other if alpha == 1 else rec.apply("mul", other, alpha))


def _rsub(rec: Recorder, input: Any, other: Any, *, alpha: Any = 1) -> Symbol:
    return _sub(rec, other, input, alpha=alpha)


def _div(rec: Recorder, input: Any, other: Any, *, rounding_mode: str | None = None) -> Symbol:
    if rounding_mode == "trunc":
        return _truncated(rec, input, other)
    return rec.apply("floordiv" if rounding_mode == "floor" else "truediv", input, other)


def _truncated(rec: Recorder, input: Any, other: Any) -> Symbol:
    x, y = rec.operand(input), rec.operand(other)
    if ir.FLOAT in (x.expr.kind, y.expr.kind):
        return rec.apply("trunc", rec.apply("truediv", x, y))
    size = rec.apply("floordiv", rec.apply("abs", x), rec.apply("abs", y))
    return rec.apply("mul", size, rec.apply("mul", rec.apply("sign", x), rec.apply("sign", y)))


def _fmod(rec: Recorder, input: Any, other: Any) -> Symbol:
    return rec.apply("sub", input, rec.apply("mul", _truncated(rec, input, other), other))


def _where(rec: Recorder, condition: Any, input: Any = None, other: Any = None) -> Symbol:
    if input is None or other is None:
        raise TraceError("`torch.where(condition)` lists positions. Write `torch.where(condition, x, y)`.")
    return rec.apply("where", condition, input, other)


def _where_method(rec: Recorder, self: Any, condition: Any, other: Any) -> Symbol:
    return rec.apply("where", condition, self, other)


def _masked_fill(rec: Recorder, input: Any, mask: Any, value: Any) -> Symbol:
    return rec.apply("where", mask, value, input)


def _clamp(rec: Recorder, input: Any, min: Any = None, max: Any = None) -> Symbol:
    if min is None and max is None:
        raise TraceError("`clamp` needs `min`, `max` or both.")
    low = rec.operand(input) if min is None else rec.apply("max", input, min)
    return low if max is None else rec.apply("min", low, max)


def _extreme(op: str) -> Callable[..., Symbol]:
    def row(rec: Recorder, input: Any, other: Any = None) -> Symbol:
        if not isinstance(other, (Symbol, torch.Tensor)):
            name = "minimum" if op == "min" else "maximum"
            raise TraceError(f"`torch.{op}` of one number has no meaning here. Write `torch.{name}(a, b)`.")
        return rec.apply(op, input, other)

    return row


def _round(rec: Recorder, input: Any, *, decimals: int = 0) -> Symbol:
    if decimals:
        raise TraceError("`round` to decimals is not supported. Write `torch.round(x * 100) / 100`.")
    return rec.apply("round", input)


# floats composed of others; accurate also where the textbook form cancels


def _isfinite(rec: Recorder, input: Any) -> Symbol:
    return rec.apply("~", rec.apply("|", rec.apply("isnan", input), rec.apply("isinf", input)))


def _float(rec: Recorder, input: Any) -> Symbol:
    symbol = rec.operand(input)
    return rec.symbol(as_float(symbol.expr), symbol.known)


def _softplus(rec: Recorder, input: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    x = _float(rec, input) * beta
    return (rec.apply("max", x, 0.0) + _log1p(rec, rec.apply("exp", -abs(x)))) / beta


def _log1p(rec: Recorder, input: Any) -> Any:
    x = _float(rec, input)
    y = 1.0 + x
    # the rounding of 1 + x cancels in log(y) / (y - 1)
    exact = rec.apply("log", y) * (x / (y - 1.0))
    return rec.apply("where", rec.apply("|", y == 1.0, rec.apply("isinf", y)), x, exact)


def _expm1(rec: Recorder, input: Any) -> Any:
    x = _float(rec, input)
    return rec.apply("tanh", x * 0.5) * (rec.apply("exp", x) + 1.0)


def _sinh(rec: Recorder, input: Any) -> Any:
    x = _float(rec, input)
    grown = _expm1(rec, abs(x))
    return rec.apply("sign", x) * ((grown + grown / (grown + 1.0)) * 0.5)


def _cosh(rec: Recorder, input: Any) -> Any:
    x = _float(rec, input)
    return (rec.apply("exp", x) + rec.apply("exp", -x)) * 0.5


def _gelu(rec: Recorder, input: Any, approximate: str = "none") -> Any:
    x = _float(rec, input)
    if approximate == "tanh":
        return 0.5 * x * (1.0 + rec.apply("tanh", math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1.0 + rec.apply("erf", x * math.sqrt(0.5)))


def _leaky_relu(rec: Recorder, input: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Any:
    x = rec.operand(input)
    return rec.apply("where", x > 0, x, x * negative_slope)


def _logsigmoid(rec: Recorder, input: Any) -> Any:
    return -_softplus(rec, -_float(rec, input))


# conversions


def _to(rec: Recorder, input: Any, *args: Any, **kwargs: Any) -> Any:
    wanted = [*args, *(v for k, v in kwargs.items() if k in ("dtype", "device", "other"))]
    for want in wanted:
        dtype = want if isinstance(want, torch.dtype) else want.dtype if isinstance(want, (torch.Tensor, Symbol)) else None
        if dtype is not None:
            input = _cast(rec, input, dtype)
    return input


def _type(rec: Recorder, input: Any, dtype: Any = None) -> Any:
    if isinstance(dtype, str) or not isinstance(dtype, torch.dtype):
        raise TraceError(f"`.type({dtype!r})` is not supported. Write `.to(torch.float32)` or another dtype.")
    return _cast(rec, input, dtype)


def _cast(rec: Recorder, input: Any, dtype: torch.dtype) -> Symbol:
    name = str(dtype).removeprefix("torch.")
    if name not in ir.CASTS:
        raise TraceError(
            f"a cast to {dtype}, which wraps around or rounds away, is not supported in a mask or score. Use one of {', '.join(ir.CASTS)}."
        )
    symbol = rec.operand(input)
    return rec.symbol(cast(symbol.expr, name), symbol.known)


def _cast_to(dtype: torch.dtype) -> Callable[..., Symbol]:
    return lambda rec, input, **kwargs: _cast(rec, input, dtype)


def _itself(rec: Recorder, input: Any, *args: Any, **kwargs: Any) -> Any:
    return input


# constants made from a symbol


def _made(value: Any) -> Callable[..., Symbol]:
    """A factory without a value of its own: ones, zeros, and the same of a symbol's dtype."""

    def row(rec: Recorder, first: Any, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Symbol:
        _need_no_shape(size[0] if len(size) == 1 else size)
        return _filled(rec, value, dtype or first.dtype)

    return row


def _full(rec: Recorder, size: Any, fill_value: Any, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Symbol:
    _need_no_shape(size)
    return rec.operand(fill_value) if dtype is None else _cast(rec, fill_value, dtype)


def _new_full(rec: Recorder, input: Any, size: Any, fill_value: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Symbol:
    _need_no_shape(size)
    return _filled(rec, fill_value, dtype or input.dtype)


def _full_like(rec: Recorder, input: Any, fill_value: Any, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Symbol:
    return _filled(rec, fill_value, dtype or input.dtype)


def _tensor(rec: Recorder, data: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Symbol:
    if isinstance(data, (list, tuple)):
        raise TraceError("a tensor of symbolic numbers cannot be made in a mask or score. Use the numbers themselves.")
    return rec.operand(data) if dtype is None else _cast(rec, data, dtype)


def _new_tensor(rec: Recorder, input: Any, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Symbol:
    return _tensor(rec, data, dtype)


def _filled(rec: Recorder, value: Any, dtype: torch.dtype) -> Symbol:
    """`value` as `dtype`; a number is converted now."""
    if isinstance(value, (Symbol, torch.Tensor)) or str(dtype).removeprefix("torch.") not in ir.CASTS:
        return _cast(rec, value, dtype)
    with torch._C.DisableTorchFunction():
        return rec.operand(torch.tensor(value, dtype=dtype).item())


def _need_no_shape(size: Any) -> None:
    if isinstance(size, int) or (isinstance(size, (tuple, list)) and len(size)):
        raise TraceError(
            f"a tensor of shape {size} cannot be made of symbols. In a mask or score everything is one number: use shape `()`."
        )


def _fixed(value: Any) -> Callable[..., Any]:
    return lambda rec, input, *args, **kwargs: value


ROWS: dict[str, Callable[..., Any]] = {
    **{name: _same(op) for op, names in _SAME.items() for name in names.split()},
    "gt": _greater("lt"), "greater": _greater("lt"), "ge": _greater("le"), "greater_equal": _greater("le"),
    "add": _add, "sub": _sub, "subtract": _sub, "rsub": _rsub, "div": _div, "divide": _div, "fmod": _fmod, "float_power": _same("pow"),
    "where": _where, "Tensor.where": _where_method, "masked_fill": _masked_fill,
    "clamp": _clamp, "clip": _clamp, "clamp_min": lambda rec, input, min: _clamp(rec, input, min),
    "clamp_max": lambda rec, input, max: _clamp(rec, input, None, max), "min": _extreme("min"), "max": _extreme("max"),
    "hardtanh": lambda rec, input, min_val=-1.0, max_val=1.0, inplace=False: _clamp(rec, input, min_val, max_val),
    "relu": lambda rec, input, inplace=False: rec.apply("max", input, 0), 
    "relu6": lambda rec, input, inplace=False: _clamp(rec, input, 0, 6),
    "leaky_relu": _leaky_relu, "silu": lambda rec, input, inplace=False: input * rec.apply("sigmoid", input), "gelu": _gelu,
    "softplus": _softplus, "logsigmoid": _logsigmoid, "log_sigmoid": _logsigmoid,
    "square": lambda rec, input: rec.apply("mul", input, input), "reciprocal": lambda rec, input: rec.apply("truediv", 1.0, input),
    "round": _round, "log1p": _log1p, "special_log1p": _log1p, "expm1": _expm1, "special_expm1": _expm1,
    "log10": lambda rec, input: rec.apply("mul", rec.apply("log2", input), math.log10(2)),
    "tan": lambda rec, input: rec.apply("truediv", rec.apply("sin", input), rec.apply("cos", input)), "sinh": _sinh, "cosh": _cosh,
    "isfinite": _isfinite, "lerp": lambda rec, input, end, weight: input + weight * (end - input),
    "to": _to, "type": _type, "type_as": lambda rec, input, other: _to(rec, input, other), "float": _cast_to(torch.float32),
    "double": _cast_to(torch.float64), "half": _cast_to(torch.float16), "bfloat16": _cast_to(torch.bfloat16),
    "int": _cast_to(torch.int32), "long": _cast_to(torch.int64), "bool": _cast_to(torch.bool),
    "short": _cast_to(torch.int16), "char": _cast_to(torch.int8), "byte": _cast_to(torch.uint8),
    **dict.fromkeys(["clone", "contiguous", "cpu", "cuda", "squeeze"], _itself),
    "dim": _fixed(0), "ndimension": _fixed(0), "numel": _fixed(1), "size": _fixed(torch.Size(())),
    "is_floating_point": lambda rec, input: input.dtype.is_floating_point, "is_complex": _fixed(False), "is_tensor": _fixed(False),
    "ones_like": _made(1), "zeros_like": _made(0), "new_ones": _made(1), "new_zeros": _made(0),
    "full": _full, "full_like": _full_like, "new_full": _new_full, "new_tensor": _new_tensor,
    **dict.fromkeys(["tensor", "as_tensor", "asarray", "scalar_tensor"], _tensor),
}  # fmt: skip
