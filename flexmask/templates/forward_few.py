"""Forward attention where there are few queries: query heads that share keys share a tile too, and a tile's keys are split among programs.

A tile has QUERIES queries of each of up to PACK heads, one head after the other. With SPLIT, `portions` programs take their portion of the
tiles of keys each, and leave sums in memory that portions.py adds up. `assemble` joins this module with forward.py, whose functions walk
and mask the tiles, and leaves its kernel out.
"""

import triton
import triton.language as tl

from .backward import is_idle
from .dropout import head_keys, row_keys, survives  # noqa: F401
from .forward import (
    BITS,
    BLOCK_KV,
    BLOCK_Q,
    HEAD_DIM,
    LOG2E,
    MAP_FORM,
    PACK,
    PADDED_DIM,
    PADDED_V_DIM,
    PIECES,
    QUERIES,
    SCORE,
    SPLIT,
    TMA,
    V_HEAD_DIM,
    attend_bits,
    attend_list,
    attend_span,
    load_bounds,
    mask_row,
    score_row,
)
from .portions import finish_rows

# ---- few queries


@triton.jit
def within(first, last, portion, portions):
    """Which of [first, last) a portion takes."""
    count = tl.maximum(last - first, 0)
    return first + count * portion // portions, first + count * (portion + 1) // portions


@triton.jit
def attend_span_portion(acc, total, peak, context, first, last, gap_at, gap, portion, portions, TILE: tl.constexpr):
    """A portion of what `attend_span` does."""
    low, high = within(first, last - gap, portion, portions)
    return attend_span(acc, total, peak, context, low, high + gap, gap_at, gap, TILE)


@triton.jit
def attend_list_portion(acc, total, peak, context, index, first, last, extra, whole, portion, portions, TILE: tl.constexpr):
    """A portion of what `attend_list` does."""
    low, high = within(first, last + extra, portion, portions)
    named = tl.minimum(high, last)
    return attend_list(acc, total, peak, context, index, low, named, high - named, whole, TILE)


@triton.jit
def attend_ranges_portion(acc, total, peak, context, ranges, whole, portion, portions):
    """A portion of what `attend_ranges` does."""
    first = tl.load(ranges)
    first_full = tl.minimum(tl.load(ranges + 1), whole)
    last_full = tl.minimum(tl.load(ranges + 2), whole)
    last = tl.load(ranges + 3)
    gap = tl.maximum(last_full - first_full, 0)
    acc, total, peak = attend_span_portion(acc, total, peak, context, first_full, first_full + gap, 0, 0, portion, portions, "full")
    acc, total, peak = attend_span_portion(acc, total, peak, context, first, last, first_full, gap, portion, portions, "bounded")
    return acc, total, peak


@triton.jit
def attend_lists_portion(acc, total, peak, context, counts, offsets, index, patterns, whole, portion, portions):
    """A portion of what `attend_lists` does."""
    full = tl.load(counts)
    first = tl.load(offsets)
    short = (tl.load(index + first + full - 1, mask=full > 0, other=-1) == whole).to(tl.int32)
    acc, total, peak = attend_list_portion(
        acc, total, peak, context, index, first, first + full - short, 0, whole, portion, portions, "full"
    )
    first = tl.load(offsets + 1)
    last = first + tl.load(counts + 1)
    if PIECES > 0:
        acc, total, peak = attend_list_portion(acc, total, peak, context, index, first, last, short, whole, portion, portions, "bounded")
    elif BITS:
        low, high = within(first, last, portion, portions)
        acc, total, peak = attend_bits(acc, total, peak, context, index, patterns, low, high)
        acc, total, peak = attend_span_portion(acc, total, peak, context, whole, whole + short, 0, 0, portion, portions, "tail")
    else:
        acc, total, peak = attend_list_portion(acc, total, peak, context, index, first, last, short, whole, portion, portions, "evaluated")
    return acc, total, peak


@triton.jit
def find_unit(q_len, units, portions):
    """(tile row, batch entry, which of `units` heads or groups of heads, portion) of this program."""
    tiles = tl.cdiv(q_len, QUERIES)
    pid = tl.program_id(0)
    turn = pid // portions
    unit = turn // tiles
    return turn % tiles, unit // units, unit % units, pid % portions


@triton.jit
def rows_of(m, unit, q_len, group):
    """Head, query, and whether there is such a one, of each row of a tile."""
    place = tl.arange(0, BLOCK_Q)
    if PACK > 1:
        member = place // QUERIES
        head = unit * group + tl.minimum(member, group - 1)
        query = m * QUERIES + place % QUERIES
        exists = (query < q_len) & (member < group)
    else:
        head = unit + 0 * place
        query = m * BLOCK_Q + place
        exists = query < q_len
    return head, query, exists


