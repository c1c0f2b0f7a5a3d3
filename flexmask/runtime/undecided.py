"""Exact tile states of any predicate: tiles that box arithmetic cannot decide are evaluated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..analysis import UNKNOWN
from ..ir import Env, Expr, evaluate
from .grid import EMPTY, FULL, PARTIAL, Grid

# elements evaluated at once: int64 temporaries of this many stay in the cache of a CPU
ELEMENTS_ON_HOST = 1 << 19
ELEMENTS_ON_DEVICE = 1 << 24

# A tile is PARTIAL once a kept and a masked place of it are seen, so a few places are looked at first: (rows, columns) per tile.
SAMPLES = ((8, 8), (8, 1 << 30), (1 << 30, 1 << 30))


def evaluate_unknown(
    states: torch.Tensor, predicate: Expr, grid: Grid, tensors: Sequence[torch.Tensor], scalars: Sequence[int | float]
) -> torch.Tensor:
    """`states` [B, H, nQ, nK] with each UNKNOWN tile decided by evaluating the predicate in it. On CPU tensors; work per such tile."""
    states = states.clone()
    where = (states == UNKNOWN).nonzero()
    for rows, columns in SAMPLES:
        q_offset, k_offset = _spread(rows, grid.block_q), _spread(columns, grid.block_kv)
        last = len(q_offset) == grid.block_q and len(k_offset) == grid.block_kv
        decided = [_decide(part, q_offset, k_offset, predicate, grid, tensors, scalars) for part in _parts(where, q_offset, k_offset)]
        found = torch.cat(decided) if decided else states.new_empty(0)
        settled = (found == PARTIAL) | last
        states[where[settled].unbind(-1)] = found[settled]
        where = where[~settled]
        if last:
            break
    return states


def evaluate_all(
    predicate: Expr, grid: Grid, tensors: Sequence[torch.Tensor], scalars: Sequence[int | float], device: torch.device
) -> torch.Tensor:
    """Exact states of every tile by evaluating all of it, a few block rows at a time: O(q_len * kv_len) work, no sync, any device."""
    states = torch.empty(grid.shape, dtype=torch.int8, device=device)
    keys = torch.arange(grid.columns * grid.block_kv, device=device).clamp(max=grid.kv_len - 1)
    step = max(1, ELEMENTS_ON_DEVICE // max(1, grid.batch * grid.heads * grid.block_q * len(keys)))
    for first in range(0, grid.rows, step):
        last = min(first + step, grid.rows)
        queries = torch.arange(first * grid.block_q, last * grid.block_q, device=device).clamp(max=grid.q_len - 1)
        b, h = torch.arange(grid.batch, device=device), torch.arange(grid.heads, device=device)
        indices = {"b": b.view(-1, 1, 1, 1), "h": h.view(-1, 1, 1), "q_idx": queries.view(-1, 1), "kv_idx": keys}
        kept = _kept(predicate, indices, grid, tensors, scalars, (grid.batch, grid.heads, len(queries), len(keys)), device)
        tiles = kept.unflatten(-1, (grid.columns, grid.block_kv)).unflatten(2, (last - first, grid.block_q))
        states[:, :, first:last] = _state(tiles.any(-1).any(3), tiles.all(-1).all(3))
    return states


def _spread(count: int, side: int) -> torch.Tensor:
    """`count` offsets over a block side, the first and the last among them, or all of them."""
    return torch.arange(side) if count >= side else torch.linspace(0, side - 1, count).round().long()


def _parts(where: torch.Tensor, q_offset: torch.Tensor, k_offset: torch.Tensor) -> Sequence[torch.Tensor]:
    return where.split(max(1, ELEMENTS_ON_HOST // (len(q_offset) * len(k_offset)))) if len(where) else ()


def _decide(
    where: torch.Tensor,
    q_offset: torch.Tensor,
    k_offset: torch.Tensor,
    predicate: Expr,
    grid: Grid,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int | float],
) -> torch.Tensor:
    """States of the tiles at `where` [tiles, 4] as far as these places of them tell. Short tiles see their last row or column again."""
    b, h, i, j = (x.view(-1, 1, 1) for x in where.unbind(-1))
    queries = (i * grid.block_q + q_offset.view(-1, 1)).clamp(max=grid.q_len - 1)
    keys = (j * grid.block_kv + k_offset).clamp(max=grid.kv_len - 1)
    shape = (len(where), len(q_offset), len(k_offset))
    kept = _kept(predicate, {"b": b, "h": h, "q_idx": queries, "kv_idx": keys}, grid, tensors, scalars, shape, where.device).flatten(1)
    return _state(kept.any(-1), kept.all(-1))


def _kept(
    predicate: Expr,
    indices: dict[str, torch.Tensor],
    grid: Grid,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int | float],
    shape: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    value = evaluate(predicate, Env({**indices, "q_len": grid.q_len, "kv_len": grid.kv_len}, tensors, scalars))
    if not isinstance(value, torch.Tensor):
        value = torch.full((), bool(value), device=device)
    return value.expand(shape)


def _state(some: torch.Tensor, every: torch.Tensor) -> torch.Tensor:
    # EMPTY, PARTIAL, FULL = 0, 1, 2: one for a kept place, one more where there is no masked one
    assert (EMPTY, PARTIAL, FULL) == (0, 1, 2)
    return some.to(torch.int8) + every.to(torch.int8)
