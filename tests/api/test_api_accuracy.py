"""Rounding: errors against float64 are those of torch's own attention in the same dtype, or less."""

import pytest
import torch
import torch.nn.functional as F

import flexmask
from flexmask import masks, reference

N = 200
MASKS = {
    "causal": masks.causal,
    "window": masks.sliding_window(40),
    "documents": masks.document(torch.arange(N) // 70),
    "chosen": flexmask.mask(lambda q_idx, kv_idx: (q_idx * 7 + kv_idx * 5) % 11 < 6),
}
WORSE = 1.5  # times the root mean square error of the other


def results(run, given, dout):
    out = run(*given)
    return out, *torch.autograd.grad(out, given, dout)


def errors(found, exact):
    return [(x.double() - want).square().mean().sqrt().item() for x, want in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_out_and_gradients_are_as_exact_as_torchs(name, dtype):
    torch.manual_seed(0)
    mask, dense = MASKS[name], MASKS[name].to_dense(N, N)
    given = tuple(torch.randn(1, 2, N, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, 2, N, 64, dtype=dtype)
    wide = tuple(x.detach().double().requires_grad_() for x in given)
    exact = results(lambda q, k, v: reference.attention(q, k, v, mask), wide, dout.double())
    ours = errors(results(lambda q, k, v: flexmask.attention(q, k, v, mask=mask), given, dout), exact)
    theirs = errors(results(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense), given, dout), exact)
    assert all(a <= WORSE * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
