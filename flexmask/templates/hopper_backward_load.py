"""The warp of a Hopper backward kernel that fetches: it walks the map by columns, and leaves a record beside each block row."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper import tma_load
from .hopper_backward_plan import (
    ALL,
    BITS,
    BLOCK_KV,
    BLOCK_Q,
    CROSSED,
    FIELDS,
    FULL,
    MAP_FORM,
    NO_MORE,
    NOTHING,
    PADDED_DIM,
    PARTIAL,
    SCORE,
    STAGES,
    STARTS,
)

# ---- the warp that fetches


@gluon.jit
def column_of(tile_map, line, q_len):
    """How many block rows line `line` of the map keeps, and three numbers that `entry_of` reads them by."""
    ranges, counts, offsets = tile_map[0], tile_map[1], tile_map[2]
    if MAP_FORM == "none":
        steps = gl.cdiv(q_len, BLOCK_Q)
        found = (steps, 0, 0, steps)
    elif MAP_FORM == "range":
        first = gl.load(ranges + line * 4)
        steps = gl.maximum(gl.load(ranges + line * 4 + 3) - first, 0)
        found = (steps, first, gl.load(ranges + line * 4 + 1), gl.load(ranges + line * 4 + 2))
    else:
        full = gl.load(counts + line * 2)
        # entries of PARTIAL ones are counted on from those of FULL ones
        behind = gl.load(offsets + line * 2 + 1) - full
        found = (full + gl.load(counts + line * 2 + 1), full, gl.load(offsets + line * 2), behind)
    return found


@gluon.jit
def entry_of(tile_map, column, j, steps):
    """The block row of step j, of `steps`; 0 behind the last."""
    index = tile_map[3]
    _, a, b, c = column
    if MAP_FORM == "list":
        return gl.load(index + (j + gl.where(j < a, b, c)), mask=j < steps, other=0)
    else:
        return gl.where(j < steps, a + j, 0)


@gluon.jit
def pattern_of(tile_map, column, j, steps):
    """The number of the pattern of step j: ALL for a FULL tile, NOTHING behind the last."""
    patterns = tile_map[4]
    _, full, _, behind = column
    number = gl.load(patterns + (j + behind), mask=(j >= full) & (j < steps), other=NOTHING)
    return gl.where(j < full, ALL, number)


@gluon.jit
def is_full(column, j, m):
    """Whether the map calls block row m of step j FULL."""
    _, a, b, c = column
    return j < a if MAP_FORM == "list" else (m >= b) & (m < c)


@gluon.jit
def send_record(bufs, bars, slot, start, tile, state, lead, b, h):
    """Fills a slot of records, and tells that it and the numbers of its rows are there."""
    rec_s, ld_full = bufs[4], bars[5]
    i = gl.arange(0, FIELDS, gl.BlockedLayout([1], [32], [1], [0]))
    record = gl.where(i == 0, start, gl.where(i == 1, tile, gl.where(i == 2, state, lead)))
    if SCORE:
        record = gl.where(i < 4, record, gl.where(i == 4, b, h))
    rec_s.index(slot).store(record.to(gl.int32))
    mbarrier.arrive(ld_full.index(slot))


@gluon.jit
def send_bounds(bufs, slot, starts, stops, lead, start, q_len):
    """Puts the interval of each query of a tile where consumers find it; nothing is kept beyond the last query."""
    low_s, high_s = bufs[5], bufs[6]
    VEC: gl.constexpr = gl.BlockedLayout([BLOCK_Q // 32], [32], [1], [0])
    rows = start + gl.arange(0, BLOCK_Q, VEC)
    at = lead.to(gl.int64) * q_len + rows
    if STARTS:
        low_s.index(slot).store(gl.load(starts + at, mask=rows < q_len, other=0))
    high_s.index(slot).store(gl.load(stops + at, mask=rows < q_len, other=0))


@gluon.jit
def expect_queries(descs, bufs, bars, slot, state, pattern):
    """Says how many bytes will come with the queries of a slot; for a tile that is masked by bits these come too."""
    q_full, words_s = bars[1], bufs[10]
    TILE: gl.constexpr = BLOCK_Q * PADDED_DIM * 2
    LINES: gl.constexpr = BLOCK_KV * BLOCK_Q // 32 // 256
    if BITS:
        if state == PARTIAL:
            mbarrier.expect(q_full.index(slot), TILE + LINES * 1024)
            tma_load(descs[6], [0, 0, pattern * LINES, 0], q_full.index(slot), words_s.index(slot))
        else:
            mbarrier.expect(q_full.index(slot), TILE)
    else:
        mbarrier.expect(q_full.index(slot), TILE)


@gluon.jit
def send_rows(descs, bufs, bars, rows_of, it, b, h, head, m, state, lead):
    """Fetches block row m of query head h into the slot of step `it`, once it is free."""
    q_desc, do_desc = descs[0], descs[3]
    q_s, do_s, lse_s, shift_s = bufs[0], bufs[1], bufs[2], bufs[3]
    q_full, q_empty, do_full, do_empty = bars[1], bars[2], bars[3], bars[4]
    lse, shift, terms_len, q_len, starts, stops = rows_of
    TILE: gl.constexpr = BLOCK_Q * PADDED_DIM * 2
    VEC: gl.constexpr = gl.BlockedLayout([BLOCK_Q // 32], [32], [1], [0])
    slot = it % STAGES
    phase = (it // STAGES) & 1
    start = m * BLOCK_Q
    at = head.to(gl.int64) * terms_len + start + gl.arange(0, BLOCK_Q, VEC)
    lse_tile = gl.load(lse + at)
    shift_tile = gl.load(shift + at)
    mbarrier.wait(q_empty.index(slot), phase ^ 1)
    expect_queries(descs, bufs, bars, slot, state, lead)
    tma_load(q_desc, [b, h, start, 0], q_full.index(slot), q_s.index(slot))
    mbarrier.wait(do_empty.index(slot), phase ^ 1)
    mbarrier.expect(do_full.index(slot), TILE)
    tma_load(do_desc, [b, h, start, 0], do_full.index(slot), do_s.index(slot))
    lse_s.index(slot).store(lse_tile)
    shift_s.index(slot).store(shift_tile)
    if CROSSED:
        send_bounds(bufs, slot, starts, stops, lead, start, q_len)
    send_record(bufs, bars, slot, start, head * (terms_len // BLOCK_Q) + m, state, lead, b, h)


@gluon.jit
def produce(descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    """Fetches the keys and values once, then what every query head that reads them keeps of the column."""
    k_desc, v_desc = descs[1], descs[2]
    k_s, v_s = bufs[7], bufs[8]
    kv_full, do_empty = bars[0], bars[4]
    n, kv_b, kv_h, heads, group, readers = place
    q_len = rows_of[3]
    kv_len, stride_ib, stride_ih = keys_of[0], keys_of[1], keys_of[2]
    maps, stride_mb, stride_mh = tile_map
    mbarrier.expect(kv_full, 2 * BLOCK_KV * PADDED_DIM * 2)
    for w in gl.static_range(2):
        tma_load(k_desc, [kv_b, kv_h, n * BLOCK_KV + w * 64, 0], kv_full, k_s.index(w))
        tma_load(v_desc, [kv_b, kv_h, n * BLOCK_KV + w * 64, 0], kv_full, v_s.index(w))
    whole = (n + 1) * BLOCK_KV <= kv_len  # keys beyond the last must be masked even in FULL tiles
    it = 0
    b = kv_b
    h = kv_h * group
    for reader in range(readers):
        column = column_of(maps, b * stride_mb + h * stride_mh + n, q_len)
        steps = column[0]
        turns = gl.where((reader + 1 == readers) & (it + steps == 0), 1, steps)
        following = entry_of(maps, column, 0, steps)
        lead = b * stride_ib + h * stride_ih
        next_lead = lead
        if BITS:
            next_lead = pattern_of(maps, column, 0, steps)
        for j in range(turns):
            m = following
            following = entry_of(maps, column, j + 1, steps)
            if BITS:
                lead = next_lead
                next_lead = pattern_of(maps, column, j + 1, steps)
            full = is_full(column, j, m) & whole & (j < steps)
            if SCORE:  # that of queries beyond the last may be no number
                full = full & ((m + 1) * BLOCK_Q <= q_len)
            state = gl.where(full, FULL, PARTIAL)
            send_rows(descs, bufs, bars, rows_of, it, b, h, b * (heads * group) + h, m, state, lead)
            it += 1
        last = h + 1 == (kv_h + 1) * group
        b = gl.where(last, b + 1, b)
        h = gl.where(last, kv_h * group, h + 1)
    slot = it % STAGES
    mbarrier.wait(do_empty.index(slot), ((it // STAGES) & 1) ^ 1)
    send_record(bufs, bars, slot, 0, 0, NO_MORE, 0, 0, 0)


@gluon.jit
def field(record, NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """One number of a record, which every thread holds whole."""
    return gl.sum(gl.where(gl.arange(0, FIELDS, LAYOUT) == NUMBER, record, 0), axis=0)
