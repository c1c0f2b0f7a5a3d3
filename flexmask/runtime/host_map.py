"""Tile maps by torch operations, for the CPU: what they depend on may be looked at, so one map is made and it is exact."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import lru_cache

import torch

from ..analysis import BoxTest, Facts, Form, NotInterval, box_test
from ..ir import Expr
from .classify import UNKNOWN, classify
from .grid import EMPTY, Grid, interval_ranges, interval_states
from .intervals import Intervals, ascending, solve
from .tile_lists import pack
from .tile_map import TileMap
from .undecided import evaluate_unknown

Captured = tuple[Sequence[torch.Tensor], Sequence[int | float]]


def build(
    facts: Facts,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int | float],
    *,
    q_len: int,
    kv_len: int,
    batch: int = 1,
    heads: int = 1,
    block_q: int = 128,
    block_kv: int = 128,
    axis: str = "row",
    promised: Set[int] = frozenset(),
) -> TileMap:
    """The map of a mask for these lengths and captures, whose block sizes may be any numbers; by rows or ("column") by columns.

    `promised` are the tables that the caller vouches to ascend; others are looked at.
    """
    grid = Grid(q_len, kv_len, block_q, block_kv, batch if facts.uses_b else 1, heads if facts.uses_h else 1)
    lines, captured = grid.along(axis), (tensors, scalars)
    form, contiguous = (facts.rows, facts.rows_contiguous) if axis == "row" else (facts.columns, facts.columns_contiguous)
    intervals = find_intervals(form, captured, grid, promised) if isinstance(form, Form) else None
    if intervals is None:
        return _listed(_evaluated(facts, captured, grid, axis, None), grid, axis, None)
    assert isinstance(form, Form)
    if form.residue is not None:
        bounds = interval_states(intervals, lines)
        return _listed(_evaluated(facts, captured, grid, axis, bounds), grid, axis, None)
    if contiguous and len(form.pieces) == 1:
        return TileMap(q_len, kv_len, block_q, block_kv, axis, intervals, ranges=interval_ranges(intervals, lines))
    return _listed(interval_states(intervals, lines), grid, axis, intervals)


def find_intervals(form: Form, captured: Captured, grid: Grid, promised: Set[int] = frozenset()) -> Intervals | None:
    """The intervals of the form, or None where a table that it relies on does not ascend, or a row needs more pieces than are kept."""
    tensors, scalars = captured
    if not all(n in promised or bool(ascending(tensors[n])) for n in form.sorted_tables):
        return None
    try:
        return solve(form, tensors, scalars, q_len=grid.q_len, kv_len=grid.kv_len, batch=grid.batch, heads=grid.heads)
    except NotInterval:
        return None


def _evaluated(facts: Facts, captured: Captured, grid: Grid, axis: str, bounds: torch.Tensor | None) -> torch.Tensor:
    """States of every tile, a row for each line: EMPTY where `bounds` are, else by box arithmetic, else by evaluation."""
    test = find_box(facts.predicate, len(captured[0]))
    states = classify(test, grid, *captured)
    if bounds is not None:
        outside = bounds == EMPTY
        states = states.masked_fill(outside if axis == "row" else outside.transpose(-1, -2), EMPTY)
    if bool((states == UNKNOWN).any()):
        states = evaluate_unknown(states, facts.predicate, grid, *captured, test)
    return states if axis == "row" else states.transpose(-1, -2)


@lru_cache(maxsize=256)
def find_box(predicate: Expr, tensors: int) -> BoxTest:
    """The box test of a predicate, derived once."""
    return box_test(predicate, tensors)


def _listed(states: torch.Tensor, grid: Grid, axis: str, intervals: Intervals | None) -> TileMap:
    counts, offsets, index = pack(states)
    return TileMap(grid.q_len, grid.kv_len, grid.block_q, grid.block_kv, axis, intervals, None, counts, offsets, index)
