"""The survey kernel: what a map needs to know of each block of its owner axis, one program a block, in one launch.

The owner axis is that of queries ("row" maps) or of keys ("column" maps), the other axis the other one. The constants and the functions
under "mods" are replaced by `assemble_survey`; everything else is copied as it stands.
"""
# mypy: disable-error-code=assignment
# (tuples grow)

import triton
import triton.language as tl

from .functions import number

# ---- constants
# whether keys own the blocks
COLUMNS = tl.constexpr(False)
# block lengths along both axes, and the powers of two that hold them
OWNER_BLOCK = tl.constexpr(128)
OTHER_BLOCK = tl.constexpr(128)
PADDED_OWNER = tl.constexpr(128)
PADDED_OTHER = tl.constexpr(128)
NUM_WARPS = tl.constexpr(4)
# runs of kept places that the form has, and how many of them are kept once settled; 0: there is no form
RUNS = tl.constexpr(0)
PIECES = tl.constexpr(0)
# whether range numbers are wanted
RANGES = tl.constexpr(False)
# necessary conditions, and the runs of each
HULLS = tl.constexpr(0)
HULL_RUNS = tl.constexpr(0)
# terms whose least and greatest value in a block are wanted, along both axes, and the number of the first of each
OWNER_TERMS = tl.constexpr(0)
OTHER_TERMS = tl.constexpr(0)
FIRST_OWNER_TERM = tl.constexpr(0)
FIRST_OTHER_TERM = tl.constexpr(0)


# ---- mods
@triton.jit
def owner_values(tables, numbers, b, h, index, q_len, kv_len):
    """Of each place of the owner axis: starts and stops of the form's runs, of each condition's runs, and the terms."""
    return ()


@triton.jit
def other_values(tables, numbers, b, h, index, q_len, kv_len):
    """Of each place of the other axis: the terms."""
    return ()


@triton.jit
def check_tables(broken, tables, numbers):
    """Looks through the tables that must ascend: none."""


# ---- functions
MAX_INDEX = tl.constexpr(1 << 24)
LEAST = tl.constexpr(-(1 << 63))
GREATEST = tl.constexpr((1 << 63) - 1)
# neighbours of a table compared at a time
CHUNK = tl.constexpr(256 * NUM_WARPS.value)


@triton.jit
def clip(bound, length):
    """A bound in [0, length], int32."""
    return tl.minimum(tl.maximum(bound, 0), length).to(tl.int32)


@triton.jit
def insert(starts, stops, start, stop, COUNT: tl.constexpr):
    """COUNT runs in the order of their starts, and one more."""
    new_starts = ()
    new_stops = ()
    for i in tl.static_range(COUNT):
        earlier = start < starts[i]
        new_starts += (tl.where(earlier, start, starts[i]),)
        new_stops += (tl.where(earlier, stop, stops[i]),)
        start, stop = tl.where(earlier, starts[i], start), tl.where(earlier, stops[i], stop)
    new_starts += (start,)
    new_stops += (stop,)
    return new_starts, new_stops


@triton.jit
def sort_runs(values, length):
    """Starts and stops of the form's runs, clipped to [0, length], in the order of their starts."""
    starts = ()
    stops = ()
    for i in tl.static_range(RUNS):
        starts, stops = insert(starts, stops, clip(values[2 * i], length), clip(values[2 * i + 1], length), i)
    return starts, stops


@triton.jit
def piece_of(starts, stops, PIECE: tl.constexpr):
    """Piece number PIECE of the union of sorted runs, (0, 0) where there is none, and whether there is one."""
    count, reach = 0, -1
    piece_start, piece_stop = 0, 0
    for i in tl.static_range(RUNS):
        real = starts[i] < stops[i]
        opens = real & (starts[i] > reach)
        count += opens.to(tl.int32)
        reach = tl.where(real, tl.maximum(reach, stops[i]), reach)
        piece_start = tl.where(opens & (count == PIECE + 1), starts[i], piece_start)
        piece_stop = tl.where(real & (count == PIECE + 1), reach, piece_stop)
    return piece_start, piece_stop, count > PIECE


