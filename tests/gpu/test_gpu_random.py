"""Random masks of a few structures, forward and backward, on a real GPU against the float64 reference: 384 cases.

All masks of a structure share their kernels, as they differ in the tables they capture alone; so many cases cost little compiling.
"""

import random

import pytest
import torch

import flexmask
from flexmask import reference

pytestmark = pytest.mark.gpu
BATCHES, EACH = 8, 8
SIZES = (1, 2, 63, 64, 65, 127, 128, 129, 200, 255, 256, 300, 385)


def bounds(rng, lines, length, pieces):
    """Starts and stops of intervals for each line, int32 [lines, pieces]: some empty, some whole, some that overlap."""
    g = torch.Generator().manual_seed(rng.randrange(1 << 30))
    ends = torch.randint(-length // 4, length + length // 4 + 1, (2, lines, pieces), generator=g).sort(0).values
    ends[:, torch.rand(lines, generator=g) < 0.1] = 0
    ends[1, torch.rand(lines, generator=g) < 0.1] = length
    return ends.clamp(0, length).int().cuda()


def rows(pieces):
    def make(rng, heads, q_len, kv_len):
        starts, stops = bounds(rng, q_len, kv_len, pieces)
        tables = [(starts[:, i].contiguous(), stops[:, i].contiguous()) for i in range(pieces)]
        masks = [flexmask.mask(lambda b, h, q_idx, kv_idx, s=s, e=e: (kv_idx >= s[q_idx]) & (kv_idx < e[q_idx])) for s, e in tables]
        whole = masks[0]
        for mask in masks[1:]:
            whole = whole | mask
        return whole

    return make


def keys(rng, heads, q_len, kv_len):
    """Each key ends, or begins, for each head at a place of its own."""
    found = [bounds(rng, kv_len, q_len, 1)[..., 0] for _ in range(heads)]
    starts, stops = (torch.stack([f[i] for f in found]) for i in (0, 1))
    return flexmask.mask(lambda b, h, q_idx, kv_idx: (q_idx >= starts[h, kv_idx]) & (q_idx < stops[h, kv_idx]))


def pairs(rng, heads, q_len, kv_len):
    """Any mask at all: rectangles of ones and zeros, and some single places turned."""
    table = torch.zeros(q_len, kv_len, dtype=torch.bool, device="cuda")
    for _ in range(rng.randrange(1, 9)):
        r, c = (sorted(rng.choices(range(n + 1), k=2)) for n in (q_len, kv_len))
        table[r[0] : r[1], c[0] : c[1]] ^= True
    if rng.random() < 0.5:
        table ^= torch.rand(q_len, kv_len, device="cuda") < 0.01
    return flexmask.mask(lambda b, h, q_idx, kv_idx: table[q_idx, kv_idx])


def documents(rng, heads, q_len, kv_len):
    """Ids that ascend, or do not: the device decides which kernel works."""
    n = max(q_len, kv_len)
    ids = torch.randint(0, rng.randrange(1, 8), (n,), generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    ids = (ids.sort().values if rng.random() < 0.5 else ids).int().cuda()
    return flexmask.mask(lambda b, h, q_idx, kv_idx: (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx))


STRUCTURES = {
    "one interval": rows(1), "two intervals": rows(2), "three intervals": rows(3), "keys": keys, "pairs": pairs, "documents": documents,
}  # fmt: skip


def check(structure, rng):
    dim, dtype = rng.choice((64, 128)), rng.choice((torch.bfloat16, torch.float16))
    kv_heads, group = rng.choice((1, 2)), rng.choice((1, 1, 2))
    batch, heads, q_len, kv_len = rng.choice((1, 2)), kv_heads * group, rng.choice(SIZES), rng.choice(SIZES)
    mask = STRUCTURES[structure](rng, heads, q_len, kv_len)
    shapes = (batch, heads, q_len), (batch, kv_heads, kv_len), (batch, kv_heads, kv_len), (batch, heads, q_len)
    q, k, v, dout = (torch.randn(*shape, dim, device="cuda", dtype=dtype) for shape in shapes)
    given, wanted = ([x.detach().to(to).requires_grad_() for x in (q, k, v)] for to in (dtype, torch.float64))
    out, lse = flexmask.attention(*given, mask=mask, enable_gqa=True, return_lse=True)
    want, want_lse = reference.attention(*wanted, mask, enable_gqa=True, return_lse=True)
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty) and (out[empty] == 0).all()
    assert ((lse.double() - want_lse)[~empty].abs() < 1e-3).all()  # one key too many among 300 shows
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
    grads, want_grads = torch.autograd.grad(out, given, dout), torch.autograd.grad(want, wanted, dout.double())
    for found, right in zip(grads, want_grads, strict=True):
        assert found.isfinite().all()
        assert (found.double() - right).norm() <= 1e-2 * right.norm() + 1e-3, (found.shape, dim, dtype)


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("structure", STRUCTURES)
def test_forward_and_backward(structure, batch):
    rng = random.Random(f"{structure} {batch}")
    torch.manual_seed(batch)
    for _ in range(EACH):
        check(structure, rng)
