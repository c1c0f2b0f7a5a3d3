"""Gradients through `flexmask.attention`: those of the dense reference, for masks, scores and what scores capture."""

from dataclasses import astuple

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import predicates

import flexmask
from flexmask import masks, reference, scores

B, H, Q, KV = 1, 2, 33, 29


def inputs(dtype=torch.float64, heads=H, kv_heads=H, q_len=Q, kv_len=KV, batch=B):
    torch.manual_seed(0)
    shapes = (batch, heads, q_len, 8), (batch, kv_heads, kv_len, 8), (batch, kv_heads, kv_len, 5)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def gradients(run, leaves):
    """Of a number that weighs out and lse unevenly; rows that keep nothing have lse -inf, which no weight may touch."""
    out, lse = run()
    weight = torch.linspace(0.5, 2.0, out.shape[-1], dtype=out.dtype)
    return torch.autograd.grad((out * weight).sum() + lse.masked_fill(lse == -torch.inf, 0).cos().sum(), leaves, allow_unused=True)


def agree(mask=None, score=None, tables=(), tolerance=1e-9, extras=None, **sizes):
    q, k, v = inputs(**sizes)
    options = {"enable_gqa": q.shape[1] != k.shape[1], "return_lse": True, **(extras or {})}
    leaves = (q, k, v, *tables, *(x for x in options.values() if isinstance(x, torch.Tensor)))
    found = gradients(lambda: flexmask.attention(q, k, v, mask=mask, score=score, **options), leaves)
    want = gradients(lambda: reference.attention(q, k, v, mask, score, **options), leaves)
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", zoo.MASKS)
def test_every_zoo_mask(name):
    agree(zoo.MASKS[name](B, H, Q, KV))


@pytest.mark.parametrize("name", zoo.SCORES)
def test_every_zoo_score(name):
    agree(masks.local_window(9), zoo.SCORES[name](B, H, Q, KV), tolerance=1e-5)  # some scores compute in float32


@settings(max_examples=500)
@given(predicates(), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.0, 0.3]))
def test_random_masks(predicate, grouped, with_sinks, dropout_p):
    batch, heads, q_len, kv_len = astuple(predicate.sizes)
    extras = {"dropout_p": dropout_p, "seed": 3} if dropout_p else {}
    if with_sinks:
        extras["sinks"] = torch.linspace(-1, 2, heads, dtype=torch.float64, requires_grad=True)
    kv_heads = 1 if grouped else heads
    agree(predicate.mask(), extras=extras, batch=batch, heads=heads, kv_heads=kv_heads, q_len=q_len, kv_len=kv_len)


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 90), st.integers(-40, 40))
def test_lengths_and_offsets(q_len, kv_len, window, offset):
    mask = flexmask.mask(lambda q_idx, kv_idx: (q_idx + offset >= kv_idx) & (q_idx + offset - kv_idx < window))
    agree(mask, heads=2, kv_heads=1, q_len=q_len, kv_len=kv_len)


def test_grouped_heads_and_empty_rows():
    agree(masks.sliding_window(3) & ~masks.prefix_lm(9), heads=4, kv_heads=2)


def test_tables_that_a_score_captures():
    slope = torch.randn(H, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(H, Q, KV, dtype=torch.float64, requires_grad=True)

    @flexmask.score
    def biased(score, b, h, q_idx, kv_idx):
        return torch.tanh(score) * 3 + bias[h, q_idx, kv_idx] + slope[h] * (kv_idx - q_idx) + bias[h, 0, kv_idx]

    agree(masks.causal, biased, tables=(slope, bias))


def test_a_score_that_ignores_the_score():
    @flexmask.score
    def flat(score, q_idx, kv_idx):
        return 0.1 * kv_idx

    q, k, v = inputs()
    dq, dk, dv = torch.autograd.grad(flexmask.attention(q, k, v, score=flat).sum(), (q, k, v))
    assert not dq.any() and not dk.any() and dv.any()


def test_gradcheck():
    q, k, v = inputs(q_len=7, kv_len=6)
    attn = flexmask.compile(masks.sliding_window(3), scores.softcap(2.0))
    assert torch.autograd.gradcheck(lambda *x: attn(*x, return_lse=True), (q, k, v))


def test_a_captured_tensor_changed_before_the_backward_pass_is_an_error():
    q, k, v = inputs()
    doc = torch.arange(Q) // 9
    out = flexmask.attention(q, k, v, mask=masks.document(doc))
    doc += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
