"""The sizes and random tables that zoo entries are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import masks as benchmark
from flexmask import masks


@dataclass(frozen=True)
class Case:
    """Sizes, a seeded source of tables, and short names for what most entries need. `n` covers both lengths."""

    B: int
    H: int
    Q: int
    KV: int
    seed: int = 0
    device: str = "cpu"
    generator: torch.Generator = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    @property
    def n(self) -> int:
        return max(self.Q, self.KV)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Whole numbers in [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator).to(dtype).to(self.device)

    def bools(self, *shape: int, p: float = 0.5) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator) < p).to(self.device)

    def reals(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def documents(self, *lead: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Ascending document ids [*lead, n], about 12 tokens each."""
        starts = (torch.rand(*lead, self.n, generator=self.generator) < 1 / 12).long()
        return starts.cumsum(-1).to(dtype).to(self.device)

    def lengths(self) -> torch.Tensor:
        """Document lengths that add up to n, some of them 0."""
        cuts = torch.randint(0, self.n + 1, (4,), generator=self.generator).sort().values
        edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([self.n])])
        return edges.diff().to(self.device)

    def packed(self) -> tuple[benchmark.Document, ...]:
        """The same as the benchmark's documents: every other one is flagged."""
        edges = masks.offsets(self.lengths().cpu()).tolist()
        pairs = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
        return tuple(benchmark.Document(a, a + (b - a) // 3, b, i % 2 == 1) for i, (a, b) in enumerate(pairs))


def entry(table: dict[str, Callable[..., Any]], wrap: Callable[[Any], Any], name: str, make: Callable[[Case], Any]) -> None:
    """Puts make, as a function of (B, H, Q, KV, seed=0, device="cpu"), into `table`."""
    assert name not in table, f"{name} is in the zoo already"
    table[name] = lambda B, H, Q, KV, seed=0, device="cpu": wrap(make(Case(B, H, Q, KV, seed, device)))
