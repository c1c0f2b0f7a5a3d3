"""Calls of few queries: heads that share keys share a tile too, and where the GPU has room for more programs than tiles, keys are split."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from .request import Request
from .store import Store

# rows of a tile of plain Triton; before Hopper; and in float32 as many as products of these fit the registers at any head dim
MOST_ROWS, MOST_AMPERE_ROWS, MOST_FLOAT32_ROWS = 128, 64, 16
# rows of a tile of the Hopper kernel, and how many heads may share it
HOPPER_ROWS, HOPPER_PACKS = 128, (2, 4, 8, 16)
# splitting shorter rows would not pay for adding up the parts
LEAST_KEYS = 1024


class Few(NamedTuple):
    """How a kernel serves few queries: how many heads share a tile (a power of two), its rows, and whether its keys are split."""

    pack: int = 1
    rows: int = 0
    split: bool = False

    @property
    def done(self) -> str:
        """What is done for them."""
        parts = [f"up to {self.pack} heads share a tile"] * (self.pack > 1) + ["rows are split among programs"] * self.split
        return " and ".join(parts)


class Served(NamedTuple):
    """How plain Triton and how the Hopper kernel would serve a call; `why` the call keeps to plain Triton, "" where it need not."""

    plain: Few = Few()
    hopper: Few = Few()
    why: str = ""


MANY = Served()


@lru_cache(maxsize=64)
def processors_of(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 0 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def served(store: Store, request: Request, dtype: torch.dtype, arch: int, device: torch.device) -> Served:
    """How a call is served if its queries are few: rows are split where there would be two programs or more for each that there is
    without."""
    processors, s = processors_of(device), request.shapes
    if not processors or 0 in (s.q_len, s.kv_len, s.batch, s.heads):
        return MANY
    by_head = request.mask is not None and store.facts(request.mask)[1].uses_h
    group = 1 if by_head else s.heads // s.kv_heads
    most = MOST_FLOAT32_ROWS if dtype == torch.float32 else MOST_ROWS if 90 <= arch < 120 else MOST_AMPERE_ROWS
    return _served(s.q_len, s.kv_len, s.batch * s.heads, group, most, processors)


@lru_cache(maxsize=4096)
def _served(q_len: int, kv_len: int, heads: int, group: int, most: int, processors: int) -> Served:
    """By sizes: `heads` of all batch entries, of which each `group` may share tiles of at most so many rows. Rows of the Hopper kernel take
    two thirds of the time."""
    pack, rows, tiles = _plain(q_len, heads, group, most)
    shared, hopper_tiles = _hopper(q_len, heads, group)
    split, hopper_split = (2 * n <= processors and kv_len >= LEAST_KEYS for n in (tiles, hopper_tiles))
    plain = Few(pack, rows, split) if pack > 1 or split else Few()
    hopper = Few(shared, HOPPER_ROWS, hopper_split) if shared > 1 or hopper_split else Few()
    smaller = plain != Few() and 3 * tiles * rows < 2 * hopper_tiles * HOPPER_ROWS
    return Served(plain, hopper, f"of so few queries {plain.done}, and its tiles would be half empty" if smaller else "")


def _plain(q_len: int, heads: int, group: int, most: int) -> tuple[int, int, int]:
    """How many heads share a tile, its rows, and how many tiles there are: heads share them where that at least halves these."""
    pack = 1 << (group - 1).bit_length()
    if pack > most or 2 * -(-q_len // (most // pack)) > group * -(-q_len // most):
        pack = 1
    rows = min(most, max(16, 1 << (min(q_len, most) * pack - 1).bit_length()))
    return pack, rows, -(-q_len // (rows // pack)) * heads // (group if pack > 1 else 1)


def _hopper(q_len: int, heads: int, group: int) -> tuple[int, int]:
    """How many heads share a tile, and how many tiles there are: more heads where that saves a quarter of these."""
    best, tiles = 1, -(-q_len // HOPPER_ROWS) * heads
    for pack in HOPPER_PACKS:
        shared = -(-q_len // (HOPPER_ROWS // pack)) * heads // pack
        if group % pack == 0 and 4 * shared <= 3 * tiles:
            best, tiles = pack, shared
    return best, tiles
