"""How many lines of a map have gone before, of those that keep a block: where programs that hold a line each must add to what belongs to
the block one after the other.

For each block the table has a bit for each line, 32 to a word, set where the line keeps the block; and beside each word how many bits those
before it have. So a line's rank at a block is that number and some bits of one word, and the table takes two bits for each tile. The lines
of a map in range form go from the first to the last, those in list form from the last to the first: their places in the table.
Nothing here depends on the mask, so this module is imported as it stands. No kernel waits for the host.
"""

import triton
import triton.language as tl

# blocks that are looked at together
MARK_CHUNK = tl.constexpr(512)
COUNT_CHUNK = tl.constexpr(128)


@triton.jit
def mark_listed(own, index, entries, first, count, blocks, words, bit):
    """Sets a bit in the words of the blocks that index[first : first + count] names. Of a list that was never made nothing is believed."""
    for begin in range(0, tl.minimum(count, blocks), MARK_CHUNK):
        place = begin + tl.arange(0, MARK_CHUNK)
        at = first.to(tl.int64) + place
        block = tl.load(index + at, mask=(place < count) & (at >= 0) & (at < entries), other=-1)
        tl.atomic_or(own + block * words * 2, bit, mask=(block >= 0) & (block < blocks), sem="relaxed")


@triton.jit
def mark_run(own, first, last, blocks, words, bit):
    """The same for blocks [first, last)."""
    for begin in range(tl.maximum(first, 0), tl.minimum(last, blocks), MARK_CHUNK):
        block = begin + tl.arange(0, MARK_CHUNK)
        tl.atomic_or(own + block * words * 2, bit, mask=block < tl.minimum(last, blocks), sem="relaxed")


@triton.jit(do_not_specialize=["entries", "lines", "blocks", "words"])
def mark_kernel(table, offsets, index, ranks, entries, lines, blocks, words, RANGES: tl.constexpr):
    """One program for each line."""
    line = tl.program_id(0)
    lead, place = line // lines, line % lines
    if not RANGES:
        place = lines - 1 - place
    own = ranks + (lead.to(tl.int64) * blocks * words + place // 32) * 2
    bit = tl.full([], 1, tl.int32) << (place % 32)
    if RANGES:
        mark_run(own, tl.load(table + line * 4), tl.load(table + line * 4 + 3), blocks, words, bit)
    else:
        for group in tl.static_range(2):
            count = tl.load(table + line * 2 + group)
            mark_listed(own, index, entries, tl.load(offsets + line * 2 + group), count, blocks, words, bit)


@triton.jit
def count_bits(x):
    """How many bits of int32 are set."""
    x = x.to(tl.int64) & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101 & 0xFFFFFFFF) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["blocks", "words"])
def count_kernel(ranks, blocks, words):
    """One program for some blocks of all leading axes together."""
    block = tl.program_id(0) * COUNT_CHUNK + tl.arange(0, COUNT_CHUNK)
    at, exists = ranks + block.to(tl.int64) * words * 2, block < blocks
    found = tl.zeros([COUNT_CHUNK], tl.int32)
    for word in range(words):
        tl.store(at + word * 2 + 1, found, mask=exists)
        found += count_bits(tl.load(at + word * 2, mask=exists, other=0))


def rank_lines(table, offsets, index, ranks):
    """Fills `ranks`, contiguous int32 zeros [batch, heads, blocks, ceil(lines / 32), 2].

    `table` is contiguous int32: the ranges [batch, heads, lines, 4], or else the counts [batch, heads, lines, 2], with `offsets` of the
    same shape and `index` int32.
    """
    leads, lines = table.shape[0] * table.shape[1], table.shape[2]
    blocks, words = ranks.shape[2:4]
    if leads * lines * blocks:
        entries = 0 if index is None else index.numel()
        mark_kernel[(leads * lines,)](
            table, offsets, index, ranks, entries, lines, blocks, words, RANGES=table.shape[3] == 4, num_warps=4
        )  # fmt: skip
        count_kernel[(triton.cdiv(leads * blocks, COUNT_CHUNK.value),)](ranks, leads * blocks, words, num_warps=4)
