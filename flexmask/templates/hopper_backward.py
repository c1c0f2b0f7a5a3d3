"""Backward attention on Hopper GPUs, in Gluon: all three gradients in one kernel, one program a block column of BLOCK_KV keys.

Two warpgroups hold the dk and dv of 64 keys each; one warp more fetches, by TMA into a ring of STAGES slots, the block rows of queries and
of dout that the column keeps, with their two numbers from `row_terms`. For each of them a warpgroup computes, keys down and queries across,
    s = k q^T, p = exp2(s - lse), dp = v dout^T - delta, ds = p * dp, dv += p dout, dk += ds q
(a score mod changes s, and ds by its derivative, which p is multiplied by as soon as its copy for dv is made)
with p and ds as operands in registers, hands its ds to the other through shared memory, and computes its half of dq = ds^T k. That is
added to a float32 buffer, four neighbouring registers at a time: the buffer lies in the order of the registers, and `gather_queries` reads
it back as rows. So runs may differ in the last bits of dq.

Whoever fetches walks the map and leaves a record beside each block row: where it begins, which tile of the buffer its dq is added to, what
to do with it, and which entry of the tables of intervals, or which pattern of bits, is meant. Every program takes at least one step, as
products that may be skipped are not made side by side: a column that keeps nothing masks one block row away. Bits come by TMA too.
The constants and the functions under "mods" are replaced by `assemble_hopper_backward`, which copies everything else as it stands.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .backward import is_idle
from .hopper import LOG2E, in_fours, kept_bits, load_bound, low_bits, meet, spread, spread_bits, tma_load, tma_store, to_half

# ---- constants of the plan
HEAD_DIM = tl.constexpr(128)
V_HEAD_DIM = tl.constexpr(128)
# both 64 or both 128: tiles are that wide, zero beyond the head dim
PADDED_DIM = tl.constexpr(128)
PADDED_V_DIM = tl.constexpr(128)
BLOCK_Q = tl.constexpr(64)
BLOCK_KV = tl.constexpr(128)
STAGES = tl.constexpr(2)
CONSUMER_REGISTERS = tl.constexpr(240)
PRODUCER_REGISTERS = tl.constexpr(24)
# "none": every tile is full; "range": four numbers a block column; "list": a list of block rows a block column
MAP_FORM = tl.constexpr("none")
# PARTIAL tiles compare with so many intervals of each key's queries, or-ed; or, CROSSED, with one interval of each query's keys
PIECES = tl.constexpr(0)
CROSSED = tl.constexpr(False)
# or they read their bits from the map
BITS = tl.constexpr(False)
# whether intervals may begin after the first place
STARTS = tl.constexpr(True)
# "always"; or only where the map's flag on the device says that its intervals "hold", or that they "fail"
RUNS = tl.constexpr("always")
SCORE = tl.constexpr(False)
# ---- kernel

# what a record says of its block row
FULL = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
NO_MORE = tl.constexpr(2)
# numbers of patterns that do not exist, for which TMA gives zeros: nothing is kept, or all
NOTHING = tl.constexpr(1 << 29)
ALL = tl.constexpr((1 << 29) + 1)
# numbers of a record
FIELDS = tl.constexpr(8 if SCORE.value else 4)
# the layout of 32 columns of scores, as many as are changed at a time
PART = tl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))


# ---- mods
@gluon.jit
def score_column(tables, numbers, b, h, kv_idx):
    """What the score mod needs of keys: nothing, as there is none."""
    return ()


@gluon.jit
def score_row(tables, numbers, b, h, q_idx):
    """What the score mod needs of queries: nothing, as there is none."""
    return ()


@gluon.jit
def score_pair(tables, numbers, column, row, score, b, h, q_idx, kv_idx):
    """The changed score and its derivative, float32; not called, as there is no score mod."""
    return score, score


# ---- functions

# what Triton 3.9 renamed
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def add_four(addresses, x):
    """Adds four neighbouring registers of float32 to global memory, at the address of the first."""
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11}; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f", [addresses, x], dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


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


# ---- the warpgroups that multiply


@gluon.jit
def field(record, NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """One number of a record, which every thread holds whole."""
    return gl.sum(gl.where(gl.arange(0, FIELDS, LAYOUT) == NUMBER, record, 0), axis=0)


@gluon.jit
def issue_scores(k_w, q_s, slot, S_LAYOUT: gl.constexpr):
    """s = k q^T of 64 keys, not waited for."""
    zero = gl.full([64, BLOCK_Q], 0.0, gl.float32, S_LAYOUT)
    queries = q_s.index(slot).reshape([BLOCK_Q, PADDED_DIM]).permute((1, 0))
    return warpgroup_mma(k_w, queries, zero, use_acc=False, is_async=True)


@gluon.jit
def issue_dq(ds_s, ds_slot, k_s, WG: gl.constexpr, DQ_LAYOUT: gl.constexpr):
    """This warpgroup's half of dq = ds^T k over the keys of both, not waited for: half of the columns, or of the rows where there are
    but 64 columns."""
    zero = gl.full([64, 64], 0.0, gl.float32, DQ_LAYOUT)
    if PADDED_DIM == 128:
        a0 = ds_s.index(ds_slot * 2).permute((1, 0))
        a1 = ds_s.index(ds_slot * 2 + 1).permute((1, 0))
        b0 = k_s.index(0).reshape([64, PADDED_DIM]).slice(WG * 64, 64, dim=1)
        b1 = k_s.index(1).reshape([64, PADDED_DIM]).slice(WG * 64, 64, dim=1)
    else:
        a0 = ds_s.index(ds_slot * 2).slice(WG * 64, 64, dim=1).permute((1, 0))
        a1 = ds_s.index(ds_slot * 2 + 1).slice(WG * 64, 64, dim=1).permute((1, 0))
        b0 = k_s.index(0).reshape([64, PADDED_DIM])
        b1 = k_s.index(1).reshape([64, PADDED_DIM])
    half = warpgroup_mma(a0, b0, zero, use_acc=False, is_async=True)
    return warpgroup_mma(a1, b1, half, is_async=True)


@gluon.jit
def add_dq(dq, tile, sums, WG: gl.constexpr):
    """Adds a [64, 64] piece of dq to its tile of the buffer, which holds two such pieces in the order of their registers."""
    LAYOUT: gl.constexpr = dq.type.layout
    row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    col = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))[None, :]
    at = (row // 16) * 128 + (row % 8) * 16 + ((row // 8) % 2) * 2 + (col // 8) * 512 + ((col // 2) % 4) * 4 + col % 2
    piece = tile.to(gl.int64) * (BLOCK_Q * PADDED_DIM) + WG * 4096
    add_four(sums.to(gl.int64) + piece * 4 + (at * 4).to(gl.int64), dq)


@gluon.jit
def piece_of_keys(keys_of, at, kv0, PIECE: gl.constexpr, FOURS: gl.constexpr):
    """(start, stop) of one interval of 64 keys, which begin at row `at` of the tables; keys beyond the last keep nothing."""
    kv_len, starts, stops = keys_of[0], keys_of[3], keys_of[4]
    stop = load_bound(stops + at * PIECES + PIECE, kv0, kv_len, PIECES, 64, FOURS)
    start = stop
    if STARTS or PIECE > 0:
        start = load_bound(starts + at * PIECES + PIECE, kv0, kv_len, PIECES, 64, FOURS)
    return start, stop


@gluon.jit
def bounds_of_keys(keys_of, lead, kv0, FOURS: gl.constexpr):
    """Start and stop of each interval of 64 keys."""
    at = lead.to(gl.int64) * keys_of[0] + kv0
    bounds = piece_of_keys(keys_of, at, kv0, 0, FOURS)
    if PIECES > 1:
        second = piece_of_keys(keys_of, at, kv0, 1, FOURS)
        bounds = (bounds[0], bounds[1], second[0], second[1])
    if PIECES > 2:
        third = piece_of_keys(keys_of, at, kv0, 2, FOURS)
        bounds = (bounds[0], bounds[1], bounds[2], bounds[3], third[0], third[1])
    return bounds


@gluon.jit
def afresh(x):
    """`x`, an int32, such that nothing that depends on it is computed before it is needed, and then held in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bits_of_keys(words_s, slot, pattern, kv0, kv_len, WG: gl.constexpr, FOURS: gl.constexpr):
    """The words of 64 keys as `spread` takes them; of a FULL tile those of all keys that exist."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, FOURS)))
    words = reinterpret(words_s.index(afresh(slot)), gl.int32, [2, 64, BLOCK_Q // 32], FLAT).index(WG)
    word = spread_bits(words.load(gl.SliceLayout(1, gl.SliceLayout(2, FOURS))), FOURS)
    exists = gl.where(kv0 + gl.arange(0, 64, ROW) < kv_len, -1, 0)[:, None, None, None]
    return gl.where(pattern == ALL, exists, word)


@gluon.jit
def mask_tile(p, bufs, slot, keys_of, lead, start, kv0, WG: gl.constexpr, S_LAYOUT: gl.constexpr):
    """The probabilities of a PARTIAL tile, 0 where a pair is not kept or a key does not exist."""
    kv0 = afresh(kv0)
    if BITS or PIECES > 0:
        FOURS: gl.constexpr = in_fours(p).type.layout
        if BITS:
            words = bits_of_keys(bufs[10], slot, lead, kv0, keys_of[0], WG, FOURS)
        else:
            words = kept_bits(bounds_of_keys(keys_of, lead, kv0, FOURS), start, BLOCK_Q, PIECES, STARTS)
        p = gl.where(spread(words, 64, BLOCK_Q, S_LAYOUT), p, 0.0)
    else:
        kv = kv0 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))[:, None]
        if CROSSED:
            COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
            p = gl.where(kv < bufs[6].index(slot).load(COL)[None, :], p, 0.0)
            if STARTS:
                p = gl.where(kv >= bufs[5].index(slot).load(COL)[None, :], p, 0.0)
        p = gl.where(kv < keys_of[0], p, 0.0)
    return p


@gluon.jit
def left_and_right(x):
    """The halves of an accumulator [64, N], for which no number changes its place."""
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x.shape[1] // 2, 16])
    left, right = gl.split(gl.permute(gl.reshape(x, [64, 2, x.shape[1] // 2]), (0, 2, 1)))
    return gl.convert_layout(left, HALF), gl.convert_layout(right, HALF)


@gluon.jit
def side_by_side(left, right, LAYOUT: gl.constexpr):
    """The accumulator of which these are the halves."""
    return gl.convert_layout(gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [64, 2 * left.shape[1]]), LAYOUT)


@gluon.jit
def crossed_words(bufs, slot, kv_len, kv0, S_LAYOUT: gl.constexpr):
    """The words of 64 keys, as `spread` takes them, from the one interval of each query: a bit a pair, added up in each thread."""
    COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    kv = kv0 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))[:, None]
    keep = kv < gl.minimum(bufs[6].index(slot).load(COL), kv_len)[None, :]
    if STARTS:
        keep = keep & (kv >= bufs[5].index(slot).load(COL)[None, :])
    place = gl.arange(0, BLOCK_Q, COL)[None, :]
    bits = gl.where(keep, gl.full([1, 1], 1, gl.int32, S_LAYOUT) << ((place // 8) * 2 + place % 2), 0)
    return gl.sum(gl.sum(in_fours(bits), axis=3), axis=1)[:, None, :, None]


@gluon.jit
def kept_words(bufs, slot, keys_of, lead, start, kv0, WG: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Which pairs of a PARTIAL tile are kept and exist, in words of 64 keys as `spread` takes them."""
    kv0 = afresh(kv0)
    FOURS: gl.constexpr = in_fours(gl.full([64, BLOCK_Q], 0, gl.int32, S_LAYOUT)).type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, FOURS)))
    if PIECES > 0:
        words = kept_bits(bounds_of_keys(keys_of, lead, kv0, FOURS), start, BLOCK_Q, PIECES, STARTS)
    elif CROSSED:
        words = crossed_words(bufs, slot, keys_of[0], kv0, S_LAYOUT)
    else:
        place = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, FOURS))))[None, None, :, None]
        words = low_bits(keys_of[5] - 2 * place, start, BLOCK_Q)
        if BITS:
            words = words & bits_of_keys(bufs[10], slot, lead, kv0, keys_of[0], WG, FOURS)
        else:
            words = words & gl.where(kv0 + gl.arange(0, 64, ROW) < keys_of[0], -1, 0)[:, None, None, None]
    return words


