"""Forward attention for Hopper: warpgroups that multiply, fed through rings of shared memory by one warp that loads.

The constants and the two functions under "mods" are replaced by `assemble_hopper`, which also leaves one branch only of each `if WIDE`
(a head dim beyond 128); everything else is copied as it stands.
The loading warp takes tiles of queries (from a queue, or by stride), writes what there is to do into a *record*, and brings queries, keys
and values by TMA; each multiplying warpgroup takes 64 rows, whose output and softmax stay in its registers. A step has two products in
flight: Q K^T of its own tile of keys, and P V of the tile before; warpgroups take turns at issuing (*ping-pong*), so that the softmax of
one hides behind the products of another. The first tile of keys is always masked; then come PARTIAL and then FULL ones.
The order of statements in `step` decides whether the compiler keeps the products asynchronous, and the registers free of spills.
"""
# ruff: noqa: RUF005, SIM102, SIM108
# (Triton specialises an `if`, long conditional expressions read badly, and shapes are added up by Gluon's compiler)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper import (
    INFINITY,
    LN2,
    LOG2E,
    in_fours,
    join,
    kept_bits,
    load_bound,
    load_words,
    low_bits,
    meet,
    pass_by,
    spread,
    spread_bits,
    tma_load,
    tma_store,
    to_half,
)

# ---- constants of the plan
HEAD_DIM = gl.constexpr(64)
V_HEAD_DIM = gl.constexpr(64)
# tiles are that wide, zero beyond the head dim
PADDED_DIM = gl.constexpr(64)
PADDED_V_DIM = gl.constexpr(64)
DTYPE = gl.constexpr(gl.bfloat16)
BLOCK_Q = gl.constexpr(128)
BLOCK_KV = gl.constexpr(128)
# tiles of keys and values in flight, and of queries
STAGES = gl.constexpr(2)
Q_STAGES = gl.constexpr(2)
# "grid": a program a tile; "stride": every so many-th tile; "queue": the next that nobody has taken
SCHEDULE = gl.constexpr("queue")
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)
# "none": every tile is full; "range": four numbers a tile row; "list": a list of tiles a tile row
MAP_FORM = gl.constexpr("none")
# PARTIAL tiles compare with so many row intervals, or-ed
PIECES = gl.constexpr(0)
# or with one interval of queries for each key
CROSSED = gl.constexpr(False)
# or are masked by bits, a pattern of them for each PARTIAL tile of a list
BITS = gl.constexpr(False)
# whether intervals may begin after the first key (or query)
STARTS = gl.constexpr(True)
# "always"; or only where the map's flag on the device says that its intervals "hold", or that they "fail"
RUNS = gl.constexpr("always")
SCORE = gl.constexpr(False)
# ---- constants of wide plans
# a head dim beyond 128: tiles lie in parts of so many columns, and the output leaves from where the queries lay
WIDE = gl.constexpr(False)
PART = gl.constexpr(64)
# ---- kernel

ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(BLOCK_Q.value // ROWS.value)
WORDS = gl.constexpr(BLOCK_KV.value // 32)
# numbers of a record
FIELDS = gl.constexpr(16 if BITS.value else 8)
# instead of a pattern's number, where the first tile of a walk has none: it is FULL; or stands for the tiles of a row that keeps nothing
ALL = gl.constexpr(-1)
NOTHING = gl.constexpr(-2)
# layouts of scores and output in a warpgroup, of the probabilities that it multiplies values with, and of a number for each row
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV.value, 16]))
if WIDE:
    OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART.value, 16]))
else:
    OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_V_DIM.value, 16]))
FACTOR = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=OUTPUT.value, k_width=2))
BY_ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))
BY_KEY = gl.constexpr(gl.SliceLayout(0, SCORES.value))


# ---- mods
@gluon.jit
def score_row(tables, numbers, b, h, q_idx):
    """What the score mod needs of a query row: nothing, as there is none."""
    return ()


@gluon.jit
def score_mod(tables, numbers, row, score, b, h, q_idx, kv_idx):
    """The changed score, float32; not called, as there is no score mod."""
    return score


