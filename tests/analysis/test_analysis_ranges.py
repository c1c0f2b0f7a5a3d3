"""Ranges of index expressions: bounds always, and exact where said so."""

from __future__ import annotations

import pytest
import torch
from analysis_cases import Instance, read
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmask.analysis import IndexRange, index_range
from flexmask.ir import Env, evaluate

LEAVES = {"b": (0, 1), "h": (0, 3), "q_idx": (0, 9), "kv_idx": (0, 6), "q_len": (10, 10), "kv_len": (7, 7)}
SCALARS = [4, 7, 2, 0, -3]


def brute(text: str) -> tuple[int, int]:
    axes = {"b": (-1, 1, 1, 1), "h": (-1, 1, 1), "q_idx": (-1, 1), "kv_idx": (-1,)}
    indices = {name: torch.arange(LEAVES[name][0], LEAVES[name][1] + 1).view(shape) for name, shape in axes.items()}
    value = torch.as_tensor(evaluate(read(text), Env({**indices, "q_len": 10, "kv_len": 7}, Instance(10, 10).tensors, SCALARS)))
    return int(value.min()), int(value.max())


EXACT = [
    "q_idx", "q_idx - kv_idx + s1", "3 * q_idx - 2 * kv_idx + b", "q_idx + kv_idx - q_idx", "min(max(q_idx - kv_idx + 4, 0), 8)",
    "q_idx // 4", "(kv_idx - q_idx) // -3", "abs(q_idx - kv_idx)", "q_idx % 4", "(q_idx - kv_idx) % 5", "q_idx % 16", "q_idx * h",
    "min(q_idx, kv_idx)", "7", "q_idx // (h + 1)", "s0 * q_idx", "abs(q_idx + 3)", "q_len - 1 - q_idx", "q_idx >> 1", "2 * q_idx % 64",
]  # fmt: skip


@pytest.mark.parametrize("text", EXACT)
def test_exact_ranges(text):
    found = index_range(read(text), LEAVES, SCALARS)
    assert found == IndexRange(*brute(text), exact=True)


@pytest.mark.parametrize(
    "text",
    [
        "q_idx % 3 - q_idx",
        "where(q_idx < 3, q_idx, 2)",
        "abs(2 * q_idx - 9)",
        "2 * q_idx % 4",
        "q_idx * (q_idx - 5)",
        "max(q_idx, 9 - q_idx)",
    ],
)
def test_bounds_that_need_not_be_reached(text):
    found, (lo, hi) = index_range(read(text), LEAVES, SCALARS), brute(text)
    assert found is not None and not found.exact and found.lo <= lo and hi <= found.hi


@pytest.mark.parametrize(
    "text", ["t0[q_idx]", "t0[q_idx] + 1", "min(t1[q_idx], 3)", "int32(t7[q_idx])", "q_idx // (kv_idx - 3)", "q_idx ^ kv_idx"]
)
def test_data_has_no_range(text):
    assert index_range(read(text), LEAVES, SCALARS) is None


def test_an_index_without_a_range_is_an_error():
    with pytest.raises(KeyError):
        index_range(read("q_idx"), {})


@st.composite
def integers(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0:
        return draw(st.sampled_from(["q_idx", "kv_idx", "h", "b", "s0", "s4", "3", "-2", "1"]))
    x, y, d = (
        draw(integers(depth - 1)),
        draw(integers(draw(st.integers(0, depth - 1)))),
        draw(st.sampled_from(["2", "3", "-4", "s0", "s4"])),
    )
    return draw(st.sampled_from([
        f"({x} + {y})", f"({x} - {y})", f"({x} * {y})", f"({x} // {d})", f"({x} % {d})", f"min({x}, {y})", f"max({x}, {y})", f"abs({x})",
        f"where({x} < {y}, {x}, {y})", f"-{x}",
    ]))  # fmt: skip


@settings(max_examples=300)
@given(integers())
def test_random_index_expressions(text):
    found, (lo, hi) = index_range(read(text), LEAVES, SCALARS), brute(text)
    if found is not None:
        assert (found.lo, found.hi) == (lo, hi) if found.exact else (found.lo <= lo and hi <= found.hi)