@gluon.jit
def set_aside(values):
    """Shared memory that holds values of queries, of which each thread has found one or two, and will need a quarter."""
    row_s = ()
    for i in gl.static_range(len(values)):
        row_s += (gl.allocate_shared_memory(values[i].dtype, [BLOCK_Q], gl.SwizzledSharedLayout(1, 1, 1, [0]), values[i]),)
    return row_s


@gluon.jit
def fetched(row_s, first):
    """The values of 32 queries of a tile, from query `first` of it on."""
    row = ()
    for i in gl.static_range(len(row_s)):
        row += (row_s[i].slice(first, 32).load(gl.SliceLayout(0, PART))[None, :],)
    return row


@gluon.jit
def look_ahead(record, mods, kv0, REC: gl.constexpr):
    """What the score mod is given besides scores and queries, and what it needs of either, found while products are made."""
    tables, numbers = mods[0], mods[1]
    b = field(record, 4, REC)
    h = field(record, 5, REC)
    kv_idx = afresh(kv0) + gl.arange(0, 64, gl.SliceLayout(1, PART))[:, None]
    q_idx = field(record, 0, REC) + gl.arange(0, BLOCK_Q, gl.BlockedLayout([1], [32], [4], [0]))
    row_s = set_aside(score_row(tables, numbers, b, h, q_idx))
    return b, h, kv_idx, score_column(tables, numbers, b, h, kv_idx), row_s


