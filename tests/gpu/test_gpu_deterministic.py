"""Gradients of captured tables on a real GPU, thousands of programs at once: the same bits at every run, and near those of float sums."""

import pytest
import torch

import flexmask
from flexmask import masks
from flexmask.runtime import backward, forward
from flexmask.runtime.checks import check_inputs
from flexmask.runtime.request import Request
from flexmask.runtime.store import default_store

pytestmark = pytest.mark.gpu
BATCH, HEADS, LENGTH = 4, 16, 4096
TIMES = 4


def everything(make, shapes, mask, dtype, dim):
    """A function of `deterministic` that gives dq, dk, dv and the tables' gradients."""
    g = torch.Generator(device="cuda").manual_seed(0)
    shape = (BATCH, HEADS, LENGTH, dim)
    q, k, v, dout = (torch.randn(*shape, generator=g, device="cuda").to(dtype) for _ in range(4))
    tables = [torch.randn(*s, generator=g, device="cuda") * 0.1 for s in shapes]
    traced = flexmask.score(make(*tables)).traced()
    request = Request(None if mask is None else mask.traced(), traced, check_inputs(q, k, v, False))
    store, wanted = default_store(), range(len(traced.tensors))
    result = forward.run_triton(store, request, q, k, v, dim**-0.5)
    saved = backward.Saved(q, k, v, result.out, result.lse)

    def run(deterministic):
        found = backward.run_triton(store, request, saved, dout, None, dim**-0.5, wanted, deterministic=deterministic)
        return [found.dq, found.dk, found.dv, *found.tables.values()]

    return run


def slope(table):
    return lambda score, h, q_idx, kv_idx: score + table[h] * (kv_idx - q_idx) * 0.001


def distance(table):
    return lambda score, h, q_idx, kv_idx: score + table[h, torch.clamp(q_idx - kv_idx, 0, 128)]


def few_entries(table):
    return lambda score, q_idx, kv_idx: score * table[(q_idx * kv_idx) % 5]


def bias(table):
    return lambda score, q_idx, kv_idx: score + table[q_idx, kv_idx]


def several(gain, column, single):
    return lambda score, h, q_idx, kv_idx: torch.tanh(score * gain[h]) + column[q_idx] * column[-1 - kv_idx] + single[0] * score


CASES = {
    "slope": (slope, [(HEADS,)]),
    "distance": (distance, [(HEADS, 129)]),
    "few entries": (few_entries, [(5,)]),
    "bias": (bias, [(LENGTH, LENGTH)]),
    "several": (several, [(HEADS,), (LENGTH,), (1,)]),
}
MASKS = {
    "none": lambda: None,
    "causal": lambda: masks.causal,
    "unsorted documents": lambda: masks.document(torch.arange(LENGTH, device="cuda", dtype=torch.int32) % 7),
}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_at_every_run_and_near_float_sums(case, mask, dim):
    run = everything(*CASES[case], MASKS[mask](), torch.bfloat16, dim)
    first = run(True)
    for _ in range(TIMES - 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(True), strict=True))
    for fixed, floats in zip(first, run(False), strict=True):
        scale = floats.double().abs().max().clamp(min=1e-6)
        assert fixed.isfinite().all()
        assert ((fixed.double() - floats.double()).abs().max() / scale).item() < 2**-8  # a bit of bfloat16


def test_sums_of_floats_are_not_the_same_at_every_run():
    """If they were, the test above would show nothing."""
    run = everything(*CASES["few entries"], None, torch.bfloat16, 64)
    first = run(False)
    assert any(not torch.equal(first[3], run(False)[3]) for _ in range(10))