# ---- functions of wide plans
# parts of keys, of values, and of a place that holds queries first and their output afterwards
PARTS = gl.constexpr(PADDED_DIM.value // PART.value)
V_PARTS = gl.constexpr(PADDED_V_DIM.value // PART.value)
Q_PARTS = gl.constexpr(max(PARTS.value, V_PARTS.value))


@gluon.jit
def load_parts(source, b, h, row, full, ring, at, COUNT: gl.constexpr):
    """Bring a tile that begins at `row`, part by part, to places from `at` on of a ring."""
    for i in gl.static_range(COUNT):
        tma_load(source, [b, h, row, i * PART], full, ring.index(at + i))


@gluon.jit
def begin_scores(q, k_ring, slot):
    """Q K^T in flight, added up over the parts; `q` is a ring and the place of the queries in it."""
    q_ring, at = q
    flying = gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES)
    for i in gl.static_range(PARTS):
        k = k_ring.index(slot * PARTS + i).reshape([BLOCK_KV, PART]).permute((1, 0))
        flying = warpgroup_mma(q_ring.index(at + i).reshape([ROWS, PART]), k, flying, use_acc=i > 0, is_async=True)
    return flying


@gluon.jit
def no_output():
    """The parts of an output to which nothing has been added."""
    parts = ()
    for _ in gl.static_range(V_PARTS):
        parts += (gl.full([ROWS, PART], 0.0, gl.float32, OUTPUT),)
    return parts


@gluon.jit
def begin_output(p, v_ring, slot, acc):
    """P V in flight, a product a part."""
    flying = ()
    for i in gl.static_range(V_PARTS):
        v = v_ring.index(slot * V_PARTS + i).reshape([BLOCK_KV, PART])
        flying += (warpgroup_mma(p, v, acc[i], is_async=True),)
    return flying


@gluon.jit
def end_output(flying):
    """The parts of the output, when no product is in flight any more."""
    if V_PARTS == 1:
        parts = (warpgroup_mma_wait(0, deps=flying),)
    else:
        parts = warpgroup_mma_wait(0, deps=flying)
    return parts


@gluon.jit
def times(acc, factor):
    """The parts of the output, each row times its factor."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    parts = ()
    for i in gl.static_range(V_PARTS):
        parts += (acc[i] * factor,)
    return parts


@gluon.jit
def store_parts(out, b, h, start, acc, ring, at):
    """Store 64 rows of output by way of the place of their queries, which is free when all have come back from here."""
    for i in gl.static_range(V_PARTS):
        ring.index(at + i).reshape([ROWS, PART]).store(to_half(acc[i], DTYPE))
    fence_async_shared()
    for i in gl.static_range(V_PARTS):
        tma_store(out, [b, h, start, i * PART], ring.index(at + i))
    tma.store_wait(0)
    join()


# ---- functions
@gluon.jit
def walk_none(kv_len):
    """The walk over all tiles of keys, from the last to the first: see `find_walk`."""
    columns = gl.cdiv(kv_len, BLOCK_KV)
    return columns - 1, 0, 0, columns - 2, columns - 1, 0


@gluon.jit
def walk_range(ranges, whole):
    """The walk from a map in range form: PARTIAL tiles downwards, then FULL ones downwards. A short FULL tile is PARTIAL."""
    start = gl.load(ranges)
    first_full = gl.minimum(gl.load(ranges + 1), whole)
    last_full = gl.minimum(gl.load(ranges + 2), whole)
    full = gl.maximum(last_full - first_full, 0)
    part = gl.maximum(gl.load(ranges + 3) - start - full, 0)
    last = start + part - 1
    some = gl.minimum(part, 1)
    taken = gl.minimum(full, 1 - some)
    first = gl.where(part > 0, gl.where(last >= first_full, last + full, last), gl.where(full > 0, last_full - 1, 0))
    return first, last - 1, part - some, last_full - 1 - taken, full - taken, 0


@gluon.jit
def walk_list(counts, offsets, index, patterns, whole, valid):
    """The walk from a map in list form: a short FULL tile (always the last one, number `whole`), PARTIAL tiles, FULL ones."""
    full, part = gl.load(counts, mask=valid, other=0), gl.load(counts + 1, mask=valid, other=0)
    full_at, part_at = gl.load(offsets), gl.load(offsets + 1)
    at = gl.where(part > 0, part_at, full_at)
    first = gl.load(index + at, mask=part + full > 0, other=0)
    short = (gl.load(index + full_at + full - 1, mask=full > 0, other=-1) == whole).to(gl.int32)
    some = gl.minimum(part, 1 - short)
    taken = gl.minimum(full, 1 - short - some)
    pattern = 0
    if BITS:
        pattern = gl.load(patterns + part_at, mask=some > 0, other=0)
        pattern = gl.where(some > 0, pattern, gl.where(full > 0, ALL, NOTHING))
    return gl.where(short > 0, whole, first), part_at + some, part - some, full_at + taken, full - taken - short, pattern


@gluon.jit
def find_walk(tile_map, b, h, m, kv_len, valid):
    """(first, part_at, part, full_at, full, pattern): the first tile of keys of a tile row, tile 0 where it keeps none; where the other
    PARTIAL tiles begin and how many there are; the same of FULL ones; and the pattern of bits that masks the first, ALL or NOTHING."""
    ranges, counts, offsets, index, stride_mb, stride_mh, patterns = tile_map
    if MAP_FORM == "none":
        walk = walk_none(kv_len)
    else:
        line = b.to(gl.int64) * stride_mb + h.to(gl.int64) * stride_mh + m
        if MAP_FORM == "range":
            walk = walk_range(ranges + line * 4, kv_len // BLOCK_KV)
        else:
            walk = walk_list(counts + line * 2, offsets + line * 2, index, patterns, kv_len // BLOCK_KV, valid)
    return walk


@gluon.jit
def partial_tile(tile_map, i, part_at, part, full_at, full):
    """The number of PARTIAL tile i of a walk, not counting the first; in range form, the FULL ones are jumped over."""
    if MAP_FORM == "range":
        tile = part_at - i
        tile = gl.where(tile > full_at - full, tile + full, tile)
    elif MAP_FORM == "list":
        tile = gl.load(tile_map[3] + part_at + i, mask=i < part, other=0)
    else:
        tile = 0
    return tile


@gluon.jit
def masked_tile(tile_map, i, part_at, part, full_at, full):
    """What a step needs to know of PARTIAL tile i of a walk, not counting the first: its number, where that is looked at, and its
    pattern of bits."""
    tile = 0
    if SCORE or not BITS:
        tile = partial_tile(tile_map, i, part_at, part, full_at, full)
    pattern = 0
    if BITS:
        pattern = gl.load(tile_map[6] + part_at + i, mask=i < part, other=0)
    return tile, pattern


@gluon.jit
def full_tile(tile_map, i, full_at, full):
    """The number of FULL tile i of a walk."""
    if MAP_FORM == "list":
        tile = gl.load(tile_map[3] + full_at + i, mask=i < full, other=0)
    else:
        tile = full_at - i
    return tile


@gluon.jit
def any_tile(tile_map, i, part_at, part, full_at, full):
    """The number of tile i of a walk, whatever its kind, not counting the first."""
    if MAP_FORM == "list":
        at = gl.where(i < part, part_at + i, full_at + i - part)
        tile = gl.load(tile_map[3] + at, mask=i < part + full, other=0)
    else:
        tile = gl.where(i < part, partial_tile(tile_map, i, part_at, part, full_at, full), full_at - (i - part))
    return tile


@gluon.jit
def find_tile(turn, call, tile_map):
    """(tile row, batch entry, head, and its walk) of tile number `turn`: `resident` heads at a time, so that their keys stay in the L2
    cache; tile rows in the given order, or the last one first."""
    tiles, rows, resident, heads, kv_len, order = call
    valid = tiles > 0  # where there is nothing to do, the map and the order may name places that do not exist
    turn = gl.maximum(gl.minimum(turn, tiles - 1), 0)  # there may be none left: any tile then, which is not used
    group = turn // (resident * rows)
    rest = turn - group * (resident * rows)
    if order is None:
        m = rows - 1 - rest // resident
    else:
        m = gl.load(order + rest // resident, mask=valid, other=0)
    head = group * resident + rest % resident
    b, h = head // heads, head % heads
    first, part_at, part, full_at, full, pattern = find_walk(tile_map, b, h, m, kv_len, valid)
    return m, b, h, first, part_at, part, full_at, full, pattern


@gluon.jit
def publish(records, full, empty, number, m, b, h, first, part_at, part, full_at, fulls, pattern):
    """Hand the record of tile `number` of this program to the warpgroups that multiply; m is -1 where there is none."""
    slot = number & 1
    mbarrier.wait(empty.index(slot), ((number >> 1) & 1) ^ 1)
    i = gl.arange(0, FIELDS, gl.BlockedLayout([1], [32], [1], [0]))
    low = gl.where(i == 0, m, gl.where(i == 1, b, gl.where(i == 2, h, first)))
    high = gl.where(i == 4, part_at, gl.where(i == 5, part, gl.where(i == 6, full_at, fulls)))
    if BITS:
        high = gl.where(i < 8, high, pattern)
    records.index(slot).store(gl.where(i < 4, low, high).to(gl.int32))
    mbarrier.arrive(full.index(slot))


@gluon.jit
def load_cuts(cuts, cut, b, h, tile, m):
    """The rows of this tile that keep each key of a tile of keys: the first one, and 65536 times the one after the last."""
    column_starts, column_stops, stride_cb, stride_ch, kv_len = cut
    key = tile * BLOCK_KV + gl.arange(0, BLOCK_KV, gl.BlockedLayout([BLOCK_KV // 32], [32], [1], [0]))
    at = b.to(gl.int64) * stride_cb + h.to(gl.int64) * stride_ch + key
    stop = gl.load(column_stops + at, mask=key < kv_len, other=0) - m * BLOCK_Q
    word = gl.minimum(gl.maximum(stop, 0), BLOCK_Q) << 16
    if STARTS:
        start = gl.load(column_starts + at, mask=key < kv_len, other=0) - m * BLOCK_Q
        word = word | gl.minimum(gl.maximum(start, 0), BLOCK_Q)
    cuts.store(word)


@gluon.jit
def load_keys(k, v, rings, bars, cut, place, at, tile, masked):
    """Bring a tile of keys and one of values to place `at` of their rings; with cuts, if it is masked."""
    k_ring, v_ring, cut_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    b, h, kv_b, kv_h, m = place
    slot = at % STAGES
    phase = (at // STAGES) & 1
    mbarrier.wait(k_empty.index(slot), phase ^ 1)
    mbarrier.expect(k_full.index(slot), BLOCK_KV * PADDED_DIM * 2)
    if WIDE:
        load_parts(k, kv_b, kv_h, tile * BLOCK_KV, k_full.index(slot), k_ring, slot * PARTS, PARTS)
    else:
        tma_load(k, [kv_b, kv_h, tile * BLOCK_KV, 0], k_full.index(slot), k_ring.index(slot))
    if CROSSED:
        if masked:
            load_cuts(cut_ring.index(slot), cut, b, h, tile, m)
        mbarrier.arrive(k_full.index(slot))
    mbarrier.wait(v_empty.index(slot), phase ^ 1)
    mbarrier.expect(v_full.index(slot), BLOCK_KV * PADDED_V_DIM * 2)
    if WIDE:
        load_parts(v, kv_b, kv_h, tile * BLOCK_KV, v_full.index(slot), v_ring, slot * V_PARTS, V_PARTS)
    else:
        tma_load(v, [kv_b, kv_h, tile * BLOCK_KV, 0], v_full.index(slot), v_ring.index(slot))


@gluon.jit
def produce(sources, rings, q_ring, records, bars, q_bars, record_bars, call, tile_map, cut, group, kv_batch, queue):
    """The warp that loads."""
    q, k, v = sources
    q_full, q_empty = q_bars
    tiles = call[0]
    at = 0
    number = 0
    turn = gl.program_id(0)
    m, b, h, first, part_at, part, full_at, full, pattern = find_tile(turn, call, tile_map)
    while turn < tiles:
        publish(records, record_bars[0], record_bars[1], number, m, b, h, first, part_at, part, full_at, full, pattern)
        buffer = (number % Q_STAGES) * CONSUMERS
        if not WIDE:
            for w in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(buffer + w), ((number // Q_STAGES) & 1) ^ 1)
                mbarrier.expect(q_full.index(buffer + w), ROWS * PADDED_DIM * 2)
                tma_load(q, [b, h, m * BLOCK_Q + w * ROWS, 0], q_full.index(buffer + w), q_ring.index(buffer + w))
        place = (b, h, b * kv_batch, h // group, m)
        count = 1 + part + full
        early = gl.minimum(count, STAGES)
        following = first
        for i in range(early):
            tile = following
            following = any_tile(tile_map, i, part_at, part, full_at, full)
            load_keys(k, v, rings, bars, cut, place, at, tile, i <= part)
            at += 1
        if WIDE:
            for w in gl.static_range(CONSUMERS):  # last, as the output of the tile before has to leave from there
                mbarrier.wait(q_empty.index(buffer + w), ((number // Q_STAGES) & 1) ^ 1)
                mbarrier.expect(q_full.index(buffer + w), ROWS * PADDED_DIM * 2)
                load_parts(q, b, h, m * BLOCK_Q + w * ROWS, q_full.index(buffer + w), q_ring, (buffer + w) * Q_PARTS, PARTS)
        # the rings are full: time to find the next tile of queries
        if SCHEDULE == "queue":
            taken = gl.atomic_add(queue, 1, sem="relaxed")
            if taken == tiles - 1:  # the last one of this launch leaves the counter at 0
                gl.store(queue, 0)
            turn = taken + gl.num_programs(0)
        else:
            turn += gl.num_programs(0)
        next_m, next_b, next_h, next_first, next_part_at, next_part, next_full_at, next_full, next_pattern = find_tile(turn, call, tile_map)
        for i in range(early, count):
            tile = following
            following = any_tile(tile_map, i, part_at, part, full_at, full)
            load_keys(k, v, rings, bars, cut, place, at, tile, i <= part)
            at += 1
        number += 1
        m, b, h, first = next_m, next_b, next_h, next_first
        part_at, part, full_at, full, pattern = next_part_at, next_part, next_full_at, next_full, next_pattern
    publish(records, record_bars[0], record_bars[1], number, -1, 0, 0, 0, 0, 0, 0, 0, NOTHING)


@gluon.jit
def field(record, I: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, FIELDS, record.type.layout) == I, record, 0), axis=0)


@gluon.jit
def fetch(records, full, empty, number):
    """The record of tile `number`, as `publish` was given it."""
    slot = number & 1
    mbarrier.wait(full.index(slot), (number >> 1) & 1)
    x = records.index(slot).load(gl.BlockedLayout([FIELDS], [32], [4], [0]))
    m, b, h, first = field(x, 0), field(x, 1), field(x, 2), field(x, 3)
    part_at, part, full_at, fulls = field(x, 4), field(x, 5), field(x, 6), field(x, 7)
    pattern = 0
    if BITS:
        pattern = field(x, 8)
    mbarrier.arrive(empty.index(slot))
    return m, b, h, first, part_at, part, full_at, fulls, pattern


@gluon.jit
def fours():
    """Something in the layout that scores have after `in_fours`."""
    return in_fours(gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES))


@gluon.jit
def load_bounds(rows, b, h, start):
    """The row intervals of 64 rows: start and stop of each piece, as `load_bound` gives them. Or where patterns of bits are."""
    row_starts, row_stops, stride_rb, stride_rh, q_len, words = rows
    FOURS: gl.constexpr = fours().type.layout
    at = (b.to(gl.int64) * stride_rb + h.to(gl.int64) * stride_rh + start) * PIECES
    bounds = ()
    if BITS:
        bounds += (words,)
    if PIECES > 0:
        stop = load_bound(row_stops + at, start, q_len, PIECES, ROWS, FOURS)
        begin = stop  # not looked at where intervals begin with the first key
        if STARTS:
            begin = load_bound(row_starts + at, start, q_len, PIECES, ROWS, FOURS)
        bounds += (begin, stop)
    if PIECES > 1:
        bounds += (load_bound(row_starts + at + 1, start, q_len, PIECES, ROWS, FOURS),)
        bounds += (load_bound(row_stops + at + 1, start, q_len, PIECES, ROWS, FOURS),)
    if PIECES > 2:
        bounds += (load_bound(row_starts + at + 2, start, q_len, PIECES, ROWS, FOURS),)
        bounds += (load_bound(row_stops + at + 2, start, q_len, PIECES, ROWS, FOURS),)
    return bounds


@gluon.jit
def load_pattern(bounds, pattern, count, W: gl.constexpr):
    """The words of 64 rows in a pattern of bits, for `spread_bits`; only the first `count` of each row are read."""
    bits = 0
    if BITS:
        source = bounds[0] + (pattern.to(gl.int64) * BLOCK_Q + W * ROWS) * WORDS
        FOURS: gl.constexpr = fours().type.layout
        bits = load_words(source, count, ROWS, WORDS, FOURS)
    return bits


@gluon.jit
def first_bits(bits, pattern, tile, kv_len):
    """The words of `low_bits` for the first tile of a walk."""
    FOURS: gl.constexpr = fours().type.layout
    place = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, FOURS))))[None, None, :, None]
    kept = low_bits(gl.where(pattern == ALL, kv_len, 0) - 2 * place, tile * BLOCK_KV, BLOCK_KV)
    return gl.where(pattern >= 0, spread_bits(bits, FOURS), kept)


@gluon.jit
def masked_scores(s, bounds, cuts, tile, kv_len, W: gl.constexpr):
    """Scores with -inf where they are not kept; of a kernel that reads bits, `bounds` are the words."""
    if BITS:
        keep = spread(bounds, ROWS, BLOCK_KV, SCORES)
    elif CROSSED:
        word = cuts.load(BY_KEY)[None, :]
        row = (W * ROWS + gl.arange(0, ROWS, BY_ROW))[:, None]
        keep = row < (word >> 16)
        if STARTS:
            keep = keep & (row >= (word & 0xFFFF))
    elif PIECES > 0:
        keep = spread(kept_bits(bounds, tile * BLOCK_KV, BLOCK_KV, PIECES, STARTS), ROWS, BLOCK_KV, SCORES)
    else:
        keep = (tile * BLOCK_KV + gl.arange(0, BLOCK_KV, BY_KEY))[None, :] < kv_len
    return gl.where(keep, s, -INFINITY)


@gluon.jit
def score_context(score_mods, b, h, q_idx, scale):
    """What the score mod is given besides scores and keys, and what depends on the rows only."""
    tables, numbers = score_mods
    context = ()
    if SCORE:
        context = (tables, numbers, score_row(tables, numbers, b, h, q_idx), b, h, q_idx, scale)
    return context


@gluon.jit
def changed_scores(s, score, tile):
    """Scores in base 2 after the score mod, which takes them in base e."""
    tables, numbers, row, b, h, q_idx, scale = score
    kv_idx = (tile * BLOCK_KV + gl.arange(0, BLOCK_KV, BY_KEY))[None, :]
    changed = score_mod(tables, numbers, row, s * scale, b, h, q_idx, kv_idx) * LOG2E
    return gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES) + changed  # a score mod may give a number for all keys


@gluon.jit
def softmax(s, peak, scale, MASKED: gl.constexpr):
    """(probabilities, the new greatest score by row, what sums so far are multiplied by); -inf - -inf would be NaN."""
    new_peak = gl.maximum(peak, gl.max(s, axis=1))
    base = new_peak
    if MASKED or SCORE:
        base = gl.where(new_peak == -INFINITY, 0.0, new_peak)
    if SCORE:
        p = gl.exp2(s - base[:, None])
        shrink = gl.exp2(peak - base)
    else:
        base = base * scale
        p = gl.exp2(s * scale - base[:, None])
        shrink = gl.exp2(peak * scale - base)
    return p, new_peak, shrink


@gluon.jit
def row_sums(p):
    """What each thread holds of a row, added: [64, 4]. The four meet once, at the end of the row."""
    return gl.sum(gl.sum(in_fours(p), axis=3), axis=1)


@gluon.jit
def before_waiting(x):
    """`x`, which is not negative, such that all it is made of is computed before the next wait for products: a store that never happens
    stands between, as the assembler would move the wait up past arithmetic, but moves nothing past a store."""
    NEVER: gl.constexpr = "{.reg .pred p; .reg .b32 a; setp.lt.f32 p, $1, 0f00000000; mov.b32 a, 0; @p st.shared.f32 [a], $1;"
    return gl.inline_asm_elementwise(NEVER + " mov.b32 $0, $1;}", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def step(q, rings, bars, p, acc, total, peak, at, tile, pattern, bounds, kv_len, score, scale, W: gl.constexpr, MASKED: gl.constexpr):
    """A tile of keys: Q K^T, together with P V of the tile before, at whose ends stand the softmax and the new P."""
    k_ring, v_ring, cut_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    slot = at % STAGES
    phase = (at // STAGES) & 1
    before = (at - 1) % STAGES
    phase_before = ((at - 1) // STAGES) & 1
    if MASKED:
        bits = load_pattern(bounds, pattern, WORDS, W)  # they come while the product is made
    mbarrier.wait(k_full.index(slot), phase)
    meet(8 + W, 256)
    if WIDE:
        s_flying = begin_scores(q, k_ring, slot)
        mbarrier.wait(v_full.index(before), phase_before)
        acc_flying = begin_output(p, v_ring, before, acc)
    else:
        zeros = gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES)
        k = k_ring.index(slot).reshape([BLOCK_KV, PADDED_DIM]).permute((1, 0))
        s_flying = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), phase_before)
        acc_flying = warpgroup_mma(p, v_ring.index(before).reshape([BLOCK_KV, PADDED_V_DIM]), acc, is_async=True)
    pass_by(8 + (W + 1) % CONSUMERS, 256)
    if WIDE:
        s = warpgroup_mma_wait(V_PARTS, deps=[s_flying])
    else:
        s = warpgroup_mma_wait(1, deps=[s_flying])
    if not (CROSSED and MASKED):
        mbarrier.arrive(k_empty.index(slot))
    if SCORE:
        s = changed_scores(s, score, tile)
    if MASKED:
        if BITS:
            FOURS: gl.constexpr = fours().type.layout
            bounds = spread_bits(bits, FOURS)
        s = masked_scores(s, bounds, cut_ring.index(slot), tile, kv_len, W)
    if CROSSED and MASKED:  # the cuts have been read
        mbarrier.arrive(k_empty.index(slot))
    new_p, peak, shrink = softmax(s, peak, scale, MASKED)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + row_sums(new_p)
    if CONSUMERS == 2:  # three have not the registers to hide the softmax behind P V
        total = before_waiting(total)
    if WIDE:
        acc = end_output(acc_flying)
    else:
        acc = warpgroup_mma_wait(0, deps=[acc_flying])
    mbarrier.arrive(v_empty.index(before))
    p = gl.convert_layout(to_half(new_p, DTYPE), FACTOR)
    if WIDE:
        acc = times(acc, shrink)
    else:
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
    return p, acc, total, peak


@gluon.jit
def finish(total, peak, scale, sinks, peaks, lse, head, h, row, q_len):
    """Store log-sum-exp and greatest score of the rows; what their output is multiplied by."""
    height = peak
    if not SCORE:
        height = peak * scale
    to = head.to(gl.int64) * q_len + row
    if peaks is not None:
        # no NaN is greatest, but it is in the sum
        certain = (total >= 0.0) | (height == INFINITY)
        gl.store(peaks + to, gl.where(certain, height * LN2, total), mask=row < q_len)
    shrink = gl.full([ROWS], 1.0, gl.float32, BY_ROW)
    if sinks is not None:  # a logit more in the denominator
        sink = gl.load(sinks + h).to(gl.float32) * LOG2E
        top = gl.maximum(height, sink)
        base = gl.where(top == -INFINITY, 0.0, top)
        shrink = gl.exp2(height - base)
        total = total * shrink + gl.exp2(sink - base)
        height = base
    # not `total > 0`: a NaN must come out as NaN
    empty = total == 0.0
    gl.store(lse + to, gl.where(empty, -INFINITY, (height + gl.log2(total)) * LN2), mask=row < q_len)
    return shrink / gl.where(empty, 1.0, total)


@gluon.jit
def begin_tile(m, b, h, pattern, q_ring, k_ring, q_full, k_full, number, at, rows, W: gl.constexpr):
    """(what masks the rows of tile `number`, the words of its first tile of keys, Q K^T of that in flight). Where there is no such tile,
    the product is of no use, and nothing is waited for."""
    bounds = load_bounds(rows, b, h, gl.maximum(m, 0) * BLOCK_Q + W * ROWS)
    bits = load_pattern(bounds, pattern, gl.where(pattern >= 0, WORDS, 0), W)
    buffer = (number % Q_STAGES) * CONSUMERS + W
    slot = at % STAGES
    mbarrier.wait(q_full.index(buffer), (number // Q_STAGES) & 1, pred=m >= 0)
    mbarrier.wait(k_full.index(slot), (at // STAGES) & 1, pred=m >= 0)
    meet(8 + W, 256)
    if WIDE:
        flying = begin_scores((q_ring, buffer * Q_PARTS), k_ring, slot)
    else:
        q = q_ring.index(buffer).reshape([ROWS, PADDED_DIM])
        k = k_ring.index(slot).reshape([BLOCK_KV, PADDED_DIM]).permute((1, 0))
        zeros = gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES)
        flying = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    pass_by(8 + (W + 1) % CONSUMERS, 256)
    return bounds, bits, flying


@gluon.jit
def consume(
    W: gl.constexpr, out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found
):
    """A warpgroup that multiplies: rows [64 W, 64 W + 64) of every tile of queries."""
    k_ring, v_ring, cut_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    q_full, q_empty = q_bars
    heads, q_len, kv_len = lengths
    lse, sinks, peaks = found
    at = 0
    number = 0
    if W == CONSUMERS - 1:
        pass_by(8, 256)  # the first warpgroup begins
    m, b, h, first, part_at, part, full_at, full, pattern = fetch(records, record_bars[0], record_bars[1], number)
    if not WIDE:
        bounds, bits, s_flying = begin_tile(m, b, h, pattern, q_ring, k_ring, q_full, k_full, number, at, rows, W)
        s = warpgroup_mma_wait(0, deps=[s_flying])
    while m >= 0:
        start = m * BLOCK_Q + W * ROWS
        row = start + gl.arange(0, ROWS, BY_ROW)
        score = score_context(score_mods, b, h, row[:, None], scale)
        following, next_pattern = masked_tile(tile_map, 0, part_at, part, full_at, full)
        buffer = (number % Q_STAGES) * CONSUMERS + W
        slot = at % STAGES
        if WIDE:
            q = (q_ring, buffer * Q_PARTS)
            bounds, bits, s_flying = begin_tile(m, b, h, pattern, q_ring, k_ring, q_full, k_full, number, at, rows, W)
            s = warpgroup_mma_wait(0, deps=[s_flying])
        else:
            q = q_ring.index(buffer).reshape([ROWS, PADDED_DIM])
        if SCORE:
            s = changed_scores(s, score, first)
        kept = bounds
        if BITS:
            kept = first_bits(bits, pattern, first, kv_len)
        s = masked_scores(s, kept, cut_ring.index(slot), first, kv_len, W)
        mbarrier.arrive(k_empty.index(slot))
        peak = gl.full([ROWS], -INFINITY, gl.float32, BY_ROW)
        new_p, peak, _ = softmax(s, peak, scale, True)
        total = row_sums(new_p)
        p = gl.convert_layout(to_half(new_p, DTYPE), FACTOR)
        if WIDE:
            acc = no_output()
        else:
            acc = gl.full([ROWS, PADDED_V_DIM], 0.0, gl.float32, OUTPUT)
        at += 1

        if MAP_FORM != "none":
            for i in range(part):
                tile, pattern = following, next_pattern
                following, next_pattern = masked_tile(tile_map, i + 1, part_at, part, full_at, full)
                p, acc, total, peak = step(q, rings, bars, p, acc, total, peak, at, tile, pattern, bounds, kv_len, score, scale, W, True)
                at += 1
        for i in range(full):
            tile = 0
            if SCORE:
                tile = full_tile(tile_map, i, full_at, full)
            p, acc, total, peak = step(q, rings, bars, p, acc, total, peak, at, tile, 0, bounds, kv_len, score, scale, W, False)
            at += 1

        if not WIDE:
            mbarrier.arrive(q_empty.index(buffer))
        before = (at - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
        if WIDE:
            acc_flying = begin_output(p, v_ring, before, acc)
        else:
            acc_flying = warpgroup_mma(p, v_ring.index(before).reshape([BLOCK_KV, PADDED_V_DIM]), acc, is_async=True)
        number += 1
        last_b, last_h = b, h
        if not WIDE:  # the first product of the next tile is made while this one is stored
            m, b, h, first, part_at, part, full_at, full, pattern = fetch(records, record_bars[0], record_bars[1], number)
            bounds, bits, s_flying = begin_tile(m, b, h, pattern, q_ring, k_ring, q_full, k_full, number, at, rows, W)
        sums = gl.convert_layout(gl.sum(total, axis=1), BY_ROW)
        share = finish(sums, peak, scale, sinks, peaks, lse, last_b * heads + last_h, last_h, row, q_len)
        if WIDE:
            acc = end_output(acc_flying)
            mbarrier.arrive(v_empty.index(before))
            store_parts(out, last_b, last_h, start, times(acc, share), out_ring, buffer * Q_PARTS)
            mbarrier.arrive(q_empty.index(buffer))
            m, b, h, first, part_at, part, full_at, full, pattern = fetch(records, record_bars[0], record_bars[1], number)
        else:
            tma.store_wait(0)  # the output of the tile before has left
            acc = warpgroup_mma_wait(1, deps=[acc_flying])
            mbarrier.arrive(v_empty.index(before))
            acc = acc * gl.convert_layout(share, gl.SliceLayout(1, OUTPUT))[:, None]
            tile_out = out_ring.index(W)
            tile_out.reshape([ROWS, PADDED_V_DIM]).store(to_half(acc, DTYPE))
            fence_async_shared()
            tma_store(out, [last_b, last_h, start, 0], tile_out)
            s = warpgroup_mma_wait(0, deps=[s_flying])
    if not WIDE:
        tma.store_wait(0)
    if W == 0:
        meet(8, 256)  # the last warpgroup has passed once more


@gluon.jit
def consume_0(out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found):
    consume(0, out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found)


@gluon.jit
def consume_1(out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found):
    consume(1, out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found)


@gluon.jit
def consume_2(out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found):
    consume(2, out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found)


@gluon.jit
def barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """So many barriers in shared memory, each of which waits for COUNT arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=COUNT)
    return made


