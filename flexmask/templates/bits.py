"""The bits kernel: which places the PARTIAL tiles of a list map keep, each different tile once.

A tile's bits are int32 words by the lines of the map: of one by rows [BLOCK_Q, WORDS], bit (key % 32) of word key // 32 of a query; of one
by columns [BLOCK_KV, WORDS], bit (query % 32) of word query // 32 of a key. Programs share the listed tiles out evenly. Each thread
evaluates whole words, a bit at a time. A tile's words are then looked up in a hash table by all programs at once: the first to bring them
adds a pattern, the others compare all words with it, so that equal hashes of different tiles do no harm. The sizes and the functions
under "mods" are replaced by `assemble_bits`.
"""

import triton
import triton.language as tl

# ---- sizes
# "row": a line of the map is a block of queries over blocks of keys; "column": the other way about
AXIS = tl.constexpr("row")
BLOCK_Q = tl.constexpr(128)
BLOCK_KV = tl.constexpr(128)
# words of a query (by columns: of a key), words of a tile, and the power of two that holds those
WORDS = tl.constexpr(4)
SIZE = tl.constexpr(512)
PADDED = tl.constexpr(512)
NUM_WARPS = tl.constexpr(8)
# without a limit ptxas spills some for the sake of more programs
MOST_REGISTERS = tl.constexpr(128)


# ---- mods
@triton.jit
def mask_row(tables, numbers, b, h, q_idx):
    """What the mask needs of a query row."""
    return ()


@triton.jit
def mask_mod(tables, numbers, row, b, h, q_idx, kv_idx):
    """Whether a query keeps a key."""
    return q_idx >= kv_idx


# ---- functions
# programs at most: a few times what a great GPU holds at a time
MOST_PROGRAMS = 2048
# lines whose tiles are counted together
LINES = tl.constexpr(512)
# bits of a word evaluated together, so that their loads overlap
TOGETHER = tl.constexpr(2)
# places of the hash table that are looked at for one tile
PROBES = tl.constexpr(512)


@triton.jit
def words_of_rows(tables, numbers, b, h, queries, keys):
    """Words of 32 keys each, of which the first are given, for queries."""
    row = mask_row(tables, numbers, b, h, queries)
    words = tl.zeros([PADDED], tl.int32)
    for first in range(0, 32, TOGETHER):
        for part in tl.static_range(TOGETHER):
            keep = mask_mod(tables, numbers, row, b, h, queries, keys + (first + part))
            words = words | (tl.where(keep, 1, 0) << (first + part))
    return words


@triton.jit
def words_of_columns(tables, numbers, b, h, queries, keys):
    """Words of 32 queries each, of which the first are given, for keys."""
    words = tl.zeros([PADDED], tl.int32)
    for first in range(0, 32, TOGETHER):
        for part in tl.static_range(TOGETHER):
            query = queries + (first + part)
            keep = mask_mod(tables, numbers, mask_row(tables, numbers, b, h, query), b, h, query, keys)
            words = words | (tl.where(keep, 1, 0) << (first + part))
    return words


@triton.jit
def words_of_tile(tables, numbers, b, h, q_block, kv_block, q_len, kv_len):
    """The words of a tile, int32 [PADDED]; places beyond the tile and the lengths are 0."""
    place = tl.arange(0, PADDED)
    line, word = place // WORDS, place % WORDS
    if AXIS == "row":
        queries = q_block * BLOCK_Q + line
        words = words_of_rows(tables, numbers, b, h, queries, kv_block * BLOCK_KV + word * 32)
        exist = tl.minimum(BLOCK_KV, kv_len - kv_block * BLOCK_KV) - word * 32
        inside = (place < SIZE) & (queries < q_len)
    else:
        keys = kv_block * BLOCK_KV + line
        words = words_of_columns(tables, numbers, b, h, q_block * BLOCK_Q + word * 32, keys)
        exist = tl.minimum(BLOCK_Q, q_len - q_block * BLOCK_Q) - word * 32
        inside = (place < SIZE) & (keys < kv_len)
    # the first `exist` bits of each word
    existing = tl.where(exist < 32, (1 << tl.minimum(tl.maximum(exist, 0), 31)) - 1, -1)
    return tl.where(inside, words & existing, 0)


