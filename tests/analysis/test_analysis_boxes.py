"""The tile test: EMPTY and FULL are proofs; the usual masks leave only PARTIAL tiles UNKNOWN."""

from __future__ import annotations

import pytest
import torch
from analysis_cases import BATCH, HEADS, Instance, check_boxes, instances, random_masks, read, true_states
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmask.analysis import EMPTY, FULL, UNKNOWN, Boxes, boxes, classify
from flexmask.ir import FALSE, TRUE

SIZES = [(1, 1), (8, 8), (4, 16), (16, 3), (5, 7)]


def states(mask: str, instance: Instance, block_q: int, block_kv: int) -> str:
    """The tiles of batch entry and head 0, drawn: . EMPTY, # FULL, ? UNKNOWN."""
    grid = Boxes.grid(instance.q_len, instance.kv_len, block_q, block_kv, BATCH, HEADS)
    found = classify(read(mask), grid, instance.tensors, instance.scalars)[0, 0]
    return "\n".join("".join({EMPTY: ".", FULL: "#", UNKNOWN: "?"}[x] for x in row) for row in found.tolist())


def test_causal_drawn():
    assert states("kv_idx <= q_idx", Instance(10, 12), 4, 3) == "??..\n#??.\n###?"


def test_window_drawn():
    assert states("(kv_idx <= q_idx) & (q_idx - kv_idx < 5)", Instance(12, 12), 2, 2) == (
        "?.....\n#?....\n?#?...\n.?#?..\n..?#?.\n...?#?"
    )  # fmt: skip


# masks whose tiles are all decided but the truly PARTIAL ones
EXACT = [
    "True", "False", "kv_idx <= q_idx", "q_idx - kv_idx < s0", "abs(q_idx - kv_idx) <= 3", "q_idx + s1 >= kv_idx",
    "q_idx + t6[h] >= kv_idx", "(kv_idx <= q_idx) & (q_idx - kv_idx < 5)", "3 * q_idx < 2 * kv_idx + s1", "kv_idx < s2",
    "q_idx // 4 == kv_idx // 4", "(q_idx - kv_idx) // -3 >= 1", "t0[q_idx] == t0[kv_idx]", "t2[b, q_idx] == t2[b, kv_idx]",
    "t0[q_idx] < t2[0, kv_idx]", "kv_idx < t4[q_idx]", "t3[b, kv_idx]", "t3[b, q_idx]", "~t3[b, kv_idx]", "t5[q_idx, kv_idx]",
    "t5[kv_idx, q_idx]", "t5[q_idx // 3, kv_idx // 5]", "t7[kv_idx] > 0.25", "t1[kv_idx // 2] < 2", "kv_idx < q_len - 3",
    "(q_idx - kv_idx) % 64 < 5", "kv_idx < s2 + t6[h] * b", "q_idx >> 2 == kv_idx >> 2",
]  # fmt: skip


@pytest.mark.parametrize("mask", EXACT)
def test_only_partial_tiles_are_unknown(mask):
    for seed, (q_len, kv_len) in enumerate([(23, 23), (19, 30), (9, 2)]):
        for block_q, block_kv in SIZES:
            assert not check_boxes(read(mask), Instance(q_len, kv_len, seed), block_q, block_kv).any()


SOUND = [
    "float32(q_idx) / 3.0 < float32(kv_idx)", "tanh(t7[q_idx]) <= t7[kv_idx]", "exp(t7[kv_idx]) * 2.0 > 1.5",
    "log(t7[q_idx]) < t7[kv_idx]", "sqrt(t7[kv_idx]) >= 0.0", "1.0 / t7[kv_idx] < 2.0", "isnan(sqrt(t7[kv_idx]))",
    "floor(t7[kv_idx] * 3.0) == 1.0", "sin(t7[q_idx]) < 1.5", "where(t3[b, kv_idx], t7[q_idx], 0.5) <= 0.5",
    "int32(t7[q_idx] * 4.0) <= kv_idx - 3", "(q_idx & 6) < kv_idx", "(q_idx ^ kv_idx) < 8", "q_idx * kv_idx % 7 < 3",
    "abs(t7[q_idx] - t7[kv_idx]) < 0.5", "sign(t7[q_idx]) < 0.0", "min(max(sqrt(t7[q_idx]), 0.0), 1.0) <= 1.0",
    "q_idx % -4 < kv_idx % 3 - 3", "~(t7[q_idx] < t7[kv_idx])", "t4[(q_idx * kv_idx) % 5] < kv_idx", "(1 << (q_idx % 4)) < kv_idx",
    "float16(q_idx) == 3.0", "bfloat16(t7[q_idx]) < t7[q_idx]", "q_idx // (kv_idx - 4 + 5) == 0", "(t7[q_idx] > 0.0) ^ (kv_idx < q_idx)",
    "pow(q_idx, 2) < kv_idx", "rsqrt(float32(q_idx + 1)) < 0.5", "t7[q_idx] % 0.5 < 0.25", "bool(t7[kv_idx])", "bool(q_idx - kv_idx)",
]  # fmt: skip


