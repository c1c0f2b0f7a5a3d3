"""Gradients on a real GPU, thousands of programs at once: the same bits at every run, and near those that are not."""

import pytest
import torch

import flexmask
from benchmarks import masks as benchmark
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


def drawn(dim, kv_heads=HEADS, length=LENGTH, dtype=torch.bfloat16):
    """q, k, v and dout."""
    g = torch.Generator(device="cuda").manual_seed(0)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return [torch.randn(BATCH, n, length, dim, generator=g, device="cuda").to(dtype).requires_grad_() for n in heads]


def differ(found, wanted):
    """How far gradients are from others, by the root of the mean square."""
    return max(float((x.double() - y.double()).norm() / y.double().norm()) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kv_heads", [HEADS, 4])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", benchmark.NAMES)
def test_gradients_of_q_k_and_v_are_the_same_bits_at_every_run(name, dim, kv_heads):
    mask, (q, k, v, dout) = benchmark.build(name, 8192, "cuda"), drawn(dim, kv_heads, 8192)
    attn, free = (flexmask.compile(mask, enable_gqa=True, deterministic=wanted) for wanted in (True, False))
    out = attn(q, k, v)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for _ in range(TIMES):
        again = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert differ(first, torch.autograd.grad(free(q, k, v), (q, k, v), dout)) < 1e-3
    if torch.cuda.get_device_capability() == (9, 0):
        kernels = [line for line in attn.explain(q, k, v).splitlines() if line.split()[:1] == ["gradients"]]
        assert kernels and all("hopper backward" in line and "deterministic" in line for line in kernels), kernels


@pytest.mark.parametrize("length", [2, 63, 129, 1000, 4097])  # of a single row dq and dk are zero but for rounding
def test_lengths_that_are_no_multiples_of_tiles(length):
    q, k, v, dout = drawn(128, length=length)
    attn, free = (flexmask.compile(masks.causal, deterministic=wanted) for wanted in (True, False))
    found, again, wanted = (torch.autograd.grad(each(q, k, v), (q, k, v), dout) for each in (attn, attn, free))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert differ(found, wanted) < 1e-3


def test_streams_at_once_do_not_wait_for_each_other():
    attn, streams, found = flexmask.compile(masks.sliding_window(500), deterministic=True), [torch.cuda.Stream() for _ in range(3)], []
    q, k, v, dout = drawn(64)
    wanted = torch.autograd.grad(attn(q, k, v), (q, k, v), dout)
    torch.cuda.synchronize()
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            found.append(torch.autograd.grad(attn(q, k, v), (q, k, v), dout))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for some in found for a, b in zip(some, wanted, strict=True))


def test_maps_made_again_in_a_graph_have_their_ranks_made_again():
    ids = torch.zeros(LENGTH, device="cuda", dtype=torch.int32)
    attn = flexmask.compile(masks.causal & masks.document(ids), deterministic=True)
    q, k, v, dout = drawn(64)
    torch.autograd.grad(attn(q, k, v), (q, k, v), dout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attn.update_maps()
        found = torch.autograd.grad(attn(q, k, v), (q, k, v), dout)
    for size in (700, 1500, 300):
        ids.copy_(torch.arange(LENGTH, device="cuda") // size)
        graph.replay()
        again = flexmask.compile(masks.causal & masks.document(ids.clone()), deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(again(q, k, v), (q, k, v), dout), strict=True))


def test_sums_of_floats_are_not_the_same_at_every_run():
    """If they were, the test above would show nothing."""
    run = everything(*CASES["few entries"], None, torch.bfloat16, 64)
    first = run(False)
    assert any(not torch.equal(first[3], run(False)[3]) for _ in range(10))
