"""An expression's text: Python's own syntax, read back to the same node."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from ir_expressions import SCALAR_KINDS, TENSOR_KINDS, expressions

from flexmask import ir


def back(expr: ir.Expr) -> ir.Expr:
    return ir.parse(ir.show(expr), TENSOR_KINDS, SCALAR_KINDS)


@pytest.mark.parametrize("kind", ["bool", "int", "float"])
def test_text_parses_back(kind):
    @given(expressions(kind, 5))
    @settings(max_examples=200, deadline=None)
    def check(expr):
        assert back(expr) is expr

    check()


@pytest.mark.parametrize("value", [True, 0, -7, 2**62, 0.5, -0.0, 1e-30, math.inf, -math.inf, math.nan])
def test_constants_parse_back(value):
    assert back(ir.const(value)) is ir.const(value)
    kept = ir.make("neg", (ir.const(value),), kind="int" if isinstance(value, int) else "float")
    if not isinstance(value, bool):
        assert back(kept) is kept


def test_every_operation_parses_back():
    arguments = {"and": ir.TRUE, "or": ir.TRUE, "xor": ir.FALSE, "not": ir.TRUE}
    for name, op in ir.OPS.items():
        leaf = arguments.get(name, ir.Q)
        args = (ir.TRUE, ir.Q, ir.K) if name == "where" else (leaf,) * op.arity
        assert back(ir.make(name, args)) is ir.make(name, args), name


def test_brackets_only_where_needed():
    q, k = ir.Q, ir.K
    assert repr((q - k) - (k - q)) == "q_idx - kv_idx - (kv_idx - q_idx)"
    assert repr(((q < k) & (k < q)) | ~(q <= k)) == "(q_idx < kv_idx) & (kv_idx < q_idx) | ~(q_idx <= kv_idx)"
    assert repr(q // 2 * 3 % 5) == "q_idx // 2 * 3 % 5"
    assert repr(-(q + 1)) == "-(q_idx + 1)"


def test_captures_by_the_users_names():
    expr = ir.load(0, "int", ir.B, ir.Q) < ir.scalar(0, "int") + ir.load(1, "int")
    assert ir.show(expr) == "t0[b, q_idx] < s0 + t1[()]"
    assert ir.show(expr, {"t0": "doc", "s0": "window", "t1": "offset", "q_idx": "q"}) == "doc[b, q] < window + offset"
    assert repr(ir.search(0, "left", ir.B, ir.Q)) == "left(t0, b, q_idx)"
    assert ir.parse("left(t0, b, q_idx)", ["int"]) is ir.search(0, "left", ir.B, ir.Q)


@pytest.mark.parametrize(
    "text",
    ["q_idx.real", "__import__('os')", "q_idx < kv_idx < 3", "t1[q_idx]", "s0", "exit()", "[1]", "'a'", "q_idx if b else h", "+q_idx"],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        ir.parse(text, ["int"])