# lengths, counts and strides are not specialised on: another length must not compile another kernel
@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "tiles", "rows", "resident", "heads", "group", "kv_batch",
        "stride_rb", "stride_rh", "stride_mb", "stride_mh", "stride_cb", "stride_ch",
    ]
)  # fmt: skip
def attention_forward(
    q, k, v, out, lse,  # TMA descriptors; lse float32 [B, Hq, Q]
    scale, q_len, kv_len, tiles, rows, resident, heads, group, kv_batch,  # `rows` tile rows; `group` query heads share a key head
    score_tables, score_numbers,  # tuples: see `pack`
    row_starts, row_stops, stride_rb, stride_rh,  # row intervals int32 [.., .., Q, PIECES], strides in rows
    column_starts, column_stops, stride_cb, stride_ch,  # intervals of queries int32 [.., .., KV, 1], strides in keys
    ranges, counts, offsets, index, stride_mb, stride_mh,  # the tile map, strides in tile rows
    patterns, words,  # the numbers of PARTIAL tiles' bits, beside `index`, and the bits, int32 [.., BLOCK_Q, WORDS]
    order, queue,  # int32 [rows], tile rows in the order of their turn; int32 [1], 0; either may be None
    broken,  # int32: 0 where the map's intervals, or bits, hold; 1 where they fail, and no kernel before has done the work
    sinks, peaks,  # [Hq], a logit of each head that has no value; float32 [B, Hq, Q], for the greatest scores; either may be None
):  # fmt: skip
    """Tile rows of the output: as many as the schedule gives this program."""
    if RUNS == "hold":
        if gl.load(broken) != 0:
            tiles = 0
    if RUNS == "fail":
        if gl.load(broken) != 1:
            tiles = 0
    if not SCORE:
        scale = scale * LOG2E
    if WIDE:
        q_ring = gl.allocate_shared_memory(q.dtype, [CONSUMERS * Q_STAGES * Q_PARTS] + q.block_type.shape, q.layout)
        out_ring = q_ring
        k_ring = gl.allocate_shared_memory(k.dtype, [STAGES * PARTS] + k.block_type.shape, k.layout)
        v_ring = gl.allocate_shared_memory(v.dtype, [STAGES * V_PARTS] + v.block_type.shape, v.layout)
    else:
        q_ring = gl.allocate_shared_memory(q.dtype, [CONSUMERS * Q_STAGES] + q.block_type.shape, q.layout)
        out_ring = gl.allocate_shared_memory(out.dtype, [CONSUMERS] + out.block_type.shape, out.layout)
        k_ring = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
        v_ring = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    cut_ring = k_ring
    if CROSSED:
        cut_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_KV], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    records = gl.allocate_shared_memory(gl.int32, [2, FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_bars = (barriers(CONSUMERS * Q_STAGES, 1), barriers(CONSUMERS * Q_STAGES, 1))
    record_bars = (barriers(2, 1), barriers(2, CONSUMERS))
    # keys are there when TMA has brought them, and the loading warp their cuts
    bars = (barriers(STAGES, 1 + CROSSED), barriers(STAGES, CONSUMERS), barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    fence_async_shared()
    rings = (k_ring, v_ring, cut_ring)
    tile_map = (ranges, counts, offsets, index, stride_mb, stride_mh, patterns)
    bounds = (row_starts, row_stops, stride_rb, stride_rh, q_len, words)
    work = (
        out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, bounds,
        (heads, q_len, kv_len), scale, (score_tables, score_numbers), (lse, sinks, peaks),
    )  # fmt: skip
    loading = (
        (q, k, v), rings, q_ring, records, bars, q_bars, record_bars, (tiles, rows, resident, heads, kv_len, order), tile_map,
        (column_starts, column_stops, stride_cb, stride_ch, kv_len), group, kv_batch, queue,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([(consume_0, work), (consume_1, work), (produce, loading)], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize(
            [(consume_0, work), (consume_1, work), (consume_2, work), (produce, loading)],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
