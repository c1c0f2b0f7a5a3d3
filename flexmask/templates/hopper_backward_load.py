"""The warp of a Hopper backward kernel that fetches: it walks the map by columns, and leaves a record beside each block row."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper import cuts_of, tma_load
from .hopper_backward_plan import (
    ALL,
    BITS,
    BLOCK_KV,
    BLOCK_Q,
    CROSSED,
    DETERMINISTIC,
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
def draw_number(numbers):
    """Which program of all this is to be: without turns the GPU's number for it, else the order in which they begin."""
    number = gl.program_id(0)
    if DETERMINISTIC:
        number = gl.atomic_add(numbers, 1, sem="relaxed")
    return number


@gluon.jit
def bits_set(x):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def rank_of(ranks, line, m, q_len):
    """How many columns go before this one (line `line` of the map) of those that keep block row m."""
    table, place, columns = ranks
    rank = place
    if MAP_FORM != "none":
        lead = line // columns
        at = table + ((lead.to(gl.int64) * gl.cdiv(q_len, BLOCK_Q) + m) * ((columns + 31) // 32) + place // 32) * 2
        rank = gl.load(at + 1) + bits_set(gl.load(at) & ((gl.to_tensor(1) << (place % 32)) - 1))
    return rank


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
def first_entries(tile_map, column, steps):
    """What `next_entry` is to know at a column's first step: what comes next. Where columns take turns and tiles are listed, that is the
    first of the FULL tiles and the last of the PARTIAL ones (which fall), how many FULL ones have been taken, and how many others have
    not."""
    if DETERMINISTIC and MAP_FORM == "list":
        left = steps - column[1]
        full_one, partial_one = rising_entries(tile_map, column, 0, left)
        found = (full_one, partial_one, gl.to_tensor(0), left)
    elif BITS:
        found = (entry_of(tile_map, column, 0, steps), pattern_of(tile_map, column, 0, steps))
    else:
        found = (entry_of(tile_map, column, 0, steps),)
    return found


@gluon.jit
def rising_entries(tile_map, column, taken, left):
    """The first FULL block row, of which so many are taken, and the first PARTIAL one, of which so many are left; far beyond the last."""
    _, full, first, behind = column
    full_one = gl.load(tile_map[3] + (first + taken), mask=taken < full, other=1 << 30)
    partial_one = gl.load(tile_map[3] + (behind + full + left - 1), mask=left > 0, other=1 << 30)
    return full_one, partial_one


@gluon.jit
def next_entry(tile_map, column, known, j, steps):
    """(place in the column's list, block row, pattern of bits if there are any) of step j, and what to know at the next one.

    Where columns take turns each should come to a block row just after the column before it has been there. Listed tiles go from the first
    query to the last, and so do columns from the last key to the first: under causal masks each begins where no other has been before.
    Ranges go from the last query to the first, and columns from the first key to the last."""
    if DETERMINISTIC and MAP_FORM == "list":
        full_one, partial_one, taken, left = known
        is_next = (full_one < partial_one).to(gl.int32)
        place = gl.where(is_next > 0, taken, column[1] + left - 1)
        m = gl.where(j < steps, gl.minimum(full_one, partial_one), 0)
        taken += is_next
        left -= 1 - is_next
        pattern = pattern_of(tile_map, column, gl.where(j < steps, place, steps), steps) if BITS else 0
        full_one, partial_one = rising_entries(tile_map, column, taken, left)
        then = (full_one, partial_one, taken, left)
    elif DETERMINISTIC:
        place = steps - 1 - j
        m = gl.where(j < steps, column[1] + place, 0)
        pattern = 0
        then = known
    elif BITS:
        place = j
        m, pattern = known
        then = (entry_of(tile_map, column, j + 1, steps), pattern_of(tile_map, column, j + 1, steps))
    else:
        place = j
        m = known[0]
        pattern = 0
        then = (entry_of(tile_map, column, j + 1, steps),)
    return place, m, pattern, then


@gluon.jit
def is_full(column, j, m):
    """Whether the map calls block row m of step j FULL."""
    _, a, b, c = column
    return j < a if MAP_FORM == "list" else (m >= b) & (m < c)


@gluon.jit
def send_record(bufs, bars, slot, start, tile, state, lead, b, h, rank, COUNT: gl.constexpr):
    """Fills a slot of records, and tells that it and the numbers of its rows are there; COUNT is 2 where nothing comes by TMA."""
    rec_s, full = bufs[4], bars[1]
    i = gl.arange(0, FIELDS, gl.BlockedLayout([1], [32], [1], [0]))
    record = gl.where(i == 0, start, gl.where(i == 1, tile, gl.where(i == 2, state, lead)))
    if FIELDS == 8:
        record = gl.where(i < 4, record, gl.where(i == 4, b, gl.where(i == 5, h, rank)))
    rec_s.index(slot).store(record.to(gl.int32))
    mbarrier.arrive(full.index(slot), count=COUNT)


@gluon.jit
def send_cuts(bufs, slot, starts, stops, lead, start, q_len, keys):
    """Puts which keys of the column each query of a tile keeps where consumers find it."""
    kv0, kv_len = keys
    at = lead.to(gl.int64) * q_len + start
    bufs[5].index(slot).store(cuts_of(starts + at, stops + at, q_len - start, kv0, kv_len, BLOCK_Q, BLOCK_KV, STARTS))


@gluon.jit
def expect_bytes(descs, bufs, bars, slot, state, pattern):
    """Says how many bytes will come to a slot; for a tile that is masked by bits these come too."""
    full, words_s = bars[1], bufs[9]
    TILES: gl.constexpr = BLOCK_Q * PADDED_DIM * 4
    LINES: gl.constexpr = BLOCK_KV * BLOCK_Q // 32 // 256
    if BITS:
        if state == PARTIAL:
            mbarrier.expect(full.index(slot), TILES + LINES * 1024)
            tma_load(descs[6], [0, 0, pattern * LINES, 0], full.index(slot), words_s.index(slot))
        else:
            mbarrier.expect(full.index(slot), TILES)
    else:
        mbarrier.expect(full.index(slot), TILES)


@gluon.jit
def send_rows(descs, bufs, bars, rows_of, keys, it, b, h, head, m, state, lead, rank):
    """Fetches block row m of query head h into the slot of step `it`, once it is free."""
    q_desc, do_desc = descs[0], descs[3]
    q_s, do_s, lse_s, shift_s = bufs[0], bufs[1], bufs[2], bufs[3]
    full, empty = bars[1], bars[2]
    lse, shift, terms_len, q_len, starts, stops = rows_of
    VEC: gl.constexpr = gl.BlockedLayout([BLOCK_Q // 32], [32], [1], [0])
    slot = it % STAGES
    start = m * BLOCK_Q
    at = head.to(gl.int64) * terms_len + start + gl.arange(0, BLOCK_Q, VEC)
    lse_tile = gl.load(lse + at)
    shift_tile = gl.load(shift + at)
    mbarrier.wait(empty.index(slot), ((it // STAGES) & 1) ^ 1)
    expect_bytes(descs, bufs, bars, slot, state, lead)
    tma_load(q_desc, [b, h, start, 0], full.index(slot), q_s.index(slot))
    tma_load(do_desc, [b, h, start, 0], full.index(slot), do_s.index(slot))
    lse_s.index(slot).store(lse_tile)
    shift_s.index(slot).store(shift_tile)
    if CROSSED:
        send_cuts(bufs, slot, starts, stops, lead, start, q_len, keys)
    send_record(bufs, bars, slot, start, head * (terms_len // BLOCK_Q) + m, state, lead, b, h, rank, 1)


@gluon.jit
def produce(descs, bufs, bars, line, rows_of, keys_of, tile_map, sums):
    """Fetches the keys and values once, then what every query head that reads them keeps of the column."""
    k_desc, v_desc = descs[1], descs[2]
    k_s, v_s = bufs[6], bufs[7]
    kv_full, empty = bars[0], bars[2]
    n, kv_b, kv_h, heads, group, readers, ranks = line
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
        known = first_entries(maps, column, steps)
        lead = b * stride_ib + h * stride_ih
        for j in range(turns):
            place, m, pattern, known = next_entry(maps, column, known, j, steps)
            if BITS:
                lead = pattern
            full = is_full(column, place, m) & whole & (j < steps)
            if SCORE:  # that of queries beyond the last may be no number
                full = full & ((m + 1) * BLOCK_Q <= q_len)
            state = gl.where(full, FULL, PARTIAL)
            rank = -1
            if DETERMINISTIC:
                rank = gl.where(j < steps, rank_of(ranks, b * stride_mb + h * stride_mh, m, q_len), -1)
            send_rows(descs, bufs, bars, rows_of, (n * BLOCK_KV, kv_len), it, b, h, b * (heads * group) + h, m, state, lead, rank)
            it += 1
        last = h + 1 == (kv_h + 1) * group
        b = gl.where(last, b + 1, b)
        h = gl.where(last, kv_h * group, h + 1)
    slot = it % STAGES
    mbarrier.wait(empty.index(slot), ((it // STAGES) & 1) ^ 1)
    send_record(bufs, bars, slot, 0, 0, NO_MORE, 0, 0, 0, -1, 2)


@gluon.jit
def field(record, NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """One number of a record, which every thread holds whole."""
    return gl.sum(gl.where(gl.arange(0, FIELDS, LAYOUT) == NUMBER, record, 0), axis=0)
