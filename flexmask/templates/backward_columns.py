"""Backward attention by columns: the gradients of keys and values, one program a tile of BLOCK_KV keys of one key head, over all query
heads that read it. What it shares with the gradient of the queries is in `backward`."""

import triton
import triton.language as tl

from .backward import (
    BLOCK_KV,
    BLOCK_Q,
    HEAD_DIM,
    LOG2E,
    PADDED_DIM,
    PADDED_V_DIM,
    PIECES,
    PRECISION,
    SCORE,
    TMA,
    V_HEAD_DIM,
    follow,
    head_of,
    is_idle,
    load_tile,
    mask_mod,
    mask_row,
    score_row,
    walk,
    weigh,
)
from .dropout import head_keys, row_keys, survives
from .forward import inside, load_bounds, store_rows

# ---- dkdv


@triton.jit
def keep_queries(bounds, mask, b, h, q_idx, kv_idx, q_len, TILE: tl.constexpr):
    """Which pairs a PARTIAL tile keeps, by column intervals, by the predicate, or (the short last tile) by the length alone."""
    if TILE == "bounded":
        keep = inside(bounds, q_idx)
    elif TILE == "evaluated":
        tables, numbers = mask
        row = mask_row(tables, numbers, b, h, q_idx)
        keep = mask_mod(tables, numbers, row, b, h, q_idx, kv_idx) & (q_idx < q_len)
    else:
        keep = q_idx < q_len
    return keep


@triton.jit
def load_terms(source, start):
    """What `row_terms` says of a tile of queries, float32 [1, BLOCK_Q]; `source` is a descriptor and a head, or a pointer and where the
    head's rows begin. By pointers, as they are read ahead, each thread copies all that it needs itself: 32 times over in a tile."""
    terms, head = source
    return terms.load([head, start]) if TMA else tl.load(terms + head + (start + tl.arange(0, BLOCK_Q)))[None, :]