# lengths and counts are not specialised on: another length must not compile another kernel
@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "heads", "group", "units", "portions", "rows", "stride_rb", "stride_rh", "stride_mb", "stride_mh", "threshold",
    ]
)  # fmt: skip
def attention_forward(
    q, k, v, out, lse,  # k, v: TMA descriptors or pointers; out [B, Hq, Q, Dv]; lse float32 [B, Hq, Q]
    portion_sums, portion_totals, portion_heights,  # SPLIT: float32 [portions, B, Hq, Q, Dv], and twice [portions, B, Hq, Q]
    scale, q_len, kv_len, heads, group, kv_batch,
    units, portions, rows,  # `units` a batch entry: heads, or groups of `group` that share a key head; rows of the output in all
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    mask_tables, mask_numbers, score_tables, score_numbers,  # tuples: see `pack`
    row_starts, row_stops, stride_rb, stride_rh,  # row intervals int32 [.., .., Q, PIECES], strides in rows
    ranges, counts, offsets, index, stride_mb, stride_mh,  # the tile map, strides in tile rows
    patterns, words,  # the numbers of PARTIAL tiles' bits, beside `index`, and the bits
    broken,  # int32: 0 where the map's row intervals, or bits, hold; 1 where they fail, and no kernel before has done the work
    sinks, peaks,  # [Hq], a logit of each head that has no value; float32 [B, Hq, Q], for the greatest scores; either may be None
    seed, threshold, factor,  # of dropout: int64, or None; how many of 2**24 it drops; what it multiplies the others by
):  # fmt: skip
    """One tile row of the output, or one portion of its keys."""
    if is_idle(broken):
        return
    m, b, unit, portion = find_unit(q_len, units, portions)
    head, query, exists = rows_of(m, unit, q_len, group)
    b64, head64, query64 = b.to(tl.int64), head.to(tl.int64), query.to(tl.int64)
    kv_b = b * kv_batch
    if PACK > 1:
        kv_h, h = unit, head[:, None]
        tile_row = b * stride_mb + m
    else:
        kv_h, h = unit // group, unit
        tile_row = b * stride_mb + unit * stride_mh + m
    q_idx = query[:, None]
    column = tl.arange(0, PADDED_DIM)[None, :]
    places = q + (b64 * stride_qb + head64 * stride_qh + query64 * stride_qn)[:, None] + column
    q_tile = tl.load(places, mask=exists[:, None] & (column < HEAD_DIM), other=0.0)
    if TMA:
        keys, values = (k, kv_b, kv_h, stride_kn), (v, kv_b, kv_h, stride_vn)
    else:
        kv_b64, kv_h64 = kv_b.to(tl.int64), kv_h.to(tl.int64)
        keys = (k + kv_b64 * stride_kb + kv_h64 * stride_kh, kv_b, kv_h, stride_kn)
        values = (v + kv_b64 * stride_vb + kv_h64 * stride_vh, kv_b, kv_h, stride_vn)
    bounds = load_bounds(row_starts, row_stops, (b64 * stride_rb + head64 * stride_rh + query64)[:, None], exists[:, None])
    mask = (mask_tables, mask_numbers, ())
    if BITS:
        mask = words
    elif MAP_FORM == "list" and PIECES == 0:
        mask = (mask_tables, mask_numbers, mask_row(mask_tables, mask_numbers, b, h, q_idx))
    score = (score_tables, score_numbers, ())
    if SCORE:
        score = (score_tables, score_numbers, score_row(score_tables, score_numbers, b, h, q_idx))
    else:
        scale = scale * LOG2E
    dropout = ()
    if seed is not None:
        dropout = (row_keys(head_keys(seed, b, h), q_idx), threshold)
    context = (q_tile, keys, values, kv_len, scale, (b, h, q_idx), bounds, mask, score, dropout)

    acc = tl.zeros([BLOCK_Q, PADDED_V_DIM], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    whole = kv_len // BLOCK_KV
    if MAP_FORM == "none":
        acc, total, peak = attend_span_portion(acc, total, peak, context, 0, whole, 0, 0, portion, portions, "full")
        acc, total, peak = attend_span_portion(acc, total, peak, context, whole, tl.cdiv(kv_len, BLOCK_KV), 0, 0, portion, portions, "tail")
    elif MAP_FORM == "range":
        acc, total, peak = attend_ranges_portion(acc, total, peak, context, ranges + tile_row * 4, whole, portion, portions)
    else:
        lists = (counts + tile_row * 2, offsets + tile_row * 2)
        acc, total, peak = attend_lists_portion(acc, total, peak, context, lists[0], lists[1], index, patterns, whole, portion, portions)

    height = peak if SCORE else peak * scale
    row = (b64 * heads + head64) * q_len + query64
    if SPLIT:
        row += portion.to(tl.int64) * rows
        column = tl.arange(0, PADDED_V_DIM)[None, :]
        tl.store(portion_totals + row, total, mask=exists)
        tl.store(portion_heights + row, height, mask=exists)
        tl.store(portion_sums + row[:, None] * V_HEAD_DIM + column, acc, mask=exists[:, None] & (column < V_HEAD_DIM))
    else:
        to = out + b64 * stride_ob + head64 * stride_oh + query64 * stride_on
        finish_rows(acc, total, height, row, head, exists, to, lse, sinks, peaks, seed, factor, PADDED_V_DIM)
