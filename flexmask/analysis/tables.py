"""Ranges of the values of a captured table over boxes: small reductions on the table's device, without reading anything back."""

from __future__ import annotations

import torch

from .spans import LARGEST_DOUBLE, Span, floats, integers


def reduced(
    table: torch.Tensor, axis: int, lo: torch.Tensor, hi: torch.Tensor, side: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of `table` along `axis` over each window [lo, hi], which replace that axis.

    `lo` and `hi` are int64 of shape [n] with hi - lo < `side`; positions from `length` on do not count. Two overlapping
    power-of-two windows cover each [lo, hi], so any windows cost O(table * log side) once.
    """
    table = table.movedim(axis, -1)[..., :length]
    if table.dtype == torch.bool:
        table = table.to(torch.uint8)
    power = min(side, table.shape[-1]).bit_length() - 1
    width = 2**power
    # a window that starts in the last, shorter box sees the last entry again instead of its neighbours
    table = torch.cat((table, table[..., -1:].expand(*table.shape[:-1], width - 1)), -1)
    found = []
    for pick in (torch.minimum, torch.maximum):
        windows = table
        for step in range(power):
            windows = pick(windows[..., : -(2**step)], windows[..., 2**step :])
        last = windows.shape[-1] - 1
        first = windows.index_select(-1, lo.clamp(0, last))
        second = windows.index_select(-1, torch.maximum(hi - width + 1, lo).clamp(0, last))
        found.append(pick(first, second).movedim(-1, axis))
    return found[0], found[1]


def whole(table: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum over `dims`, kept with size 1."""
    table = table.to(torch.uint8) if table.dtype == torch.bool else table
    return table.amin(dims, keepdim=True), table.amax(dims, keepdim=True)


def span_of(lo: torch.Tensor, hi: torch.Tensor) -> Span:
    """Table values as a Span. A NaN or infinity anywhere, which min and max hand on, makes it unbounded."""
    if not lo.dtype.is_floating_point:
        # float64 rounds what it cannot hold; bounds beyond 2**53 are dropped
        return integers(lo.double(), hi.double())
    return floats(lo.double(), hi.double(), 0.0, 0.0, LARGEST_DOUBLE)
