"""Expressions: interned, hashed by structure, walked and rebuilt."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from ir_expressions import SCALAR_KINDS, TENSOR_KINDS, expressions

from flexmask import ir

q, k = ir.Q, ir.K


def test_equal_expressions_are_one_object():
    assert (q - k < 4) is (q - k < 4)
    assert ir.const(0.0) is not ir.const(-0.0) and ir.const(float("nan")) is ir.const(float("nan"))
    assert ir.const(1) is not ir.const(True) and ir.const(1) is not ir.const(1.0)
    assert ir.scalar(0, "int") is not ir.scalar(0, "float")
    assert ir.load(0, "int", q) is not ir.load(0, "float", q)


def test_an_expression_has_no_truth_value():
    with pytest.raises(TypeError, match="compare with `is`"):
        bool(q < k)


def test_kinds():
    assert (q + k).kind == "int" and (q < k).kind == "bool"
    assert ir.make("add", (q, ir.const(0.5))).kind == "float"
    assert ir.make("where", (ir.TRUE, ir.TRUE, ir.FALSE)).kind == "bool"
    assert ir.make("where", (ir.TRUE, q, ir.const(0.5))).kind == "float"
    assert ir.make("cast", (q,), "bfloat16").kind == "float"
    with pytest.raises(ValueError, match="add takes 2 arguments, got 1"):
        ir.make("add", (q,))


def test_walk_yields_each_node_once_and_arguments_first():
    expr = (q - k < 4) & (q - k < 5)
    nodes = list(ir.walk(expr))
    assert len(nodes) == len(set(nodes)) and nodes[-1] is expr
    assert [repr(n) for n in nodes[:3]] == ["q_idx", "kv_idx", "q_idx - kv_idx"]


def test_substitute():
    assert ir.substitute(q - k < 4, {q: q + 1}) is (q + 1 - k < 4)
    table = ir.load(0, "int", q)
    assert repr(ir.substitute(table < k, {q: k})) == "t0[kv_idx] < kv_idx"
    assert ir.uses(table, q) and not ir.uses(table, k)


@given(expressions("bool", 4))
@settings(max_examples=100, deadline=None)
def test_rebuilding_without_change_gives_the_same_node(expr):
    assert ir.rebuild(expr, lambda e: e) is expr


def test_digests_tell_structure_and_kinds():
    texts = ["q_idx < t0[kv_idx]", "q_idx < t1[kv_idx]", "q_idx <= t0[kv_idx]"]
    expressions_ = [ir.parse(t, ["int", "int"]) for t in texts] + [ir.parse(texts[0], ["float"])]
    assert len({ir.digest(e) for e in expressions_}) == 4
    assert ir.digest(q < k) != ir.digest(q < k, "sm_90")


def test_digests_are_the_same_in_another_process():
    text = "(q_idx - kv_idx < s0) & (t0[b, q_idx] == t0[b, kv_idx]) | (t2[1, 0] < 0.5)"
    program = f"from flexmask import ir; print(ir.digest(ir.parse({text!r}, {TENSOR_KINDS!r}, {SCALAR_KINDS!r})))"
    there = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert there.stdout.strip() == ir.digest(ir.parse(text, TENSOR_KINDS, SCALAR_KINDS))


def test_expressions_travel_as_text_only():
    import pickle

    with pytest.raises(TypeError, match=r"ir\.show and ir\.parse"):
        pickle.dumps(q < k)
