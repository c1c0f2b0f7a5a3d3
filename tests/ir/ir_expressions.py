"""Random expressions over small captures, and the values to evaluate them on."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from flexmask import ir

TENSORS = (torch.tensor([3, -1, 0, 2, 5]), torch.tensor([True, False, False, True]), torch.tensor([[0.5, -2.0], [1.5, 0.25]]))
TENSOR_KINDS = ("int", "bool", "float")
SCALARS = (2, -3, 0.75)
SCALAR_KINDS = ("int", "int", "float")

_INT_LEAVES = st.one_of(
    st.sampled_from([ir.B, ir.H, ir.Q, ir.K, ir.scalar(0, "int"), ir.scalar(1, "int")]), st.integers(-4, 6).map(ir.const)
)
_FLOAT_LEAVES = st.one_of(st.just(ir.scalar(2, "float")), st.sampled_from([-1.5, 0.0, -0.0, 0.25, 3.0]).map(ir.const))
_BOOL_LEAVES = st.sampled_from([ir.TRUE, ir.FALSE])


def _positive(expr: ir.Expr, length: int) -> ir.Expr:
    return ir.make("mod", (expr, ir.const(length)))


@st.composite
def expressions(draw: st.DrawFn, kind: str = "bool", depth: int = 3) -> ir.Expr:
    """An expression of `kind` that has a value at every index; at most `depth` operations deep."""
    if depth == 0:
        return draw({"int": _INT_LEAVES, "float": _FLOAT_LEAVES, "bool": _BOOL_LEAVES}[kind])

    def part(of: str) -> ir.Expr:
        return draw(expressions(of, depth - draw(st.integers(1, depth))))

    if kind == "bool":
        op = draw(st.sampled_from(["lt", "le", "eq", "ne", "and", "or", "xor", "not", "where", "load"]))
        if op in ("lt", "le", "eq", "ne"):
            of = draw(st.sampled_from(["int", "int", "float"]))
            return ir.make(op, (part(of), part("int")))
        if op == "load":
            return ir.load(1, "bool", _positive(part("int"), 4))
        return ir.make(op, tuple(part("bool") for _ in range(ir.OPS[op].arity)))
    if kind == "float":
        op = draw(st.sampled_from(["add", "sub", "mul", "neg", "abs", "tanh", "sigmoid", "floor", "cast", "load", "min"]))
        if op == "load":
            return ir.load(2, "float", _positive(part("int"), 2), _positive(part("int"), 2))
        if op == "cast":
            return ir.make("cast", (part("int"),), "float32")
        return ir.make(op, (part("float"), part("int"))[: ir.OPS[op].arity])
    op = draw(
        st.sampled_from(["add", "sub", "mul", "floordiv", "mod", "neg", "abs", "min", "max", "bitand", "where", "load", "cast", "rshift"])
    )
    if op == "load":
        return ir.load(0, "int", _positive(part("int"), 5))
    if op == "cast":
        return ir.make("cast", (part("bool"),), draw(st.sampled_from(["int64", "int32"])))
    if op == "where":
        return ir.make("where", (part("bool"), part("int"), part("int")))
    if op in ("floordiv", "mod", "rshift"):
        amount = draw(st.sampled_from([1, 2, 3])) * (1 if op == "rshift" else draw(st.sampled_from([1, -1])))
        return ir.make(op, (part("int"), ir.const(amount)))
    return ir.make(op, tuple(part("int") for _ in range(ir.OPS[op].arity)))


POINTS = [(b, h, q, k) for b in (0, 1) for h in (0, 2) for q in (0, 1, 4) for k in (0, 3, 5)]


def grid() -> dict[str, torch.Tensor]:
    columns = torch.tensor(POINTS).T
    return dict(zip(("b", "h", "q_idx", "kv_idx"), columns, strict=True))


def on_grid(expr: ir.Expr) -> torch.Tensor:
    """The value at every point, as tensors."""
    return torch.as_tensor(ir.evaluate(expr, ir.Env(grid(), TENSORS, SCALARS))).expand(len(POINTS))


def at_point(expr: ir.Expr, point: tuple[int, ...]) -> bool | int | float:
    """The value at one point, as Python numbers."""
    return ir.evaluate(expr, ir.Env(dict(zip(("b", "h", "q_idx", "kv_idx"), point, strict=True)), TENSORS, SCALARS))
