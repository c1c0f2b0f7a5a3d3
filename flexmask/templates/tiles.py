"""The planning kernel: the exact state of every tile of a slab of a map, 0 EMPTY, 1 PARTIAL, 2 FULL.

A program takes up to CHUNK tiles of one owner block at a time. Hulls and the box test decide most of them together. Of those left open it
looks at four lines each (the first and the last query, the first and the last key), GROUP tiles at a time: a tile that shows a kept and a
masked place is PARTIAL. The rest is evaluated whole. The sizes and the functions under "mods" are replaced by `assemble_tiles`.
"""

import triton
import triton.language as tl

# ---- sizes
# "row": the owner blocks are blocks of queries and the others blocks of keys; "column": the other way about
AXIS = tl.constexpr("row")
BLOCK_Q = tl.constexpr(128)
BLOCK_KV = tl.constexpr(128)
# the powers of two that hold a tile's queries and keys
PADDED_Q = tl.constexpr(128)
PADDED_KV = tl.constexpr(128)
# tiles whose lines are looked at together, and queries of a tile that are evaluated together
GROUP = tl.constexpr(4)
STRIP = tl.constexpr(8)
BOXED = tl.constexpr(False)
HULLS = tl.constexpr(0)


# ---- mods
@triton.jit
def mask_row(tables, numbers, b, h, q_idx):
    """What the mask needs of a query row."""
    return ()


@triton.jit
def mask_mod(tables, numbers, row, b, h, q_idx, kv_idx):
    """Whether a query keeps a key."""
    return q_idx >= kv_idx


@triton.jit
def box_test(tables, numbers, b, h, q_idx, kv_idx, q_len, kv_len):
    """Whether tiles keep something, and whether everything; not called, as there is no box test."""
    return kv_idx >= 0, kv_idx < 0


@triton.jit
def distrusted(broken, HULL: tl.constexpr):
    """Not 0 where a hull does not hold, because a table that it needs does not ascend; not called, as there are no hulls."""
    return 0


# ---- functions
# tiles decided together by hulls and the box test
CHUNK = tl.constexpr(256)
# as many programs walk all of a slab: few enough to start and stop in microseconds where there is nothing to do
MOST_PROGRAMS = 16384
# pieces of work that keep a great GPU busy: smaller maps are cut finer, though not below LEAST_SPAN tiles
FEW_PROGRAMS = 4096
LEAST_SPAN = 8
# more would leave a multiprocessor with few programs; without a limit ptxas spills some for the sake of even more programs
MOST_REGISTERS = 128
# strips of queries in a tile
STRIPS = tl.constexpr(triton.cdiv(BLOCK_Q.value, STRIP.value))
# what has been seen of a tile, or-ed: a kept place, a masked place
KEPT = tl.constexpr(1)
MASKED = tl.constexpr(2)
BOTH = tl.constexpr(3)


@triton.jit
def evaluate(tables, numbers, b, h, q_idx, kv_idx, exists):
    """The places as numbers to add up: 1 for a kept one, 65536 for a masked one, 0 for one that does not exist. The indices broadcast to
    the shape of `exists`."""
    keep = mask_mod(tables, numbers, mask_row(tables, numbers, b, h, q_idx), b, h, q_idx, kv_idx)
    return tl.where(exists, tl.where(keep, 1, 65536), 0)


@triton.jit
def seen_in(sums):
    """KEPT and MASKED as far as sums of `evaluate` tell."""
    return tl.where((sums & 65535) != 0, KEPT, 0) | tl.where((sums >> 16) != 0, MASKED, 0)


@triton.jit
def ends(block, length, BLOCK: tl.constexpr):
    """The first and the last index of blocks, [2, .., 1]."""
    return tl.minimum(block * BLOCK + tl.arange(0, 2)[:, None, None] * (BLOCK - 1), length - 1)


