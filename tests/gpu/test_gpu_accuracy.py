"""Rounding on a GPU: errors against float64 are at most 1.5 times those of FlexAttention's kernels in the same dtype."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flexmask
from flexmask import reference

pytestmark = pytest.mark.gpu

N = 1000
WORSE = 1.5


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 200)


def softcap(score, b, h, q_idx, kv_idx):
    return 20.0 * torch.tanh(score / 20.0)


def results(run, given, dout):
    out = run(*given)
    return out, *torch.autograd.grad(out, given, dout)


def errors(found, exact):
    return [(x.double() - want).square().mean().sqrt().item() for x, want in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("mask", "score"), [(causal, None), (window, None), (causal, softcap)])
def test_out_and_gradients_are_as_exact_as_flexattentions(mask, score, dtype):
    torch.manual_seed(0)
    given = tuple(torch.randn(1, 2, N, 64, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3))
    dout = torch.randn(1, 2, N, 64, dtype=dtype, device="cuda")
    wide = tuple(x.detach().double().requires_grad_() for x in given)
    block_mask, compiled = create_block_mask(mask, None, None, N, N, device="cuda"), torch.compile(flex_attention)
    exact = results(lambda q, k, v: reference.attention(q, k, v, mask, score), wide, dout.double())
    ours = errors(results(lambda q, k, v: flexmask.attention(q, k, v, mask=mask, score=score), given, dout), exact)
    theirs = errors(results(lambda q, k, v: compiled(q, k, v, score_mod=score, block_mask=block_mask), given, dout), exact)
    assert all(a <= WORSE * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