@triton.jit
def hash_of(words):
    """A number from 1 to 2147483647 that depends on every word and its place."""
    mixed = words.to(tl.uint32, bitcast=True) ^ (tl.arange(0, PADDED).to(tl.uint32) * 73244475)
    mixed = (mixed ^ (mixed >> 16)) * 73244475
    mixed = (mixed ^ (mixed >> 15)) * 739982445
    mixed = mixed ^ (mixed >> 16)
    return tl.maximum(tl.xor_sum(mixed.to(tl.int32, bitcast=True), 0) & 2147483647, 1)


@triton.jit
def pattern_at(words, number):
    """The words of a pattern, as pointers."""
    return words + tl.cast(number, tl.int64) * SIZE + tl.arange(0, PADDED)


@triton.jit
def add_pattern(words, slots, at, entry, mine, pool):
    """A new pattern's number, in the entry at `at` too once its words can be read; `pool` where there is no room for another."""
    number = tl.minimum(tl.atomic_add(slots, tl.full([], 1, tl.int64), sem="relaxed"), pool).to(tl.int32)
    if number < pool:
        tl.store(pattern_at(words, number), mine, mask=tl.arange(0, PADDED) < SIZE)
        tl.debug_barrier()
    tl.atomic_xchg(at, entry + (number + 1), sem="release")
    return number


@triton.jit
def compared(words, at, entry, mine, pool):
    """The number of the pattern of `entry` if it is `mine`, -1 if it is another; `pool` where it found no room.

    Waits for the program that adds it, if need be: that one waits for nobody.
    """
    while entry.to(tl.int32) == 0:
        entry = tl.atomic_add(at, tl.full([], 0, tl.int64), sem="acquire")
    number = entry.to(tl.int32) - 1
    if number < pool:
        # not from the first-level cache, which other multiprocessors do not write to
        theirs = tl.load(pattern_at(words, number), mask=tl.arange(0, PADDED) < SIZE, other=0, cache_modifier=".cg")
        number = tl.where(tl.max((theirs != mine).to(tl.int32), 0) == 0, number, -1)
    return number


@triton.jit
def pattern_of(words, slots, mine, pool, room):
    """The number of the pattern with the words `mine`, which is added if it is new; outside of [0, pool) where there is no room for it.

    slots[0] counts the patterns; the `room` entries behind it are 0, or a pattern's hash in the high half and its number + 1 in the low
    one, 0 there as long as its words are not written.
    """
    hashed = hash_of(mine)
    slot, probes = hashed & (room - 1), tl.full([], 0, tl.int32)
    number = tl.full([], -1, tl.int32)
    while (number < 0) & (probes < PROBES):
        at = slots + 1 + slot
        fresh = hashed.to(tl.int64) << 32
        entry = tl.atomic_cas(at, tl.full([], 0, tl.int64), fresh)
        if entry == 0:
            number = add_pattern(words, slots, at, fresh, mine, pool)
        else:
            if (entry >> 32) == hashed:
                number = compared(words, at, entry, mine, pool)
        slot = (slot + 1) & (room - 1)
        probes += 1
    return number


@triton.jit
def partial_tiles(counts, first, lines):
    """How many PARTIAL tiles each of LINES lines lists."""
    line = first + tl.arange(0, LINES)
    return tl.load(counts + line * 2 + 1, mask=line < lines, other=0)


@triton.jit
def count_tiles(counts, offsets, broken, lines, iota):
    """How many PARTIAL tiles there are to do. A line whose tiles stand among the numbers that all lines share breaks the map."""
    total, shared = 0, 0
    # an atomic, as other programs may be setting the flag: all threads of this one must see the same
    if tl.atomic_add(broken, 0, sem="relaxed") == 0:
        for first in range(0, lines, LINES):
            partial = partial_tiles(counts, first, lines)
            offset = tl.load(offsets + (first + tl.arange(0, LINES)) * 2 + 1, mask=partial > 0, other=0)
            total += tl.sum(partial, 0)
            shared += tl.sum(((partial > 0) & (offset >= iota)).to(tl.int32), 0)
        if shared > 0:
            tl.store(broken, 1)
            total = 0
    return total


