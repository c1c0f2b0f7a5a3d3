"""Backward attention: the gradient of the queries, one program a tile of BLOCK_Q rows; and what it shares with that of keys and values
(`backward_columns`). Nothing is added atomically, so every run gives the same bits.

With p = exp2(score - lse): ds = p * (dout v^T - delta), dv = p^T dout, dq = scale * ds' k and dk = scale * ds'^T q, where ds' is ds times
the slope of the score mod. Dropout zeroes the same pairs as in the forward pass, of dout v^T and of p in dv, and multiplies the others by
`factor`. Rows come with two numbers from `row_terms`: their log-sum-exp in base 2, infinite where nothing is kept (so p
is 0), and -delta, from where the product dout v^T starts.

The constants and the functions under "mods" are replaced by `assemble_backward`, which takes the kernel of one part and copies everything
else as it stands. Mods are functions of single places, so the tiles of keys hand them theirs transposed: keys down, queries across.
"""

import triton
import triton.language as tl

from .dropout import head_keys, row_keys, survives
from .forward import find_tile, inside, load_bounds, load_rows, store_rows

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
# "none": every tile is full; "range": four numbers a line of tiles; "list": a list of tiles a line
MAP_FORM = tl.constexpr("none")
# PARTIAL tiles compare with so many intervals of each line's places, or-ed; with none they evaluate mask_mod
PIECES = tl.constexpr(0)
# whether intervals may begin after the first place
STARTS = tl.constexpr(True)
# "always"; or only where the map's flag on the device says that its intervals "hold", or that they "fail"
RUNS = tl.constexpr("always")
SCORE = tl.constexpr(False)
# gradients of captured tables: "" (none), or score_scatter adds a "float"; or first finds the "peak" of each entry (and no dq is made),
# then, in another launch, adds in "fixed" point, so that no order matters
SCATTER = tl.constexpr("")
PRECISION = tl.constexpr("ieee")
# ---- kernel

LOG2E = tl.constexpr(1.4426950408889634)


# ---- mods
@triton.jit
def mask_row(tables, numbers, b, h, q_idx):
    """What the mask needs of query rows: nothing, as no tile is evaluated."""
    return ()


@triton.jit
def mask_mod(tables, numbers, row, b, h, q_idx, kv_idx):
    """Whether queries keep keys; not called, as no tile is evaluated."""
    return kv_idx >= 0


@triton.jit
def score_row(tables, numbers, b, h, q_idx):
    """What the score mod needs of query rows: nothing, as there is none."""
    return ()


@triton.jit
def score_mod(tables, numbers, row, score, b, h, q_idx, kv_idx):
    """The changed score, float32; not called, as there is no score mod."""
    return score


@triton.jit
def score_slope(tables, numbers, row, score, b, h, q_idx, kv_idx):
    """How fast the changed score follows the score, float32; not called, as there is no score mod."""
    return score


@triton.jit
def score_scatter(grads, tables, numbers, row, score, b, h, q_idx, kv_idx, ds, valid):
    """Adds the gradients of captured tables; not called, as none is wanted."""


# ---- functions


@triton.jit
def load_tile(source, start, length, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECKED: tl.constexpr):
    """A tile of rows; `source` = (descriptor or pointer to the head's first row, batch entry, head, row stride)."""
    rows, b, h, stride = source
    if TMA:
        tile = rows.load([b, h, start, 0]).reshape(BLOCK, PADDED)
    else:
        tile = load_rows(rows, start, length, stride, BLOCK, WIDTH, PADDED, CHECKED)
    return tile


@triton.jit
def head_of(source, b, h, stride_b, stride_h, stride_n):
    """One head of a tensor, as `load_tile` takes it."""
    rows = source
    if not TMA:
        rows = source + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    return rows, b, h, stride_n


