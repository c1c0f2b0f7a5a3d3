"""The oracle itself, against torch's own attention, torch's mask builder, finite differences, and plain loops."""

import math

import pytest
import torch
import zoo
from hypothesis import given, settings
from strategies import layouts, predicates
from torch.nn.attention.flex_attention import AuxRequest, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flexmask import masks, reference, scores

SIZES = (2, 3, 21, 34)


def inputs(B=2, H=3, Q=21, KV=34, D=8, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, n, D, dtype=torch.float64, generator=generator).requires_grad_(requires_grad) for n in (Q, KV, KV)]


def mask_for_torch(mask):
    """torch counts positional parameters to tell a mask from a score."""
    return lambda b, h, q, k: mask(b, h, q, k)


def score_for_torch(score):
    return lambda s, b, h, q, k: score(s, b, h, q, k)


# ---- values


@given(layouts(largest=40))
@settings(max_examples=30)
def test_plain_attention_is_torchs(layout):
    q, k, v = layout.tensors(torch.float64)
    found = reference.attention(q, k, v, enable_gqa=layout.enable_gqa)
    k, v = (x.expand(q.shape[0], *x.shape[1:]) for x in (k, v))
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, enable_gqa=layout.enable_gqa))


@pytest.mark.parametrize("name", zoo.MASKS)
def test_masked_attention_is_torchs_where_a_row_keeps_a_key(name):
    q, k, v = inputs()
    mask = zoo.MASKS[name](*SIZES)
    keep = reference.dense_mask(mask, *SIZES)
    out, lse = reference.attention(q, k, v, mask, return_lse=True)
    empty = ~keep.any(dim=-1)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=keep).masked_fill(empty[..., None], 0.0)
    torch.testing.assert_close(out, expected)
    scaled = (q @ k.mT / math.sqrt(8)).masked_fill(~keep, -math.inf)
    torch.testing.assert_close(lse, scaled.logsumexp(dim=-1))
    assert torch.equal(lse == -math.inf, empty)


# torch indexes a table by a uint8 or int16 scalar differently, and lets uint8 differences wrap around
TORCH_DIFFERS = {"small_unsigned_table"}


@pytest.mark.parametrize("name", [n for n in zoo.MASKS if n not in TORCH_DIFFERS])
def test_dense_mask_is_torchs_create_mask(name):
    mask = zoo.MASKS[name](*SIZES)
    assert torch.equal(reference.dense_mask(mask, *SIZES), create_mask(mask_for_torch(mask), *SIZES, device="cpu"))


@pytest.mark.parametrize("name", zoo.SCORES)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_scores_are_flex_attentions(name):
    """torch's own unfused flex_attention computes in float32 or less in places, hence the tolerance."""
    q, k, v = inputs()
    score = zoo.SCORES[name](*SIZES)
    expected, aux = flex_attention(q, k, v, score_mod=score_for_torch(score), return_aux=AuxRequest(lse=True))
    found, found_lse = reference.attention(q, k, v, score=score, return_lse=True)
    tolerance = 2e-2 if name in ("head_gate_batch", "relative_bias_clipped", "t5_bias_decoder", "full_bias") else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found_lse, aux.lse, rtol=tolerance, atol=tolerance)


