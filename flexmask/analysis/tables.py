"""Ranges of the values of a captured table over boxes: small reductions on the table's device, without reading anything back."""

from __future__ import annotations

import torch

from .spans import LARGEST_DOUBLE, Span, floats, integers


def reduced(table: torch.Tensor, axis: int, lo: torch.Tensor, hi: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of `table` along `axis` over each window [lo, hi], which replace that axis.

    `lo` and `hi` are int64 of shape [n] with hi - lo < `side`. Two overlapping power-of-two windows cover each [lo, hi], so any
    windows cost O(table * log side).
    """
    table = table.movedim(axis, -1)
    if table.dtype == torch.bool:
        table = table.to(torch.uint8)
    found = []
    for pick in (torch.minimum, torch.maximum):
        windows, best = table, table.index_select(-1, lo)
        for power in range(1, min(side, table.shape[-1]).bit_length()):
            width = 2**power
            windows = pick(windows[..., : -width // 2], windows[..., width // 2 :])  # the extremes of `width` entries from each on
            last = windows.shape[-1] - 1
            ends = (windows.index_select(-1, lo.clamp(0, last)), windows.index_select(-1, (hi - width + 1).clamp(0, last)))
            best = torch.where(hi - lo + 1 >= width, pick(*ends), best)
        found.append(best.movedim(-1, axis))
    return found[0], found[1]


def whole(table: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum over `dims`, kept with size 1."""
    table = table.to(torch.uint8) if table.dtype == torch.bool else table
    return table.amin(dims, keepdim=True), table.amax(dims, keepdim=True)


def span_of(lo: torch.Tensor, hi: torch.Tensor) -> Span:
    """Table values as a Span. A NaN or infinity anywhere, which min and max hand on, makes it unbounded."""
    if not lo.dtype.is_floating_point:
        return integers(lo.double(), hi.double())
    return floats(lo.double(), hi.double(), 0.0, 0.0, LARGEST_DOUBLE)
