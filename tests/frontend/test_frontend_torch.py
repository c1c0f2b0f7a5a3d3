"""Each torch function of the table, traced, against torch itself; the names are the table's, so a new row without a case fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flexmask import ir
from flexmask.frontend import trace
from flexmask.frontend.torch_table import ROWS

x = torch.tensor([-20.0, -3.5, -2.5, -1.0, -0.3, -1e-4, 0.0, 1e-4, 0.4, 0.5, 1.0, 1.5, 2.5, 7.0, 20.0])
y = torch.tensor([3.0, -1.5, 2.5, -1.0, 0.3, 2.0, 1.0, 0.7, -0.4, 0.25, 1.0, -3.0, 2.5, 2.0, -7.0])
i = torch.arange(-7, 8)
j = torch.tensor([3, -2, 5, -1, 1, 2, -3, 4, 7, -7, 2, 3, -5, 1, 2])
p, r = x > 0, y > 0


def value(function, *tensors: torch.Tensor) -> torch.Tensor:
    """`function` traced on the elements of `tensors`, captured as tables of q_idx, and evaluated."""
    traced = trace(lambda q_idx: _number(function(*(t[q_idx] for t in tensors))), "score")
    return torch.as_tensor(ir.evaluate(traced.expr, ir.Env({"q_idx": torch.arange(len(x))}, traced.tensors, traced.scalars))).expand(len(x))


def _number(symbol):
    return symbol.float() if symbol.dtype is torch.bool else symbol


# fmt: off
FLOAT_FUNCTIONS = {
    "abs absolute": torch.abs, "neg negative": torch.neg, "sign sgn": torch.sign, "pos positive": torch.positive,
    "exp": torch.exp, "exp2 special_exp2": torch.exp2, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan,
    "tanh": torch.tanh, "sigmoid expit special_expit": torch.sigmoid, "erf special_erf": torch.erf, "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc fix": torch.trunc, "round": torch.round, "isnan": torch.isnan, "isinf": torch.isinf, "isfinite": torch.isfinite,
    "log": lambda a: torch.log(a.abs()), "log2": lambda a: torch.log2(a.abs()), "log10": lambda a: torch.log10(a.abs()),
    "sqrt": lambda a: torch.sqrt(a.abs()), "rsqrt": lambda a: torch.rsqrt(a.abs()), "reciprocal": torch.reciprocal, "square": torch.square,
    "log1p special_log1p": lambda a: torch.log1p(a.abs() * 1e-3), "expm1 special_expm1": torch.expm1,
    "sinh": torch.sinh, "cosh": torch.cosh, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu, "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu, "softplus": F.softplus, "logsigmoid log_sigmoid": F.logsigmoid,
    "clamp clip": lambda a: a.clamp(-1, 2) + torch.clip(a, max=0.5), "clamp_min": lambda a: torch.clamp_min(a, 1.0),
    "clamp_max": lambda a: a.clamp_max(1.0), "double": lambda a: a.double().float(), "half": lambda a: a.half().float(),
    "float": lambda a: a.float(), "bfloat16": lambda a: a.bfloat16().float(), "int": lambda a: a.int(), "long": lambda a: a.long(),
    "bool": lambda a: a.bool(), "to": lambda a: a.to(torch.float16).to(torch.device("cpu"), torch.float32),
    "type": lambda a: a.type(torch.int64),
    "clone contiguous squeeze cpu": lambda a: a.clone().contiguous().squeeze().cpu(), "cuda": lambda a: a,
    "ones_like": torch.ones_like, "zeros_like": lambda a: torch.zeros_like(a, dtype=torch.int64), "new_ones": lambda a: a.new_ones(()),
    "new_zeros": lambda a: a.new_zeros(()), "full_like": lambda a: torch.full_like(a, 3), "new_full": lambda a: a.new_full((), 2.5),
    "new_tensor": lambda a: a.new_tensor(2.5), "full": lambda a: a + torch.full((), 2.5),
    "tensor as_tensor asarray scalar_tensor": lambda a: a + torch.as_tensor(2.5) + torch.tensor(1),
    "dim ndimension": lambda a: a + 0 * (a.dim() + a.ndimension()), "numel": lambda a: a * (a * 0 + 1),
    "size": lambda a: a + len(a.shape) * 0,
    "is_floating_point": lambda a: a if torch.is_floating_point(a) else -a, "is_complex": lambda a: -a if a.is_complex() else a,
    "is_tensor": lambda a: a,
}
TWO_FLOATS = {
    "add": torch.add, "sub subtract": torch.subtract, "rsub": torch.rsub, "mul multiply": torch.mul,
    "true_divide truediv": torch.true_divide,
    "div divide": lambda a, b: torch.div(a, b) + torch.div(a, b, rounding_mode="floor") + torch.div(a, b, rounding_mode="trunc"),
    "floor_divide floordiv": torch.floor_divide, "remainder mod": torch.remainder, "fmod": torch.fmod, "pow": lambda a, b: a.abs().pow(b),
    "float_power": lambda a, b: torch.float_power(a.abs(), b).float(), "minimum sym_min": torch.minimum, "maximum sym_max": torch.maximum,
    "min": torch.min, "max": torch.max, "lt less": torch.lt, "le less_equal": torch.le, "gt greater": torch.gt,
    "ge greater_equal": torch.ge, "eq": torch.eq, "ne not_equal": torch.ne, "lerp": lambda a, b: torch.lerp(a, b, 0.25),
    "where": lambda a, b: torch.where(a > 0, a, b), "Tensor.where": lambda a, b: a.where(b > 0, b), "type_as": lambda a, b: a.type_as(b),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, -1.0),
}
TWO_INTEGERS = {
    "bitwise_and and": torch.bitwise_and, "bitwise_or or": torch.bitwise_or, "bitwise_xor xor": torch.bitwise_xor,
    "bitwise_not invert": lambda a, b: torch.bitwise_not(a), "bitwise_left_shift lshift": lambda a, b: torch.bitwise_left_shift(a, b.abs()),
    "bitwise_right_shift rshift": lambda a, b: torch.bitwise_right_shift(a, b.abs()), "logical_and": torch.logical_and,
    "logical_or": torch.logical_or, "logical_xor": torch.logical_xor, "logical_not sym_not": lambda a, b: torch.logical_not(a),
    "add": torch.add, "floor_divide": torch.floor_divide, "remainder": torch.remainder, "fmod": torch.fmod,
    "div": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "div floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "floor": lambda a, b: torch.floor(a) + torch.round(b), "true_divide": torch.true_divide, "minimum": torch.minimum,
    "abs": lambda a, b: abs(a),
    "sqrt": lambda a, b: torch.sqrt(a.abs()), "sign": lambda a, b: torch.sign(a), "isnan": lambda a, b: torch.isnan(a),
    "clamp": lambda a, b: a.clamp(-2, 3),
}
TWO_CONDITIONS = {
    "&": lambda a, b: a & b, "|": lambda a, b: a | b, "^": lambda a, b: a ^ b, "~": lambda a, b: ~a, "and": torch.logical_and,
    "bitwise": torch.bitwise_or, "==": torch.eq, "!=": torch.ne, "+": torch.add, "*": torch.mul, "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a, b, ~b), "ones_like": lambda a, b: torch.ones_like(a) & b,
}
TYPE_METHODS = {"short", "char", "byte"}  # refused: see test_frontend_refusals
# fmt: on
CASES = [
    *((name, function, (x,)) for name, function in FLOAT_FUNCTIONS.items()),
    *((name, function, (x, y)) for name, function in TWO_FLOATS.items()),
    *((name, function, (i, j)) for name, function in TWO_INTEGERS.items()),
    *((name, function, (p, r)) for name, function in TWO_CONDITIONS.items()),
]


@pytest.mark.parametrize(("name", "function", "tensors"), CASES, ids=[f"{c[0]}-{c[2][0].dtype}"[:40] for c in CASES])
def test_means_what_torch_computes(name, function, tensors):
    wanted = function(*tensors).float().expand(len(x))
    torch.testing.assert_close(value(function, *tensors).float(), wanted, rtol=2e-6, atol=2e-7, equal_nan=True)


def test_every_row_has_a_case():
    named = {name for case in CASES for name in case[0].split()} | TYPE_METHODS
    assert set(ROWS) <= named


def test_gelu_by_tanh():
    function = lambda a: F.gelu(a, approximate="tanh")
    torch.testing.assert_close(value(function, x), function(x), rtol=2e-6, atol=1e-6)


def test_numbers_of_torch_tensors_and_symbols_mix():
    captured, cap = torch.tensor(2.0), 3.0
    traced = trace(lambda score: torch.where(score > captured, captured, torch.clamp(score, -cap, cap)), "score")
    assert repr(traced.expr) == "where(t0[()] < score, t0[()], min(max(score, -s0), s0))"


def test_captured_numbers_in_torch_functions_stay_scalars():
    heads = 8
    traced = trace(lambda score, h: score + torch.exp2(torch.tensor(-8.0) * (h + 1) / heads), "score")
    assert repr(traced.expr) == "score + exp2(-8.0 * (h + 1) / s0)"


def test_captured_numbers_in_functions_of_real_tensors_are_used_now():
    n = 9
    traced = trace(lambda b, h, q, k: torch.arange(n)[q] >= k, "mask")
    assert traced.volatile and dict(traced.specialised) == {"n": 9} and repr(traced.expr) == "kv_idx <= t0[q_idx]"
