"""Every zoo mask and score through every stage, against brute force: expression, facts, tile states, attention on the CPU."""

import pytest
import torch
import zoo

import flexmask
from flexmask import reference
from flexmask.analysis import Form
from flexmask.ir import parse, show
from flexmask.runtime.store import default_store

SIZES = [(2, 2, 33, 47), (1, 4, 70, 70), (2, 2, 129, 65)]
BLOCKS = [(16, 16), (32, 8), (7, 13)]


def states_of(dense, block_q, block_kv):
    """Tile states by looking at every pair."""
    _, _, Q, KV = dense.shape
    rows = [dense[:, :, i : i + block_q] for i in range(0, Q, block_q)]
    tiles = [[row[..., j : j + block_kv].flatten(2) for j in range(0, KV, block_kv)] for row in rows]
    stack = lambda f: torch.stack([torch.stack([f(t) for t in row], -1) for row in tiles], -2)
    return stack(lambda t: t.any(-1)).to(torch.int8) + stack(lambda t: t.all(-1)).to(torch.int8)


@pytest.mark.parametrize("name", zoo.MASKS)
def test_masks(name):
    for (B, H, Q, KV), (block_q, block_kv) in zip(SIZES, BLOCKS, strict=True):
        mask = zoo.MASKS[name](B, H, Q, KV)
        want = reference.dense_mask(mask, B, H, Q, KV)
        assert torch.equal(mask.to_dense(Q, KV, B, H), want)
        states = mask.block_mask(Q, KV, B, H, (block_q, block_kv)).states()
        assert torch.equal(states.expand(B, H, *states.shape[2:]), states_of(want, block_q, block_kv))
        facts = default_store().facts(mask.traced())[1]
        for axis, form in (("row", facts.rows), ("column", facts.columns)):
            if isinstance(form, Form) and form.residue is None:
                try:
                    found = mask.intervals(Q, KV, axis, B, H)
                except flexmask.NotInterval as error:
                    assert "does not ascend" in str(error)
                else:
                    assert torch.equal(found.to_dense().expand(B, H, Q, KV), want)


@pytest.mark.parametrize("name", zoo.MASKS)
def test_attention_under_masks(name):
    B, H, Q, KV = SIZES[0]
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, Q, 16), torch.randn(B, H, KV, 16), torch.randn(B, H, KV, 24)
    mask = zoo.MASKS[name](B, H, Q, KV)
    out, lse = flexmask.attention(q, k, v, mask=mask, return_lse=True)
    want, want_lse = reference.attention(q.double(), k.double(), v.double(), mask, return_lse=True)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", zoo.SCORES)
def test_attention_under_scores(name):
    B, H, Q, KV = SIZES[0]
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, Q, 16), torch.randn(B, H, KV, 16), torch.randn(B, H, KV, 24)
    score = zoo.SCORES[name](B, H, Q, KV)
    with torch.no_grad():
        out = flexmask.attention(q, k, v, mask=flexmask.masks.local_window(30), score=score)
        want = reference.attention(q.double(), k.double(), v.double(), flexmask.masks.local_window(30), score)
    torch.testing.assert_close(out.double(), want, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", zoo.MASKS)
def test_structure_is_what_hashes(name):
    """Other tensors, numbers and lengths of the same kind give the same expression; its text reads back."""
    a = zoo.MASKS[name](2, 2, 33, 47, seed=0).traced()
    b = zoo.MASKS[name](2, 2, 33, 47, seed=1).traced()
    assert a.expr is b.expr
    kinds = {(n.op, n.value): n.kind for n in flexmask.ir.walk(a.expr)}
    tensors = [kinds["load", i] for i in range(len(a.tensors))]
    scalars = [kinds["scalar", i] for i in range(len(a.scalars))]
    assert parse(show(a.expr), tensors, scalars) is a.expr
