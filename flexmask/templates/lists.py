"""Tile lists on a GPU: from a table of tile states, or straight from row intervals.

Row number r of the map owns index[r * share : (r + 1) * share]: its FULL tiles ascend from the front, its PARTIAL ones from the back.
`counts` holds how many there are of each, `offsets` where each group begins. A row with more tiles than its share lists every block from
its first kept one to its last as PARTIAL, out of the numbers 0, 1, 2, ... that the caller keeps at index[iota:].
Nothing here depends on the mask, so this module is imported as it stands. No kernel waits for the host.
"""

import triton
import triton.language as tl

# tiles listed together
STATES_CHUNK = tl.constexpr(1024)
INTERVALS_CHUNK = tl.constexpr(256)


@triton.jit
def list_chunk(listed, share, is_full, is_partial, tile, full, partial):
    """Lists the tiles of a chunk behind `full` and `partial` earlier ones; how many there are then. Nothing is stored outside the share."""
    upto = tl.cumsum(is_full.to(tl.int32) + is_partial.to(tl.int32) * 65536, 0)
    front = full + (upto & 65535) - 1
    back = share - partial - (upto >> 16)
    tl.store(listed + front, tile, mask=is_full & (front < share))
    tl.store(listed + back, tile, mask=is_partial & (back >= 0))
    return full + tl.sum(is_full.to(tl.int32), 0), partial + tl.sum(is_partial.to(tl.int32), 0)


@triton.jit
def close_row(counts, offsets, row, share, iota, full, partial, low, high):
    """Stores how many tiles row `row` lists, and where; [low, high) are the blocks from its first kept one to its last."""
    fits = full + partial <= share
    first = row * share
    tl.store(counts + row * 2, tl.where(fits, full, 0))
    tl.store(counts + row * 2 + 1, tl.where(fits, partial, high - low))
    tl.store(offsets + row * 2, first)
    tl.store(offsets + row * 2 + 1, tl.where(fits, first + share - partial, iota + low))


@triton.jit
def list_row_of_states(states, counts, offsets, index, row, columns, share, iota):
    """The lists of one row of states."""
    full, partial, low, high = 0, 0, columns, 0
    for begin in range(0, columns, STATES_CHUNK):
        tile = begin + tl.arange(0, STATES_CHUNK)
        state = tl.load(states + tile, mask=tile < columns, other=0)
        end = tl.max(tl.where(state != 0, tile + 1, 0), 0)
        if end > 0:
            full, partial = list_chunk(index + row * share, share, state == 2, state == 1, tile, full, partial)
            low = tl.minimum(low, tl.min(tl.where(state != 0, tile, columns), 0))
            high = end
    close_row(counts, offsets, row, share, iota, full, partial, low, high)


@triton.jit(do_not_specialize=["first", "rows", "blocks", "columns", "share", "iota"])
def states_kernel(states, counts, offsets, index, broken, first, rows, blocks, columns, share, iota):
    """One program for each row of a slab [leads, rows, columns] of a map of `blocks` rows."""
    line = tl.program_id(0)
    wanted = 1
    if broken is not None:
        wanted = tl.load(broken)
    if wanted == 1:
        row = line // rows * blocks + first + line % rows
        list_row_of_states(states + line.to(tl.int64) * columns, counts, offsets, index, row, columns, share, iota)


def list_states(states, counts, offsets, index, first, share, iota, evaluated_only_if=None):
    """List the tiles of contiguous int8 states [batch, heads, rows, columns], rows [first, first + rows) of the map.

    counts, offsets: contiguous int32 [batch, heads, blocks, 2]; index: int32, see the head of this file. Where `evaluated_only_if`
    (int32, the map's flags) does not begin with 1 nothing is done.
    """
    batch, heads, rows, columns = states.shape
    lines = batch * heads * rows
    if lines:
        sizes = (first, rows, counts.shape[2], columns, share, iota)
        states_kernel[(lines,)](states, counts, offsets, index, evaluated_only_if, *sizes, num_warps=4)


@triton.jit
def within(x, begin):
    """Whether numbers lie in the chunk of tiles that starts at `begin`."""
    return (x >= begin) & (x < begin + INTERVALS_CHUNK)


