"""The host side of the Hopper forward kernel. Copied by `assemble_hopper` into every generated file."""

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

from .hopper_forward import attention_forward
from .hopper_forward_plan import (
    BITS,
    BLOCK_KV,
    MEMBERS,
    PACK,
    PADDED_DIM,
    PADDED_V_DIM,
    PART,
    QUERIES,
    SCHEDULE,
    SPAN,
    SPLIT,
    WIDE,
    WORDS,
)
from .hopper_turns import long_level, processors
from .launcher import describe, fits_tma, resident_heads, results_of, rising, strides, without_keys
from .portions import add_portions, portion_memory, split_among


# ---- functions
def tiles_of(x, rows, width, heads=1):
    """A Gluon descriptor of [1, heads, rows, width] tiles of `x`, laid out in shared memory as wgmma reads them."""
    if WIDE:
        width = PART.value
    known = describe(x, rows, width)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return GluonDescriptor(known.base, known.shape, known.strides, [1, heads, *known.block_shape[2:]], layout)


def check_bits(patterns, words):
    """Raises ValueError where the plan reads bits and they are not there, and the other way about."""
    if BITS.value != (words is not None) or BITS.value != (patterns is not None):
        raise ValueError("this kernel reads bits: it needs `patterns` and `words`" if BITS else "this kernel reads no bits")
    if BITS and tuple(words.shape[1:]) != (QUERIES.value, WORDS.value):
        raise ValueError(f"words must be [pool, {QUERIES.value}, {WORDS.value}]; got {list(words.shape)}")


def forward(q, k, v, scale, mask_captures=((), ()), score_captures=((), ()), row_starts=None, row_stops=None,
            ranges=None, counts=None, offsets=None, index=None, patterns=None, words=None, broken=None, into=None,
            sinks=None, dropout=None, peaks=None, order=None, queue=None, column_starts=None, column_stops=None,
            portions=None):  # fmt: skip
    """(out [B, Hq, Q, Dv], lse float32 [B, Hq, Q]) of q [B, Hq, Q, D], k [B or 1, Hkv, KV, D], v [B or 1, Hkv, KV, Dv].

    Captures come from `pack`; those of the mask are not looked at. row_starts and row_stops are int32 [B or 1, Hq or 1, Q, PIECES], or
    (for a crossed plan) column_starts and column_stops int32 [B or 1, Hq or 1, KV, 1]; the map is `ranges` int32 [B or 1, Hq or 1, tile
    rows, 4], or `counts` and `offsets` int32 [.., .., tile rows, 2] with `index`; with bits also `patterns` int32, as long as `index`, and
    `words` int32 [pool, QUERIES, BLOCK_KV / 32]. All are contiguous. `broken` is the flag that a kernel
    looks at which does not always run; `into` the (out, lse) that its partner has filled where this one does nothing. `sinks` [Hq] are
    logits that take part in the softmax and have no value. `peaks`, float32 [B, Hq, Q] contiguous, is filled with the greatest scores.
    `order` is what `lists.order_lines` says of the tile rows; by default the last comes first. `queue` int32 [1] is 0, and again
    when the kernel is done; it belongs to one launch at a time. A plan that splits rows does so among `portions` programs, or as many as
    the GPU has room for. Raises ValueError for dropout, for bits that are missing, of other sizes
    or not read, and for tensors that TMA cannot describe.
    """
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    if dropout is not None:
        raise ValueError("this kernel has no dropout. Use a KernelPlan.")
    check_bits(patterns, words)
    out, lse = results_of(q, k, v) if into is None else into
    if lse.numel() == 0:
        return out, lse
    if kv_len == 0:
        return without_keys(out, lse, sinks, peaks)
    if not fits_tma(out):
        raise ValueError(f"TMA needs rows of a multiple of 16 bytes; got an output of {tuple(out.shape)}, strides {out.stride()}")
    q, scale = rising(q, scale)
    rows, units = triton.cdiv(q_len, QUERIES.value), batch * heads // PACK.value
    tiles, programs, group = rows * units, processors(q.device), heads // k.shape[1]
    if SCHEDULE == "queue" and queue is None:
        queue = torch.zeros(1, dtype=torch.int32, device=q.device)
    tile_map = counts if ranges is None else ranges
    resident = resident_heads(units, kv_len, (k.shape[3] + v.shape[3]) * k.element_size() * PACK.value // group)
    sinks = None if sinks is None else sinks.contiguous()
    if SPLIT:
        portions = portions or split_among(tiles, triton.cdiv(kv_len, BLOCK_KV.value), programs)
        tiles *= portions
        memory = portion_memory(out, portions)
    else:
        portions, memory = 1, (None, None, None)
    attention_forward[(tiles if SCHEDULE == "grid" else min(tiles, programs),)](
        tiles_of(q, SPAN.value, PADDED_DIM.value, MEMBERS.value), tiles_of(k, BLOCK_KV.value, PADDED_DIM.value),
        tiles_of(v, BLOCK_KV.value, PADDED_V_DIM.value), tiles_of(out, SPAN.value, PADDED_V_DIM.value, MEMBERS.value), lse,
        float(scale), q_len, kv_len, tiles, rows, resident, heads, group, int(k.shape[0] > 1), *score_captures,
        row_starts, row_stops, *strides(row_starts, q_len),
        column_starts, column_stops, *strides(column_starts, kv_len),
        ranges, counts, offsets, index, *strides(tile_map, rows), patterns, words,
        order, long_level(resident, programs), queue, broken, sinks, peaks, *memory, portions, lse.numel(),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if SPLIT:
        add_portions(memory, out, lse, broken, sinks, peaks)
    return out, lse