@pytest.mark.parametrize("mask", SOUND)
def test_proofs_hold_for_every_operation(mask):
    for block_q, block_kv in SIZES:
        check_boxes(read(mask), Instance(19, 22, 3, False), block_q, block_kv)


@settings(max_examples=200)
@given(random_masks(scattered=0.4), instances, st.sampled_from(SIZES))
def test_random_masks(mask, instance, block):
    check_boxes(read(mask), instance, *block)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "mask",
    ["t7[kv_idx] < 5.0", "~(t7[kv_idx] < 5.0)", "max(t7[kv_idx], 0.0) <= 9.0", "t7[kv_idx] * 0.0 == 0.0", "t7[kv_idx] != t7[kv_idx]"],
)
def test_nan_and_infinity_prove_nothing(mask, bad):
    instance = Instance(8, 8)
    instance.tensors[7][5] = bad
    check_boxes(read(mask), instance, 4, 2)


def test_huge_integers_do_not_overflow():
    instance = Instance(8, 8)
    instance.tensors[1] = torch.full((9,), 2**62)
    for mask in ("t1[kv_idx] + t1[q_idx] < 0", "t1[kv_idx] * 4 == 0", "t1[kv_idx] > kv_idx", "t1[kv_idx] == t1[q_idx] - 1"):
        check_boxes(read(mask), instance, 4, 4)


def test_rows_in_chunks_are_the_rows_at_once(monkeypatch):
    instance, mask = Instance(24, 24, 5), read("(t0[q_idx] == t0[kv_idx]) & t5[q_idx, kv_idx] | (kv_idx < t4[q_idx])")
    grid = Boxes.grid(24, 24, 5, 3, BATCH, HEADS)
    whole = classify(mask, grid, instance.tensors, instance.scalars)
    monkeypatch.setattr(boxes, "_CELLS", 8)
    assert torch.equal(classify(mask, grid, instance.tensors, instance.scalars), whole)


def test_windows_of_unequal_sizes():
    """Boxes need not be a grid: here key ranges [0, 2], [3, 3], [4, 10]."""
    instance = Instance(11, 11, 1, False)
    lo, hi = torch.tensor([0, 3, 4]), torch.tensor([2, 3, 10])
    point = torch.zeros(1, dtype=torch.int64)
    given_boxes = Boxes(lo, hi, lo, hi, point, point, 7, 7, 11, 11)
    mask = read("t1[q_idx] <= t1[kv_idx]")
    keep, found = instance.keep(mask)[0, 0], classify(mask, given_boxes, instance.tensors)
    for i in range(3):
        for j in range(3):
            tile = keep[lo[i] : hi[i] + 1, lo[j] : hi[j] + 1]
            assert found[0, 0, i, j] == (FULL if tile.all() else UNKNOWN if tile.any() else EMPTY)


def test_shape_follows_what_the_mask_depends_on():
    instance, grid = Instance(9, 7), Boxes.grid(9, 7, 4, 4, BATCH, HEADS)
    shapes = {m: tuple(classify(read(m), grid, instance.tensors).shape) for m in ("kv_idx < 3", "t3[b, kv_idx]", "t6[h] < kv_idx")}
    assert list(shapes.values()) == [(1, 1, 3, 2), (BATCH, 1, 3, 2), (1, HEADS, 3, 2)]
    assert classify(TRUE, grid).eq(FULL).all() and classify(FALSE, grid).eq(EMPTY).all()
    assert classify(TRUE, Boxes.grid(0, 7, 4, 4)).shape == (1, 1, 0, 2)


def test_the_oracle_of_these_tests():
    assert true_states(torch.tensor([[True, True, False], [True, True, False]]), 2, 2).tolist() == [[2, 0]]