@triton.jit
def do_tile(patterns, at, tables, numbers, index, words, slots, broken, line, q_len, kv_len, heads, blocks, pool, room):
    """The pattern of the PARTIAL tile of a line that is listed at `at`; whether there was room for it."""
    owner, lead = line % blocks, line // blocks
    other = tl.load(index + at)
    q_block, kv_block = other, owner
    if AXIS == "row":
        q_block, kv_block = owner, other
    mine = words_of_tile(tables, numbers, lead // heads, lead % heads, q_block, kv_block, q_len, kv_len)
    number = pattern_of(words, slots, mine, pool, room)
    fits = (number >= 0) & (number < pool)
    tl.store(patterns + at, number, mask=fits)
    tl.store(broken, 1, mask=fits == 0)
    return fits.to(tl.int32)


# no length is specialised on: another one must not compile another kernel
@triton.jit(do_not_specialize=["q_len", "kv_len", "lines", "heads", "blocks", "iota", "pool", "room"])
def make_bits(
    patterns, tables, numbers, counts, offsets, index, words, slots, broken, q_len, kv_len, lines, heads, blocks, iota, pool, room
):  # fmt: skip
    """Patterns of all PARTIAL tiles, as many for each program: one takes those from `begin` to `end`, counted along the lines."""
    total = count_tiles(counts, offsets, broken, lines, iota)
    program, each, rest = tl.program_id(0), total // tl.num_programs(0), total % tl.num_programs(0)
    begin = program * each + tl.minimum(program, rest)
    end = begin + each + (program < rest).to(tl.int32)
    before, fits = 0, 1
    for first in range(0, tl.where(begin < end, lines, 0), LINES):
        partial = partial_tiles(counts, first, lines)
        upto = before + tl.cumsum(partial, 0)
        after = before + tl.sum(partial, 0)
        for tile in range(tl.maximum(begin, before), tl.minimum(end, after)):
            if fits != 0:
                line = first + tl.sum((upto <= tile).to(tl.int32), 0)
                past = tl.max(tl.where(upto <= tile, upto, before), 0)
                at = tl.load(offsets + line * 2 + 1) + (tile - past)
                fits = do_tile(patterns, at, tables, numbers, index, words, slots, broken, line, q_len, kv_len, heads, blocks, pool, room)
        before = after


def bits(counts, offsets, index, patterns, words, slots, broken, captures, q_len, kv_len, iota):
    """Fill `patterns` (int32, as long as `index`) where `index` lists PARTIAL tiles: numbers of their bits in `words`.

    counts, offsets: int32 [batch, heads, lines, 2] and index: int32, finished lists; the lines' own entries end at index[iota]. words:
    int32 [pool, BLOCK_Q, WORDS] (by columns [pool, BLOCK_KV, WORDS]), for up to `pool` different tiles. slots: int64 [1 + a power of two],
    zeroed by the caller; then slots[0] is the number of different tiles. broken: int32 [1 or more], zeroed by the caller; broken[0]
    becomes 1, and nothing else may be used, where there are more different tiles than have room, or a line lists its tiles from
    index[iota] on. Where it is 1 already nothing is done. All are contiguous; captures come from `pack`. One launch, nothing is waited
    for. Raises ValueError for other sizes of `words` and `slots`.
    """
    pool, room = words.shape[0], slots.shape[0] - 1
    line = SIZE.value // WORDS.value
    if words.shape[1:] != (line, WORDS.value):
        raise ValueError(f"words must be [pool, {line}, {WORDS.value}]; got {list(words.shape)}")
    if room < 1 or room & (room - 1):
        raise ValueError(f"slots must hold 1 + a power of two; got {room + 1}")
    batch, heads, blocks, _ = counts.shape
    lines = batch * heads * blocks
    columns = triton.cdiv(kv_len, BLOCK_KV.value) if AXIS.value == "row" else triton.cdiv(q_len, BLOCK_Q.value)
    if lines and columns:
        make_bits[(min(lines * columns, MOST_PROGRAMS),)](
            patterns, *captures, counts, offsets, index, words, slots, broken,
            q_len, kv_len, lines, heads, blocks, iota, pool, room,
            num_warps=NUM_WARPS.value, enable_fp_fusion=True, maxnreg=MOST_REGISTERS.value,
        )  # fmt: skip