@triton.jit
def weigh(s, scale, lse, place, score):
    """The probabilities of a tile from its products q k^T, were all its pairs kept."""
    if SCORE:
        tables, numbers, row = score
        b, h, q_idx, kv_idx = place
        changed = score_mod(tables, numbers, row, s * scale, b, h, q_idx, kv_idx)
        height = tl.broadcast_to(changed * LOG2E, s.shape)
    else:
        height = s * scale
    return tl.exp2(height - lse)


@triton.jit
def follow(ds, s, scale, keep, place, score, TILE: tl.constexpr):
    """The gradient of the product q k^T * scale from that of the changed score; 0 where a tile keeps nothing, whatever the slope."""
    if SCORE:
        tables, numbers, row = score
        b, h, q_idx, kv_idx = place
        ds = ds * score_slope(tables, numbers, row, s * scale, b, h, q_idx, kv_idx)
        if TILE != "full":
            ds = tl.where(keep, ds, 0.0)
    return ds


@triton.jit
def walk_span(acc, context, first, last, gap_at, gap, STEP: tl.constexpr, TILE: tl.constexpr):
    """Tiles [first, last), jumping over the `gap` tiles from `gap_at` on."""
    for i in tl.range(first, last - gap, num_stages=NUM_STAGES):
        tile = i
        if TILE != "full":
            tile = tl.where(i >= gap_at, i + gap, i)
        acc = STEP(acc, context, tile, TILE)
    return acc


@triton.jit
def walk_list(acc, context, index, first, last, extra, whole, STEP: tl.constexpr, TILE: tl.constexpr):
    """The tiles named by index[first:last], and tile `whole` where `extra` is 1. Each number is read one step ahead."""
    following = tl.load(index + first, mask=first < last, other=whole)
    for i in tl.range(first, last + extra, num_stages=NUM_STAGES):
        tile = following
        following = tl.load(index + i + 1, mask=i + 1 < last, other=whole)
        acc = STEP(acc, context, tile, TILE)
    return acc