@given(predicates())
@settings(max_examples=60)
def test_random_masks_are_evaluated_pair_by_pair(predicate):
    s = predicate.sizes
    dense = reference.dense_mask(predicate.mask(), s.B, s.H, s.Q, s.KV)
    function, i = predicate.function(), torch.tensor
    for b, h, q, k in {(0, 0, 0, 0), (s.B - 1, s.H - 1, s.Q - 1, s.KV - 1), (0, s.H - 1, s.Q // 2, s.KV // 3), (s.B - 1, 0, 0, s.KV - 1)}:
        with reference._PointSemantics(torch.float32, keep=None):
            value = function(i(b), i(h), i(q), i(k))
        assert bool(value) == bool(dense[b, h, q, k])


def test_narrow_integers_do_not_wrap_and_narrow_floats_do_not_round():
    small = torch.tensor([1, 200], dtype=torch.uint8)
    assert reference.dense_mask(lambda b, h, q, k: small[q] - small[k] < 0, 1, 1, 2, 2)[0, 0].tolist() == [[False, True], [False, False]]
    slope = torch.tensor([1 / 3], dtype=torch.bfloat16)
    q = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    k = torch.zeros(1, 1, 1000, 4, dtype=torch.float64)
    _, lse = reference.attention(q, k, k, score=lambda s, b, h, q, k: s - slope[h] * k, return_lse=True)
    torch.testing.assert_close(lse.flatten(), (-slope.double() * torch.arange(1000)).logsumexp(0, keepdim=True), rtol=1e-12, atol=0)


def test_half_precision_inputs_are_computed_in_float64_and_returned_in_their_dtype():
    q, k, v = (x.bfloat16() for x in inputs())
    out, lse = reference.attention(q, k, v, masks.causal, return_lse=True)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), masks.causal, return_lse=True)
    assert (out.dtype, lse.dtype, exact_lse.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    assert torch.equal(out, exact.bfloat16()) and torch.equal(lse, exact_lse.float())


def test_a_score_of_minus_infinity_is_a_mask():
    q, k, v = inputs()
    hidden = reference.attention(q, k, v, score=lambda s, b, h, q, k: torch.where(q > k, s, -math.inf), return_lse=True)
    masked = reference.attention(q, k, v, mask=lambda b, h, q, k: q > k, return_lse=True)
    for found, expected in zip(hidden, masked, strict=True):
        torch.testing.assert_close(found, expected)


# ---- rows and chunks


@pytest.mark.parametrize("rows", [slice(5, 9), slice(None, None, 4), torch.tensor([20, 0, 7]), torch.tensor([], dtype=torch.int64)])
def test_chosen_rows_are_the_rows_of_the_whole(rows):
    q, k, v = inputs()
    mask, score = zoo.MASKS["composed_deeply"](*SIZES), zoo.SCORES["bias_in_steps"](*SIZES)
    whole = reference.attention(q, k, v, mask, score, return_lse=True)
    some = reference.attention(q, k, v, mask, score, return_lse=True, rows=rows)
    for found, expected in zip(some, whole, strict=True):
        torch.testing.assert_close(found, expected[:, :, rows])
    assert torch.equal(reference.dense_mask(mask, *SIZES, rows=rows), reference.dense_mask(mask, *SIZES)[:, :, rows])


def test_rows_of_a_long_sequence_cost_little():
    n = 100_000
    q, k, v = (torch.randn(1, 1, n, 4) for _ in range(3))
    out = reference.attention(q, k, v, masks.sliding_window(3), rows=torch.tensor([n - 1]))
    expected = scaled_dot_product_attention(q[:, :, -1:].double(), k[:, :, -3:].double(), v[:, :, -3:].double())
    torch.testing.assert_close(out, expected.float())


def test_chunks_give_the_same_values_and_gradients(monkeypatch):
    bias = torch.randn(3, 34, requires_grad=True)
    score, mask = scores.key_bias(bias[:2]), masks.causal | masks.padding(torch.tensor([3, 9]))

    def run():
        q, k, v = inputs(requires_grad=True)
        out, lse = reference.attention(q, k, v, mask, score, return_lse=True)
        return [out, lse, *torch.autograd.grad((out.sin().sum() + lse.sum()), [q, k, v, bias])]

    whole = run()
    monkeypatch.setattr(reference, "_CHUNK", 2 * 3 * 34 * 4)
    for found, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, expected)


# ---- gradients


