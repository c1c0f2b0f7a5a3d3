"""Which pairs dropout drops: a hash of seed, batch entry, head, query and key, the same here and in the kernels whatever the tiles.

Hashing is C. Wellons's lowbias32 (public domain), a bijection of 32 bits. Two keys are derived for each row, so that a pair costs one
hash of its key index; the second key enters in its middle, as one alone would give all rows the same bits in another order.
"""

from __future__ import annotations

import torch

Keys = tuple[torch.Tensor, torch.Tensor]


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


FIRST, SECOND = 0x7FEB352D, _signed(0x846CA68B)
STARTS = _signed(0x9E3779B9), _signed(0x85EBCA6B)


def _fold(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x ^= x >> bits, unsigned, in place. (torch has few operations on unsigned numbers; int32 products wrap around as theirs do.)"""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << 32 - bits) - 1))


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = _fold(x.clone(), 16).mul_(FIRST)
    return _fold(_fold(x, 15).mul_(SECOND), 16)


def row_keys(seed: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor) -> Keys:
    """Two int32 numbers for each row, of the shape that b, h (the query head) and q_idx broadcast to. `seed` is int64 [1]."""
    low, high = seed.int(), (seed >> 32).int()
    found = []
    for start in STARTS:
        key = _mix(low ^ start)
        for part in (high, b, h, q_idx):
            key = _mix(key ^ part.int())
        found.append(key)
    return found[0], found[1]


def dropped(keys: Keys, kv_idx: torch.Tensor, threshold: int) -> torch.Tensor:
    """Whether pairs are dropped, bool: keys from `row_keys` of rows [.., 1] with kv_idx [KV] give [.., KV]. A share of threshold / 2**24
    of all pairs is.

    >>> import torch
    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> rows = row_keys(torch.tensor([5]), zero, zero, torch.arange(1000)[:, None])
    >>> round(dropped(rows, torch.arange(1000), 1 << 22).double().mean().item(), 3)
    0.25
    """
    x = _fold(kv_idx.int() ^ keys[0], 16).mul_(FIRST)
    x = _fold(x, 15).bitwise_xor_(keys[1]).mul_(SECOND)
    return (_fold(x, 16) >> 8).bitwise_and_(0xFFFFFF) < threshold
