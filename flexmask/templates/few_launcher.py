"""The host side of the kernel for few queries: copied by `assemble` into its files in place of launcher.py's `forward`."""

import torch
import triton

from .forward import BLOCK_KV, NUM_STAGES, NUM_WARPS, PACK, PADDED_DIM, PADDED_V_DIM, QUERIES, SPLIT, TMA
from .forward_few import attention_forward
from .hopper_turns import processors
from .launcher import addressable, describe, results_of, rising, strides, without_keys
from .portions import add_portions, portion_memory

# ---- functions


def portions_of(programs, kv_len, device):
    """Among how many programs to split the keys of each tile row: one for each multiprocessor in all, as two take turns at the memory, each
    with two tiles of keys or more."""
    return max(1, min(processors(device) // max(1, programs), triton.cdiv(kv_len, BLOCK_KV.value) // 2))


def forward(q, k, v, scale, mask_captures=((), ()), score_captures=((), ()), row_starts=None, row_stops=None,
            ranges=None, counts=None, offsets=None, index=None, patterns=None, words=None, broken=None, into=None,
            sinks=None, dropout=None, peaks=None, portions=None):  # fmt: skip
    """(out [B, Hq, Q, Dv], lse float32 [B, Hq, Q]) of q [B, Hq, Q, D], k [B or 1, Hkv, KV, D], v [B or 1, Hkv, KV, Dv].

    Captures come from `pack`. row_starts and row_stops are int32 [B or 1, Hq or 1, Q, PIECES]; the map, of tile rows of QUERIES queries,
    and the same for all heads where heads share a tile, is `ranges` int32 [B or 1, Hq or 1, tile rows, 4], or `counts` and `offsets`
    int32 [.., .., tile rows, 2] with `index`, and with bits `patterns` and `words`. All are contiguous. `broken` is the flag that a
    kernel looks at which does not always run; `into` the (out, lse) that its partner has filled where this one returns. `sinks` [Hq] are
    logits that take part in the softmax and have no value. `dropout` is (seed, int64 [1] on q's device; how many of 2**24 pairs are
    dropped; what the others are multiplied by). `peaks`, float32 [B, Hq, Q] contiguous, is filled with the greatest scores. `portions`
    says among how many programs a row is split, where that is not to be as the GPU has room for.
    """
    batch, heads, q_len, _ = q.shape
    kv_len, group = k.shape[2], heads // k.shape[1]
    out, lse = results_of(q, k, v) if into is None else into
    if lse.numel() == 0:
        return out, lse
    if kv_len == 0:
        return without_keys(out, lse, sinks, peaks)
    q, scale = rising(q, scale)
    q, k, v = addressable(q), addressable(k), addressable(v)
    tiles, units = triton.cdiv(q_len, QUERIES.value), k.shape[1] if PACK.value > 1 else heads
    programs, tile_map = tiles * batch * units, counts if ranges is None else ranges
    if SPLIT:
        portions = portions or portions_of(programs, kv_len, q.device)
        memory = portion_memory(out, portions)
    else:
        portions, memory = 1, (None, None, None)
    finish = dropout or (None, 0, 1.0)
    sinks = None if sinks is None else sinks.contiguous()
    sources = (k, v)
    if TMA:
        sources = (describe(k, BLOCK_KV.value, PADDED_DIM.value), describe(v, BLOCK_KV.value, PADDED_V_DIM.value))
    attention_forward[(programs * portions,)](
        q, *sources, out, lse, *memory,
        float(scale), q_len, kv_len, heads, group, int(k.shape[0] > 1), units, portions, lse.numel(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *mask_captures, *score_captures,
        row_starts, row_stops, *strides(row_starts, q_len),
        ranges, counts, offsets, index, *strides(tile_map, tiles), patterns, None if words is None else words.view(torch.uint8), broken,
        sinks, peaks, *finish,
        num_warps=NUM_WARPS.value, num_stages=NUM_STAGES.value, enable_fp_fusion=True,
    )  # fmt: skip
    if SPLIT:
        add_portions(memory, out, lse, broken, sinks, peaks, finish[0], finish[2])
    return out, lse