@triton.jit
def range_numbers(start, stop, exists, length):
    """(first, first_full, last_full, last) blocks of the other axis, of one-piece rows whose union is one interval."""
    blocks = tl.cdiv(length, OTHER_BLOCK)
    last = tl.cdiv(tl.max(tl.where(exists, stop, 0), 0), OTHER_BLOCK)
    first = tl.minimum(tl.min(tl.where(exists & (start < stop), start, length), 0) // OTHER_BLOCK, last)
    # a row that keeps nothing stops at 0, so its block has no full tile
    least_stop = tl.min(tl.where(exists, stop, length), 0)
    first_full = tl.cdiv(tl.max(tl.where(exists, start, 0), 0), OTHER_BLOCK)
    last_full = tl.where(least_stop == length, blocks, least_stop // OTHER_BLOCK)
    first_full = tl.maximum(tl.minimum(first_full, last), first)
    return first, first_full, tl.maximum(tl.minimum(last_full, last), first_full), last


@triton.jit
def survey_form(values, exists, row, tile_row, length, starts, stops, ranges, broken):
    """Stores the settled pieces of rows, and the range numbers of their block; a row of more pieces breaks the form."""
    run_starts, run_stops = sort_runs(values, length)
    for i in tl.static_range(PIECES):
        start, stop, _ = piece_of(run_starts, run_stops, i)
        tl.store(starts + row * PIECES + i, start, mask=exists)
        tl.store(stops + row * PIECES + i, stop, mask=exists)
        if RANGES:
            first, first_full, last_full, last = range_numbers(start, stop, exists, length)
            tl.store(ranges + tile_row * 4, first)
            tl.store(ranges + tile_row * 4 + 1, first_full)
            tl.store(ranges + tile_row * 4 + 2, last_full)
            tl.store(ranges + tile_row * 4 + 3, last)
    if RUNS > PIECES:
        _, _, more = piece_of(run_starts, run_stops, PIECES)
        tl.store(broken, 1, mask=tl.max((exists & more).to(tl.int32), 0) > 0)


@triton.jit
def survey_hull(values, exists, hull, length, FIRST: tl.constexpr):
    """Stores the blocks of the other axis outside of which a condition keeps nothing; its runs begin at number FIRST of the values."""
    least = tl.full([PADDED_OWNER], MAX_INDEX, tl.int32)
    most = tl.zeros([PADDED_OWNER], tl.int32)
    for i in tl.static_range(HULL_RUNS):
        start, stop = clip(values[FIRST + 2 * i], length), clip(values[FIRST + 2 * i + 1], length)
        real = exists & (start < stop)
        least = tl.where(real, tl.minimum(least, start), least)
        most = tl.where(real, tl.maximum(most, stop), most)
    last = tl.cdiv(tl.max(most, 0), OTHER_BLOCK)
    tl.store(hull, tl.minimum(tl.min(least, 0) // OTHER_BLOCK, last))
    tl.store(hull + 1, last)


@triton.jit
def extremes(x, exists):
    """The least and the greatest value of a block, as int64 or float32; NaN twice where there is a NaN."""
    if x.dtype.is_floating():
        known = exists & (x <= float("inf"))
        lost = tl.max((exists & (known == 0)).to(tl.int32), 0) > 0
        least = tl.where(lost, float("nan"), tl.min(tl.where(known, x, float("inf")), 0))
        greatest = tl.where(lost, float("nan"), tl.max(tl.where(known, x, float("-inf")), 0))
    else:
        wide = x.to(tl.int64)
        least = tl.min(tl.where(exists, wide, GREATEST), 0)
        greatest = tl.max(tl.where(exists, wide, LEAST), 0)
    return least, greatest


@triton.jit
def survey_term(x, exists, b, h, block, summaries, strides, TERM: tl.constexpr):
    """Stores the extremes of one term in a block."""
    least, greatest = extremes(x, exists)
    at = b * number(strides[2 * TERM]) + h * number(strides[2 * TERM + 1]) + block
    tl.store(summaries[2 * TERM] + at, least)
    tl.store(summaries[2 * TERM + 1] + at, greatest)


@triton.jit
def check_ascending(broken, table, strides, sizes, FLAG: tl.constexpr, FORM: tl.constexpr, RANK: tl.constexpr, TYPE: tl.constexpr):
    """Looks through this program's share of a table; where an entry is less than the one before it along the last axis, broken[FLAG]
    becomes 1, and broken[0] where the FORM needs the table."""
    pairs = number(sizes[RANK - 1]) - 1
    chunks = tl.cdiv(pairs, CHUNK)
    rows = 1
    for axis in tl.static_range(RANK - 1):
        rows *= number(sizes[axis])
    falls = tl.zeros([CHUNK], tl.int32)
    for turn in range(tl.program_id(0), chunks * rows, tl.num_programs(0)):
        start = table
        row = turn // chunks
        for axis in tl.static_range(RANK - 1):
            size = number(sizes[RANK - 2 - axis])
            start += (row % size).to(tl.int64) * strides[RANK - 2 - axis]
            row = row // size
        at = turn % chunks * CHUNK + tl.arange(0, CHUNK)
        within = at < pairs
        entry = tl.load(start + at.to(tl.int64) * strides[RANK - 1], mask=within, other=0).to(TYPE)
        following = tl.load(start + (at + 1).to(tl.int64) * strides[RANK - 1], mask=within, other=0).to(TYPE)
        # written so that a NaN counts as a fall
        falls = falls | (within & ((following >= entry) == 0)).to(tl.int32)
    fell = tl.max(falls, 0) > 0
    tl.store(broken + FLAG, 1, mask=fell)
    if FORM:
        tl.store(broken, 1, mask=fell)


@triton.jit
def survey_owner(
    tables, numbers, b, h, lead, leads, block, q_len, kv_len, starts, stops, ranges, hulls, summaries, strides, broken
):  # fmt: skip
    """All of one block of the owner axis."""
    owner_len, other_len = (kv_len, q_len) if COLUMNS else (q_len, kv_len)
    blocks = tl.cdiv(owner_len, OWNER_BLOCK)
    place = tl.arange(0, PADDED_OWNER)
    index = block * OWNER_BLOCK + place
    exists = (place < OWNER_BLOCK) & (index < owner_len)
    values = owner_values(tables, numbers, b, h, index, q_len, kv_len)
    tile_row = lead.to(tl.int64) * blocks + block
    if RUNS > 0:
        row = lead.to(tl.int64) * owner_len + index
        survey_form(values, exists, row, tile_row, other_len, starts, stops, ranges, broken)
    for i in tl.static_range(HULLS):
        hull = hulls + (tile_row + leads.to(tl.int64) * blocks * i) * 2
        survey_hull(values, exists, hull, other_len, 2 * RUNS + 2 * HULL_RUNS * i)
    for i in tl.static_range(OWNER_TERMS):
        x = values[2 * RUNS + 2 * HULL_RUNS * HULLS + i]
        survey_term(x, exists, b, h, block, summaries, strides, FIRST_OWNER_TERM + i)


@triton.jit
def survey_other(tables, numbers, b, h, block, q_len, kv_len, summaries, strides):
    """The terms of one block of the other axis."""
    place = tl.arange(0, PADDED_OTHER)
    index = block * OTHER_BLOCK + place
    exists = (place < OTHER_BLOCK) & (index < (q_len if COLUMNS else kv_len))
    values = other_values(tables, numbers, b, h, index, q_len, kv_len)
    for i in tl.static_range(OTHER_TERMS):
        survey_term(values[i], exists, b, h, block, summaries, strides, FIRST_OTHER_TERM + i)


# lengths and counts are not specialised on: another length must not compile another kernel
@triton.jit(do_not_specialize=["q_len", "kv_len", "heads", "leads"])
def survey_block(tables, numbers, q_len, kv_len, heads, leads, starts, stops, ranges, hulls, summaries, strides, broken):
    """One block of the owner axis for one (b, h); programs beyond those do the blocks of the other axis."""
    program = tl.program_id(0)
    blocks = tl.cdiv(kv_len if COLUMNS else q_len, OWNER_BLOCK)
    others = tl.cdiv(q_len if COLUMNS else kv_len, OTHER_BLOCK)
    if program < leads * blocks:
        lead = program // blocks
        survey_owner(
            tables, numbers, lead // heads, lead % heads, lead, leads, program % blocks, q_len, kv_len, starts, stops, ranges, hulls,
            summaries, strides, broken,
        )  # fmt: skip
    elif OTHER_TERMS > 0:
        program -= leads * blocks
        if program < leads * others:
            lead = program // others
            survey_other(tables, numbers, lead // heads, lead % heads, program % others, q_len, kv_len, summaries, strides)
    check_tables(broken, tables, numbers)


def survey(captures, q_len, kv_len, batch, heads, starts=None, stops=None, ranges=None, hulls=None, summaries=(), broken=None):
    """Fills the given contiguous tensors in one launch. n: blocks of the owner axis, which has N places.

    `captures` come from the launcher's `pack`; `batch` and `heads` are 1 where the mask does not depend on them.
    starts, stops  int32 [batch, heads, N, PIECES]: what a place keeps of the other axis: pieces in order, disjoint, (0, 0) last
    ranges         int32 [batch, heads, n, 4]: first, first full, last full, last block of the other axis
    hulls          int32 [HULLS, batch, heads, n, 2]: blocks outside of which a condition keeps nothing
    summaries      least and greatest value of each term, int64 or float32 [batch | 1, heads | 1, blocks of its axis]
    broken         int32 zeros [1 + captured tensors]: 1 in [1 + t] where table t does not ascend, in [0] where the form does not hold
    """
    if max(q_len, kv_len, batch, heads) > MAX_INDEX.value:
        raise ValueError(f"sizes beyond {MAX_INDEX.value} are not supported; got {batch} x {heads} x {q_len} x {kv_len}")
    owner_len, other_len = (kv_len, q_len) if COLUMNS.value else (q_len, kv_len)
    blocks = triton.cdiv(owner_len, OWNER_BLOCK.value)
    if OTHER_TERMS.value:
        blocks += triton.cdiv(other_len, OTHER_BLOCK.value)
    strides = ()
    for table in summaries[::2]:
        strides += (table.stride(0) if table.shape[0] > 1 else 0, table.stride(1) if table.shape[1] > 1 else 0)
    survey_block[(max(1, batch * heads * blocks),)](
        *captures, q_len, kv_len, heads, batch * heads, starts, stops, ranges, hulls, tuple(summaries),
        tuple(16 * x + 2 for x in strides), broken, num_warps=NUM_WARPS.value, enable_fp_fusion=True,
    )  # fmt: skip
