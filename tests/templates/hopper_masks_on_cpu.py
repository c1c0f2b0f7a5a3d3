"""In torch, what the assembly of Hopper kernels does that masks: `two_halves`, and `kept_or` and `cut_or`, which take all registers."""

from __future__ import annotations

import math
import re

import torch


def packed(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Two numbers as float16 in an int32, which must hold them exactly."""
    halves = torch.stack([low, high], -1)
    assert torch.equal(halves.half().float(), halves), "a number that float16 has not"
    return halves.half().view(torch.int32)[..., 0]


def masked(text: str, pack: int, x: torch.Tensor, where: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
    """`kept_or` and `cut_or`."""
    assert pack * 2 == x.shape[1], "not all registers of a thread at once"
    otherwise = {"0fFF800000": -math.inf, "0f00000000": 0.0}[re.findall(r"0f\w+", text)[0]]
    column = torch.arange(x.shape[1])
    if row is None:
        keep = where >> (column // 8 * 2 + column % 2) & 1
    else:
        middle, half = (where[:, i::2].contiguous().view(torch.float16).reshape(1, -1) for i in range(2))
        keep = (row.contiguous().view(torch.float16).float()[:, :1] - middle.float()).abs() < half.float()
    return torch.where(keep.bool(), x, otherwise)
