"""What one call asks for, and what it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..frontend import Traced
from .checks import Shapes
from .maps import Extent


class Result(NamedTuple):
    """out [B, Hq, Q, Dv] in q's dtype, lse [B, Hq, Q], natural; where asked for, the greatest score of each row, [B, Hq, Q]."""

    out: torch.Tensor
    lse: torch.Tensor
    peaks: torch.Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What one call asks for: the traced mods and the sizes; and whether sizes of its kernels may be measured (see `tuning`)."""

    mask: Traced | None
    score: Traced | None
    shapes: Shapes
    autotune: bool = False

    @property
    def score_tensors(self) -> tuple[torch.Tensor, ...]:
        return () if self.score is None else self.score.tensors

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """All captured tensors, the mask's first."""
        return (() if self.mask is None else self.mask.tensors) + self.score_tensors

    def extent(self, device: torch.device) -> Extent:
        s = self.shapes
        return Extent(s.q_len, s.kv_len, s.batch, s.heads, device)