@pytest.mark.parametrize("mask", ["causal", "empty_rows", "bounds_by_batch_and_head", "nothing"])
def test_gradients_are_the_finite_differences(mask):
    q, k, v = inputs(1, 2, 5, 6, 3, requires_grad=True)
    table = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    cap = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    keep = zoo.MASKS[mask](1, 2, 5, 6)

    def run(q, k, v, table, cap):
        out, lse = reference.attention(
            q, k, v, keep, scores.chain(scores.relative_bias(table), lambda s, b, h, q, k: cap * torch.tanh(s / cap)), return_lse=True
        )
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, table, cap))


def test_empty_rows_have_zero_gradient():
    q, k, v = inputs(requires_grad=True)
    out, lse = reference.attention(q, k, v, mask=lambda b, h, q, k: q < 0, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    for grad in torch.autograd.grad(out.sum() + lse.sum(), [q, k, v]):
        assert (grad == 0).all()


def test_a_score_that_is_infinite_outside_the_mask_leaves_captured_gradients_finite():
    """log(q - k) exists below the diagonal only; what it gives elsewhere must not reach `rate`."""
    q, k, v = inputs(requires_grad=True)
    rate = torch.rand(3, requires_grad=True)
    out = reference.attention(q, k, v, lambda b, h, q, k: q > k, lambda s, b, h, q, k: s - rate[h] * torch.log((q - k).double()))
    grads = torch.autograd.grad(out.square().sum(), [q, k, v, rate])
    assert all(g.isfinite().all() for g in grads) and (grads[3] != 0).all()


# ---- NaN stays where it is kept


def test_nan_in_a_query_row_stays_in_its_row():
    q, k, v = inputs()
    q[0, 1, 4] = math.nan
    out = reference.attention(q, k, v, masks.causal)
    bad = out.isnan().any(dim=-1)
    assert bad[0, 1, 4] and bad.sum() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["k", "v"])
def test_a_bad_key_reaches_only_the_rows_that_keep_it(place, value):
    q, k, v = inputs()
    (k if place == "k" else v)[1, 2, 5] = value
    mask = masks.sliding_window(3)
    rows = reference.attention(q, k, v, mask).isfinite().all(dim=-1)
    expected = torch.ones_like(rows)
    expected[1, 2, 5:8] = False
    if place == "k" and value == math.inf:  # q @ k of -inf drops the key, +inf gives NaN: either way no other row changes
        expected[1, 2, 5:8] = rows[1, 2, 5:8]
    assert torch.equal(rows, expected)


def test_a_bad_key_that_nobody_keeps_leaves_gradients_finite():
    q, k, v = inputs()
    k[:, :, 30] = v[:, :, 30] = math.nan
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = reference.attention(q, k, v, masks.causal)  # keys from 21 on are beyond every query
    for grad in torch.autograd.grad(out.sum(), [q, k, v]):
        assert grad.isfinite().all()


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, k, v: reference.attention(q[0], k, v), ValueError, r"q, k and v are \[B, H, N, D\]"),
        (lambda q, k, v: reference.attention(q, k[..., :4], v), ValueError, "k and v need shapes"),
        (lambda q, k, v: reference.attention(q, k, v[:, :, :5]), ValueError, "k and v need shapes"),
        (lambda q, k, v: reference.attention(q, k[:, :1], v[:, :1]), ValueError, "3 query heads over 1 key heads: pass enable_gqa"),
        (lambda q, k, v: reference.attention(q, k[:, :2], v[:, :2], enable_gqa=True), ValueError, "whole number of heads"),
        (lambda q, k, v: reference.attention(q, k, v, lambda q_idx, kv_idx, a=1, c=2: q_idx >= kv_idx), ValueError, "in this order"),
        (lambda q, k, v: reference.attention(q, k, v, lambda b, h, q, k: q - k), TypeError, r"bools, not torch.int64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*inputs())


def test_no_keys_and_no_queries():
    q, k, v = inputs(KV=0)
    out, lse = reference.attention(q, k, v, masks.causal, scores.softcap(2.0), return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    q, k, v = inputs(Q=0)
    assert reference.attention(q, k, v, masks.causal).shape == (2, 3, 0, 8)


# ---- sinks, dropout, greatest scores


def test_a_sink_is_a_column_without_a_value():
    q, k, v = inputs()
    sinks = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    mask = masks.causal & masks.sliding_window(7)
    out, lse = reference.attention(q, k, v, mask, scores.softcap(2.0), return_lse=True, sinks=sinks)
    plain, plain_lse = reference.attention(q, k, v, mask, scores.softcap(2.0), return_lse=True)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, sinks[:, None].expand_as(plain_lse)))
    torch.testing.assert_close(out, plain * (plain_lse - lse).exp()[..., None])


