"""Sinks, dropout and greatest scores on a real GPU against the float64 reference, and that no call waits for the GPU."""

import pytest
import torch

import flexmask
from flexmask import masks, reference, scores
from flexmask.runtime import backward, forward
from flexmask.runtime.checks import check_inputs
from flexmask.runtime.extras import Extras
from flexmask.runtime.request import Request
from flexmask.runtime.store import default_store

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-4}
SHUFFLED = flexmask.mask(lambda b, h, q_idx, kv_idx: (q_idx >= 9) & ((kv_idx * 7 + q_idx * 3 + h) % 5 < 2))


def tensors(B, Hq, Hkv, Q, KV, D, Dv, dtype, kv_batch=None):
    """q, k, v, dout, dlse, sinks, seed."""
    g = torch.Generator(device="cuda").manual_seed(0)
    shapes = (B, Hq, Q, D), (kv_batch or B, Hkv, KV, D), (kv_batch or B, Hkv, KV, Dv), (B, Hq, Q, Dv)
    made = [torch.randn(*shape, generator=g, device="cuda").to(dtype) for shape in shapes]
    sinks = torch.linspace(-2, 3, Hq, device="cuda")
    return *made, torch.randn(B, Hq, Q, generator=g, device="cuda"), sinks, torch.tensor([1234567890123456789], device="cuda")


def request_of(q, k, v, mask, score):
    return Request(*(None if mod is None else mod.traced() for mod in (mask, score)), check_inputs(q, k, v, True))


def ours(given, mask, score, p):
    q, k, v, dout, dlse, sinks, seed = given
    request, extras, scale = request_of(q, k, v, mask, score), Extras(sinks, p, seed if p else None, True), q.shape[-1] ** -0.5
    found = forward.run_triton(default_store(), request, q, k, v, scale, extras)
    saved = backward.Saved(q, k, v, found.out, found.lse)
    grads = backward.run_triton(default_store(), request, saved, dout, dlse, scale, [], extras)
    return {**found._asdict(), "dq": grads.dq, "dk": grads.dk, "dv": grads.dv, "sinks": grads.sinks}


def expected(given, mask, score, p):
    q, k, v, dout, dlse, sinks, seed = (x.double() if x.is_floating_point() else x for x in given)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    out, lse, peaks = reference.attention(
        q, k, v, mask, score, enable_gqa=True, return_lse=True, return_max_scores=True, sinks=sinks, dropout_p=p, seed=seed
    )
    grads = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), leaves)
    return {"out": out, "lse": lse, "peaks": peaks, **dict(zip(("dq", "dk", "dv", "sinks"), grads, strict=True))}


def check(given, mask=None, score=None, p=0.2):
    """Everything within the tolerance of its largest entry."""
    found, want = ours(given, mask, score, p), expected(given, mask, score, p)
    for name, value in found.items():
        theirs, here = want[name].detach().double(), value.double()
        assert torch.equal(theirs.isfinite(), here.isfinite()), name
        theirs, here = (x.masked_fill(~theirs.isfinite(), 0) for x in (theirs, here))
        assert ((here - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)).item() < TOLERANCE[given[0].dtype], name


@pytest.mark.parametrize("p", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("mask", [None, masks.causal, masks.sliding_window(90), SHUFFLED], ids=["full", "causal", "window", "evaluated"])
def test_masks(mask, p):
    check(tensors(2, 4, 2, 333, 401, 64, 64, torch.bfloat16), mask, None, p)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_head_dims_and_dtypes(dims, dtype):
    check(tensors(1, 4, 1, 300, 300, *dims, dtype), masks.causal)


@pytest.mark.parametrize("mask", [masks.causal, SHUFFLED], ids=["causal", "evaluated"])
def test_scores(mask):
    check(tensors(1, 2, 2, 200, 230, 128, 128, torch.float16), mask, scores.softcap(5.0))


@pytest.mark.parametrize("ascending", [True, False])
def test_kernels_that_take_turns(ascending):
    doc = torch.randint(0, 5, (2, 500), device="cuda", dtype=torch.int32)
    doc = doc.sort(-1).values if ascending else doc
    check(tensors(2, 4, 2, 500, 500, 64, 64, torch.bfloat16), masks.causal & masks.document(doc))


def test_keys_shared_by_the_batch():
    check(tensors(3, 4, 2, 100, 200, 64, 64, torch.bfloat16, kv_batch=1), masks.causal)


def test_a_graph_draws_anew_where_its_seed_changes():
    q, k, v, dout, dlse, sinks, seed = tensors(1, 4, 4, 256, 256, 64, 64, torch.bfloat16)
    request, extras = request_of(q, k, v, masks.causal, None), Extras(sinks, 0.3, seed, True)

    def step():
        found = forward.run_triton(default_store(), request, q, k, v, 0.125, extras)
        saved = backward.Saved(q, k, v, found.out, found.lse)
        return *found, *backward.run_triton(default_store(), request, saved, dout, dlse, 0.125, [], extras)[:3]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True)), value