@gluon.jit
def weigh_part(s, words, lse_s, start, mods, ahead, FIRST: gl.constexpr, DTYPE: gl.constexpr):
    """`weigh` of 32 columns, from column FIRST of the tile on."""
    tables, numbers, scale = mods
    b, h, kv_idx, column, row_s = ahead
    COL: gl.constexpr = gl.SliceLayout(0, PART)
    q_idx = (start + FIRST + gl.arange(0, 32, COL))[None, :]
    changed, slope = score_pair(tables, numbers, column, fetched(row_s, FIRST), s * scale, b, h, q_idx, kv_idx)
    # a score mod may give a number for all pairs of a query or a key
    height = gl.full([64, 32], 0.0, gl.float32, PART) + changed * LOG2E
    p = gl.exp2(height - lse_s.slice(FIRST, 32).load(COL)[None, :])
    keep = spread(words >> (FIRST // 4), 64, 32, PART)
    return to_half(gl.where(keep, p, 0.0), DTYPE), gl.where(keep, p * slope, 0.0)


@gluon.jit
def weigh(s, words, lse_s, start, mods, ahead, FIRST: gl.constexpr, DTYPE: gl.constexpr):
    """(probabilities, in 16 bits; the same times the score mod's derivative) of the tile's columns from FIRST on, from s = k q^T; 0 where
    a pair is not kept, whatever its score is. A part after the other, as all at once would need more registers than there are."""
    if s.shape[1] == 32:
        p, weight = weigh_part(s, words, lse_s, start, mods, ahead, FIRST, DTYPE)
    else:
        LAYOUT: gl.constexpr = s.type.layout
        left, right = left_and_right(s)
        p_left, w_left = weigh(left, words, lse_s, start, mods, ahead, FIRST, DTYPE)
        p_right, w_right = weigh(right, words, lse_s, start, mods, ahead, FIRST + s.shape[1] // 2, DTYPE)
        p = side_by_side(p_left, p_right, LAYOUT)
        weight = side_by_side(w_left, w_right, LAYOUT)
    return p, weight


@gluon.jit
def apart(x):
    """`x`, each element in a register of its own, written here: where registers that a product begins with are written while another one is
    in flight, the assembler waits for that first."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def take_step(dk, dv, it, k_w, v_w, kv0, bufs, bars, scale_log2, mods, keys_of, sums, WG: gl.constexpr,
              S_LAYOUT: gl.constexpr, A_LAYOUT: gl.constexpr, DQ_LAYOUT: gl.constexpr):  # fmt: skip
    """One block row's share of dk (but for the scale) and dv, and this column's share of the block row's dq (likewise)."""
    q_s, do_s, lse_s, shift_s, rec_s, _, _, k_s, _, ds_s, _ = bufs
    _, q_full, q_empty, do_full, do_empty, _ = bars
    COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    REC: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [4], [0])
    slot = it % STAGES
    phase = (it // STAGES) & 1
    if SCORE:
        ahead = look_ahead(rec_s.index(slot).load(REC), mods, kv0, REC)
    # dp begins at -delta, which needs no registers then
    shift = apart(gl.full([64, BLOCK_Q], 0.0, gl.float32, S_LAYOUT) + shift_s.index(slot).load(COL)[None, :])
    mbarrier.wait(q_full.index(slot), phase)
    s_sent = issue_scores(k_w, q_s, slot, S_LAYOUT)
    mbarrier.wait(do_full.index(slot), phase)
    do_w = do_s.index(slot).reshape([BLOCK_Q, PADDED_DIM])
    dp_sent = warpgroup_mma(v_w, do_w.permute((1, 0)), shift, use_acc=True, is_async=True)
    lse = lse_s.index(slot).load(COL)
    record = rec_s.index(slot).load(REC)
    start = field(record, 0, REC)
    tile = field(record, 1, REC)
    state = field(record, 2, REC)
    lead = field(record, 3, REC)
    if SCORE:
        words = gl.full([64, 1, 4, 1], -1, gl.int32, in_fours(shift).type.layout)
        if state == PARTIAL:
            words = kept_words(bufs, slot, keys_of, lead, start, kv0, WG, S_LAYOUT)
    s = warpgroup_mma_wait(1, deps=[s_sent])
    if SCORE:
        half, weight = weigh(s, words, lse_s.index(slot), start, mods, ahead, 0, q_s.dtype)
    else:
        weight = gl.exp2(s * scale_log2 - lse[None, :])
        if state == PARTIAL:
            weight = mask_tile(weight, bufs, slot, keys_of, lead, start, kv0, WG, S_LAYOUT)
        half = to_half(weight, q_s.dtype)
    p_op = gl.convert_layout(half, A_LAYOUT)
    dv_sent = warpgroup_mma(p_op, do_w, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp_sent])
    ds = to_half(weight * dp, q_s.dtype)
    ds_slot = it & 1
    ds_s.index(ds_slot * 2 + WG).store(ds)
    fence_async_shared()
    meet(8, 256)
    dq_sent = issue_dq(ds_s, ds_slot, k_s, WG, DQ_LAYOUT)
    dk_sent = warpgroup_mma(gl.convert_layout(ds, A_LAYOUT), q_s.index(slot).reshape([BLOCK_Q, PADDED_DIM]), dk, is_async=True)
    dv, dq = warpgroup_mma_wait(1, deps=[dv_sent, dq_sent])
    mbarrier.arrive(do_empty.index(slot))
    add_dq(dq, tile, sums, WG)
    dk = warpgroup_mma_wait(0, deps=[dk_sent])
    mbarrier.arrive(q_empty.index(slot))
    return dk, dv


@gluon.jit
def consume(WG: gl.constexpr, descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    """The dk and dv of 64 keys: steps until a record says that there are no more."""
    dk_desc, dv_desc = descs[4], descs[5]
    rec_s, k_s, v_s = bufs[4], bufs[7], bufs[8]
    kv_full, ld_full = bars[0], bars[5]
    n, kv_b, kv_h = place[0], place[1], place[2]
    dq_sums, scale_log2, scale, score_tables, score_numbers = sums
    mods = (score_tables, score_numbers, scale)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    REC: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [4], [0])
    kv0 = n * BLOCK_KV + WG * 64
    k_w = k_s.index(WG).reshape([64, PADDED_DIM])
    v_w = v_s.index(WG).reshape([64, PADDED_DIM])
    dv = gl.full([64, PADDED_DIM], 0.0, gl.float32, ACC)
    dk = gl.full([64, PADDED_DIM], 0.0, gl.float32, ACC)
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(ld_full.index(0), 0)
    it = 0
    going = 1
    while going > 0:
        dk, dv = take_step(dk, dv, it, k_w, v_w, kv0, bufs, bars, scale_log2, mods, keys_of, dq_sums, WG, S_LAYOUT, A_LAYOUT, DQ_LAYOUT)
        it += 1
        mbarrier.wait(ld_full.index(it % STAGES), (it // STAGES) & 1)
        going = NO_MORE - field(rec_s.index(it % STAGES).load(REC), 2, REC)
    meet(8, 256)  # nobody reads the keys any more: their room takes dk, that of the values dv
    v_w.store(to_half(dv, k_s.dtype))
    k_w.store(to_half(dk * scale, k_s.dtype))
    fence_async_shared()
    tma_store(dv_desc, [kv_b, kv_h, kv0, 0], v_s.index(WG))
    tma_store(dk_desc, [kv_b, kv_h, kv0, 0], k_s.index(WG))
    tma.store_wait(0)


@gluon.jit
def consume_first(descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    consume(0, descs, bufs, bars, place, rows_of, keys_of, tile_map, sums)


@gluon.jit
def consume_second(descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    consume(1, descs, bufs, bars, place, rows_of, keys_of, tile_map, sums)


# ---- start


@gluon.jit
def stands_down(broken):
    """Whether this kernel's partner does the work."""
    idle = False
    if RUNS == "hold":
        idle = gl.load(broken) != 0
    if RUNS == "fail":
        idle = gl.load(broken) != 1
    return idle


@gluon.jit
def place_of(order, columns, heads, resident):
    """(block column, batch entry, head) of this program: `resident` heads at a time, so that their queries stay in the L2 cache; block
    columns in the given order, or the first one first, as under causal masks it has the most work."""
    pid = gl.program_id(0)
    turn = pid % (columns * resident)
    head = pid // (columns * resident) * resident + turn % resident
    n = turn // resident
    if order is not None:
        n = gl.load(order + n)
    return n, head // heads, head % heads


@gluon.jit
def rings(dtype: gl.constexpr, q_desc, k_desc, words_desc):
    """Shared memory: of each slot the queries, dout, their two numbers, the record and (crossed) the bounds of rows; keys; values; two
    turns of ds of two warpgroups; of each slot the bits of its tile."""
    VEC: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, PADDED_DIM], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, PADDED_DIM], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, PADDED_DIM], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, PADDED_DIM], k_desc.layout)
    ds_s = gl.allocate_shared_memory(dtype, [4, 64, BLOCK_Q], DS)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], VEC)
    shift_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], VEC)
    rec_s = gl.allocate_shared_memory(gl.int32, [STAGES, FIELDS], VEC)
    low_s = rec_s
    high_s = rec_s
    if CROSSED:
        low_s = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_Q], VEC)
        high_s = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_Q], VEC)
    words_s = rec_s
    if BITS:
        LINES: gl.constexpr = BLOCK_KV * BLOCK_Q // 32 // 256
        words_s = gl.allocate_shared_memory(gl.int32, [STAGES, 1, 1, LINES, 256], words_desc.layout)
    return q_s, do_s, lse_s, shift_s, rec_s, low_s, high_s, k_s, v_s, ds_s, words_s