@triton.jit
def look(tables, numbers, b, h, q_block, kv_block, live, q_len, kv_len, ALONG_KEYS: tl.constexpr):
    """What two lines of each of GROUP tiles show: their first and last query where ALONG_KEYS, else their first and last key.

    The blocks of the owner axis are [1, 1, 1], those of the other one [1, GROUP, 1]. Places are [2, GROUP, along the line]: Triton lays
    threads along the last dimension.
    """
    if ALONG_KEYS:
        queries = ends(q_block, q_len, BLOCK_Q)
        offset = tl.arange(0, PADDED_KV)[None, None, :]
        keys = kv_block * BLOCK_KV + offset
        exists = (offset < BLOCK_KV) & (keys < kv_len)
    else:
        keys = ends(kv_block, kv_len, BLOCK_KV)
        offset = tl.arange(0, PADDED_Q)[None, None, :]
        queries = q_block * BLOCK_Q + offset
        exists = (offset < BLOCK_Q) & (queries < q_len)
    exists = exists & live[None, :, None] & (tl.arange(0, 2)[:, None, None] < 2)
    return seen_in(tl.sum(tl.sum(evaluate(tables, numbers, b, h, queries, keys, exists), 2), 0))


@triton.jit
def evaluate_tile(tables, numbers, b, h, q_block, kv_block, q_len, kv_len, seen):
    """`seen` of a whole tile: strips of queries that lie far apart, until a kept and a masked place are known."""
    column = tl.arange(0, PADDED_KV)[None, :]
    keys = kv_block * BLOCK_KV + column
    some_keys = (column < BLOCK_KV) & (keys < kv_len)
    strip = 0
    while (strip < STRIPS) & (seen != BOTH):
        line = strip + tl.arange(0, STRIP)[:, None] * STRIPS
        queries = q_block * BLOCK_Q + line
        exists = (line < BLOCK_Q) & (queries < q_len) & some_keys
        sums = evaluate(tables, numbers, b, h, queries, keys, exists)
        seen = seen | seen_in(tl.sum(tl.sum(sums, 1), 0))
        strip += 1
    return seen


@triton.jit
def hull_of(hulls, broken, line, lines, columns):
    """The blocks [low, high) outside of which nothing is kept, by those hulls that hold."""
    low, high = 0, columns
    for g in tl.static_range(HULLS):
        at = hulls + (g * lines + line).to(tl.int64) * 2
        first, last = tl.load(at), tl.load(at + 1)
        if broken is not None:
            untrue = distrusted(broken, g) != 0
            first, last = tl.where(untrue, 0, first), tl.where(untrue, columns, last)
        low, high = tl.maximum(low, first), tl.minimum(high, last)
    return low, high


@triton.jit
def chosen(order, rank):
    """Where in a vector the chosen elements stand of the given ranks; `order` counts the chosen ones up to each element."""
    return tl.sum((order[None, :] <= rank[:, None]).to(tl.int32), 1)


@triton.jit
def decide_whole(at, begin, tile, seen, left, tables, numbers, b, h, owner, q_len, kv_len):
    """Evaluates those of GROUP tiles that are `left`, one after the other, and stores their states."""
    slot = tl.arange(0, GROUP)
    order = tl.cumsum(left.to(tl.int32), 0)
    for rank in range(tl.sum(left.to(tl.int32), 0)):
        here = slot == tl.sum((order <= rank).to(tl.int32), 0)
        other = tl.sum(tl.where(here, tile, 0), 0)
        known = tl.sum(tl.where(here, seen, 0), 0)
        if AXIS == "row":
            known = evaluate_tile(tables, numbers, b, h, owner, other, q_len, kv_len, known)
        else:
            known = evaluate_tile(tables, numbers, b, h, other, owner, q_len, kv_len, known)
        state = tl.where(known == KEPT, 2, tl.where(known == BOTH, 1, 0))
        tl.store(at + (other - begin), state.to(tl.int8))


@triton.jit
def decide_open(at, begin, order, total, tables, numbers, b, h, owner, q_len, kv_len):
    """Evaluates the `total` tiles of a chunk that are open, which `order` counts, and stores their states."""
    for first in range(0, total, GROUP):
        slot = first + tl.arange(0, GROUP)
        live = slot < total
        tile = begin + tl.where(live, chosen(order, slot), 0)
        one = tl.zeros([1, 1, 1], tl.int32) + owner
        if AXIS == "row":
            q_block, kv_block = one, tile[None, :, None]
        else:
            q_block, kv_block = tile[None, :, None], one
        seen = look(tables, numbers, b, h, q_block, kv_block, live, q_len, kv_len, True)
        if tl.sum((live & (seen != BOTH)).to(tl.int32), 0) > 0:
            seen = seen | look(tables, numbers, b, h, q_block, kv_block, live, q_len, kv_len, False)
        tl.store(at + (tile - begin), tl.full([GROUP], 1, tl.int8), mask=live & (seen == BOTH))
        decide_whole(at, begin, tile, seen, live & (seen != BOTH), tables, numbers, b, h, owner, q_len, kv_len)


