"""Forward attention, one program a tile of BLOCK_Q query rows: online softmax over the tiles of keys that the map keeps.

The constants and the four functions under "mods" are replaced by `assemble`; everything else is copied as it stands.
Scores are kept in base 2. A row that keeps no key gives 0 and a log-sum-exp of -inf, or its head's sink. A NaN in a query stays in its
row; a NaN in a value row reaches the rows that share a computed tile with it even where the key is masked out (0 * NaN), as in dense
attention.
"""
# ruff: noqa: SIM108
# (Triton specialises an `if`, and long conditional expressions read badly)

import triton
import triton.language as tl

from .dropout import head_keys, row_keys, survives

# ---- constants of the plan
HEAD_DIM = tl.constexpr(64)
V_HEAD_DIM = tl.constexpr(64)
# next powers of two: tiles are that wide, zero beyond the head dim
PADDED_DIM = tl.constexpr(64)
PADDED_V_DIM = tl.constexpr(64)
BLOCK_Q = tl.constexpr(64)
BLOCK_KV = tl.constexpr(64)
NUM_WARPS = tl.constexpr(4)
NUM_STAGES = tl.constexpr(2)
TMA = tl.constexpr(False)
# "none": every tile is full; "range": four numbers a tile row; "list": a list of tiles a tile row
MAP_FORM = tl.constexpr("none")
# PARTIAL tiles compare with so many row intervals, or-ed; with none they evaluate mask_mod
PIECES = tl.constexpr(0)
# without intervals, whether PARTIAL tiles read the pattern of bits that the map holds of them
BITS = tl.constexpr(False)
# whether row intervals may begin after the first key
STARTS = tl.constexpr(True)
# "always"; or only where the map's flag on the device says that its row intervals or bits "hold", or that they "fail"
RUNS = tl.constexpr("always")
SCORE = tl.constexpr(False)
PRECISION = tl.constexpr("ieee")
# of few queries (forward_few.py): so many heads share a tile, and whether its keys are split among programs
PACK = tl.constexpr(1)
SPLIT = tl.constexpr(False)
# ---- kernel
QUERIES = tl.constexpr(BLOCK_Q.value // PACK.value)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# ---- mods
@triton.jit
def mask_row(tables, numbers, b, h, q_idx):
    """What the mask needs of a query row: nothing, as no tile is evaluated."""
    return ()


@triton.jit
def mask_mod(tables, numbers, row, b, h, q_idx, kv_idx):
    """Whether query q_idx [BLOCK_Q, 1] keeps key kv_idx [1, BLOCK_KV]; not called, as no tile is evaluated."""
    return kv_idx >= 0


@triton.jit
def score_row(tables, numbers, b, h, q_idx):
    """What the score mod needs of a query row: nothing, as there is none."""
    return ()


@triton.jit
def score_mod(tables, numbers, row, score, b, h, q_idx, kv_idx):
    """The changed score, float32; not called, as there is no score mod."""
    return score


# ---- functions


@triton.jit
def load_rows(source, start, length, stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECKED: tl.constexpr):
    """Rows [start, start + BLOCK) at `source`: [BLOCK, PADDED], zero beyond WIDTH and, where CHECKED, beyond `length`."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    at = source + start.to(tl.int64) * stride + (row * stride + column)
    if CHECKED or WIDTH != PADDED:
        tile = tl.load(at, mask=(start + row < length) & (column < WIDTH), other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_rows(target, start, length, stride, tile, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The reverse of `load_rows`: stores what exists of a tile."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    exists = start + row < length
    if WIDTH != PADDED:
        exists = exists & (column < WIDTH)
    tl.store(target + start.to(tl.int64) * stride + (row * stride + column), tile, mask=exists)


@triton.jit
def load_keys(keys, start, kv_len, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECKED: tl.constexpr):
    """A tile of K or V; `keys` = (descriptor or pointer to the head's first row, batch entry, head, row stride)."""
    source, b, h, stride = keys
    if TMA:
        tile = source.load([b, h, start, 0]).reshape(BLOCK_KV, PADDED)
    else:
        tile = load_rows(source, start, kv_len, stride, BLOCK_KV, WIDTH, PADDED, CHECKED)
    return tile


@triton.jit
def load_bound(row_starts, row_stops, at, valid):
    """One interval a row, [start, stop), each [BLOCK_Q, 1]; empty for rows that do not exist."""
    return tl.load(row_starts + at, mask=valid, other=0), tl.load(row_stops + at, mask=valid, other=0)


@triton.jit
def load_bounds(row_starts, row_stops, at, valid):
    """The row intervals of a tile row: start and stop of each piece."""
    bounds = ()
    if PIECES > 0:
        bounds += load_bound(row_starts, row_stops, at * PIECES, valid)
    if PIECES > 1:
        bounds += load_bound(row_starts, row_stops, at * PIECES + 1, valid)
    if PIECES > 2:
        bounds += load_bound(row_starts, row_stops, at * PIECES + 2, valid)
    return bounds


@triton.jit
def inside(bounds, kv_idx):
    """Whether a key lies in one of its row's intervals."""
    keep = kv_idx < bounds[1]
    if STARTS:
        keep = keep & (kv_idx >= bounds[0])
    if PIECES > 1:
        keep = keep | ((kv_idx >= bounds[2]) & (kv_idx < bounds[3]))
    if PIECES > 2:
        keep = keep | ((kv_idx >= bounds[4]) & (kv_idx < bounds[5]))
    return keep


@triton.jit
def bits_of(words, pattern):
    """A tile's pattern, [BLOCK_Q, BLOCK_KV], of which `words` holds 8 keys a byte. (Words of 32 would be fetched ahead of time, for every
    place its own, and fill the shared memory.)"""
    row, column = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_KV)[None, :]
    if PACK > 1:
        row = row % QUERIES
    line: tl.constexpr = triton.cdiv(BLOCK_KV.value, 32) * 4
    byte = tl.load(words + pattern.to(tl.int64) * (QUERIES * line) + (row * line + column // 8))
    return ((byte.to(tl.int32) >> (column % 8)) & 1) != 0


@triton.jit
def keep_of(bounds, mask, place, kv_idx, kv_len, pattern, TILE: tl.constexpr):
    """Which keys a PARTIAL tile keeps, by row intervals, by its bits, by the predicate, or (the short last tile) by the length alone."""
    if TILE == "bounded":
        keep = inside(bounds, kv_idx)
    elif TILE == "bits":
        keep = bits_of(mask, pattern)
    elif TILE == "evaluated":
        tables, numbers, row = mask
        b, h, q_idx = place
        keep = mask_mod(tables, numbers, row, b, h, q_idx, kv_idx) & (kv_idx < kv_len)
    else:
        keep = kv_idx < kv_len
    return keep


@triton.jit
def attend(acc, total, peak, context, tile, pattern, TILE: tl.constexpr):
    """One tile of keys: (acc, total, peak) are the output so far, the softmax's denominator, and the highest score, by row. `pattern` is
    the number of the tile's bits, if it has any."""
    q, keys, values, kv_len, scale, place, bounds, mask, score, dropout = context
    start = tile * BLOCK_KV
    kv_idx = start + tl.arange(0, BLOCK_KV)[None, :]
    k = load_keys(keys, start, kv_len, HEAD_DIM, PADDED_DIM, TILE != "full")
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SCORE:
        tables, numbers, row = score
        b, h, q_idx = place
        changed = score_mod(tables, numbers, row, s * scale, b, h, q_idx, kv_idx)
        s = tl.broadcast_to(changed * LOG2E, (BLOCK_Q, BLOCK_KV))
    if TILE != "full":
        s = tl.where(keep_of(bounds, mask, place, kv_idx, kv_len, pattern, TILE), s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    # a row with nothing kept yet has peak -inf, and -inf - -inf is NaN
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    if SCORE:
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(peak - base)
    else:
        p = tl.exp2(s * scale - (base * scale)[:, None])
        shrink = tl.exp2(peak * scale - base * scale)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if len(dropout) > 0:
        keys_of_rows, threshold = dropout
        p = tl.where(survives(keys_of_rows, kv_idx, threshold), p, 0.0)
    v = load_keys(values, start, kv_len, V_HEAD_DIM, PADDED_V_DIM, TILE != "full")
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def attend_span(acc, total, peak, context, first, last, gap_at, gap, TILE: tl.constexpr):
    """Tiles [first, last), jumping over the `gap` tiles from `gap_at` on."""
    for i in tl.range(first, last - gap, num_stages=NUM_STAGES):
        tile = i
        if TILE != "full":
            tile = tl.where(i >= gap_at, i + gap, i)
        acc, total, peak = attend(acc, total, peak, context, tile, 0, TILE)
    return acc, total, peak


@triton.jit
def attend_list(acc, total, peak, context, index, first, last, extra, whole, TILE: tl.constexpr):
    """The tiles named by index[first:last], and tile `whole` where `extra` is 1. Each number is read one step ahead, so that no load
    of keys waits for it."""
    following = tl.load(index + first, mask=first < last, other=whole)
    for i in tl.range(first, last + extra, num_stages=NUM_STAGES):
        tile = following
        following = tl.load(index + i + 1, mask=i + 1 < last, other=whole)
        acc, total, peak = attend(acc, total, peak, context, tile, 0, TILE)
    return acc, total, peak


@triton.jit
def attend_bits(acc, total, peak, context, index, patterns, first, last):
    """The tiles named by index[first:last], each masked by the bits whose number stands at the same place of `patterns`."""
    following, next_pattern = tl.load(index + first, mask=first < last, other=0), tl.load(patterns + first, mask=first < last, other=0)
    for i in tl.range(first, last, num_stages=NUM_STAGES):
        tile, pattern = following, next_pattern
        following = tl.load(index + i + 1, mask=i + 1 < last, other=0)
        next_pattern = tl.load(patterns + i + 1, mask=i + 1 < last, other=0)
        acc, total, peak = attend(acc, total, peak, context, tile, pattern, "bits")
    return acc, total, peak


@triton.jit
def attend_ranges(acc, total, peak, context, ranges, whole):
    """Range form: FULL tiles [first_full, last_full), the rest of [first, last) PARTIAL; a short FULL tile is done with those."""
    first = tl.load(ranges)
    first_full = tl.minimum(tl.load(ranges + 1), whole)
    last_full = tl.minimum(tl.load(ranges + 2), whole)
    last = tl.load(ranges + 3)
    gap = tl.maximum(last_full - first_full, 0)
    acc, total, peak = attend_span(acc, total, peak, context, first_full, first_full + gap, 0, 0, "full")
    acc, total, peak = attend_span(acc, total, peak, context, first, last, first_full, gap, "bounded")
    return acc, total, peak


@triton.jit
def attend_lists(acc, total, peak, context, counts, offsets, index, patterns, whole):
    """List form: FULL tiles, then PARTIAL ones; a short FULL tile (always the last one, number `whole`) is masked as well."""
    full = tl.load(counts)
    first = tl.load(offsets)
    short = (tl.load(index + first + full - 1, mask=full > 0, other=-1) == whole).to(tl.int32)
    acc, total, peak = attend_list(acc, total, peak, context, index, first, first + full - short, 0, whole, "full")
    first = tl.load(offsets + 1)
    last = first + tl.load(counts + 1)
    if PIECES > 0:
        acc, total, peak = attend_list(acc, total, peak, context, index, first, last, short, whole, "bounded")
    elif BITS:
        acc, total, peak = attend_bits(acc, total, peak, context, index, patterns, first, last)
        acc, total, peak = attend_span(acc, total, peak, context, whole, whole + short, 0, 0, "tail")
    else:
        acc, total, peak = attend_list(acc, total, peak, context, index, first, last, short, whole, "evaluated")
    return acc, total, peak


@triton.jit
def add_sink(acc, total, height, sink):
    """A logit more (base 2, as `height`, the highest score) in the softmax's denominator."""
    top = tl.maximum(height, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(height - base)
    return acc * shrink[:, None], total * shrink + tl.exp2(sink - base), base


@triton.jit
def find_tile(q_len, heads, resident):
    """(tile row, batch entry, head) of this program: `resident` heads at a time, so that their keys stay in the L2 cache; the last
    tile row first, as under causal masks it has the most work."""
    tiles = tl.cdiv(q_len, BLOCK_Q)
    pid = tl.program_id(0)
    turn = pid % (tiles * resident)
    head = pid // (tiles * resident) * resident + turn % resident
    return tiles - 1 - turn // resident, head // heads, head % heads


# lengths and counts are not specialised on: another length must not compile another kernel
@triton.jit(
    do_not_specialize=["q_len", "kv_len", "heads", "group", "resident", "stride_rb", "stride_rh", "stride_mb", "stride_mh", "threshold"]
)
def attention_forward(
    q, k, v, out, lse,  # q, k, v: TMA descriptors or pointers; out [B, Hq, Q, Dv]; lse float32 [B, Hq, Q]
    scale, q_len, kv_len, heads, group, kv_batch, resident,  # `group` query heads share a key head; kv_batch is 0 where K has one entry
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
    """One tile row of the output."""
    idle = False
    if RUNS == "hold":
        idle = tl.load(broken) != 0
    if RUNS == "fail":
        idle = tl.load(broken) != 1
    if idle:
        return
    m, b, h = find_tile(q_len, heads, resident)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    kv_b, kv_h = b * kv_batch, h // group
    kv_b64, kv_h64 = kv_b.to(tl.int64), kv_h.to(tl.int64)
    start = m * BLOCK_Q
    q_idx = start + tl.arange(0, BLOCK_Q)[:, None]
    if TMA:
        q_tile = q.load([b, h, start, 0]).reshape(BLOCK_Q, PADDED_DIM)
        keys = (k, kv_b, kv_h, stride_kn)
        values = (v, kv_b, kv_h, stride_vn)
    else:
        q_tile = load_rows(q + b64 * stride_qb + h64 * stride_qh, start, q_len, stride_qn, BLOCK_Q, HEAD_DIM, PADDED_DIM, True)
        keys = (k + kv_b64 * stride_kb + kv_h64 * stride_kh, kv_b, kv_h, stride_kn)
        values = (v + kv_b64 * stride_vb + kv_h64 * stride_vh, kv_b, kv_h, stride_vn)
    bounds = load_bounds(row_starts, row_stops, b64 * stride_rb + h64 * stride_rh + q_idx, q_idx < q_len)
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
    tile_row = b * stride_mb + h * stride_mh + m
    if MAP_FORM == "none":
        acc, total, peak = attend_span(acc, total, peak, context, 0, whole, 0, 0, "full")
        # no trip or one; an `if` would hold a whole tile of keys in registers
        acc, total, peak = attend_span(acc, total, peak, context, whole, tl.cdiv(kv_len, BLOCK_KV), 0, 0, "tail")
    elif MAP_FORM == "range":
        acc, total, peak = attend_ranges(acc, total, peak, context, ranges + tile_row * 4, whole)
    else:
        acc, total, peak = attend_lists(acc, total, peak, context, counts + tile_row * 2, offsets + tile_row * 2, index, patterns, whole)

    height = peak if SCORE else peak * scale
    row = start + tl.arange(0, BLOCK_Q)
    to = (b64 * heads + h64) * q_len + row
    if peaks is not None:
        # no NaN is greatest, but it is in the sum
        certain = (total >= 0.0) | (height == float("inf"))
        tl.store(peaks + to, tl.where(certain, height * LN2, total), mask=row < q_len)
    if sinks is not None:
        acc, total, height = add_sink(acc, total, height, tl.load(sinks + h).to(tl.float32) * LOG2E)
    # not `total > 0`: a NaN must come out as NaN
    empty = total == 0.0
    share = 1.0 / tl.where(empty, 1.0, total)
    if seed is not None:
        share = share * factor
    acc = acc * share[:, None]
    row_lse = tl.where(empty, float("-inf"), (height + tl.log2(total)) * LN2)
    tl.store(lse + to, row_lse, mask=row < q_len)
    tile_out = out + b64 * stride_ob + h64 * stride_oh
    store_rows(tile_out, start, q_len, stride_on, acc.to(out.dtype.element_ty), BLOCK_Q, V_HEAD_DIM, PADDED_V_DIM)
