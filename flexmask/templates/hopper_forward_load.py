"""The warp of a Hopper forward kernel that loads: it walks the map, writes what there is to do into records, and brings tiles by TMA."""
# ruff: noqa: SIM108
# (long conditional expressions read badly)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper import cuts_of, find_turn, long_lines, tma_load
from .hopper_forward_plan import (
    ALL,
    APART,
    BITS,
    BLOCK_KV,
    CONSUMERS,
    CROSSED,
    FIELDS,
    HEADS_APART,
    MAP_FORM,
    NOTHING,
    PACK,
    PADDED_DIM,
    PADDED_V_DIM,
    Q_STAGES,
    QUERIES,
    ROWS,
    SCHEDULE,
    SCORE,
    SPLIT,
    STAGES,
    STARTS,
    WIDE,
)
from .hopper_forward_portion import begin_portion, place_before, portion_of
from .hopper_forward_wide import PARTS, Q_PARTS, V_PARTS, load_parts


# ---- the warp that loads
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
def find_tile(turn, turns, call, tile_map):
    """(tile row, batch entry, head, its walk, and which portion of that) of tile number `turn`; tile rows in the given order, or the last
    one first; of heads that share a tile, the first."""
    tiles, rows, resident, units, kv_len, order, _, portions = call
    valid = tiles > 0  # where there is nothing to do, the map and the order may name places that do not exist
    turn = gl.maximum(gl.minimum(turn, tiles - 1), 0)  # there may be none left: any tile then, which is not used
    portion = 0
    if SPLIT:
        portion = turn % portions
        line, unit = find_turn(turn // portions, turns, rows, resident, gl.maximum(tiles // (rows * portions), 1))
    else:
        line, unit = find_turn(turn, turns, rows, resident, gl.maximum(tiles // rows, 1))
    if order is None:
        m = rows - 1 - line
    else:
        m = gl.load(order + line, mask=valid, other=0)
    b, h = unit // units, unit % units * PACK
    first, part_at, part, full_at, full, pattern = find_walk(tile_map, b, h, m, kv_len, valid)
    if SPLIT:
        chosen = any_tile(tile_map, place_before(portion, portions, part, full), part_at, part, full_at, full)
        first, pattern = begin_portion(tile_map[6], first, chosen, part_at, part, full, pattern, portion, portions, kv_len)
    return m, b, h, first, part_at, part, full_at, full, pattern, portion


@gluon.jit
def publish(records, full, empty, number, m, b, h, first, part_at, part, full_at, fulls, pattern, portion):
    """Hand the record of tile `number` of this program to the warpgroups that multiply; m is -1 where there is none."""
    slot = number & 1
    mbarrier.wait(empty.index(slot), ((number >> 1) & 1) ^ 1)
    i = gl.arange(0, FIELDS, gl.BlockedLayout([1], [32], [1], [0]))
    low = gl.where(i == 0, m, gl.where(i == 1, b, gl.where(i == 2, h, first)))
    high = gl.where(i == 4, part_at, gl.where(i == 5, part, gl.where(i == 6, full_at, fulls)))
    if BITS:
        high = gl.where(i < 8, high, pattern)
    if SPLIT:
        high = gl.where(i < 9, high, portion)
    records.index(slot).store(gl.where(i < 4, low, high).to(gl.int32))
    mbarrier.arrive(full.index(slot))


@gluon.jit
def load_cuts(cuts, cut, b, h, tile, m):
    """Which rows of this tile keep each key of a tile of keys."""
    column_starts, column_stops, stride_cb, stride_ch, kv_len = cut
    key = tile * BLOCK_KV
    at = b.to(gl.int64) * stride_cb + h.to(gl.int64) * stride_ch + key
    base = m * QUERIES
    cuts.store(cuts_of(column_starts + at, column_stops + at, kv_len - key, base, base + QUERIES, BLOCK_KV, QUERIES, STARTS))


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
    turns = long_lines(call[5], call[1], call[6], tiles > 0)
    at = 0
    number = 0
    turn = gl.program_id(0)
    m, b, h, first, part_at, part, full_at, full, pattern, portion = find_tile(turn, turns, call, tile_map)
    while turn < tiles:
        publish(records, record_bars[0], record_bars[1], number, m, b, h, first, part_at, part, full_at, full, pattern, portion)
        buffer = (number % Q_STAGES) * CONSUMERS
        if not WIDE:
            for w in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(buffer + w), ((number // Q_STAGES) & 1) ^ 1)
                mbarrier.expect(q_full.index(buffer + w), ROWS * PADDED_DIM * 2)
                tma_load(q, [b, h + w * HEADS_APART, m * QUERIES + w * APART, 0], q_full.index(buffer + w), q_ring.index(buffer + w))
        place = (b, h, b * kv_batch, h // group, m)
        low = 0
        count = 1 + part + full
        masked = part  # of the tiles after the first
        if SPLIT:
            low, last = portion_of(portion, call[7], part, full)
            count = 1 + last - low
            masked = gl.maximum(part - low, 0)
        early = gl.minimum(count, STAGES)
        following = first
        for i in range(early):
            tile = following
            following = any_tile(tile_map, low + i, part_at, part, full_at, full)
            load_keys(k, v, rings, bars, cut, place, at, tile, i <= masked)
            at += 1
        if WIDE:
            for w in gl.static_range(CONSUMERS):  # last, as the output of the tile before has to leave from there
                mbarrier.wait(q_empty.index(buffer + w), ((number // Q_STAGES) & 1) ^ 1)
                mbarrier.expect(q_full.index(buffer + w), ROWS * PADDED_DIM * 2)
                head, start, to = h + w * HEADS_APART, m * QUERIES + w * APART, (buffer + w) * Q_PARTS
                load_parts(q, b, head, start, q_full.index(buffer + w), q_ring, to, PARTS)
        # the rings are full: time to find the next tile of queries
        if SCHEDULE == "queue":
            taken = gl.atomic_add(queue, 1, sem="relaxed")
            if taken == tiles - 1:  # the last one of this launch leaves the counter at 0
                gl.store(queue, 0)
            turn = taken + gl.num_programs(0)
        else:
            turn += gl.num_programs(0)
        next_m, next_b, next_h, next_first, next_part_at, next_part, next_full_at, next_full, next_pattern, next_portion = find_tile(
            turn, turns, call, tile_map
        )
        for i in range(early, count):
            tile = following
            following = any_tile(tile_map, low + i, part_at, part, full_at, full)
            load_keys(k, v, rings, bars, cut, place, at, tile, i <= masked)
            at += 1
        number += 1
        m, b, h, first = next_m, next_b, next_h, next_first
        part_at, part, full_at, full, pattern = next_part_at, next_part, next_full_at, next_full, next_pattern
        portion = next_portion
    publish(records, record_bars[0], record_bars[1], number, -1, 0, 0, 0, 0, 0, 0, 0, NOTHING, 0)


@gluon.jit
def field(record, NUMBER: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, FIELDS, record.type.layout) == NUMBER, record, 0), axis=0)


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
    portion = 0
    if SPLIT:
        portion = field(x, 9)
    mbarrier.arrive(empty.index(slot))
    return m, b, h, first, part_at, part, full_at, fulls, pattern, portion
