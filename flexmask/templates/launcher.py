"""The host side of a kernel: packs what a call brings and starts the kernel. Copied by `assemble` into every generated file."""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .forward import (
    BITS,
    BLOCK_KV,
    BLOCK_Q,
    MAP_FORM,
    NUM_STAGES,
    NUM_WARPS,
    PADDED_DIM,
    PADDED_V_DIM,
    PIECES,
    QUERIES,
    RUNS,
    SCORE,
    TMA,
    attention_forward,
)

# ---- constants
# keys and values of as many heads as fit are walked together: about half of a data-centre GPU's L2 cache
RESIDENT_BYTES = 24 * 1024 * 1024
# indices up to here may be added and subtracted in 32 bits
MAX_INDEX = 1 << 24


# ---- bounds
def row_bounds(tensors, scalars, q_len, kv_len, batch, heads, device):
    """The row intervals, int32 [batch, heads, q_len, PIECES] twice: not called, as this plan needs none from here."""
    raise ValueError("this kernel takes its row intervals from the caller")


# ---- functions


def pack(tensors, scalars):
    """Captures as the kernel takes them: (pointer, strides..., pointer, ...) and (sizes of all tensors..., scalars...).

    Integers of the second tuple travel as 16 * x + 2: Triton compiles anew for those that are 1 or divisible by 16.
    """
    tables, numbers = [], []
    for tensor in tensors:
        tables += [tensor, *tensor.stride()]
        numbers += tensor.shape
    numbers += scalars
    return tuple(tables), tuple(x if isinstance(x, float) else 16 * int(x) + 2 for x in numbers)


def addressable(x):
    """`x`, copied where its last dimension is not contiguous or its rows lie too far apart for 32-bit offsets in a tile."""
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and abs(x.stride(2)) < 1 << 22 else x.contiguous()


def fits_tma(x):
    """Whether a TMA descriptor can describe `x`: base and strides are multiples of 16 bytes."""
    size = x.element_size()
    strides = [stride for stride, length in zip(x.stride()[:3], x.shape[:3], strict=True) if length > 1]
    return x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s * size % 16 == 0 for s in strides)


def describe(x, rows, width):
    """A TMA descriptor of [1, 1, rows, width] tiles of `x`; reads outside give 0. Raises ValueError where a copy would not help."""
    if not fits_tma(x):
        x = x.contiguous().clone()
        if not fits_tma(x):
            raise ValueError(f"TMA needs rows of a multiple of 16 bytes; got {tuple(x.shape)}, {x.dtype}. Use a plan with pointer loads.")
    unit = 16 // x.element_size()
    strides = [stride if length > 1 else unit for stride, length in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, width])