def test_a_row_with_nothing_but_its_sink():
    q, k, v = inputs(Q=3, KV=4, requires_grad=True)
    sinks = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    out, lse, peaks = reference.attention(q, k, v, lambda b, h, q, k: k < 0, return_lse=True, return_max_scores=True, sinks=sinks)
    assert not out.any() and torch.equal(lse, sinks[:, None].expand(2, 3, 3)) and bool((peaks == -math.inf).all())
    grads = torch.autograd.grad(out.sum() + lse.sum(), [q, k, v, sinks])
    assert not any(grad.any() for grad in grads[:3])
    assert grads[3].tolist() == [6.0, 6.0, 6.0]  # every row's lse is the sink itself


def test_gradients_with_sinks_and_dropout():
    q, k, v = inputs(B=1, H=2, Q=5, KV=6, D=3, requires_grad=True)
    sinks = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True)

    def run(*leaves):
        return reference.attention(*leaves[:3], masks.causal, return_lse=True, sinks=leaves[3], dropout_p=0.4, seed=3)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks))


def test_dropout_zeroes_probabilities_and_keeps_their_expectation():
    q, k, _ = inputs(B=1, H=2, Q=40, KV=40)
    eye = torch.eye(40, dtype=torch.float64).expand(1, 2, 40, 40)  # so that out is the probabilities
    plain, lse = reference.attention(q, k, eye, masks.causal, return_lse=True)
    found, dropped_lse = reference.attention(q, k, eye, masks.causal, return_lse=True, dropout_p=0.25, seed=11)
    kept = found != 0
    torch.testing.assert_close(found[kept], plain[kept] / 0.75)
    assert torch.equal(lse, dropped_lse) and 0.2 < 1 - kept.sum().item() / (plain != 0).sum().item() < 0.3
    again = [reference.attention(q, k, eye, masks.causal, dropout_p=0.25, seed=s) for s in (11, torch.tensor([11]), 12)]
    assert torch.equal(again[0], found) and torch.equal(again[1], found) and not torch.equal(again[2], found)
    part = reference.attention(q, k, eye, masks.causal, dropout_p=0.25, seed=11, rows=slice(7, 30))
    torch.testing.assert_close(part, found[:, :, 7:30])


def test_dropout_draws_a_seed_from_torch():
    q, k, v = inputs()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(reference.attention(q, k, v, dropout_p=0.5))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_greatest_scores():
    q, k, v = inputs(requires_grad=True)
    out, peaks = reference.attention(q, k, v, masks.causal, scores.softcap(2.0), return_max_scores=True, sinks=torch.full((3,), 99.0))
    changed = 2.0 * torch.tanh(q @ k.mT / math.sqrt(8) / 2.0)
    torch.testing.assert_close(peaks, changed.masked_fill(~reference.dense_mask(masks.causal, *SIZES), -math.inf).amax(-1))
    assert out.requires_grad and not peaks.requires_grad
    assert reference.attention(q.float(), k.float(), v.float(), return_max_scores=True)[1].dtype == torch.float32


def test_what_sinks_and_dropout_refuse():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="one logit for each of 3 query heads"):
        reference.attention(q, k, v, sinks=torch.zeros(2))
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match="below 1"):
            reference.attention(q, k, v, dropout_p=p)
