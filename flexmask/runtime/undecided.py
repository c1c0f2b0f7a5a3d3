"""Exact tile states of any predicate: tiles that box arithmetic cannot decide are evaluated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..analysis import BoxTest
from ..ir import Env, Expr, evaluate
from .classify import PARTS, UNKNOWN, classify_parts
from .grid import EMPTY, FULL, PARTIAL, Grid

# elements evaluated at once: int64 temporaries of this many stay in the cache of a CPU
ELEMENTS = 1 << 19

# A tile is PARTIAL once a kept and a masked place of it are seen, so a few places are looked at first: (rows, columns) per tile.
# Then its parts are classified, and then many places are looked at, all of them at last.
_ALL = 1 << 30
FEW_SAMPLES = ((2, 2), (4, 4), (8, 8))
MANY_SAMPLES = ((_ALL, 2), (2, _ALL), (_ALL, _ALL))
# irrational steps, as regular ones would always meet the same places of a periodic mask, and different ones along the two axes
_ROW_STEP, _COLUMN_STEP = 5**0.5 / 2 - 0.5, 2**0.5 - 1


def evaluate_unknown(
    states: torch.Tensor,
    predicate: Expr,
    grid: Grid,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int | float],
    test: BoxTest | None = None,
) -> torch.Tensor:
    """`states` [B, H, nQ, nK] with each UNKNOWN tile decided by evaluating the predicate in it. On CPU tensors; work per such tile.

    `test` is the predicate's box test: it is asked about parts of the tiles before all their places are evaluated.
    """
    states = states.clone()
    where = (states == UNKNOWN).nonzero()
    for rows, columns in FEW_SAMPLES:
        where = _look(states, where, rows, columns, predicate, grid, tensors, scalars)
    if test is not None and len(where) and _has_parts(grid):
        where = _settled(states, where, classify_parts(where, test, grid, tensors, scalars), (UNKNOWN,))
    for rows, columns in MANY_SAMPLES:
        where = _look(states, where, rows, columns, predicate, grid, tensors, scalars)
    return states


def _has_parts(grid: Grid) -> bool:
    """Whether tiles can be cut up, and into a number of parts that a grid may have."""
    return grid.block_q % PARTS == grid.block_kv % PARTS == 0 and grid.tiles * PARTS**2 < 2**31


def _settled(states: torch.Tensor, where: torch.Tensor, found: torch.Tensor, unsettled: tuple[int, ...]) -> torch.Tensor:
    """Writes what was found of the tiles at `where`, and returns those of which nothing more than `unsettled` is known."""
    left = torch.zeros_like(found, dtype=torch.bool)
    for state in unsettled:
        left |= found == state
    states[where[~left].unbind(-1)] = found[~left]
    return where[left]


def _look(
    states: torch.Tensor,
    where: torch.Tensor,
    rows: int,
    columns: int,
    predicate: Expr,
    grid: Grid,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int | float],
) -> torch.Tensor:
    """Evaluates so many rows and columns of each tile at `where`, and returns the tiles that this does not settle."""
    q_offset, k_offset = _spread(rows, grid.block_q, _ROW_STEP), _spread(columns, grid.block_kv, _COLUMN_STEP)
    complete = len(q_offset) == grid.block_q and len(k_offset) == grid.block_kv
    at_once = max(1, ELEMENTS // (len(q_offset) * len(k_offset)))
    found = [_decide(part, q_offset, k_offset, predicate, grid, tensors, scalars) for part in where.split(at_once)]
    return _settled(states, where, torch.cat(found), () if complete else (EMPTY, FULL))


def _spread(count: int, side: int, step: float) -> torch.Tensor:
    """`count` offsets over a block side: all of them, the first and the last, or scattered ones."""
    if count >= side:
        return torch.arange(side)
    if count == 2:
        return torch.tensor([0, side - 1])
    return (torch.arange(1, count + 1) * step % 1 * side).long()


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
    indices = {"b": b, "h": h, "q_idx": queries, "kv_idx": keys, "q_len": grid.q_len, "kv_len": grid.kv_len}
    kept = torch.as_tensor(evaluate(predicate, Env(indices, tensors, scalars)))
    kept = kept.expand(len(where), len(q_offset), len(k_offset)).flatten(1)
    return _state(kept.any(-1), kept.all(-1))


def _state(some: torch.Tensor, every: torch.Tensor) -> torch.Tensor:
    # EMPTY, PARTIAL, FULL = 0, 1, 2: one for a kept place, one more where there is no masked one
    assert (EMPTY, PARTIAL, FULL) == (0, 1, 2)
    return some.to(torch.int8) + every.to(torch.int8)
