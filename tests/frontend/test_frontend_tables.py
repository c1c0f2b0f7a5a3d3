"""Indexing captured tensors: all at once, in steps, with `:` and `...`; what has been bound is remembered."""

from __future__ import annotations

import itertools

import pytest
import torch

from flexmask import ir
from flexmask.frontend import trace

table = torch.arange(2 * 3 * 4 * 5, dtype=torch.int32).view(2, 3, 4, 5)
strided = table.transpose(0, 3)[::2]
SIZES = (2, 3, 4, 5)


# fmt: off
WAYS = {
    "at once": (lambda b, h, q, k: table[b, h, q, k], "t0[b, h, q_idx, kv_idx]"),
    "in steps": (lambda b, h, q, k: table[b][h][q][k], "t0[b, h, q_idx, kv_idx]"),
    "two and two": (lambda b, h, q, k: table[b, h][q, k], "t0[b, h, q_idx, kv_idx]"),
    "last first": (lambda b, h, q, k: table[..., k][b][h, q], "t0[b, h, q_idx, kv_idx]"),
    "middle first": (lambda b, h, q, k: table[:, h][b, :, k][q], "t0[b, h, q_idx, kv_idx]"),
    "dots in the middle": (lambda b, h, q, k: table[b, ..., k][h, q], "t0[b, h, q_idx, kv_idx]"),
    "dots for nothing": (lambda b, h, q, k: table[b, h, ..., q, k], "t0[b, h, q_idx, kv_idx]"),
    "all of it": (lambda b, h, q, k: table[:][...][b, h, q, k], "t0[b, h, q_idx, kv_idx]"),
    "numbers": (lambda b, h, q, k: table[1, -1, q, -2], "t0[1, -1, q_idx, -2]"),
    "numbers in steps": (lambda b, h, q, k: table[1][-1][q, 0], "t0[1, -1, q_idx, 0]"),
    "expressions": (lambda b, h, q, k: table[b, h, 3 - q, (q + k) % 5], "t0[b, h, 3 - q_idx, (q_idx + kv_idx) % 5]"),
    "negative": (lambda b, h, q, k: table[b - 2, h, q, k - 5], "t0[b - 2, h, q_idx, kv_idx - 5]"),
    "only numbers": (lambda b, h, q, k: q + table[1, 2, 3, 4], "q_idx + t0[1, 2, 3, 4]"),
}
# fmt: on


def drawn(mod) -> tuple[torch.Tensor, str]:
    traced = trace(lambda score, b, h, q_idx, kv_idx: mod(b, h, q_idx, kv_idx), "score")
    indices = dict(zip(("b", "h", "q_idx", "kv_idx"), torch.meshgrid(*map(torch.arange, SIZES), indexing="ij"), strict=True))
    value = ir.evaluate(traced.expr, ir.Env(indices, traced.tensors, traced.scalars))
    assert traced.tensors == (table,) and not traced.volatile
    return value.expand(SIZES), repr(traced.expr.args[0])


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_index(name):
    mod, expected = WAYS[name]
    value, text = drawn(mod)
    assert text == expected
    for index in itertools.product(*map(range, SIZES)):
        assert value[index] == mod(*index)


def test_random_orders_of_binding():
    """Each dimension bound alone, in every order."""
    for order in itertools.permutations(range(4)):

        def mod(b, h, q, k, order=order):
            view, left = table, [0, 1, 2, 3]
            for axis in order:
                at = left.index(axis)
                view = view[(*[slice(None)] * at, (b, h, q, k)[axis])]
                left.remove(axis)
            return view

        assert drawn(lambda b, h, q, k, mod=mod: mod(b, h, q, k))[1] == "t0[b, h, q_idx, kv_idx]"


def test_a_strided_table_is_captured_as_it_is():
    traced = trace(lambda b, h, q, k: strided[k, h, q, b] > 3, "mask")
    assert traced.tensors[0] is strided and repr(traced.expr) == "3 < t0[kv_idx, h, q_idx, b]"


def test_a_view_knows_its_shape():
    def mod(b, h, q, k):
        view = table[b, :, q]
        assert view.dim() == view.ndim == 2 and view.dtype is torch.int32
        return k < view.shape[1] + view.size(0)

    traced = trace(mod, "mask")
    assert repr(traced.expr) == "kv_idx < s0 + s1" and traced.scalar_names == ("table_size_3", "table_size_1")


def test_torch_works_on_a_view_by_numbers():
    traced = trace(lambda b, h, q, k: table[0].sum() + table[1, 2].T[k, q] + (table[0, 0] * 2)[q, k] > 0, "mask")
    assert traced.volatile
    assert repr(traced.expr) == "0 < t0[()] + t1[kv_idx, q_idx] + t2[q_idx, kv_idx]"
    assert torch.equal(traced.tensors[1], table[1, 2].T)


def test_kinds_of_tables():
    for dtype, kind in [
        (torch.bool, "bool"),
        (torch.uint8, "int"),
        (torch.int16, "int"),
        (torch.bfloat16, "float"),
        (torch.float64, "float"),
    ]:
        values = torch.ones(5, dtype=dtype)
        expr = trace(lambda score, k, values=values: score + values[k], "score").expr
        load = next(node for node in ir.walk(expr) if node.op == "load")
        assert load.kind == kind


def test_a_column_of_a_parameter():
    weight = torch.nn.Parameter(torch.ones(4, 5))
    traced = trace(lambda score, q_idx, kv_idx: score * weight[q_idx][kv_idx], "score")
    assert traced.tensors[0] is weight and repr(traced.expr) == "score * t0[q_idx, kv_idx]"
