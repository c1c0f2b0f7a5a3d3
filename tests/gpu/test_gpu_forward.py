"""The generated kernels on a real GPU against the float64 reference: the zoo, scores, head dims, dtypes, layouts, random predicates."""

import math
from dataclasses import astuple, replace

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from strategies import predicates

import flexmask
from flexmask import masks, reference, scores

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2.5e-2, torch.float32: 2e-5}


def tensors(B, Hq, Hkv, Q, KV, D, Dv, dtype, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, device="cuda").to(dtype)
    return make(B, Hq, Q, D), make(B, Hkv, KV, D), make(B, Hkv, KV, Dv)


def check(q, k, v, mask=None, score=None, gqa=False):
    with torch.no_grad():
        out, lse = flexmask.attention(q, k, v, mask=mask, score=score, enable_gqa=gqa, return_lse=True)
        want, want_lse = reference.attention(q.double(), k.double(), v.double(), mask, score, enable_gqa=gqa, return_lse=True)
    tolerance = TOLERANCE[q.dtype]
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", zoo.MASKS)
def test_zoo_masks(name):
    B, H, Q, KV = 2, 4, 333, 401
    check(*tensors(B, H, H, Q, KV, 64, 64, torch.bfloat16), zoo.MASKS[name](B, H, Q, KV, device="cuda"))


@pytest.mark.parametrize("name", zoo.MASKS)
def test_tile_states_are_those_of_the_cpu(name):
    B, H, Q, KV = 2, 2, 333, 401
    for block in ((64, 64), (128, 48), (16, 16)):
        there = zoo.MASKS[name](B, H, Q, KV, device="cuda").block_mask(Q, KV, B, H, block).states()
        assert torch.equal(there.cpu(), zoo.MASKS[name](B, H, Q, KV).block_mask(Q, KV, B, H, block).states())


@pytest.mark.parametrize("name", zoo.SCORES)
def test_zoo_scores(name):
    B, H, Q, KV = 2, 4, 150, 201
    check(*tensors(B, H, H, Q, KV, 64, 64, torch.float16), masks.local_window(90), zoo.SCORES[name](B, H, Q, KV, device="cuda"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "dims", [(16, 16), (32, 32), (40, 24), (64, 64), (80, 80), (96, 96), (128, 64), (128, 128), (192, 128), (256, 256)], ids=str
)
def test_head_dims_and_dtypes(dims, dtype):
    doc = torch.arange(300, device="cuda", dtype=torch.int32) // 77
    check(*tensors(2, 4, 2, 300, 300, *dims, dtype), masks.causal & masks.document(doc), gqa=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_score_and_evaluated_mask_together(dim, dtype):
    check(*tensors(1, 4, 1, 257, 300, dim, dim, dtype), masks.dilated(100, 3), scores.softcap(5.0), gqa=True)


@pytest.mark.parametrize("length", [1, 2, 17, 63, 64, 65, 127, 128, 129, 255, 300, 1000])
def test_lengths(length):
    check(*tensors(2, 2, 2, length, length, 64, 64, torch.bfloat16), masks.causal)
    check(*tensors(2, 2, 2, length, length + 13, 64, 64, torch.bfloat16))
    check(*tensors(2, 2, 2, 1, length, 64, 64, torch.bfloat16), masks.sliding_window(9))


@pytest.mark.parametrize("ascending", [True, False])
def test_documents_whether_they_ascend_or_not(ascending):
    doc = torch.randint(0, 5, (2, 500), device="cuda", dtype=torch.int32)
    doc = doc.sort(-1).values if ascending else doc
    check(*tensors(2, 2, 2, 500, 500, 64, 64, torch.bfloat16), masks.document(doc))


def test_layouts():
    q, k, v = tensors(2, 8, 2, 200, 200, 64, 64, torch.bfloat16)
    turned = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    check(turned(q), turned(k), turned(v), masks.causal, gqa=True)
    check(q, k[:1], v[:1], masks.causal, gqa=True)
    check(q[:, :, ::2], k[:, :, 1:], v[:, :, 1:], masks.causal, gqa=True)
    wide = torch.randn(2, 8, 200, 3 * 64, device="cuda", dtype=torch.bfloat16)
    check(*wide.chunk(3, -1), masks.causal)
    check(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, masks.causal, gqa=True)


def test_nothing_is_waited_for():
    """A call whose kernel is built neither syncs nor copies to the host, whatever the documents are."""
    q, k, v = tensors(2, 2, 2, 256, 256, 64, 64, torch.bfloat16)
    make = lambda: masks.causal & masks.document(torch.arange(256, device="cuda", dtype=torch.int32) // 50)
    attn = flexmask.compile(make())
    attn(q, k, v)
    fresh = flexmask.compile(make())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = fresh(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out, attn(q, k, v))


def test_new_lengths_and_windows_use_the_same_kernel():
    from flexmask.runtime.forward import Kernel
    from flexmask.runtime.store import default_store

    default_store().clear()
    attn = lambda n, w: flexmask.attention(*tensors(1, 2, 2, n, n, 64, 64, torch.bfloat16), mask=masks.sliding_window(w))
    attn(200, 30)
    kernels = [made[0] for made in default_store()._kernels.values() if isinstance(made, list) and isinstance(made[0], Kernel)]
    assert len(kernels) == 1
    kernel = kernels[0]
    compiled = lambda: sum(len(cache[0]) for cache in kernel.module.attention_forward.device_caches.values())
    before, first = flexmask.cache_info(), compiled()
    for n, w in ((201, 31), (512, 16), (1, 1), (64, 1000)):
        attn(n, w)
    assert flexmask.cache_info()["builds"] == before["builds"]
    assert 1 <= first <= compiled() <= first + 1, "Triton compiled anew for a length"


def test_nan_stays_in_its_row():
    q, k, v = tensors(1, 2, 2, 130, 130, 64, 64, torch.bfloat16)
    q[0, 0, 70] = math.nan
    out = flexmask.attention(q, k, v, mask=masks.causal)
    assert out[0, 0, 70].isnan().all()
    out[0, 0, 70] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("empty", ["B", "H", "Q", "KV"])
def test_empty_tensors(empty):
    sizes = {"B": 2, "H": 2, "Q": 3, "KV": 5} | {empty: 0}
    q = torch.randn(sizes["B"], sizes["H"], sizes["Q"], 64, device="cuda", dtype=torch.float16)
    k = torch.randn(sizes["B"], sizes["H"], sizes["KV"], 64, device="cuda", dtype=torch.float16)
    out, lse = flexmask.attention(q, k, k, mask=masks.causal, return_lse=True)
    assert out.shape == q.shape and (out == 0).all() and (lse == -math.inf).all()


def test_float64_is_refused():
    with pytest.raises(flexmask.BackendError, match="float16, bfloat16 or float32"):
        flexmask.attention(*tensors(1, 1, 1, 8, 8, 16, 16, torch.float64))


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(predicates())
def test_random_predicates(predicate):
    B, H, Q, KV = astuple(predicate.sizes)
    mask = predicate.mask()
    q, k, v = tensors(B, H, H, Q, KV, 32, 32, torch.float16)
    on_cpu = reference.attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), mask)
    there = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in predicate.captures.items()}
    out = flexmask.attention(q, k, v, mask=replace(predicate, captures=there).mask())
    torch.testing.assert_close(out.double().cpu(), on_cpu, atol=4e-3, rtol=4e-3)
