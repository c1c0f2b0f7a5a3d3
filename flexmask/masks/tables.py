"""How ready-made masks read a captured tensor whose leading dimensions may be left out.

The choice is made once, when the mask is built, so that the mask itself is one expression.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..mods import Ascending

# a tensor of integers, or one promised to ascend (flexmask.sorted)
Ids = torch.Tensor | Ascending


def per_batch(value: int | torch.Tensor) -> Callable[[Any], Any]:
    """A number, a 0-dimensional tensor, or a tensor [B] -> function of b."""
    if isinstance(value, torch.Tensor) and value.dim() == 1:
        return lambda b: value[b]
    expect(value, 0, "a number, a 0-dimensional tensor or a tensor [B]")
    return lambda b: value


def per_token(table: Ids) -> Callable[[Any, Any], Any]:
    """[N] or [B, N] -> function of (b, position)."""
    if expect(table, (1, 2), "a tensor [N] or [B, N]") == 1:
        return lambda b, i: table[i]
    return lambda b, i: table[b, i]


def per_pair(table: torch.Tensor) -> Callable[[Any, Any, Any, Any], Any]:
    """[Q, KV], [H, Q, KV] or [B, H, Q, KV], with 1 for a B or H that does not matter -> function of (b, h, row, column)."""
    expect(table, (2, 3, 4), "a tensor [Q, KV], [H, Q, KV] or [B, H, Q, KV]")
    whole = table[(None,) * (4 - table.dim())]
    if whole.shape[:2] == (1, 1):
        plane = whole[0, 0]
        return lambda b, h, q, k: plane[q, k]
    if whole.shape[0] == 1:
        by_head = whole[0]
        return lambda b, h, q, k: by_head[h, q, k]
    if whole.shape[1] == 1:
        by_batch = whole[:, 0]
        return lambda b, h, q, k: by_batch[b, q, k]
    return lambda b, h, q, k: table[b, h, q, k]


def expect(value: Any, ranks: int | tuple[int, ...], what: str) -> int:
    """The number of dimensions (0 for a number); ValueError unless it is one of `ranks`."""
    is_table = isinstance(value, (torch.Tensor, Ascending))
    rank = int(value.dim()) if is_table else 0
    if rank not in ((ranks,) if isinstance(ranks, int) else ranks):
        raise ValueError(f"expected {what}; got shape {list(value.shape) if is_table else value!r}.")
    return rank


def positive(**numbers: Any) -> None:
    """ValueError for a number below 1. Tensors pass unread: reading one would wait for the GPU."""
    for name, value in numbers.items():
        if not isinstance(value, torch.Tensor) and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
