"""Derivatives: every law, random expressions and every score of the zoo against torch's autograd of `evaluate`."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmask.ir import (
    FLOAT,
    OPS,
    SCORE,
    Env,
    Expr,
    H,
    K,
    Q,
    const,
    derivative,
    evaluate,
    float_loads,
    load,
    make,
    parse,
    scalar,
    simplify,
    substitute,
    walk,
)
from flexmask.ir.derivative import DIFFERENTIALS, FLAT

TENSORS = ["float", "float", "int"]
X, Y = make("index", (), "x", FLOAT), make("index", (), "y", FLOAT)
VALUES = (-2.0, -1.5, -1.0, -0.25, 0.0, 0.25, 1.0, 1.5, 3.0)


def read(text: str) -> Expr:
    return simplify(parse(text, TENSORS, ["float"]))


def slope(text: str, wrt: Expr = SCORE) -> str:
    return repr(derivative(read(text), wrt))


def at(expr: Expr, indices: dict[str, torch.Tensor], tensors=(), scalars=()) -> torch.Tensor:
    """The value at every point, float64."""
    value = torch.as_tensor(evaluate(expr, Env(indices, tensors, scalars)))
    return value.double().expand(next(iter(indices.values())).shape)


def by_autograd(expr: Expr, wrt: Expr, indices: dict[str, torch.Tensor], tensors=(), scalars=()) -> torch.Tensor:
    """What torch finds for the derivative at every point."""
    free = make("index", (), "free", FLOAT)
    value = at(wrt, indices, tensors, scalars).clone().requires_grad_()
    result = at(substitute(expr, {wrt: free}), {**indices, "free": value}, tensors, scalars)
    if not result.requires_grad:
        return torch.zeros_like(value)
    (found,) = torch.autograd.grad(result.sum(), value, allow_unused=True)
    return torch.zeros_like(value) if found is None else found


def assert_same_slope(expr: Expr, wrt: Expr, indices, tensors=(), scalars=(), rtol=1e-6, atol=1e-7) -> None:
    wanted = by_autograd(expr, wrt, indices, tensors, scalars)
    found = at(derivative(expr, wrt), indices, tensors, scalars)
    known = wanted.isfinite()
    torch.testing.assert_close(found[known], wanted[known], rtol=rtol, atol=atol, msg=lambda m: f"d {expr} / d {wrt}: {m}")


@pytest.mark.parametrize("law", DIFFERENTIALS, ids=[left for left, _ in DIFFERENTIALS])
def test_a_law_is_what_autograd_finds_also_at_kinks_and_ties(law):
    names = {"X": X, "Y": Y, "P": X < Y}
    expr = parse(law[0], variables=names)
    x, y = (v.flatten() for v in torch.meshgrid(torch.tensor(VALUES).double(), torch.tensor(VALUES).double(), indexing="ij"))
    for wrt in {X, Y} & set(walk(expr)):
        assert_same_slope(expr, wrt, {"x": x, "y": y})


def test_every_operation_on_floats_has_a_law_or_is_flat():
    ruled = {parse(left, variables={"X": X, "Y": Y, "P": X < Y}).op for left, _ in DIFFERENTIALS}
    assert not ruled & FLAT
    assert ruled | FLAT == {op for op, row in OPS.items() if row.result in (FLOAT, "promote")}


@pytest.mark.parametrize("op", sorted(FLAT))
def test_steps_pass_no_gradient(op):
    expr = make(op, (SCORE, const(0.75))[: OPS[op].arity])
    assert derivative(expr, SCORE) is const(0.0)


# texts, as people read them


def test_derivatives_are_short():
    assert slope("score") == "1.0"
    assert slope("score + t0[kv_idx]") == "1.0"
    assert slope("t0[kv_idx] * 2.0") == "0.0"
    assert slope("score * t0[q_idx] - s0") == "t0[q_idx]"
    assert slope("score / s0") == "1.0 / s0"
    assert slope("s0 * tanh(score / s0)") == "1.0 - tanh(score / s0) * tanh(score / s0)"
    assert slope("49.0 * tanh(score / 49.0)") == "1.0 - tanh(score / 49.0) * tanh(score / 49.0)"
    assert slope("score * score") == "2.0 * score"
    assert slope("pow(score, 3)") == "3.0 * pow(score, 2.0)"
    assert slope("max(score, 0)") == "where(score < 0.0, 0.0, where(0.0 < score, 1.0, 0.5))"
    assert slope("where(kv_idx <= q_idx, score, -inf)") == "where(kv_idx <= q_idx, 1.0, 0.0)"
    assert slope("where(kv_idx <= q_idx, score + 1.0, score)") == "1.0"
    assert slope("score + t0[h] * (kv_idx - q_idx)", read("t0[h]")) == "float32(kv_idx - q_idx)"


def test_conditions_and_integers_and_indices_pass_no_gradient():
    assert slope("int64(score) * 2") == "0.0"
    assert slope("float32(int64(score)) + score // 2.0") == "0.0"
    assert slope("where(score < 0.0, 1.0, 2.0)") == "0.0"
    assert slope("t0[int64(score)]") == "0.0"
    assert slope("float16(score) + bfloat16(float64(score))") == "2.0"
    inner, outer = read("t0[kv_idx]"), read("t1[int64(t0[kv_idx])]")
    assert float_loads(read("score + t1[int64(t0[kv_idx])]")) == (outer,)
    assert derivative(outer, inner) is const(0.0)


def test_loads_that_carry_gradient():
    assert float_loads(read("where(t0[q_idx] < 0.0, score * t1[h], score + t2[q_idx])")) == (read("t1[h]"),)
    assert float_loads(read("t0[q_idx] - t0[kv_idx] + t0[q_idx]")) == (read("t0[q_idx]"), read("t0[kv_idx]"))
    assert float_loads(read("t0[q_idx] * 2.0 + score - t0[q_idx] * 2.0 + floor(t1[h])")) == ()
    assert float_loads(read("score")) == ()


@pytest.mark.parametrize("wrt", [Q, read("t2[h]"), K < Q])
def test_only_floats_have_derivatives(wrt):
    with pytest.raises(ValueError, match="only floats have derivatives"):
        derivative(SCORE, wrt)


# an infinite slope of a branch that is not taken stays there


@pytest.mark.parametrize(
    "text",
    [
        "sqrt(max(score, 0.0))",
        "sqrt(min(max(score, 0.0), 4.0))",
        "where(score < 0.5, score, log(score - 0.5))",
        "log(where(score < 1.0, 1.0, score))",
        "where(1.0 + score == 1.0, score, log(1.0 + score) * (score / (1.0 + score - 1.0)))",
        "where(0.0 < s0, s0 * tanh(score / s0), score)",
        "pow(max(score, 0.0), 0.5)",
    ],
)
def test_what_is_not_chosen_does_not_count(text):
    scores = torch.tensor([-3.0, -1.0, 0.0, 0.25, 3.0], dtype=torch.float64)
    scores = scores[scores != 0.0] if "max(score" in text else scores[scores > -1.0]
    expr = read(text)
    found = at(derivative(expr, SCORE), {"score": scores}, (), (0.0,))
    step = 1e-6
    wanted = (at(expr, {"score": scores + step}, (), (0.0,)) - at(expr, {"score": scores - step}, (), (0.0,))) / (2 * step)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# sharing


def test_a_graph_of_a_billion_paths_has_a_derivative_of_its_own_size():
    x = SCORE
    for i in range(60):
        x = make("mul", (make("tanh", (x,)), make("add", (x, load(0, FLOAT, K + i)))))
    for wrt in (SCORE, float_loads(x)[0]):
        assert len(list(walk(derivative(x, wrt)))) < 10 * len(list(walk(x)))


def test_deep_choices_and_divisions_stay_linear():
    x = SCORE
    for i in range(300):
        x = make("max", (make("truediv", (make("exp", (x,)), load(0, FLOAT, const(i)))), scalar(0, FLOAT)))
    once = len(list(walk(derivative(x, SCORE))))
    assert once < 30 * 300


# against autograd

_POINTS = 64
_ENV = {
    "score": torch.linspace(-3.0, 3.0, _POINTS, dtype=torch.float64),
    "b": torch.zeros(_POINTS, dtype=torch.int64),
    "h": torch.arange(_POINTS) % 2,
    "q_idx": torch.arange(_POINTS) % 7,
    "kv_idx": torch.arange(_POINTS) % 5,
}
_TABLES = (torch.tensor([0.5, -1.25, 0.0, 2.0, -0.75, 1.0, 3.0]).double(), torch.tensor([[1.5, -0.5], [0.25, 2.5]]).double())
_ONE = ["neg", "abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "erf", "floor", "round", "sign"]
_TWO = ["add", "sub", "mul", "add", "sub", "mul", "truediv", "mod", "min", "max", "pow"]


@st.composite
def floats(draw: st.DrawFn, depth: int = 4) -> Expr:
    """A random float expression of the score, two tables, numbers and indices."""
    if depth == 0:
        leaves = [
            SCORE,
            SCORE,
            load(0, FLOAT, Q),
            load(0, FLOAT, K),
            load(1, FLOAT, H, K % 2),
            scalar(0, FLOAT),
            make("cast", (Q - K,), "float32"),
        ]
        return draw(st.one_of(st.sampled_from(leaves), st.sampled_from([-1.5, 0.0, 0.5, 1.0, 2.0]).map(const)))

    def part() -> Expr:
        return draw(floats(depth - draw(st.integers(1, depth))))

    how = draw(st.integers(0, 9))
    if how == 0:
        return make("where", (make("lt", (part(), part())), part(), part()))
    if how == 1:
        return make("cast", (part(),), draw(st.sampled_from(["float32", "float64"])))
    if how < 6:
        return make(draw(st.sampled_from(_ONE)), (part(),))
    return make(draw(st.sampled_from(_TWO)), (part(), draw(st.sampled_from([part(), Q - K]))))


@given(floats())
@settings(max_examples=300)
def test_random_expressions(expr):
    for wrt in (SCORE, *float_loads(expr)):
        wanted = by_autograd(expr, wrt, _ENV, _TABLES, (0.625,))
        found = at(derivative(expr, wrt), _ENV, _TABLES, (0.625,))
        known = at(expr, _ENV, _TABLES, (0.625,)).isfinite() & (wanted.abs() < 1e4)
        torch.testing.assert_close(found[known], wanted[known], rtol=1e-4, atol=1e-4, msg=lambda m, wrt=wrt: f"d {expr} / d {wrt}: {m}")


@pytest.mark.parametrize("name", zoo.SCORES)
def test_zoo(name):
    B, H, Q_LEN, KV_LEN = 2, 2, 9, 11
    traced = zoo.SCORES[name](B, H, Q_LEN, KV_LEN).traced()
    expr = simplify(traced.expr)
    tensors = tuple(t.double() if t.dtype.is_floating_point else t for t in traced.tensors)
    grid = torch.meshgrid(*map(torch.arange, (B, H, Q_LEN, KV_LEN)), indexing="ij")
    indices = dict(zip(("b", "h", "q_idx", "kv_idx"), grid, strict=True))
    indices["score"] = torch.randn(grid[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    carrying = {load.value for load in float_loads(expr)}
    assert carrying == {i for i, t in enumerate(tensors) if t.dtype.is_floating_point}
    for wrt in (SCORE, *float_loads(expr)):
        assert_same_slope(expr, wrt, indices, tensors, traced.scalars, rtol=1e-5)
        assert math.isfinite(at(derivative(expr, wrt), indices, tensors, traced.scalars).abs().sum())