@gluon.jit
def barriers():
    """Filled and emptied slots; both warpgroups empty one."""
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ld_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=2)
        mbarrier.init(ld_full.index(i), count=1)
    fence_async_shared()
    return kv_full, q_full, q_empty, do_full, do_empty, ld_full


# lengths and counts are not specialised on: another length must not compile another kernel
@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "terms_len", "columns", "heads", "group", "readers", "resident", "stride_ib", "stride_ih", "stride_mb",
        "stride_mh",
    ]
)  # fmt: skip
def attention_backward(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, dq_sums, lse, shift,  # float32 sums of dq, in the order of registers
    scale, q_len, kv_len, terms_len, columns, heads, group, readers, resident,  # `group` query heads share a key head, of `heads` in all
    score_tables, score_numbers,  # tuples: see `pack`
    starts, stops, stride_ib, stride_ih,  # intervals of keys (crossed: of queries), int32 [.., .., length, PIECES]; strides in entries
    ranges, counts, offsets, index, stride_mb, stride_mh,  # the tile map by columns, strides in block columns
    patterns, words_desc,  # the numbers of PARTIAL tiles' bits, beside `index`, and the bits
    order, broken,  # int32: block columns as they are begun; 0 where the map's intervals hold
):  # fmt: skip
    """One block column of dk and dv, over its `readers`: the query heads, of all batch entries where K has one for them; and its share of
    their dq."""
    if stands_down(broken):
        return
    n, kv_b, kv_h = place_of(order, columns, heads, resident)
    bufs = rings(q_desc.dtype, q_desc, k_desc, words_desc)
    bars = barriers()
    descs = (q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, words_desc)
    place = (n, kv_b, kv_h, heads, group, readers)
    rows_of = (lse, shift, terms_len, q_len, starts, stops)
    keys_of = (kv_len, stride_ib, stride_ih, starts, stops, q_len)
    tile_map = ((ranges, counts, offsets, index, patterns), stride_mb, stride_mh)
    sums = (dq_sums, scale * LOG2E, scale, score_tables, score_numbers)
    given = (descs, bufs, bars, place, rows_of, keys_of, tile_map, sums)
    gl.warp_specialize(
        [(consume_first, given), (consume_second, given), (produce, given)],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# ---- dq


@triton.jit(do_not_specialize=["q_len", "terms_len"])
def gather_queries(sums, dq, scale, q_len, terms_len, broken):
    """A block row of dq [B * Hq, Q, HEAD_DIM] from the sums, which lie in the order of registers, terms_len rows a head. The last ones
    first: those were added to last, and lie in the L2 cache."""
    if is_idle(broken):
        return
    blocks = tl.cdiv(q_len, BLOCK_Q)
    turn = tl.num_programs(0) - 1 - tl.program_id(0)
    head, m = turn // blocks, turn % blocks
    for w in tl.static_range(2):
        at = (head.to(tl.int64) * (terms_len // BLOCK_Q) + m) * (BLOCK_Q * PADDED_DIM) + w * 4096
        x = tl.load(sums + at + tl.arange(0, 4096))
        x = tl.reshape(x, [8, 4, 8, 4, 2, 2])  # column / 8, warp, row % 8, column / 2 % 4, row / 8 % 2, column % 2
        x = tl.reshape(tl.permute(x, (1, 4, 2, 0, 3, 5)), [64, 64]) * scale
        rows = m * BLOCK_Q + tl.arange(0, 64)
        columns = tl.arange(0, 64)
        if PADDED_DIM == 128:
            columns += w * 64
        else:
            rows += w * 64
        target = dq + (head.to(tl.int64) * q_len + rows[:, None]) * HEAD_DIM + columns[None, :]
        tl.store(target, x.to(dq.dtype.element_ty), mask=(rows < q_len)[:, None] & (columns < HEAD_DIM)[None, :])
