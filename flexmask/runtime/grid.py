"""The grid of tiles that a map is over, and what row intervals say of its tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ShapeError
from .intervals import Intervals

EMPTY, PARTIAL, FULL = 0, 1, 2

# tiles handled at once, which bounds every temporary table of tiles
TILES = 1 << 21


@dataclass(frozen=True)
class Grid:
    """Tiles of `block_q` x `block_kv` over q_len x kv_len; `batch` and `heads` are 1 where the mask does not depend on them."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    batch: int = 1
    heads: int = 1

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_kv < 1:
            raise ShapeError(f"a block holds at least one query and one key; got block size ({self.block_q}, {self.block_kv}).")
        if self.tiles >= 2**31:
            raise ShapeError(
                f"{self.batch} x {self.heads} x {self.rows} x {self.columns} tiles are more than 32-bit offsets reach; use larger blocks."
            )

    @property
    def rows(self) -> int:
        """Block rows, ceil(q_len / block_q)."""
        return -(-self.q_len // self.block_q)

    @property
    def columns(self) -> int:
        """Block columns, ceil(kv_len / block_kv)."""
        return -(-self.kv_len // self.block_kv)

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.rows * self.columns

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.rows, self.columns

    def along(self, axis: str) -> Grid:
        """This grid, or for "column" the grid of the transposed mask, whose rows are this one's columns."""
        if axis == "row":
            return self
        return Grid(self.kv_len, self.q_len, self.block_kv, self.block_q, self.batch, self.heads)

    def spans(self, per_tile: int = 1) -> list[tuple[int, int]]:
        """Runs [first, last) of block rows, few enough that `per_tile` values for each of their tiles stay within TILES."""
        step = max(1, TILES // max(1, per_tile * self.batch * self.heads * self.columns))
        return [(first, min(first + step, self.rows)) for first in range(0, self.rows, step)]


def interval_states(intervals: Intervals, grid: Grid) -> torch.Tensor:
    """Exact states int8 [B|1, H|1, nQ, nK] of a mask that keeps just these row intervals; O(N + tiles) work.

    For column intervals, `grid` is the transposed one.

    A tile is touched where some row has a kept key in it, and full where every row covers it. Both are counted by marking where
    each row's pieces begin (+1) and end (-1) on a line of block columns, and summing along it. A row's pieces do not touch, so
    at most one of them covers a block column.
    """
    lead = intervals.starts.shape[:2]
    states = torch.empty(*lead, grid.rows, grid.columns, dtype=torch.int8, device=intervals.starts.device)
    for first, last in grid.spans():
        rows = slice(first * grid.block_q, min(last * grid.block_q, grid.q_len))
        starts, ends = intervals.starts[:, :, rows], intervals.ends[:, :, rows]
        touched = _count(starts // grid.block_kv, _ceil(ends, grid.block_kv), grid)
        covered = _count(_ceil(starts, grid.block_kv), _floor_end(ends, grid), grid)
        height = (grid.q_len - torch.arange(first, last, device=starts.device) * grid.block_q).clamp(max=grid.block_q)
        states[:, :, first:last] = (touched > 0).to(torch.int8) + (covered == height[:, None]).to(torch.int8)
    return states


def interval_ranges(intervals: Intervals, grid: Grid) -> torch.Tensor:
    """(first, first_full, last_full, last) int32 [B|1, H|1, nQ, 4] of one-piece intervals whose union over a block row is one interval."""
    starts, ends = intervals.starts[..., 0], intervals.ends[..., 0]
    last = _ceil(_per_block(ends, 0, grid).amax(-1), grid.block_kv)
    begin = starts.masked_fill(starts == ends, grid.kv_len)
    first = torch.minimum(_per_block(begin, grid.kv_len, grid).amin(-1) // grid.block_kv, last)
    first_full = _ceil(_per_block(starts, 0, grid).amax(-1), grid.block_kv)
    # an empty row ends at 0, so its block row has no full tile
    last_full = _floor_end(_per_block(ends, grid.kv_len, grid).amin(-1), grid)
    first_full = torch.maximum(torch.minimum(first_full, last), first)
    last_full = torch.maximum(torch.minimum(last_full, last), first_full)
    return torch.stack([first, first_full, last_full, last], -1)


def _ceil(x: torch.Tensor, side: int) -> torch.Tensor:
    return (x + (side - 1)) // side


def _floor_end(ends: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Block columns that lie before `ends`; the last one ends with the keys, even where it is short."""
    whole: torch.Tensor = ends // grid.block_kv
    return whole.masked_fill(ends == grid.kv_len, grid.columns)


def _per_block(x: torch.Tensor, fill: int, grid: Grid) -> torch.Tensor:
    """Rows gathered by block, [.., nQ, block_q]; `fill` stands for the rows that the last block lacks."""
    padded: torch.Tensor = torch.nn.functional.pad(x, (0, grid.rows * grid.block_q - grid.q_len), value=fill)
    blocks: torch.Tensor = padded.unflatten(-1, (grid.rows, grid.block_q))
    return blocks


def _count(first: torch.Tensor, last: torch.Tensor, grid: Grid) -> torch.Tensor:
    """How many runs [first, last) of block columns, int32 [B, H, rows, pieces], hold each block column: int32 [B, H, block rows, nK]."""
    batch, heads, rows, _ = first.shape
    blocks = -(-rows // grid.block_q)
    width = grid.columns + 1
    line = torch.arange(batch * heads, device=first.device).view(batch, heads, 1, 1) * blocks
    line = (line + torch.arange(rows, device=first.device).view(-1, 1) // grid.block_q) * width
    marks = torch.zeros(batch * heads * blocks * width, dtype=torch.int32, device=first.device)
    one = torch.ones((), dtype=torch.int32, device=first.device).expand(first.numel())
    marks.scatter_add_(0, (line + first).flatten(), one)
    marks.scatter_add_(0, (line + torch.maximum(first, last)).flatten(), -one)
    return marks.view(batch, heads, blocks, width)[..., : grid.columns].cumsum(-1, dtype=torch.int32)