@triton.jit
def walk(acc, context, tile_map, line, length, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles that a line of the map keeps, of `length` places in blocks of BLOCK: FULL ones, then PARTIAL ones. A short FULL tile
    (always the last one, number `whole`) is done with those."""
    ranges, counts, offsets, index = tile_map
    whole = length // BLOCK
    if MAP_FORM == "none":
        acc = walk_span(acc, context, 0, whole, 0, 0, STEP, "full")
        # no trip or one; an `if` would hold a whole tile in registers
        acc = walk_span(acc, context, whole, tl.cdiv(length, BLOCK), 0, 0, STEP, "tail")
    elif MAP_FORM == "range":
        first = tl.load(ranges + line * 4)
        first_full = tl.minimum(tl.load(ranges + line * 4 + 1), whole)
        last_full = tl.minimum(tl.load(ranges + line * 4 + 2), whole)
        last = tl.load(ranges + line * 4 + 3)
        gap = tl.maximum(last_full - first_full, 0)
        acc = walk_span(acc, context, first_full, first_full + gap, 0, 0, STEP, "full")
        acc = walk_span(acc, context, first, last, first_full, gap, STEP, "bounded")
    else:
        full = tl.load(counts + line * 2)
        first = tl.load(offsets + line * 2)
        short = (tl.load(index + first + full - 1, mask=full > 0, other=-1) == whole).to(tl.int32)
        acc = walk_list(acc, context, index, first, first + full - short, 0, whole, STEP, "full")
        first = tl.load(offsets + line * 2 + 1)
        last = first + tl.load(counts + line * 2 + 1)
        if PIECES > 0:
            acc = walk_list(acc, context, index, first, last, short, whole, STEP, "bounded")
        else:
            acc = walk_list(acc, context, index, first, last, short, whole, STEP, "evaluated")
    return acc


@triton.jit
def is_idle(broken):
    """Whether this kernel's partner does the work."""
    idle = False
    if RUNS == "hold":
        idle = tl.load(broken) != 0
    if RUNS == "fail":
        idle = tl.load(broken) != 1
    return idle


# ---- dq


@triton.jit
def keep_keys(bounds, mask, b, h, q_idx, kv_idx, kv_len, TILE: tl.constexpr):
    """Which pairs a PARTIAL tile keeps, by row intervals, by the predicate, or (the short last tile) by the length alone."""
    if TILE == "bounded":
        keep = inside(bounds, kv_idx)
    elif TILE == "evaluated":
        tables, numbers, row = mask
        keep = mask_mod(tables, numbers, row, b, h, q_idx, kv_idx) & (kv_idx < kv_len)
    else:
        keep = kv_idx < kv_len
    return keep


@triton.jit
def step_q(dq, context, tile, TILE: tl.constexpr):
    """Adds the share of one tile of keys to dq (but for the scale)."""
    q, dout, lse, shift, keys, values, q_len, kv_len, scale, b, h, q_idx, bounds, mask, score, grads, dropout = context
    start = tile * BLOCK_KV
    kv_idx = start + tl.arange(0, BLOCK_KV)[None, :]
    place = (b, h, q_idx, kv_idx)
    k = load_tile(keys, start, kv_len, BLOCK_KV, HEAD_DIM, PADDED_DIM, TILE != "full")
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = weigh(s, scale, lse, place, score)
    keep = q_idx < q_len
    if TILE != "full":
        keep = keep_keys(bounds, mask, b, h, q_idx, kv_idx, kv_len, TILE)
        p = tl.where(keep, p, 0.0)
    v = load_tile(values, start, kv_len, BLOCK_KV, V_HEAD_DIM, PADDED_V_DIM, TILE != "full")
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if len(dropout) > 0:
        keys_of_rows, threshold, factor = dropout
        dp = tl.where(survives(keys_of_rows, kv_idx, threshold), dp * factor, 0.0)
    ds = p * (dp + shift)
    if SCATTER != "":
        tables, numbers, row = score
        valid = tl.broadcast_to(keep & (q_idx < q_len), (BLOCK_Q, BLOCK_KV))
        score_scatter(grads, tables, numbers, row, s * scale, b, h, q_idx, kv_idx, tl.where(valid, ds, 0.0), valid)
    if SCATTER != "peak":
        ds = follow(ds, s, scale, keep, place, score, TILE)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


# lengths and counts are not specialised on: another length must not compile another kernel
@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "terms_len", "heads", "group", "resident", "stride_ib", "stride_ih", "stride_mb", "stride_mh", "threshold",
    ]
)  # fmt: skip
def attention_backward_q(
    q, k, v, dout, dq, lse, shift,  # q, k, v, dout: TMA descriptors or pointers; dq [B, Hq, Q, D]; lse, shift: see `row_terms`
    scale, q_len, kv_len, terms_len, heads, group, kv_batch, resident,  # as in the forward kernel; `terms_len` rows of lse and shift a head
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    mask_tables, mask_numbers, score_tables, score_numbers, grads,  # tuples: see `pack`; what score_scatter adds to
    starts, stops, stride_ib, stride_ih,  # row intervals int32 [.., .., Q, PIECES], strides in rows
    ranges, counts, offsets, index, stride_mb, stride_mh,  # the tile map, strides in tile rows
    broken, spared,  # int32: 0 where the map's row intervals hold; 1 where no kernel before has done all (None: never)
    seed, threshold, factor,  # of dropout, as in the forward kernel; seed may be None
):  # fmt: skip
    """One tile row of dq, and its share of the gradients of captured tables."""
    idle = is_idle(broken)
    if spared is not None:
        idle = idle | (tl.load(spared) != 1)
    if idle:
        return
    m, b, h = find_tile(q_len, heads, resident)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    start = m * BLOCK_Q
    q_idx = start + tl.arange(0, BLOCK_Q)[:, None]
    q_head, dout_head = head_of(q, b, h, stride_qb, stride_qh, stride_qn), head_of(dout, b, h, stride_ob, stride_oh, stride_on)
    q_tile = load_tile(q_head, start, q_len, BLOCK_Q, HEAD_DIM, PADDED_DIM, True)
    dout_tile = load_tile(dout_head, start, q_len, BLOCK_Q, V_HEAD_DIM, PADDED_V_DIM, True)
    terms = (b64 * heads + h64) * terms_len + q_idx
    keys = head_of(k, b * kv_batch, h // group, stride_kb, stride_kh, stride_kn)
    values = head_of(v, b * kv_batch, h // group, stride_vb, stride_vh, stride_vn)
    bounds = load_bounds(starts, stops, b64 * stride_ib + h64 * stride_ih + q_idx, q_idx < q_len)
    mask = (mask_tables, mask_numbers, ())
    if MAP_FORM == "list" and PIECES == 0:
        mask = (mask_tables, mask_numbers, mask_row(mask_tables, mask_numbers, b, h, q_idx))
    score, pace = (score_tables, score_numbers, ()), scale
    if SCORE:
        score = (score_tables, score_numbers, score_row(score_tables, score_numbers, b, h, q_idx))
    else:
        pace = scale * LOG2E
    dropout = ()
    if seed is not None:
        dropout = (row_keys(head_keys(seed, b, h), q_idx), threshold, factor)
    context = (q_tile, dout_tile, tl.load(lse + terms), tl.load(shift + terms), keys, values, q_len, kv_len, pace, b, h, q_idx, bounds,
               mask, score, grads, dropout)  # fmt: skip
    acc = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    line = b * stride_mb + h * stride_mh + m
    acc = walk(acc, context, (ranges, counts, offsets, index), line, kv_len, step_q, BLOCK_KV)
    if SCATTER != "peak":
        target = dq + (b64 * heads + h64) * q_len * HEAD_DIM
        store_rows(target, start, q_len, HEAD_DIM, (acc * scale).to(dq.dtype.element_ty), BLOCK_Q, HEAD_DIM, PADDED_DIM)


# ---- row terms


@triton.jit(do_not_specialize=["q_len", "terms_len", "heads"])
def row_terms_kernel(
    out, dout, lse, dlse, lse2, shift,  # out, dout [B, Hq, Q, Dv]; lse, dlse (or None) float32 [B, Hq, Q]; both results [B, Hq, terms_len]
    q_len, terms_len, heads,
    stride_ob, stride_oh, stride_on,
    stride_db, stride_dh, stride_dn,
    ROWS: tl.constexpr,
):  # fmt: skip
    """What the backward kernels need of ROWS rows: their log-sum-exp in base 2, and -delta; a row that keeps nothing, or that does not
    exist, gets infinity and 0, so that its probabilities and their gradients are 0."""
    blocks = terms_len // ROWS
    pid = tl.program_id(0)
    start, head = pid % blocks * ROWS, pid // blocks
    b64, h64 = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    row = start + tl.arange(0, ROWS)
    o = load_rows(out + b64 * stride_ob + h64 * stride_oh, start, q_len, stride_on, ROWS, V_HEAD_DIM, PADDED_V_DIM, True)
    d = load_rows(dout + b64 * stride_db + h64 * stride_dh, start, q_len, stride_dn, ROWS, V_HEAD_DIM, PADDED_V_DIM, True)
    exists = row < q_len
    at = head.to(tl.int64) * q_len + row
    height = tl.load(lse + at, mask=exists, other=float("-inf"))
    delta = tl.sum(o.to(tl.float32) * d.to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + at, mask=exists, other=0.0)
    empty = height == float("-inf")
    to = head.to(tl.int64) * terms_len + row
    tl.store(lse2 + to, tl.where(empty, float("inf"), height * LOG2E))
    tl.store(shift + to, tl.where(empty, 0.0, -delta))