@triton.jit
def marks(x, begin, exists):
    """How many of the numbers fall on each tile of the chunk."""
    return tl.histogram(x - begin, INTERVALS_CHUNK, mask=exists & within(x, begin))


@triton.jit
def line_bounds(starts, stops, lead, owner, length, PIECES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """(start, stop, exists) of each piece of each row of an owner block; pieces that are not there are (0, 0)."""
    place = tl.arange(0, ROWS * PADDED)
    line, piece = place // PADDED, place % PADDED
    row = owner * BLOCK + line
    exists = (line < BLOCK) & (row < length) & (piece < PIECES)
    at = (lead.to(tl.int64) * length + row) * PIECES + piece
    return tl.load(starts + at, mask=exists, other=0), tl.load(stops + at, mask=exists, other=0), exists


@triton.jit(do_not_specialize=["length", "blocks", "columns", "other_length", "share", "iota"])
def intervals_kernel(
    starts, stops, counts, offsets, index, length, blocks, columns, other_length, share, iota,
    BLOCK: tl.constexpr, OTHER: tl.constexpr, PIECES: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for each owner block. It counts the rows that touch a tile, and those that cover it: a piece begins to touch at one tile
    and ceases to at another, so both counts are sums of marks along the line of tiles. A row's pieces do not touch one another, so at
    most one of them covers a tile."""
    row = tl.program_id(0)
    owner = row % blocks
    start, stop, exists = line_bounds(starts, stops, row // blocks, owner, length, PIECES, PADDED, BLOCK, ROWS)
    first, last = start // OTHER, (stop + (OTHER - 1)) // OTHER
    first_full = (start + (OTHER - 1)) // OTHER
    # the last block ends with the keys, even where it is short
    last_full = tl.maximum(tl.where(stop == other_length, columns, stop // OTHER), first_full)
    low = tl.min(tl.where(start < stop, first, columns), 0)
    high = tl.max(last, 0)
    height = tl.minimum(length - owner * BLOCK, BLOCK)
    # rows that touch the tile before the chunk, and 65536 times those that cover it
    before = 0
    full, partial = 0, 0
    for begin in range(low, high, INTERVALS_CHUNK):
        tile = begin + tl.arange(0, INTERVALS_CHUNK)
        near = exists & (within(first, begin) | within(last, begin) | within(first_full, begin) | within(last_full, begin))
        count = tl.zeros([INTERVALS_CHUNK], tl.int32) + before
        if tl.max(near.to(tl.int32), 0) > 0:
            change = marks(first, begin, exists) - marks(last, begin, exists)
            change += (marks(first_full, begin, exists) - marks(last_full, begin, exists)) * 65536
            count += tl.cumsum(change, 0)
            before += tl.sum(change, 0)
        covered = (count >> 16) == height
        touched = (count & 65535) > 0
        full, partial = list_chunk(index + row * share, share, covered, touched & (covered == 0), tile, full, partial)
    close_row(counts, offsets, row, share, iota, full, partial, tl.minimum(low, high), high)


def list_intervals(starts, stops, counts, offsets, index, share, iota, block, other_block, other_length):
    """List the tiles that settled intervals keep (each row's ascending, disjoint, not touching; empty ones (0, 0)), in one launch.

    starts, stops: contiguous int32 [batch, heads, length, pieces]; counts, offsets: contiguous int32 [batch, heads, blocks, 2] for owner
    blocks of `block` rows. A tile is `block` rows by `other_block` of the indices [0, other_length) that intervals hold. A tile is FULL
    where every row keeps all of it. Raises ValueError for blocks of more than 8192 rows.
    """
    batch, heads, length, pieces = starts.shape
    if block > 8192:
        raise ValueError(f"tile lists are made for blocks of up to 8192 rows; got {block}")
    blocks, columns = triton.cdiv(length, block), triton.cdiv(other_length, other_block)
    if batch * heads * blocks:
        intervals_kernel[(batch * heads * blocks,)](
            starts, stops, counts, offsets, index, length, blocks, columns, other_length, share, iota,
            BLOCK=block, OTHER=other_block, PIECES=pieces, PADDED=triton.next_power_of_2(pieces), ROWS=triton.next_power_of_2(block),
            num_warps=4,
        )  # fmt: skip


# lines that are ranked together
ORDER_CHUNK = tl.constexpr(128)
# how many shares of all the work it is told how many lines exceed: 1 / 256, 1 / 128, .. 1
ORDER_LEVELS = tl.constexpr(9)
# leading axes whose work is looked at, at most: which line is begun first changes no result
ORDER_LEADS = 16


@triton.jit
def work_of_lines(table, line, leads, step, lines, RANGES: tl.constexpr):
    """How many tiles the lines keep, over some of the leading axes; -1 for lines that do not exist."""
    exists = line < lines
    work = tl.where(exists, 0, -1)
    for lead in range(0, leads, step):
        if RANGES:
            at = table + (lead * lines + line.to(tl.int64)) * 4
            work += tl.load(at + 3, mask=exists, other=0) - tl.load(at, mask=exists, other=0)
        else:
            at = table + (lead * lines + line.to(tl.int64)) * 2
            work += tl.load(at, mask=exists, other=0) + tl.load(at + 1, mask=exists, other=0)
    return work


@triton.jit(do_not_specialize=["leads", "step", "lines"])
def order_kernel(table, order, leads, step, lines, RANGES: tl.constexpr):
    """One program for each chunk of lines: a line's place is the number of lines that come before it."""
    line = tl.program_id(0) * ORDER_CHUNK + tl.arange(0, ORDER_CHUNK)
    work = work_of_lines(table, line, leads, step, lines, RANGES)
    place = tl.zeros([ORDER_CHUNK], tl.int32)
    total = 0
    for begin in range(0, lines, ORDER_CHUNK):
        other = begin + tl.arange(0, ORDER_CHUNK)
        found = work_of_lines(table, other, leads, step, lines, RANGES)
        total += tl.sum(tl.maximum(found, 0), 0)
        before = (found[None, :] > work[:, None]) | ((found[None, :] == work[:, None]) & (other[None, :] < line[:, None]))
        place += tl.sum((before & (other < lines)[None, :]).to(tl.int32), 1)
    tl.store(order + place, line, mask=line < lines)
    if tl.program_id(0) == 0:
        level = tl.arange(0, 16)
        long = tl.zeros([16], tl.int32)
        for begin in range(0, lines, ORDER_CHUNK):
            found = work_of_lines(table, begin + tl.arange(0, ORDER_CHUNK), leads, step, lines, RANGES)
            long += tl.sum((found[None, :] > (total >> tl.maximum(ORDER_LEVELS - 1 - level, 0))[:, None]).to(tl.int32), 1)
        tl.store(order + lines + level, long, mask=level < ORDER_LEVELS)
        above = ((long > 0) & (level < ORDER_LEVELS)).to(tl.int32)
        steps = tl.sum((level[None, :] >= level[:, None]).to(tl.int32) * above[None, :], 1)
        tl.store(order + lines + ORDER_LEVELS + level, (1 << steps) - 1, mask=level < ORDER_LEVELS)


def order_lines(table, order, ranges):
    """The lines of a map by the number of tiles they keep, most first, into `order` int32 [lines + 18]; behind them, for the levels
    1 / 256, 1 / 128, .. 1, how many lines keep more than this share of all tiles; and then how many times this share the greatest keeps at
    most (a power of two), less 1. `table` is contiguous int32: the ranges [batch, heads, lines, 4], or the counts
    [batch, heads, lines, 2]."""
    leads, lines = table.shape[0] * table.shape[1], table.shape[2]
    if lines:
        step = triton.cdiv(leads, ORDER_LEADS)
        order_kernel[(triton.cdiv(lines, ORDER_CHUNK.value),)](table, order, leads, step, lines, RANGES=ranges, num_warps=4)


@triton.jit(do_not_specialize=["count"])
def turn_kernel(flags, own, count):
    """One program."""
    for begin in range(0, count, ORDER_CHUNK):
        at = begin + tl.arange(0, ORDER_CHUNK)
        flag = tl.load(flags + at, mask=at < count, other=0)
        tl.store(own + at, tl.where(at == 0, tl.where(flag == 0, 2, 0), flag), mask=at < count)


def pass_turn(flags, own):
    """The flags of a map from those of the one that has its turn before it, int32: what is known of tables is copied; the first one becomes
    2 where that map holds, so that this one does nothing, else 0."""
    turn_kernel[(1,)](flags, own, own.numel(), num_warps=1)
