"""Tile maps by generated kernels, for a GPU: nothing is waited for, and a map can be made anew in the memory it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..templates.assemble_bits import slots_for, words_in_line
from . import launch
from .grid import Grid
from .intervals import Intervals
from .recipes import ByIntervals, ByPredicate, Recipe
from .tile_map import TileMap

# entries of tile lists in one map, at most, beyond which lines get less room than they might need
MOST_ENTRIES = 1 << 24
# tile states held at a time while lists are made
MOST_STATES = 1 << 23
# different tiles whose bits one map holds, at most: 8 MiB for tiles of 128 x 128
MOST_PATTERNS = 1 << 12


@dataclass(frozen=True)
class DeviceMaps:
    """The maps of a mask for the kernels that it needs, and how to make them again from what the captured tensors hold now."""

    maps: tuple[TileMap, ...]
    _fill: tuple[Callable[[], None], ...] = field(repr=False)

    def refill(self) -> None:
        """Make the maps again in place: a few kernel launches, no wait, so that a captured graph may hold them."""
        for fill in self._fill:
            fill()


def build(
    recipes: Sequence[Recipe], captured: launch.Captures, grids: Sequence[Grid], device: torch.device, room: int, ranked: int = 0
) -> DeviceMaps:
    """The maps for the variants of one mask, their lists of at most `room` entries; the first `ranked` ones with the ranks of their lines.
    Each one's flag says whether the next has its turn: 0 if not, as this one holds; 1; or 2 where one before it does, so that neither
    has."""
    maps: list[TileMap] = []
    fill: list[Callable[[], None]] = []
    for recipe, grid in zip(recipes, grids, strict=True):
        if isinstance(recipe, ByIntervals):
            made, run = _by_intervals(recipe, captured, grid, device, room)
        else:
            made, run = _by_predicate(recipe, captured, grid, device, room, maps[-1].broken if maps else None)
        if len(maps) < ranked:
            made, run = _ranked(made, run)
        maps.append(made)
        fill.append(run if grid.q_len and grid.kv_len else lambda made=made: _clear(made))  # type: ignore[misc]
    found = DeviceMaps(tuple(maps), tuple(fill))
    found.refill()
    return found


def _by_intervals(
    recipe: ByIntervals, captured: launch.Captures, grid: Grid, device: torch.device, room: int
) -> tuple[TileMap, Callable[[], None]]:
    """Row (or column) intervals, and from them ranges or lists."""
    lines, lead = grid.along(recipe.axis), (grid.batch, grid.heads)
    starts, stops = _empty(device, 2, *lead, lines.q_len, recipe.pieces).unbind()
    broken = torch.zeros(recipe.flags, dtype=torch.int32, device=device) if recipe.flags else None
    given: dict[str, Any] = {"ranges": _empty(device, *lead, lines.rows, 4)} if recipe.ranges else _room(lines, device, room)
    intervals = Intervals(starts, stops, lines.kv_len, recipe.axis)
    made = TileMap(grid.q_len, grid.kv_len, grid.block_q, grid.block_kv, recipe.axis, intervals, broken=broken, **given)
    packed = launch.packed(captured)

    def fill() -> None:
        recipe.survey.survey(
            packed, grid.q_len, grid.kv_len, *lead, starts=starts, stops=stops, ranges=made.ranges, broken=broken
        )  # fmt: skip
        if made.ranges is None:
            launch.list_intervals(made, lines)

    return made, fill if broken is None else _zeroed(broken, fill)


def _by_predicate(
    recipe: ByPredicate, captured: launch.Captures, grid: Grid, device: torch.device, room: int, flag: torch.Tensor | None
) -> tuple[TileMap, Callable[[], None]]:
    """Lists of tiles, decided by bounds, box tests and evaluation; with a partner's `flag`, only where that says so."""
    lines, lengths, lead = grid.along(recipe.axis), (grid.q_len, grid.kv_len), (grid.batch, grid.heads)
    own = torch.zeros(recipe.flags, dtype=torch.int32, device=device) if recipe.flags else None
    asked = own if flag is None else flag
    made = TileMap(*lengths, grid.block_q, grid.block_kv, recipe.axis, broken=own if recipe.holds else flag, **_room(lines, device, room))
    if recipe.bits is not None:
        made = replace(made, **_room_for_bits(made))
    if recipe.crossing is not None:
        made = replace(made, crossing=_room_for_crossing(recipe, grid, device))
    step = max(1, min(lines.rows, MOST_STATES // max(1, grid.batch * grid.heads * lines.columns)))
    packed = launch.packed(captured)

    def fill() -> None:
        if own is not None and flag is not None:
            launch.pass_turn(flag, own)
        summaries = recipe.summaries(grid, device)
        hulls = _empty(device, recipe.hulls, *lead, lines.rows, 2) if recipe.hulls else None
        if recipe.survey is not None:
            recipe.survey.survey(packed, *lengths, *lead, hulls=hulls, summaries=summaries, broken=own if flag is None else None)
        boxes = launch.packed(((*captured[0], *summaries), captured[1]))
        states = torch.empty(*lead, step, lines.columns, dtype=torch.int8, device=device)
        for first in range(0, lines.rows, step):
            part = states if first + step <= lines.rows else torch.empty_like(states[:, :, : lines.rows - first])
            recipe.tiles.tiles(part, first, packed, boxes, *lengths, hulls=hulls, broken=asked, only_if_broken=flag is not None)
            launch.list_states(made, part, first, only_if=flag)
        if recipe.bits is not None:
            slots = torch.zeros(slots_for(MOST_PATTERNS), dtype=torch.int64, device=device)
            launch.find_bits(recipe.bits, made, slots, packed)
        if made.crossing is not None:
            recipe.crossing.survey(packed, *lengths, *lead, starts=made.crossing.starts, stops=made.crossing.ends, broken=own)

    return made, fill if own is None or flag is not None else _zeroed(own, fill)


def _ranked(made: TileMap, fill: Callable[[], None]) -> tuple[TileMap, Callable[[], None]]:
    """The map with memory for the ranks of its lines, and what fills that too."""
    table = made.counts if made.ranges is None else made.ranges
    assert table is not None
    lines = made.grid.along(made.axis)
    ranked = replace(made, ranks=_empty(table.device, *table.shape[:2], lines.columns, -(-lines.rows // 32), 2))

    def again() -> None:
        fill()
        launch.rank_lines(ranked)

    return ranked, again


def _room_for_crossing(recipe: ByPredicate, grid: Grid, device: torch.device) -> Intervals:
    """Memory for an interval of each line of the other axis."""
    other = "column" if recipe.axis == "row" else "row"
    lines = grid.along(other)
    starts, ends = _empty(device, 2, grid.batch, grid.heads, lines.q_len, 1).unbind()
    return Intervals(starts, ends, lines.kv_len, other)


def _room_for_bits(made: TileMap) -> dict[str, Any]:
    """Memory for the bits of so many different tiles, and for the numbers of all listed ones."""
    assert made.index is not None
    line, places = (made.block_q, made.block_kv) if made.axis == "row" else (made.block_kv, made.block_q)
    words = _empty(made.index.device, MOST_PATTERNS, line, words_in_line(places))
    return {"patterns": torch.empty_like(made.index), "words": words}


def _zeroed(flags: torch.Tensor, fill: Callable[[], None]) -> Callable[[], None]:
    """`fill` with new flags the first time, and the same ones cleared from then on."""
    used = False

    def again() -> None:
        nonlocal used
        if used:
            flags.zero_()
        used = True
        fill()

    return again


def _empty(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


def _room(lines: Grid, device: torch.device, room: int) -> dict[str, Any]:
    """Memory for tile lists: as many entries a line as there are blocks; or as `room` allows, and then the numbers of all blocks."""
    all_lines = lines.batch * lines.heads * lines.rows
    share = max(1, min(lines.columns, room // max(1, all_lines)))
    whole = share >= lines.columns
    index = _empty(device, all_lines * share + (0 if whole else lines.columns))
    if not whole:
        torch.arange(lines.columns, out=index[all_lines * share :])
    counts, offsets = _empty(device, 2, lines.batch, lines.heads, lines.rows, 2).unbind()
    return {"counts": counts, "offsets": offsets, "index": index, "share": share}


def _clear(made: TileMap) -> None:
    """Without queries or keys nothing is kept."""
    for table in (made.ranges, made.counts, made.offsets, made.broken):
        if table is not None:
            table.zero_()
    for intervals in (made.intervals, made.crossing):
        if intervals is not None:
            intervals.starts.zero_()
            intervals.ends.zero_()
