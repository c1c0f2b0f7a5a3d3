"""The Hopper kernels on a real GPU: masks of every way to mask a PARTIAL tile, in shapes that kernels get wrong, three times over."""

import pytest
import torch

import flexmask
from flexmask import masks, reference
from flexmask.runtime import device_map

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of compute capability 9.0"
    ),
]


def ids(n):
    return (torch.arange(n, device=DEVICE) * 7 // n).int()


def evicted(batch, heads, n):
    place = torch.arange(n, device=DEVICE)
    until = (place + 1 + (torch.rand(batch, heads, n, device=DEVICE) * (n - place)).long()).int()
    return masks.causal & flexmask.mask(lambda b, h, q_idx, kv_idx: q_idx < until[b, h, kv_idx])


def holes(q_idx, kv_idx):
    return ((q_idx < 100) | (q_idx >= 420)) & ((kv_idx < 150) | (kv_idx >= 300))


def three(q_idx, kv_idx):
    return (abs(q_idx - kv_idx) <= 70) | (kv_idx < 16) | (kv_idx >= 900) | (q_idx < 16)


# by batch, heads and the greater length
MASKS = {
    "full": lambda b, h, n: None,
    "causal": lambda b, h, n: masks.causal,
    "sliding": lambda b, h, n: masks.sliding_window(200),
    "document": lambda b, h, n: masks.document(flexmask.sorted(ids(n))),
    "causal document": lambda b, h, n: masks.causal & masks.document(flexmask.sorted(ids(n))),
    "causal document, not promised": lambda b, h, n: masks.causal & masks.document(ids(n)),
    "causal document, shuffled": lambda b, h, n: masks.causal & masks.document(ids(n).flip(0).contiguous()),
    "global sliding": lambda b, h, n: masks.causal & flexmask.mask(lambda q_idx, kv_idx: (q_idx - kv_idx <= 100) | (kv_idx < 16)),
    "three intervals": lambda b, h, n: flexmask.mask(three),
    "eviction": evicted,
    "holes": lambda b, h, n: masks.causal & flexmask.mask(holes),
    "by head": lambda b, h, n: masks.causal & flexmask.mask(lambda h, q_idx, kv_idx: q_idx - kv_idx < 64 * (h + 1)),
    "rows and keys that keep nothing": lambda b, h, n: flexmask.mask(lambda q_idx, kv_idx: (q_idx >= 700) & (kv_idx < q_idx)),
}
# batch, heads, kv heads, q_len, kv_len, head dim, v head dim
SHAPES = {
    "whole tiles": (1, 4, 4, 1024, 1024, 128, 128),
    "odd lengths": (1, 4, 4, 1000, 1000, 128, 128),
    "shared keys": (1, 4, 2, 1024, 1024, 128, 128),
    "batch": (2, 4, 4, 1024, 1024, 128, 128),
    "other lengths": (1, 4, 4, 333, 900, 128, 128),
    "64": (1, 4, 4, 1024, 1024, 64, 64),
    "96": (1, 4, 4, 1024, 1024, 96, 96),
    "192": (1, 4, 2, 1000, 1000, 192, 192),
    "192 and 128": (1, 4, 4, 1024, 1024, 192, 128),
    "256": (1, 4, 4, 700, 1000, 256, 256),
}


def test_where_bits_have_no_room_the_predicate_is_evaluated(monkeypatch):
    monkeypatch.setattr(device_map, "MOST_PATTERNS", 4)
    torch.manual_seed(0)
    table = torch.rand(600, 700, device=DEVICE) < 0.5
    mask = flexmask.mask(lambda q_idx, kv_idx: table[q_idx, kv_idx])
    given = [torch.randn(1, 2, n, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for n in (600, 700, 700)]
    wanted = [x.detach().double().requires_grad_() for x in given]
    want, dout = reference.attention(*wanted, mask), torch.randn_like(given[0])
    for _ in range(3):
        out = flexmask.attention(*given, mask=mask)
        torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
        grads = torch.autograd.grad(want, wanted, dout.double(), retain_graph=True)
        for found, right in zip(torch.autograd.grad(out, given, dout), grads, strict=True):
            assert (found.double() - right).norm() <= 6e-3 * right.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", MASKS)
def test_results_and_gradients_equal_those_of_dense_attention(mask, shape):
    batch, heads, kv_heads, q_len, kv_len, dim, v_dim = SHAPES[shape]
    torch.manual_seed(0)
    dtype = torch.float16 if shape == "other lengths" else torch.bfloat16
    made = MASKS[mask](batch, heads, max(q_len, kv_len))
    sizes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, v_dim))
    given = [torch.randn(batch, *size, device=DEVICE, dtype=dtype, requires_grad=True) for size in sizes]
    wanted = [x.detach().double().requires_grad_() for x in given]
    attn = flexmask.compile(made, enable_gqa=True)
    want, want_lse = reference.attention(*wanted, made, enable_gqa=True, return_lse=True)
    dout = torch.randn_like(want).to(dtype)
    want_grads, dead = torch.autograd.grad(want, wanted, dout.double()), want_lse == float("-inf")
    for _ in range(3):  # prepared, recorded and repeated
        out, lse = attn(*given, return_lse=True)
        assert torch.equal(lse == float("-inf"), dead) and (out[dead] == 0).all()
        assert ((lse.double() - want_lse)[~dead].abs() < 1e-3).all()
        torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
        for found, right in zip(torch.autograd.grad(out, given, dout), want_grads, strict=True):
            assert (found.double() - right).norm() <= 6e-3 * right.norm()
    assert "hopper forward" in attn.explain(*given)


@pytest.mark.parametrize("mask", ["causal", "global sliding", "by columns", "eviction"])
def test_heads_together_give_what_each_gives_alone(mask):
    """Some heads at a time, long lines of the last ones first, more tiles than programs: yet each line of each head has one turn. Nothing
    is added up in another order than for a head alone, but dq."""
    heads, n = 12, 16384
    torch.manual_seed(0)
    until = torch.arange(n, device=DEVICE) * 37 % n
    long = masks.causal & flexmask.mask(lambda q_idx, kv_idx: (q_idx - kv_idx <= 300) | (kv_idx < 64) | (q_idx >= n - 64))
    by_key = masks.causal & flexmask.mask(lambda q_idx, kv_idx: q_idx < until[kv_idx])
    made = long if mask == "by columns" else by_key if mask == "eviction" else MASKS[mask](1, 1, n)
    given = [torch.randn(1, heads, n, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    dout, attn = torch.randn_like(given[0]), flexmask.compile(made)
    out, lse = attn(*given, return_lse=True)
    dq, dk, dv = torch.autograd.grad(out, given, dout)
    for h in range(heads):
        alone = [x.detach()[:, h : h + 1].clone().requires_grad_() for x in given]
        want, want_lse = attn(*alone, return_lse=True)
        assert torch.equal(out[:, h : h + 1], want) and torch.equal(lse[:, h : h + 1], want_lse)
        want_q, want_k, want_v = torch.autograd.grad(want, alone, dout[:, h : h + 1])
        assert torch.equal(dk[:, h : h + 1], want_k) and torch.equal(dv[:, h : h + 1], want_v)
        assert (dq[:, h : h + 1] - want_q).norm() <= 2e-3 * want_q.norm()