def resident_heads(heads, kv_len, row_bytes):
    """How many heads to walk together: a divisor of their number whose keys and values fit RESIDENT_BYTES."""
    wanted = max(1, min(heads, RESIDENT_BYTES // max(1, kv_len * row_bytes)))
    while heads % wanted:
        wanted -= 1
    return wanted


def results_of(q, k, v):
    """Memory for out [B, Hq, Q, Dv] and lse [B, Hq, Q]. Raises ValueError for sizes that 32 bits do not hold."""
    batch, heads, q_len, _ = q.shape
    if max(batch, heads, q_len, k.shape[2]) > MAX_INDEX:
        raise ValueError(f"sizes beyond {MAX_INDEX} are not supported; got q {tuple(q.shape)}, k {tuple(k.shape)}")
    return (
        torch.empty(batch, heads, q_len, v.shape[3], dtype=q.dtype, device=q.device),
        torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device),
    )


def without_keys(out, lse, sinks, peaks):
    """The results where there are no keys."""
    if peaks is not None:
        peaks.fill_(float("-inf"))
    return out.zero_(), lse.fill_(float("-inf")) if sinks is None else lse.copy_(sinks[:, None].expand_as(lse))


def rising(q, scale):
    """(queries, scale) such that greater products are greater scores: kernels take the maximum before they multiply by the scale, unless
    a score mod stands between."""
    if not SCORE and scale <= 0:
        return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    return q, scale


def forward(q, k, v, scale, mask_captures=((), ()), score_captures=((), ()), row_starts=None, row_stops=None,
            ranges=None, counts=None, offsets=None, index=None, patterns=None, words=None, broken=None, into=None,
            sinks=None, dropout=None, peaks=None):  # fmt: skip
    """(out [B, Hq, Q, Dv], lse float32 [B, Hq, Q]) of q [B, Hq, Q, D], k [B or 1, Hkv, KV, D], v [B or 1, Hkv, KV, Dv].

    Captures come from `pack`. row_starts and row_stops are int32 [B or 1, Hq or 1, Q, PIECES]; the map is `ranges` int32 [B or 1,
    Hq or 1, tile rows, 4], or `counts` and `offsets` int32 [.., .., tile rows, 2] with `index`, and with bits `patterns` and `words`.
    All are contiguous. `broken` is the flag that a kernel looks at which does not always run; `into` the (out, lse) that its partner
    has filled where this one returns. `sinks` [Hq] are logits that take part in the softmax and have no value. `dropout` is (seed, int64
    [1] on q's device; how many of 2**24 pairs are dropped; what the others are multiplied by). `peaks`, float32 [B, Hq, Q] contiguous, is
    filled with the greatest scores.
    """
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    out, lse = results_of(q, k, v) if into is None else into
    if lse.numel() == 0:
        return out, lse
    if kv_len == 0:
        return without_keys(out, lse, sinks, peaks)
    q, scale = rising(q, scale)
    tiles = triton.cdiv(q_len, BLOCK_Q.value)
    tile_map = counts if ranges is None else ranges
    q, k, v = addressable(q), addressable(k), addressable(v)
    sources = (q, k, v)
    sinks = None if sinks is None else sinks.contiguous()
    if TMA:
        rows, width, v_width = BLOCK_KV.value, PADDED_DIM.value, PADDED_V_DIM.value
        sources = (describe(q, BLOCK_Q.value, width), describe(k, rows, width), describe(v, rows, v_width))
    attention_forward[(tiles * batch * heads,)](
        *sources, out, lse,
        float(scale), q_len, kv_len, heads, heads // k.shape[1], int(k.shape[0] > 1),
        resident_heads(batch * heads, kv_len, (k.shape[3] + v.shape[3]) * k.element_size()),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *mask_captures, *score_captures,
        row_starts, row_stops, *strides(row_starts, q_len),
        ranges, counts, offsets, index, *strides(tile_map, tiles), patterns, None if words is None else words.view(torch.uint8), broken,
        sinks, peaks, *(dropout or (None, 0, 1.0)),
        num_warps=NUM_WARPS.value, num_stages=NUM_STAGES.value, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def strides(x, rows):
    """Batch and head strides of a [B or 1, H or 1, rows, ..] table, in rows; 0 where there is one entry for all."""
    if x is None:
        return 0, 0
    if not x.is_contiguous() or x.shape[2] != rows:
        raise ValueError(f"expected a contiguous table of {rows} rows, got shape {tuple(x.shape)}, strides {x.stride()}")
    return (x.shape[1] * rows if x.shape[0] > 1 else 0), (rows if x.shape[1] > 1 else 0)


def attention(q, k, v, mask_tensors=(), mask_scalars=(), score_tensors=(), score_scalars=(), scale=None):
    """(out, lse) with a trivial map: every tile is computed and cut by the mask. Captures are in the order of the file's header."""
    if BITS:
        raise ValueError("this kernel reads the bits of partial tiles, which the caller must bring: see `forward`")
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    tile_rows, tile_columns = triton.cdiv(q_len, QUERIES.value), triton.cdiv(kv_len, BLOCK_KV.value)
    given = {"broken": torch.full((1,), int(RUNS == "fail"), dtype=torch.int32, device=q.device)}
    if PIECES > 0:
        given["row_starts"], given["row_stops"] = row_bounds(mask_tensors, mask_scalars, q_len, kv_len, batch, heads, q.device)
    if MAP_FORM == "range":
        ranges = torch.tensor([0, 0, 0, tile_columns], dtype=torch.int32, device=q.device)
        given["ranges"] = ranges.expand(1, 1, tile_rows, 4).contiguous()
    elif MAP_FORM == "list":
        counts = torch.tensor([0, tile_columns], dtype=torch.int32, device=q.device)
        given["counts"] = counts.expand(1, 1, tile_rows, 2).contiguous()
        given["offsets"] = torch.zeros(1, 1, tile_rows, 2, dtype=torch.int32, device=q.device)
        given["index"] = torch.arange(tile_columns, dtype=torch.int32, device=q.device)
    mask, score = pack(mask_tensors, mask_scalars), pack(score_tensors, score_scalars)
    return forward(q, k, v, head_dim**-0.5 if scale is None else scale, mask, score, **given)
