"""The meaning of an expression: on Python numbers and on tensors alike."""

from __future__ import annotations

import bisect
import itertools

import pytest
import torch
from hypothesis import given, settings
from ir_expressions import POINTS, at_point, expressions, on_grid

from flexmask import ir

q, k = ir.Q, ir.K


@pytest.mark.parametrize("kind", ["bool", "int"])
def test_numbers_and_tensors_agree(kind):
    @given(expressions(kind, 4))
    @settings(max_examples=200, deadline=None)
    def check(expr):
        assert on_grid(expr).tolist() == [at_point(expr, point) for point in POINTS]

    check()


@given(expressions("float", 4))
@settings(max_examples=150, deadline=None)
def test_floats_agree_to_float32(expr):
    wanted = torch.tensor([float(at_point(expr, point)) for point in POINTS])
    torch.testing.assert_close(on_grid(expr).float(), wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("op", ["floordiv", "mod"])
def test_division_rounds_down_for_negatives(op):
    values = range(-7, 8)
    for x, y in itertools.product(values, values):
        if y:
            expr = ir.make(op, (q, k))
            assert ir.evaluate(expr, ir.Env({"q_idx": x, "kv_idx": y})) == (x // y if op == "floordiv" else x % y)
            tensors = {"q_idx": torch.tensor([x]), "kv_idx": torch.tensor([y])}
            assert ir.evaluate(expr, ir.Env(tensors)).item() == (x // y if op == "floordiv" else x % y)


def test_shifts_and_bits_of_negatives():
    for op, python in [("lshift", int.__lshift__), ("rshift", int.__rshift__), ("bitand", int.__and__), ("bitor", int.__or__)]:
        for x, y in itertools.product(range(-5, 6), range(4)):
            tensors = {"q_idx": torch.tensor([x]), "kv_idx": torch.tensor([y])}
            assert ir.evaluate(ir.make(op, (q, k)), ir.Env(tensors)).item() == python(x, y)


def test_loads_broadcast_and_count_from_the_end():
    table = torch.arange(12).view(3, 4)
    expr = ir.load(0, "int", q, k - 4)
    rows, columns = torch.arange(3).view(3, 1), torch.arange(4).view(1, 4)
    assert torch.equal(ir.evaluate(expr, ir.Env({"q_idx": rows, "kv_idx": columns}, (table,))), table)
    assert ir.evaluate(expr, ir.Env({"q_idx": 1, "kv_idx": 2}, (table,))) == table[1, 2]
    with pytest.raises(IndexError):
        ir.evaluate(expr, ir.Env({"q_idx": 3, "kv_idx": 2}, (table,)))
    with pytest.raises(IndexError):
        ir.evaluate(expr, ir.Env({"q_idx": rows + 1, "kv_idx": columns}, (table,)))


def test_a_load_without_indices_is_one_number():
    assert ir.evaluate(ir.load(0, "float"), ir.Env(tensors=(torch.tensor(2.5),))) == 2.5
    mixed = ir.make("mul", (ir.load(0, "float"), q))
    assert ir.evaluate(mixed, ir.Env({"q_idx": torch.arange(3)}, (torch.tensor(2.5),))).tolist() == [0.0, 2.5, 5.0]


def test_narrow_tables_do_not_wrap_around():
    table = torch.tensor([200, 100], dtype=torch.uint8)
    expr = ir.load(0, "int", q) + ir.load(0, "int", q) - 300
    assert ir.evaluate(expr, ir.Env({"q_idx": torch.arange(2)}, (table,))).tolist() == [100, -100]


@pytest.mark.parametrize("side", ["left", "right"])
def test_search_counts_smaller_entries(side):
    table = [0, 0, 2, 2, 2, 5]
    count = bisect.bisect_left if side == "left" else bisect.bisect_right
    targets = list(range(-1, 8))
    expr = ir.search(0, side, q)
    tensor = torch.tensor(table, dtype=torch.int32)
    assert ir.evaluate(expr, ir.Env({"q_idx": torch.tensor(targets)}, (tensor,))).tolist() == [count(table, t) for t in targets]
    assert [int(ir.evaluate(expr, ir.Env({"q_idx": t}, (tensor,)))) for t in targets] == [count(table, t) for t in targets]


@pytest.mark.parametrize("side", ["left", "right"])
def test_search_in_one_row_a_batch_entry(side):
    table = torch.tensor([[0, 0, 1, 3], [1, 2, 2, 2]])
    count = bisect.bisect_left if side == "left" else bisect.bisect_right
    expr = ir.search(0, side, ir.B, q)
    batch, targets = torch.arange(2).view(2, 1), torch.arange(5).view(1, 5)
    wanted = [[count(row, t) for t in range(5)] for row in table.tolist()]
    assert ir.evaluate(expr, ir.Env({"b": batch, "q_idx": targets}, (table,))).tolist() == wanted
    for b, t in itertools.product(range(2), range(5)):
        assert int(ir.evaluate(expr, ir.Env({"b": b, "q_idx": t}, (table,)))) == wanted[b][t]


def test_search_for_an_entry_of_the_table_itself():
    """Where a row's document starts: left(doc, b, doc[b, q_idx])."""
    table = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 2]])
    expr = ir.search(0, "left", ir.B, ir.load(0, "int", ir.B, q))
    indices = {"b": torch.arange(2).view(2, 1, 1, 1), "q_idx": torch.arange(4).view(1, 1, 4, 1)}
    shaped = {"b": indices["b"].view(2, 1), "q_idx": indices["q_idx"].view(1, 4)}
    assert ir.evaluate(expr, ir.Env(shaped, (table,))).tolist() == [[0, 0, 2, 2], [0, 1, 1, 1]]


def test_casts_round_and_wrap_as_torch_does():
    third = ir.const(1 / 3)
    assert ir.evaluate(ir.make("cast", (third,), "bfloat16"), ir.Env()) == torch.tensor(1 / 3, dtype=torch.bfloat16).item()
    assert ir.evaluate(ir.make("cast", (ir.const(-2.7),), "int64"), ir.Env()) == -2
    assert ir.evaluate(ir.make("cast", (q,), "bool"), ir.Env({"q_idx": torch.tensor([0, -1])})).tolist() == [False, True]
    assert ir.evaluate(ir.make("cast", (q < 1,), "int32"), ir.Env({"q_idx": torch.tensor([0, 1])})).dtype is torch.int64


@pytest.mark.parametrize("name", [name for name, op in ir.OPS.items() if op.result == "float" and op.arity == 1])
def test_functions_on_numbers_and_tensors(name):
    values = [0.1, 0.5, 1.0, 2.5]
    expr = ir.make(name, (ir.SCORE,))
    wanted = ir.evaluate(expr, ir.Env({"score": torch.tensor(values, dtype=torch.float64)})).tolist()
    assert [ir.evaluate(expr, ir.Env({"score": v})) for v in values] == pytest.approx(wanted)
