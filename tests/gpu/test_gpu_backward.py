"""Gradients on a real GPU against the float64 reference: the zoo, scores and what they capture, head dims, dtypes, lengths."""

import pytest
import torch
import zoo

import flexmask
from flexmask import masks, reference, scores

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-4}


def tensors(B, Hq, Hkv, Q, KV, D, Dv, dtype, kv_batch=None):
    g = torch.Generator(device="cuda").manual_seed(0)
    shapes = (B, Hq, Q, D), (kv_batch or B, Hkv, KV, D), (kv_batch or B, Hkv, KV, Dv)
    return tuple(torch.randn(*shape, generator=g, device="cuda").to(dtype).requires_grad_() for shape in shapes)


def check(q, k, v, mask=None, score=None, tables=()):
    """Every gradient within the tolerance of its largest entry."""
    gqa, leaves = q.shape[1] != k.shape[1], (q, k, v, *tables)

    def of(run):
        out, lse = run()
        loss = (out.double() * torch.linspace(0.5, 2, out.shape[-1], device="cuda")).sum()
        return torch.autograd.grad(loss + lse.double().masked_fill(lse == -torch.inf, 0).sin().sum(), leaves, allow_unused=True)

    found = of(lambda: flexmask.attention(q, k, v, mask=mask, score=score, enable_gqa=gqa, return_lse=True))
    wide = [x.double() for x in (q, k, v)]
    want = of(lambda: reference.attention(*wide, mask, score, enable_gqa=gqa, return_lse=True))
    for name, ours, theirs in zip(("dq", "dk", "dv", *map(str, range(len(tables)))), found, want, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        scale = theirs.double().abs().max().clamp(min=1e-3)
        assert ours.isfinite().all(), name
        assert ((ours.double() - theirs.double()).abs().max() / scale).item() < TOLERANCE[q.dtype], name


@pytest.mark.parametrize("name", zoo.MASKS)
def test_zoo_masks(name):
    B, H, Q, KV = 1, 4, 333, 401
    check(*tensors(B, H, H, Q, KV, 64, 64, torch.bfloat16), zoo.MASKS[name](B, H, Q, KV, device="cuda"))


@pytest.mark.parametrize("name", zoo.SCORES)
def test_zoo_scores(name):
    B, H, Q, KV = 1, 4, 150, 201
    check(*tensors(B, H, H, Q, KV, 64, 64, torch.float16), masks.local_window(90), zoo.SCORES[name](B, H, Q, KV, device="cuda"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dims", [(16, 16), (40, 24), (64, 64), (96, 96), (128, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_head_dims_and_dtypes(dims, dtype):
    doc = torch.arange(300, device="cuda", dtype=torch.int32) // 77
    check(*tensors(2, 4, 2, 300, 300, *dims, dtype), masks.causal & masks.document(doc))


@pytest.mark.parametrize("length", [1, 2, 17, 63, 64, 65, 127, 128, 129, 255, 300, 1000])
def test_lengths(length):
    check(*tensors(1, 2, 2, length, length, 64, 64, torch.bfloat16), masks.causal)
    check(*tensors(1, 2, 1, length, length + 13, 64, 64, torch.bfloat16))
    check(*tensors(2, 2, 2, 5, length, 64, 64, torch.bfloat16, kv_batch=1), masks.sliding_window(9))


@pytest.mark.parametrize("ascending", [True, False])
def test_documents_whether_they_ascend_or_not(ascending):
    doc = torch.randint(0, 5, (2, 500), device="cuda", dtype=torch.int32)
    doc = doc.sort(-1).values if ascending else doc
    check(*tensors(2, 4, 2, 500, 500, 64, 64, torch.bfloat16), masks.causal & masks.document(doc))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_that_a_score_captures(dtype):
    slope = torch.randn(4, device="cuda", requires_grad=True)
    bias = torch.randn(4, 200, 230, device="cuda", dtype=dtype, requires_grad=True)

    @flexmask.score
    def biased(score, b, h, q_idx, kv_idx):
        return score + bias[h, q_idx, kv_idx] + slope[h] * (kv_idx - q_idx) * 0.01

    check(*tensors(2, 4, 2, 200, 230, 64, 64, dtype), masks.local_window(50), biased, (slope, bias))


def test_a_table_by_distance_is_summed_along_diagonals():
    table = torch.randn(4, 65, device="cuda", requires_grad=True)

    @flexmask.score
    def relative(score, h, q_idx, kv_idx):
        return score + table[h, torch.clamp(q_idx - kv_idx + 32, 0, 64)]

    check(*tensors(1, 4, 4, 300, 300, 64, 64, torch.float32), masks.local_window(90), relative, (table,))


def test_softcap_and_an_evaluated_mask():
    check(*tensors(1, 4, 1, 257, 300, 128, 128, torch.bfloat16), masks.dilated(100, 3), scores.softcap(5.0))
