"""The planning kernel: decides by evaluation the tiles of a map that nothing else could decide, one program a tile.

The sizes and the two functions under "mods" are replaced by `assemble_tiles`.
"""

import triton
import triton.language as tl

# ---- sizes
# a tile of the map, and the power of two that holds its keys
BLOCK_Q = tl.constexpr(128)
BLOCK_KV = tl.constexpr(128)
PADDED_KV = tl.constexpr(128)


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
UNKNOWN = tl.constexpr(3)
# queries evaluated at a time: whole tiles would not fit the registers
STRIP = tl.constexpr(16)


@triton.jit(do_not_specialize=["q_len", "kv_len", "heads", "rows", "columns"])
def decide_tile(states, tables, numbers, q_len, kv_len, heads, rows, columns):
    """Replaces state UNKNOWN of int8 [B, H, rows, columns] by 0 (nothing kept), 1 (something) or 2 (all within the lengths)."""
    tile = tl.program_id(0)
    if tl.load(states + tile) == UNKNOWN:
        row_of_tiles = tile // columns
        place = row_of_tiles // rows
        b, h = place // heads, place % heads
        column = tl.arange(0, PADDED_KV)[None, :]
        kv_idx = tile % columns * BLOCK_KV + column
        some = tl.zeros([STRIP, PADDED_KV], tl.int32)
        missing = tl.zeros([STRIP, PADDED_KV], tl.int32)
        for start in range(0, BLOCK_Q, STRIP):
            line = start + tl.arange(0, STRIP)[:, None]
            q_idx = row_of_tiles % rows * BLOCK_Q + line
            within = (line < BLOCK_Q) & (q_idx < q_len) & (column < BLOCK_KV) & (kv_idx < kv_len)
            keep = mask_mod(tables, numbers, mask_row(tables, numbers, b, h, q_idx), b, h, q_idx, kv_idx)
            some = some | (within & keep).to(tl.int32)
            missing = missing | (within & (keep == 0)).to(tl.int32)
        kept = tl.max(tl.max(some, 1), 0)
        lost = tl.max(tl.max(missing, 1), 0)
        tl.store(states + tile, (kept + kept * (1 - lost)).to(tl.int8))


def decide(states, captures, q_len, kv_len):
    """Decide the UNKNOWN tiles of contiguous int8 states [B, H, rows, columns], in place. `captures` come from the launcher's `pack`."""
    if states.numel():
        decide_tile[(states.numel(),)](states, *captures, q_len, kv_len, *states.shape[1:], num_warps=4)
    return states