@triton.jit
def step_kv(acc, context, tile, TILE: tl.constexpr):
    """Adds the share of one tile of queries to dk (but for the scale) and dv."""
    dk, dv = acc
    k, v, queries, douts, lse, shift, q_len, scale, b, h, kv_idx, bounds, mask, score_captures, dropout = context
    start = tile * BLOCK_Q
    q_idx = start + tl.arange(0, BLOCK_Q)[None, :]
    place = (b, h, q_idx, kv_idx)
    q = load_tile(queries, start, q_len, BLOCK_Q, HEAD_DIM, PADDED_DIM, TILE != "full")
    row_lse = load_terms(lse, start)
    score = (score_captures[0], score_captures[1], ())
    if SCORE:
        score = (score_captures[0], score_captures[1], score_row(score_captures[0], score_captures[1], b, h, q_idx))
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = weigh(s, scale, row_lse, place, score)
    keep = q_idx < q_len
    if TILE != "full":
        keep = keep_queries(bounds, mask, b, h, q_idx, kv_idx, q_len, TILE)
        p = tl.where(keep, p, 0.0)
    dout = load_tile(douts, start, q_len, BLOCK_Q, V_HEAD_DIM, PADDED_V_DIM, TILE != "full")
    weights = p
    if len(dropout) > 0:
        keys_of_head, threshold, factor = dropout
        kept = survives(row_keys(keys_of_head, q_idx), kv_idx, threshold)
        weights = tl.where(kept, p, 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
    row_shift = load_terms(shift, start)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    if len(dropout) > 0:
        dp = tl.where(kept, dp * factor, 0.0)
    ds = p * (dp + row_shift)
    ds = follow(ds, s, scale, keep, place, score, TILE)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def find_column(kv_len, heads, resident):
    """(block column, batch entry, head) of this program: `resident` heads at a time, so that their queries stay in the L2 cache; the
    first block column first, as under causal masks it has the most work."""
    columns = tl.cdiv(kv_len, BLOCK_KV)
    pid = tl.program_id(0)
    turn = pid % (columns * resident)
    head = pid // (columns * resident) * resident + turn % resident
    return turn // resident, head // heads, head % heads


@triton.jit(do_not_specialize=[
    "q_len", "kv_len", "terms_len", "heads", "group", "readers", "resident", "stride_ib", "stride_ih", "stride_mb", "stride_mh",
    "threshold",
])  # fmt: skip
def attention_backward_kv(
    q, k, v, dout, dk, dv, lse, shift,  # q, k, v, dout: TMA descriptors or pointers; dk [.., Hkv, KV, D], dv [.., Hkv, KV, Dv]
    scale, q_len, kv_len, terms_len, heads, group, readers, resident,  # `group` query heads share a key head, of `heads` in all
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    mask_tables, mask_numbers, score_tables, score_numbers,  # tuples: see `pack`
    starts, stops, stride_ib, stride_ih,  # column intervals int32 [.., .., KV, PIECES], strides in keys
    ranges, counts, offsets, index, stride_mb, stride_mh,  # the tile map by columns, strides in block columns
    broken,  # int32: 0 where the map's column intervals hold
    seed, threshold, factor,  # of dropout, as in the forward kernel; seed may be None
):  # fmt: skip
    """One block column of dk and dv, over its `readers`: the query heads, of all batch entries where K has one for them."""
    if is_idle(broken):
        return
    n, kv_b, kv_h = find_column(kv_len, heads, resident)
    start = n * BLOCK_KV
    kv_idx = start + tl.arange(0, BLOCK_KV)[:, None]
    keys, values = head_of(k, kv_b, kv_h, stride_kb, stride_kh, stride_kn), head_of(v, kv_b, kv_h, stride_vb, stride_vh, stride_vn)
    k_tile = load_tile(keys, start, kv_len, BLOCK_KV, HEAD_DIM, PADDED_DIM, True)
    v_tile = load_tile(values, start, kv_len, BLOCK_KV, V_HEAD_DIM, PADDED_V_DIM, True)
    pace = scale
    if not SCORE:
        pace = scale * LOG2E
    acc = (tl.zeros([BLOCK_KV, PADDED_DIM], tl.float32), tl.zeros([BLOCK_KV, PADDED_V_DIM], tl.float32))
    b, h = kv_b, kv_h * group
    for _ in tl.range(readers):
        b64, h64 = b.to(tl.int64), h.to(tl.int64)
        queries, douts = head_of(q, b, h, stride_qb, stride_qh, stride_qn), head_of(dout, b, h, stride_ob, stride_oh, stride_on)
        terms = b * heads * group + h
        if not TMA:
            terms = (b64 * heads * group + h64) * terms_len
        bounds = ()
        if PIECES > 0:
            skipped = (b64 * stride_ib + h64 * stride_ih + start) * PIECES
            own = tl.arange(0, BLOCK_KV)[:, None]
            bounds = load_bounds(starts + skipped, stops + skipped, own, own < kv_len - start)
        dropout = ()
        if seed is not None:
            dropout = (head_keys(seed, b, h), threshold, factor)
        context = (k_tile, v_tile, queries, douts, (lse, terms), (shift, terms), q_len, pace, b, h, kv_idx, bounds,
                   (mask_tables, mask_numbers), (score_tables, score_numbers), dropout)  # fmt: skip
        line = b * stride_mb + h * stride_mh + n
        acc = walk(acc, context, (ranges, counts, offsets, index), line, q_len, step_kv, BLOCK_Q)
        last = h + 1 == (kv_h + 1) * group
        b, h = tl.where(last, b + 1, b), tl.where(last, kv_h * group, h + 1)
    dk_tile, dv_tile = acc
    if seed is not None:
        dv_tile = dv_tile * factor
    at = (kv_b.to(tl.int64) * heads + kv_h) * kv_len
    store_rows(dk + at * HEAD_DIM, start, kv_len, HEAD_DIM, (dk_tile * scale).to(dk.dtype.element_ty), BLOCK_KV, HEAD_DIM, PADDED_DIM)
    store_rows(dv + at * V_HEAD_DIM, start, kv_len, V_HEAD_DIM, dv_tile.to(dv.dtype.element_ty), BLOCK_KV, V_HEAD_DIM, PADDED_V_DIM)
