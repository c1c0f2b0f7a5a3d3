"""The host side of the backward kernels: prepares what calls bring and starts them. Copied by `assemble_backward` into generated files,
which hold one part each."""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .backward import (
    BLOCK_KV,
    BLOCK_Q,
    NUM_STAGES,
    NUM_WARPS,
    PADDED_DIM,
    PADDED_V_DIM,
    SCATTER,
    TMA,
    attention_backward_q,
    row_terms_kernel,
)
from .backward_columns import attention_backward_kv
from .launcher import MAX_INDEX, addressable, describe, fits_tma, resident_heads, strides

# ---- constants
# rows of `row_terms` come in multiples of this, which blocks of queries divide, so that they are read without a check
TERM_ROWS = 128


# ---- functions


def row_terms(out, lse, dout, dlse=None):
    """(log-sum-exp in base 2, -delta), float32 [B, Hq, Q rounded up to 128], which both parts take, where delta is
    rowsum(dout * out) - dlse. out and dout are [B, Hq, Q, Dv], lse and dlse float32 [B, Hq, Q]; no dlse means 0."""
    batch, heads, q_len, _ = out.shape
    terms_len = triton.cdiv(q_len, TERM_ROWS) * TERM_ROWS
    lse2 = torch.empty(batch, heads, terms_len, dtype=torch.float32, device=out.device)
    shift = torch.empty_like(lse2)
    if lse2.numel():
        out, dout = addressable(out), addressable(dout)
        dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
        row_terms_kernel[(terms_len // 32 * batch * heads,)](
            out, dout, lse.contiguous(), dlse, lse2, shift,
            q_len, terms_len, heads, *out.stride()[:3], *dout.stride()[:3], ROWS=32, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return lse2, shift


def sources_of(q, k, v, dout):
    """The four tensors, and what the kernels read them by: pointers, or TMA descriptors of copies where their rows do not fit."""
    if max(*q.shape[:3], k.shape[2]) > MAX_INDEX:
        raise ValueError(f"sizes beyond {MAX_INDEX} are not supported; got q {tuple(q.shape)}, k {tuple(k.shape)}")
    tensors = [addressable(x) for x in (q, k, v, dout)]
    if not TMA:
        return tensors, tensors
    rows = (BLOCK_Q.value, BLOCK_KV.value, BLOCK_KV.value, BLOCK_Q.value)
    widths = (PADDED_DIM.value, PADDED_DIM.value, PADDED_V_DIM.value, PADDED_V_DIM.value)
    tensors = [aligned(x) for x in tensors]
    return tensors, [describe(x, n, width) for x, n, width in zip(tensors, rows, widths, strict=True)]


def aligned(x):
    """`x`, copied to rows a multiple of 16 bytes apart where a TMA descriptor needs it."""
    if fits_tma(x):
        return x
    unit = 16 // x.element_size()
    return x.new_empty(*x.shape[:3], triton.cdiv(x.shape[3], unit) * unit)[..., : x.shape[3]].copy_(x)


# ---- dq


def backward_q(q, k, v, dout, terms, scale, mask_captures=((), ()), score_captures=((), ()), starts=None, stops=None,
               ranges=None, counts=None, offsets=None, index=None, broken=None, grads=(), into=None, dropout=None,
               spared=None):  # fmt: skip
    """dq [B, Hq, Q, D] of out = attention(q, k, v), given dout [B, Hq, Q, Dv] and `terms` from `row_terms`.

    Captures, row intervals and the map by rows are as in the forward pass. `grads` are contiguous float32 buffers that the gradients of
    captured tables are added to, for a plan that scatters; for "peak" and "fixed" an int64 buffer for each table, then an int32 one for
    each, then a limit for each. "peak" only raises the int32 ones, and gives no dq. `broken` is the flag that a kernel looks at which does
    not always run; `into` the dq that its partner has filled where this one returns. `dropout` is what the forward pass was given.
    `spared` is a flag on the device: unless it is 1 another kernel has filled `into`.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    dq = into
    if into is None and SCATTER.value != "peak":
        dq = torch.empty(batch, heads, q_len, head_dim, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or kv_len == 0:
        return None if dq is None else dq.zero_()
    (q, k, v, dout), sources = sources_of(q, k, v, dout)
    tiles = triton.cdiv(q_len, BLOCK_Q.value)
    attention_backward_q[(tiles * batch * heads,)](
        *sources, dq, *terms,
        float(scale), q_len, kv_len, terms[0].shape[2], heads, heads // k.shape[1], int(k.shape[0] > 1),
        resident_heads(batch * heads, kv_len, (k.shape[3] + v.shape[3]) * k.element_size()),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
        *mask_captures, *score_captures, tuple(grads),
        starts, stops, *strides(starts, q_len),
        ranges, counts, offsets, index, *strides(counts if ranges is None else ranges, tiles), broken, spared,
        *(dropout or (None, 0, 1.0)),
        num_warps=NUM_WARPS.value, num_stages=NUM_STAGES.value, enable_fp_fusion=True,
    )  # fmt: skip
    return dq


# ---- dkdv


def describe_terms(x):
    """A TMA descriptor of [1, BLOCK_Q] pieces of what `row_terms` gives, with a line for each head."""
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], x.shape[2]], [x.shape[2], 1], [1, BLOCK_Q.value])


def backward_kv(q, k, v, dout, terms, scale, mask_captures=((), ()), score_captures=((), ()), starts=None, stops=None,
                ranges=None, counts=None, offsets=None, index=None, broken=None, into=None, dropout=None):  # fmt: skip
    """(dk [B or 1, Hkv, KV, D], dv [B or 1, Hkv, KV, Dv]) of out = attention(q, k, v), given dout [B, Hq, Q, Dv] and `terms` from
    `row_terms`.

    The map is by columns: starts and stops are int32 [B or 1, Hq or 1, KV, PIECES], the queries that keep each key; `ranges` int32
    [B or 1, Hq or 1, block columns, 4], or `counts` and `offsets` int32 [.., .., block columns, 2] with `index`, name block rows.
    `broken` is the flag that a kernel looks at which does not always run; `into` the (dk, dv) that its partner has filled where this
    one returns. `dropout` is what the forward pass was given.
    """
    batch, q_heads, q_len, _ = q.shape
    entries, heads, kv_len, _ = k.shape
    dk, dv = into or tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if dk.numel() == 0 or q.numel() == 0:
        return dk.zero_(), dv.zero_()
    (q, k, v, dout), sources = sources_of(q, k, v, dout)
    columns, group = triton.cdiv(kv_len, BLOCK_KV.value), q_heads // heads
    attention_backward_kv[(columns * entries * heads,)](
        *sources, dk, dv, *([describe_terms(x) for x in terms] if TMA else terms),
        float(scale), q_len, kv_len, terms[0].shape[2], heads, group, group * (batch // entries),
        resident_heads(entries * heads, q_len, (q.shape[3] + v.shape[3]) * q.element_size()),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
        *mask_captures, *score_captures,
        starts, stops, *strides(starts, kv_len),
        ranges, counts, offsets, index, *strides(counts if ranges is None else ranges, columns), broken,
        *(dropout or (None, 0, 1.0)),
        num_warps=NUM_WARPS.value, num_stages=NUM_STAGES.value, enable_fp_fusion=True,
    )  # fmt: skip
    return dk, dv
