"""Device functions that say which pairs dropout drops: the hash of seed, batch entry, head, query and key that `runtime.dropout` computes
by torch, bit for bit. `assemble` and `assemble_backward` copy them into every file, as a launch decides whether it drops.

Numbers are uint32. Tiles hand in rows of either shape: queries down and keys across, or the other way round.
"""

import triton
import triton.language as tl

# ---- functions


@triton.jit
def mix(x):
    """A bijection in which every bit of the result depends on every bit of x: C. Wellons's lowbias32 (public domain)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def head_keys(seed, b, h):
    """Two numbers for each head from the seed, a pointer to int64."""
    whole = tl.load(seed)
    low, high = whole.to(tl.uint32), (whole >> 32).to(tl.uint32)
    first = mix(mix(mix(mix(low ^ 0x9E3779B9) ^ high) ^ b.to(tl.uint32)) ^ h.to(tl.uint32))
    second = mix(mix(mix(mix(low ^ 0x85EBCA6B) ^ high) ^ b.to(tl.uint32)) ^ h.to(tl.uint32))
    return first, second


@triton.jit
def row_keys(keys, q_idx):
    """Two numbers for each row, of q_idx's shape, from those of the head."""
    return mix(keys[0] ^ q_idx.to(tl.uint32)), mix(keys[1] ^ q_idx.to(tl.uint32))


@triton.jit
def survives(keys, kv_idx, threshold):
    """Whether pairs are not dropped: keys from `row_keys`, and kv_idx, which broadcast to a tile. `threshold` of 2**24 are dropped."""
    x = keys[0] ^ kv_idx.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ keys[1]) * 0x846CA68B
    x = (x ^ (x >> 16)) >> 8
    return x.to(tl.int32) >= threshold
