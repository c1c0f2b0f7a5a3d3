"""The public call: every backend that runs here agrees with the dense reference, and bad input gives a named error."""

import math

import pytest
import torch

import flexmask
from flexmask import masks, reference, scores


def make(B=2, Hq=4, Hkv=4, Q=37, KV=37, D=16, Dv=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = lambda H, N, d: torch.randn(B, H, N, d, generator=g).to(dtype)
    return shape(Hq, Q, D), shape(Hkv, KV, D), shape(Hkv, KV, Dv)


def test_documents_and_window_with_soft_cap():
    q, k, v = make()
    doc = torch.tensor([[0] * 10 + [1] * 27, [0] * 20 + [5] * 17])
    m = masks.causal & masks.document(doc) & masks.sliding_window(8)
    attn = flexmask.compile(m, scores.softcap(2.0))
    out, lse = attn(q, k, v, return_lse=True)
    want, want_lse = reference.attention(q, k, v, m, scores.softcap(2.0), return_lse=True)
    torch.testing.assert_close(out.double(), want.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 50), (50, 1), (33, 65), (129, 127)])
def test_odd_lengths_gqa_and_unequal_head_dims(q_len, kv_len):
    q, k, v = make(Hq=6, Hkv=2, Q=q_len, KV=kv_len, D=24, Dv=40)
    out = flexmask.attention(q, k, v, mask=masks.causal, enable_gqa=True)
    want = reference.attention(q, k, v, masks.causal, enable_gqa=True)
    assert out.shape == (2, 6, q_len, 40)
    torch.testing.assert_close(out.double(), want.double(), atol=1e-5, rtol=1e-5)


def test_plain_functions_are_taken_as_masks_and_scores():
    q, k, v = make()
    out = flexmask.attention(q, k, v, mask=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, score=lambda score: score * 2)
    want = reference.attention(q, 2 * k, v, masks.causal)
    torch.testing.assert_close(out.double(), want.double(), atol=1e-5, rtol=1e-5)


def test_rows_that_keep_nothing_give_zero_and_minus_infinity():
    q, k, v = make(Q=8, KV=8)
    out, lse = flexmask.attention(q, k, v, mask=lambda q_idx, kv_idx: (q_idx > kv_idx) & (q_idx > 3), return_lse=True)
    assert (out[:, :, :4] == 0).all() and (lse[:, :, :4] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 4:]).all()


def test_captured_tensors_are_read_at_call_time():
    q, k, v = make(B=1, Q=6, KV=6)
    doc = torch.tensor([0, 0, 0, 1, 1, 1])
    attn = flexmask.compile(masks.document(doc))
    first = attn(q, k, v)
    doc[2] = 1
    assert not torch.equal(attn(q, k, v), first)
    torch.testing.assert_close(attn(q, k, v).double(), reference.attention(q, k, v, masks.document(doc)).double(), atol=1e-5, rtol=1e-5)


def test_a_rebound_closure_is_noticed():
    q, k, v = make(B=1, Q=6, KV=6)
    window = 2

    @flexmask.mask
    def near(q_idx, kv_idx):
        return q_idx - kv_idx < window

    attn = flexmask.compile(near)
    attn(q, k, v)
    window = 4
    torch.testing.assert_close(attn(q, k, v).double(), reference.attention(q, k, v, near).double(), atol=1e-5, rtol=1e-5)


