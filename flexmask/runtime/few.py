"""Calls of few queries: heads that share keys share a tile too, and where the GPU has room for more programs than tiles, keys are split."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from .request import Request
from .store import Store

# rows of a tile; in float32 as many as products of these fit the registers at any head dim
MOST_ROWS, MOST_FLOAT32_ROWS = 64, 16
# splitting shorter rows would not pay for adding up the parts
LEAST_KEYS = 1024


class Few(NamedTuple):
    """How many heads share a tile (a power of two), its rows, and whether its keys are split; `rows` is 0 where there are many queries."""

    pack: int = 1
    rows: int = 0
    split: bool = False

    @property
    def why(self) -> str:
        """Why the call keeps to plain Triton; "" where it need not."""
        done = [f"up to {self.pack} heads share a tile"] * (self.pack > 1) + ["rows are split among programs"] * self.split
        return f"of so few queries {' and '.join(done)}, which it does not do" if done else ""


MANY = Few()


@lru_cache(maxsize=64)
def processors_of(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 0 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def few_of(store: Store, request: Request, dtype: torch.dtype, device: torch.device) -> Few:
    """How a call is served if its queries are few: heads share tiles where that at least halves these, and the mask is the same for all
    heads; rows are split where there would be two programs or more for each that there is without."""
    processors, s = processors_of(device), request.shapes
    if not processors or 0 in (s.q_len, s.kv_len, s.batch, s.heads):
        return MANY
    most, group = MOST_FLOAT32_ROWS if dtype == torch.float32 else MOST_ROWS, s.heads // s.kv_heads
    by_head = request.mask is not None and store.facts(request.mask)[1].uses_h
    pack = 1 << (group - 1).bit_length()
    if by_head or pack > most or 2 * -(-s.q_len // (most // pack)) > group * -(-s.q_len // most):
        pack = 1
    rows = min(most, max(16, 1 << (min(s.q_len, most) * pack - 1).bit_length()))
    tiles = -(-s.q_len // (rows // pack)) * s.batch * (s.kv_heads if pack > 1 else s.heads)
    split = 2 * tiles <= processors and s.kv_len >= LEAST_KEYS
    return Few(pack, rows, split) if pack > 1 or split else MANY
