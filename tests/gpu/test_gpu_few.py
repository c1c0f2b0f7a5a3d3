"""The kernels for few queries on a real GPU against the float64 reference: the zoo, sizes, dtypes, extras, gradients, graphs."""

from dataclasses import replace

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Sizes, predicates

import flexmask
from flexmask import masks, reference, scores

pytestmark = pytest.mark.gpu
# of the greatest entry, as means of thousands of values are small
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 2e-4}
BF16 = torch.bfloat16


def tensors(B, Hq, Hkv, Q, KV, D=128, Dv=128, dtype=BF16, kv_batch=None, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    shapes = (B, Hq, Q, D), (kv_batch or B, Hkv, KV, D), (kv_batch or B, Hkv, KV, Dv)
    return [torch.randn(*shape, generator=g, device="cuda").to(dtype) for shape in shapes]


def close(found, want, tolerance):
    greatest = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    torch.testing.assert_close(found.double(), want.double(), rtol=0, atol=tolerance * greatest)


def check(q, k, v, mask=None, score=None, **options):
    options |= {"enable_gqa": q.shape[1] != k.shape[1], "return_lse": True}
    with torch.no_grad():
        found = flexmask.attention(q, k, v, mask=mask, score=score, **options)
        want = reference.attention(q.double(), k.double(), v.double(), mask, score, **options)
    for one, other in zip(found, want, strict=True):
        close(one, other, TOLERANCE[q.dtype])


def told(mask, tensors):
    return flexmask.compile(mask, enable_gqa=True).explain(*tensors)


# (B, Hq, Hkv, Q, KV): what explain says of the plan
SIZES = {
    (1, 32, 8, 1, 8192): ("up to 4 heads a tile", "rows split"),
    (1, 8, 8, 1, 4096): ("rows split",),
    (16, 32, 8, 5, 1500): ("up to 4 heads a tile",),
    (2, 40, 8, 3, 3001): ("up to 8 heads a tile", "rows split"),
    (1, 64, 1, 2, 2049): ("up to 64 heads a tile", "rows split"),
    (1, 8, 2, 33, 4097): ("rows split",),
    (3, 4, 2, 16, 1024): ("up to 2 heads a tile", "rows split"),
    (1, 2, 1, 300, 20000): ("rows split",),
    (2, 32, 8, 64, 3001): ("2 heads a tile", "rows split"),
    (16, 32, 8, 64, 1500): ("2 heads a tile",),
    (1, 32, 8, 32, 3001): (" 4 heads a tile", "rows split"),
    (2, 64, 8, 13, 2001): (" 8 heads a tile", "rows split"),
    (16, 16, 1, 8, 1500): (" 16 heads a tile",),
    (1, 6, 3, 170, 4000): ("2 heads a tile", "rows split"),
    (1, 32, 8, 256, 5000): ("rows split",),
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes):
    _, _, _, q_len, kv_len = sizes
    given = tensors(*sizes)
    for mask in (None, masks.at_offset(masks.causal, kv_len - q_len), masks.at_offset(masks.sliding_window(1100), kv_len - q_len)):
        check(*given, mask)
        text = told(mask, given)
        assert all(part in text for part in SIZES[sizes]), text


@pytest.mark.parametrize("name", zoo.MASKS)
@pytest.mark.parametrize("q_len", [1, 7, 29, 60, 150])
def test_zoo_masks(name, q_len):
    B, H, KV = 2, 8, 1333
    given = tensors(B, H, 2, q_len, KV, 64, 64)
    mask = zoo.MASKS[name](B, H, q_len, KV, device="cuda")
    check(*given, mask)
    assert "rows split" in told(mask, given)


@pytest.mark.parametrize("name", zoo.SCORES)
def test_zoo_scores(name):
    B, H, KV = 2, 8, 1201
    for Q in (5, 31, 64):
        score = zoo.SCORES[name](B, H, Q, KV, device="cuda")
        check(*tensors(B, H, 2, Q, KV, 64, 64, torch.float16), masks.at_offset(masks.sliding_window(900), KV - Q), score)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (64, 64), (80, 80), (128, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_head_dims_and_dtypes(dims, dtype):
    lengths = torch.tensor([1500, 77], device="cuda")
    mask = masks.at_offset(masks.causal, lengths - 4)
    check(*tensors(2, 8, 2, 4, 1500, *dims, dtype), mask)
    check(*tensors(2, 8, 2, 61, 1500, *dims, dtype), mask)
    check(*tensors(2, 8, 2, 1, 1500, *dims, dtype), mask & masks.dilated(1000, 3), scores.softcap(5.0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("q_len", [1, 9, 30, 64, 140])
def test_sinks_dropout_and_a_negative_scale(q_len, dtype):
    given = tensors(2, 8, 2, q_len, 2100, 64, 64, dtype)
    late = masks.at_offset(masks.causal, 1000) & flexmask.mask(lambda b, h, q_idx, kv_idx: q_idx != 3)
    for mask in (None, late):
        check(*given, mask, sinks=torch.linspace(-2.0, 8.0, 8, device="cuda"))
        check(*given, mask, scale=-0.1)
        seed = torch.tensor([77], device="cuda")
        check(*given, mask, dropout_p=0.3, seed=seed, sinks=torch.linspace(-2.0, 3.0, 8, device="cuda"), return_max_scores=True)


@pytest.mark.parametrize("q_len", [3, 32, 64])
def test_layouts(q_len):
    q, k, v = tensors(2, 8, 2, q_len, 2000)
    turned = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    mask = masks.at_offset(masks.causal, 1997)
    check(turned(q), turned(k), turned(v), mask)
    check(q, k[:1], v[:1], mask)
    check(q[:, :, ::2], k[:, :, 1:], v[:, :, 1:], mask)
    odd = [torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    check(*odd, mask)


@pytest.mark.parametrize("q_len", [5, 64])
def test_gradients(q_len):
    q, k, v = (x.requires_grad_() for x in tensors(1, 8, 2, q_len, 3000, 64, 64))
    mask, dout = masks.at_offset(masks.causal, 2995), torch.randn(1, 8, q_len, 64, device="cuda", dtype=BF16)
    assert "rows split" in told(mask, (q, k, v))
    found = torch.autograd.grad(flexmask.attention(q, k, v, mask=mask, enable_gqa=True), (q, k, v), dout)
    doubled = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(reference.attention(*doubled, mask, enable_gqa=True), doubled, dout.double())
    for one, other in zip(found, want, strict=True):
        close(one, other, 2e-2)


def test_decoding_into_a_cache_step_by_step():
    """The cache has room for more than is in it; how many keys each batch entry has comes as a tensor."""
    cache_k, cache_v = tensors(2, 2, 2, 1, 4096)[1:]
    attn = flexmask.compile(masks.at_offset(masks.causal, torch.tensor([100, 3000], device="cuda")), enable_gqa=True)
    for step in range(6):
        q = tensors(2, 8, 2, 1, 1, seed=step)[0]
        lengths = torch.tensor([100 + step, 3000 + step], device="cuda")
        mask = masks.at_offset(masks.causal, lengths)
        want = reference.attention(q.double(), cache_k.double(), cache_v.double(), mask, enable_gqa=True)
        out = flexmask.compile(mask, enable_gqa=True)(q, cache_k, cache_v)
        close(out, want, TOLERANCE[BF16])
        if step == 0:
            assert torch.equal(out, attn(q, cache_k, cache_v))
    found = [flexmask.attention(q, cache_k[:, :, :n], cache_v[:, :, :n], enable_gqa=True) for n in range(4000, 4096, 13)]
    for n, out in zip(range(4000, 4096, 13), found, strict=True):
        want = reference.attention(q.double(), cache_k[:, :, :n].double(), cache_v[:, :, :n].double(), enable_gqa=True)
        close(out, want, TOLERANCE[BF16])


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("q_len", [3, 64, 200])
def test_the_same_bits_each_time_and_in_a_graph(q_len, documents):
    ids = torch.arange(5000, device="cuda") // 1900
    mask = masks.at_offset(masks.causal & masks.document(ids) if documents else masks.causal, 5000 - q_len)
    attn, (q, k, v) = flexmask.compile(mask, enable_gqa=True), tensors(1, 32, 8, q_len, 5000)
    first = attn(q, k, v)
    for _ in range(3):
        assert torch.equal(attn(q, k, v), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attn(q, k, v))
    check(q, k, v, mask)


SMALL = st.builds(Sizes, st.integers(1, 2), st.sampled_from([2, 6]), st.sampled_from([1, 3, 12, 33, 64, 130]), st.integers(1024, 2600))


@pytest.mark.parametrize("part", range(10))  # by several processes
@settings(max_examples=3, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(predicate=predicates(SMALL), kv_heads=st.sampled_from([1, 2]))
def test_random_predicates(part, predicate, kv_heads):
    s = predicate.sizes
    there = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in predicate.captures.items()}
    check(*tensors(s.B, s.H, kv_heads, s.Q, s.KV, 32, 32, torch.float16), replace(predicate, captures=there).mask())