def test_nan_stays_in_its_row():
    q, k, v = make(B=1, Q=9, KV=9)
    q[0, 0, 4] = math.nan
    out = flexmask.attention(q, k, v, mask=masks.causal)
    assert torch.isnan(out[0, 0, 4]).all()
    assert torch.isfinite(out[0, 0, [0, 1, 2, 3, 5, 6, 7, 8]]).all() and torch.isfinite(out[0, 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    q, k, v = make(dtype=dtype)
    out = flexmask.attention(q, k, v, mask=masks.causal)
    assert out.dtype == dtype
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    want = reference.attention(q.double(), k.double(), v.double(), masks.causal)
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys"])
def test_empty_tensors_give_empty_or_zero(empty):
    sizes = {"B": 2, "H": 2, "Q": 3, "KV": 5}
    sizes[{"batch": "B", "heads": "H", "queries": "Q", "keys": "KV"}[empty]] = 0
    q = torch.randn(sizes["B"], sizes["H"], sizes["Q"], 16)
    k = torch.randn(sizes["B"], sizes["H"], sizes["KV"], 16)
    out, lse = flexmask.attention(q, k, k, mask=masks.causal, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert (out == 0).all() and (lse == -math.inf).all()


BAD = {
    "a 3-d query": (lambda q, k, v: (q[0], k, v), "q has shape (4, 37, 16); attention takes [batch, heads, length, head_dim]"),
    "dtypes that differ": (lambda q, k, v: (q, k.half(), v), "q, k and v differ in dtype"),
    "an integer query": (lambda q, k, v: (q.int(), k.int(), v.int()), "q is torch.int32"),
    "head dims that differ": (lambda q, k, v: (q, k[..., :8], v), "q and k differ in head_dim"),
    "lengths that differ": (lambda q, k, v: (q, k, v[:, :, :5]), "k and v differ in batch, heads or length"),
    "batches that differ": (lambda q, k, v: (q[:1], k, v), "the batch of k and v is that of q, or 1"),
    "heads that do not divide": (lambda q, k, v: (q, k[:, :3], v[:, :3]), "4 query heads are no multiple of 3 key heads"),
    "fewer key heads": (lambda q, k, v: (q, k[:, :2], v[:, :2]), "pass enable_gqa=True"),
    "an empty head dim": (lambda q, k, v: (q[..., :0], k[..., :0], v), "a head_dim is 0"),
    "a list": (lambda q, k, v: ([1], k, v), "q is a list, not a tensor"),
    "another device": (lambda q, k, v: (q, k.to("meta"), v), "are on different devices"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused_by_name(case):
    change, message = BAD[case]
    with pytest.raises(flexmask.ShapeError) as error:
        flexmask.attention(*change(*make()), mask=masks.causal)
    assert message in str(error.value)


def test_a_table_shorter_than_the_queries_is_refused_with_the_line():
    doc = torch.zeros(10, dtype=torch.int32)
    with pytest.raises(flexmask.ShapeError) as error:
        flexmask.attention(*make(), mask=lambda b, h, q_idx, kv_idx: doc[q_idx] == 0)
    text = str(error.value)
    assert "`doc`" in text and "has 10 entries on axis 0, but index `q_idx` reaches from 0 to 36" in text
    assert "test_api_attention.py" in text


def test_a_table_for_one_batch_entry_is_refused_for_two():
    doc = torch.zeros(1, 37, dtype=torch.int32)
    with pytest.raises(flexmask.ShapeError, match="Write 0 in place of `b`"):
        flexmask.attention(*make(), mask=lambda b, h, q_idx, kv_idx: doc[b, q_idx] == doc[b, kv_idx])


def test_a_capture_on_another_device_is_refused():
    doc = torch.zeros(37, dtype=torch.int32, device="meta")
    with pytest.raises(flexmask.ShapeError, match="is on meta, but the call is on cpu"):
        flexmask.attention(*make(), mask=lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx])


def test_backends_are_refused_rather_than_replaced():
    q, k, v = make()
    with pytest.raises(flexmask.BackendError, match="backend is one of"):
        flexmask.compile(masks.causal, backend="cuda")
    with pytest.raises(flexmask.BackendError, match="TRITON_INTERPRET"):
        flexmask.attention(q, k, v, backend="triton")


def test_what_is_not_a_mask_is_refused():
    with pytest.raises(flexmask.TraceError, match="takes a function, not a tensor"):
        flexmask.compile(torch.ones(3, 3))
    with pytest.raises(flexmask.TraceError, match="passed as mask="):
        flexmask.compile(scores.softcap(3.0))
    with pytest.raises(flexmask.TraceError, match="has no truth value"):
        masks.causal and masks.causal  # noqa: B018


@pytest.mark.parametrize("scale", [math.nan, math.inf, torch.tensor(1.0)])
def test_a_scale_is_a_finite_number(scale):
    with pytest.raises(flexmask.ShapeError, match="finite"):
        flexmask.attention(*make(), scale=scale)


def test_scale_multiplies_the_scores():
    q, k, v = make()
    torch.testing.assert_close(flexmask.attention(q, k, v, scale=0.5), flexmask.attention(q * 2, k, v, scale=0.25))
