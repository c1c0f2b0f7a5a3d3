"""What kernels add the gradients of captured tables to: floats, or integers whose sums are the same in any order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

# the bits of float32 infinity; those of NaN are above
INFINITE = 0x7F800000
# entries turned into floats at once, as that takes some times their memory
ENTRIES = 1 << 24


@dataclass(frozen=True)
class FloatBuffers:
    """Sums in float32, by the numbers of the tables. Their last bits depend on the order in which programs add."""

    sums: dict[int, torch.Tensor]

    @classmethod
    def zeros(cls, tables: Mapping[int, torch.Tensor], device: torch.device) -> FloatBuffers:
        return cls({n: torch.zeros(table.shape, dtype=torch.float32, device=device) for n, table in tables.items()})

    @property
    def grads(self) -> tuple[torch.Tensor, ...]:
        """As kernels with `scatter` "float" take them."""
        return tuple(self.sums.values())

    def result(self, wanted: Collection[int]) -> dict[int, torch.Tensor]:
        """The gradients of the tables that are `wanted`, float32 in their shapes."""
        return {n: sums for n, sums in self.sums.items() if n in wanted}


@dataclass(frozen=True)
class FixedBuffers:
    """Sums as int64 in units of each entry's own: 2**e / limit, where 2**e is the least power of two above the peak, the greatest magnitude
    that the entry receives. Two launches fill them: the first finds the peaks, the second adds.

    A limit is 2**62 over the number of additions to one entry, so that no sum overflows; up to 2**37 additions the units are below 2**-25
    of the peak, where a float32 sum that has reached the peak would no longer notice them.
    """

    sums: dict[int, torch.Tensor]
    peaks: dict[int, torch.Tensor]
    limits: tuple[float, ...]

    @classmethod
    def zeros(cls, tables: Mapping[int, torch.Tensor], device: torch.device, most: Mapping[int, int]) -> FixedBuffers:
        """`most` is how many numbers are added at most to an entry of each table.

        >>> buffers = FixedBuffers.zeros({3: torch.empty(2)}, torch.device("cpu"), {3: 1000})
        >>> buffers.limits == (2.0**52,)
        True
        """
        sums, peaks = (
            {n: torch.zeros(table.shape, dtype=dtype, device=device) for n, table in tables.items()} for dtype in (torch.int64, torch.int32)
        )
        return cls(sums, peaks, tuple(2.0 ** (62 - (max(most[n], 1) - 1).bit_length()) for n in tables))

    @property
    def grads(self) -> tuple[torch.Tensor | float, ...]:
        """As kernels with `scatter` "peak" and "fixed" take them."""
        return (*self.sums.values(), *self.peaks.values(), *self.limits)

    def result(self, wanted: Collection[int]) -> dict[int, torch.Tensor]:
        """The gradients of the tables that are `wanted`, float32 in their shapes; NaN for entries that received an infinity or NaN."""
        limits = dict(zip(self.sums, self.limits, strict=True))
        return {n: _floats(sums, self.peaks[n], limits[n]) for n, sums in self.sums.items() if n in wanted}


def _floats(sums: torch.Tensor, peaks: torch.Tensor, limit: float) -> torch.Tensor:
    found = torch.empty(sums.shape, dtype=torch.float32, device=sums.device)
    flat = (found.view(-1), sums.view(-1), peaks.view(-1))
    for first in range(0, sums.numel(), ENTRIES):
        into, total, peak = (x[first : first + ENTRIES] for x in flat)
        exponent = (peak >> 23).clamp_(min=1).long() - 126
        unit = (exponent + 1023 << 52).view(torch.float64).div_(limit)  # 2**exponent, written as the bits of a float64
        into.copy_(unit.mul_(total)).masked_fill_(peak >= INFINITE, torch.nan)
    return found
