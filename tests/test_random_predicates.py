"""Random masks through the whole house on the CPU: tile states and attention equal brute force, whatever people may write."""

from dataclasses import astuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layouts, predicates
from test_zoo_through_the_house import states_of

import flexmask
from flexmask import reference


@settings(max_examples=300)
@given(predicates(), st.sampled_from([(1, 1), (4, 16), (16, 8), (13, 5), (32, 64)]))
def test_tile_states_are_exact(predicate, block):
    B, H, Q, KV = astuple(predicate.sizes)
    mask = predicate.mask()
    want = reference.dense_mask(mask, B, H, Q, KV)
    states = mask.block_mask(Q, KV, B, H, block).states()
    assert torch.equal(states.expand(B, H, *states.shape[2:]), states_of(want, *block))


@settings(max_examples=200)
@given(predicates())
def test_attention_equals_the_reference(predicate):
    B, H, Q, KV = astuple(predicate.sizes)
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, Q, 8), torch.randn(B, H, KV, 8), torch.randn(B, H, KV, 5)
    out, lse = flexmask.attention(q, k, v, mask=predicate.mask(), return_lse=True)
    want, want_lse = reference.attention(q.double(), k.double(), v.double(), predicate.mask(), return_lse=True)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@settings(max_examples=60)
@given(layouts())
def test_layouts_equal_the_reference(layout):
    q, k, v = layout.tensors(torch.float32)
    out = flexmask.attention(q, k, v, mask=flexmask.masks.causal, enable_gqa=layout.enable_gqa)
    want = reference.attention(q.double(), k.double(), v.double(), flexmask.masks.causal, enable_gqa=layout.enable_gqa)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
