"""Random masks through the whole house on the CPU: tile states and attention equal brute force, whatever people may write."""

import os
from dataclasses import astuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layouts, predicates
from test_zoo_through_the_house import states_of

import flexmask
from flexmask import reference
from flexmask.runtime.grid import Grid
from flexmask.runtime.host_map import find_intervals
from flexmask.runtime.maps import Extent, find_map
from flexmask.runtime.store import default_store

BLOCKS = st.sampled_from([(1, 1), (4, 16), (16, 8), (13, 5), (32, 64)])


# `make nightly` asks for 20,000
@settings(max_examples=int(os.environ.get("FLEXMASK_EXAMPLES", "2000")))
@given(predicates(depth=3), BLOCKS, st.sampled_from(["row", "column"]))
def test_tiles_and_intervals_are_exact(predicate, block, axis):
    B, H, Q, KV = sizes = astuple(predicate.sizes)
    mask = predicate.mask()
    want, traced = reference.dense_mask(mask, *sizes), mask.traced()
    extent = Extent(Q, KV, B, H, torch.device("cpu"))
    facts, made = find_map(default_store(), traced, extent, *block, axis)
    states = made.states()
    assert torch.equal(states.expand(B, H, *states.shape[2:]), states_of(want, *block))
    if made.intervals is not None:
        assert torch.equal(made.intervals.to_dense().expand(*sizes), want)
    assert not any(outside(bounds, traced, extent, want) for bounds in (*facts.row_bounds, *facts.column_bounds))


def outside(bounds, traced, extent, want):
    """Whether the mask keeps something outside of a condition that is said to be necessary."""
    kept = find_intervals(bounds, (traced.tensors, traced.scalars), Grid(extent.q_len, extent.kv_len, 1, 1, extent.batch, extent.heads))
    return kept is not None and bool((want & ~kept.to_dense()).any())


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