@triton.jit
def ask_boxes(left, state, asked, other, tables, numbers, b, h, owner, q_len, kv_len):
    """(tiles still open, states) after the box test of a chunk; where it is not `asked`, as they were."""
    if asked:
        if AXIS == "row":
            some, every = box_test(tables, numbers, b, h, owner, other, q_len, kv_len)
        else:
            some, every = box_test(tables, numbers, b, h, other, owner, q_len, kv_len)
        left = left & some
        state = tl.where(left & every, 2, 0)
        left = left & (state == 0)
    return left, state


@triton.jit
def decide_chunk(at, begin, stop, low, high, tables, numbers, box_tables, box_numbers, b, h, owner, q_len, kv_len):
    """The states of tiles [begin, stop) of an owner block, stored from `at` on; outside of [low, high) they are EMPTY."""
    offset = tl.arange(0, CHUNK)
    other = begin + offset
    left = (other < stop) & (other >= low) & (other < high)
    state = tl.zeros([CHUNK], tl.int32)
    if BOXED:
        left, state = ask_boxes(left, state, (begin < high) & (stop > low), other, box_tables, box_numbers, b, h, owner, q_len, kv_len)
    tl.store(at + offset, state.to(tl.int8), mask=(other < stop) & (left == 0))
    total = tl.sum(left.to(tl.int32), 0)
    if total > 0:
        decide_open(at, begin, tl.cumsum(left.to(tl.int32), 0), total, tables, numbers, b, h, owner, q_len, kv_len)


# no length is specialised on: another one must not compile another kernel
@triton.jit(do_not_specialize=["q_len", "kv_len", "leads", "heads", "first", "rows", "blocks", "columns", "span"])
def decide_tiles(
    states, tables, numbers, box_tables, box_numbers, hulls, broken,
    q_len, kv_len, leads, heads, first, rows, blocks, columns, span, ONLY_IF_BROKEN: tl.constexpr,
):  # fmt: skip
    """int8 states [leads, rows, columns] of owner blocks [first, first + rows) out of `blocks`, `span` tiles at a time."""
    spans = tl.cdiv(columns, span)
    items = leads * rows * spans
    if ONLY_IF_BROKEN:
        items = tl.where(tl.load(broken) == 1, items, 0)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row_of_tiles = item // spans
        begin = item % spans * span
        lead = row_of_tiles // rows
        owner = first + row_of_tiles % rows
        low, high = hull_of(hulls, broken, lead * blocks + owner, leads * blocks, columns)
        at = states + row_of_tiles.to(tl.int64) * columns + begin
        stop = tl.minimum(begin + span, columns)
        decide_chunk(
            at, begin, stop, low, high, tables, numbers, box_tables, box_numbers, lead // heads, lead % heads, owner, q_len, kv_len
        )  # fmt: skip


def tiles(states, first, captures, box_captures, q_len, kv_len, hulls=None, broken=None, only_if_broken=False):
    """Fill contiguous int8 states [batch, heads, rows, columns] of owner blocks [first, first + rows): 0 EMPTY, 1 PARTIAL, 2 FULL.

    Captures come from `pack`; `box_captures` are the mask's with the summary tables after its own tensors. `hulls`, contiguous int32
    [HULLS, batch, heads, owner blocks, 2], may be left out; each counts where `broken` (int32 [1 + tables]) is None or 0 for its tables.
    With `only_if_broken` nothing is done unless broken[0] is 1. One launch, nothing is waited for.
    """
    batch, heads, rows, columns = states.shape
    if states.numel() == 0:
        return states
    length, block = (q_len, BLOCK_Q.value) if AXIS.value == "row" else (kv_len, BLOCK_KV.value)
    wanted = triton.cdiv(states.numel(), FEW_PROGRAMS)
    spans = triton.cdiv(columns, min(max(wanted, LEAST_SPAN), CHUNK.value))
    decide_tiles[(min(batch * heads * rows * spans, MOST_PROGRAMS),)](
        states, *captures, *box_captures, hulls if HULLS.value else None, broken,
        q_len, kv_len, batch * heads, heads, first, rows, triton.cdiv(length, block), columns, triton.cdiv(columns, spans),
        ONLY_IF_BROKEN=only_if_broken, num_warps=4, enable_fp_fusion=True, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return states
