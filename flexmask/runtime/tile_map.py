"""TileMap: which tiles of a mask are empty, partial or full, as numbers on the tensors' device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..analysis import UNKNOWN, Boxes, Facts, Form, classify
from .grid import EMPTY, FULL, PARTIAL, Grid, interval_ranges, interval_states
from .intervals import Intervals, ascending, solve
from .tile_lists import ordered, pack, unpack
from .undecided import evaluate_all, evaluate_unknown

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Box arithmetic is a chain of small operations, milliseconds of launches on a GPU: a planning kernel that evaluates the tiles is
# faster up to about this many of them.
MANY_TILES = 1 << 17
# int8 [B, H, nQ, nK] with UNKNOWN tiles -> the same with each of them decided
Decide = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class TileMap:
    """The tiles of a mask over q_len x kv_len, nQ = ceil(q_len / block_q) by nK = ceil(kv_len / block_kv), in one of two forms.

    * `ranges` int32 [B|1, H|1, nQ, 4]: kept blocks of a block row are [first, last), FULL ones [first_full, last_full); the numbers
      are (first, first_full, last_full, last).
    * `counts` int32 [B|1, H|1, nQ, 3], `offsets` int32 [B|1, H|1, nQ], `index` int32 [*]: the kept block columns of a block row lie
      in `index` from its offset on: counts[0] FULL ones, counts[1] PARTIAL ones that the row intervals decide, counts[2] PARTIAL
      ones where the predicate must be evaluated; each group ascending.

    `intervals` are the rows' kept keys where they are known to hold, or (on a GPU) hold where counts[1] is not 0; with a residue
    in the form they are its interval part. A tile is FULL if all its places within the lengths are kept.

    >>> from flexmask import masks
    >>> masks.causal.block_mask(256, 256)
    TileMap(256 x 256, tiles 128 x 128, range form)
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    intervals: Intervals | None = None
    ranges: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    index: torch.Tensor | None = None

    def __repr__(self) -> str:
        form = "range" if self.ranges is not None else "list"
        return f"TileMap({self.q_len} x {self.kv_len}, tiles {self.block_q} x {self.block_kv}, {form} form)"

    def states(self) -> torch.Tensor:
        """int8 [B|1, H|1, nQ, nK]: 0 EMPTY, 1 PARTIAL, 2 FULL; exact.

        >>> from flexmask import masks
        >>> masks.sliding_window(2).block_mask(4, 4, block_size=2).states()[0, 0].tolist()
        [[1, 0], [1, 1]]
        """
        columns = -(-self.kv_len // self.block_kv)
        if self.ranges is not None:
            first, first_full, last_full, last = self.ranges[..., None].unbind(-2)
            place = torch.arange(columns, device=self.ranges.device)
            kept, full = (place >= first) & (place < last), (place >= first_full) & (place < last_full)
            return kept.to(torch.int8) + full.to(torch.int8)
        assert self.counts is not None and self.index is not None
        return unpack(self.counts, self.index, columns)

    def listed(self) -> TileMap:
        """The same map in list form."""
        if self.ranges is None:
            return self
        group = torch.tensor([3, 1, 0], dtype=torch.int8, device=self.ranges.device)[self.states().int()]  # EMPTY, PARTIAL, FULL
        counts, offsets, index = pack(group, exact=not group.is_cuda)
        return replace(self, ranges=None, counts=counts, offsets=offsets, index=index)

    def to_dense(self) -> torch.Tensor:
        """Which tiles keep anything, bool [B|1, H|1, nQ, nK].

        >>> from flexmask import masks
        >>> masks.causal.block_mask(256, 256).to_dense()[0, 0].tolist()
        [[True, False], [True, True]]
        """
        return self.states() != EMPTY

    def to_torch(self, mask_mod: Callable[..., Any] | None = None) -> BlockMask:
        """torch's BlockMask of the same tiles, as `create_block_mask` would make it; `mask_mod` is what it evaluates in PARTIAL tiles.

        As there, tiles that reach beyond a length count as PARTIAL.

        >>> from flexmask import masks
        >>> masks.causal.block_mask(256, 256).to_torch(masks.causal).kv_num_blocks.tolist()
        [[[1, 1]]]
        """
        from torch.nn.attention.flex_attention import BlockMask  # takes long to import, and only this method needs it

        states = self.states()
        if self.q_len % self.block_q:
            states[..., -1, :].clamp_(max=PARTIAL)
        if self.kv_len % self.block_kv:
            states[..., -1].clamp_(max=PARTIAL)
        partial, full = (ordered(states == kind) for kind in (PARTIAL, FULL))
        sizes = (self.block_q, self.block_kv)
        return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=sizes, mask_mod=mask_mod, seq_lengths=(self.q_len, self.kv_len))

    def statistics(self) -> dict[str, float]:
        """Tiles by kind, and `density`, the share that is not EMPTY. Reads the map, so on a GPU this waits.

        >>> from flexmask import masks
        >>> masks.causal.block_mask(256, 256).statistics()
        {'tiles': 4, 'full': 1, 'partial': 2, 'empty': 1, 'density': 0.75}
        """
        states = self.states()
        tiles, full, partial = states.numel(), int((states == FULL).sum()), int((states == PARTIAL).sum())
        empty = tiles - full - partial
        return {"tiles": tiles, "full": full, "partial": partial, "empty": empty, "density": (full + partial) / max(1, tiles)}


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
    device: torch.device | str = "cpu",
    promised: frozenset[int] = frozenset(),
    evaluate_undecided: Decide | None = None,
) -> TileMap:
    """The map of a mask for these lengths and captures, whose block sizes may be any numbers.

    `promised` are the tables that the caller vouches to ascend. On a GPU nothing is waited for: whether other tables ascend is a
    flag on the device that chooses there, and tiles that nothing else decides go to `evaluate_undecided` (states with
    UNKNOWN tiles in, exact states out); without it every tile is evaluated. On the CPU box arithmetic leaves few to evaluate.
    """
    device = torch.device(device)
    grid = Grid(q_len, kv_len, block_q, block_kv, batch if facts.uses_b else 1, heads if facts.uses_h else 1)
    form = facts.rows if isinstance(facts.rows, Form) else None
    holds = form is not None and _holds(form, tensors, promised)
    if form is None or holds is False:
        return _from_states(_exact(facts, grid, tensors, scalars, device, evaluate_undecided), False, grid, None)
    intervals = solve(form, tensors, scalars, q_len=q_len, kv_len=kv_len, batch=grid.batch, heads=grid.heads, device=device)
    if holds is True and form.residue is None and facts.rows_contiguous and len(form.pieces) == 1:
        return TileMap(q_len, kv_len, block_q, block_kv, intervals, ranges=interval_ranges(intervals, grid))
    bounds = interval_states(intervals, grid)
    if holds is True and form.residue is None:
        return _from_states(bounds, True, grid, intervals)
    known = _known(form, bounds, holds)
    states = _exact(facts, grid, tensors, scalars, device, evaluate_undecided, known)
    return _from_states(states, holds if form.residue is None else False, grid, intervals)


def _holds(form: Form, tensors: Sequence[torch.Tensor], promised: frozenset[int]) -> bool | torch.Tensor:
    """Whether the tables ascend that the form relies on: known here, or a flag on the GPU."""
    held: bool | torch.Tensor = True
    for number in form.sorted_tables:
        if number not in promised:
            flag = ascending(tensors[number])
            held = flag if held is True else held & flag
            if held is False:
                return False
    return held


def _known(form: Form, bounds: torch.Tensor, holds: bool | torch.Tensor) -> torch.Tensor:
    """What the row intervals say of each tile, UNKNOWN where they do not decide it."""
    if form.residue is not None:  # outside the intervals nothing is kept; inside, who knows
        bounds = bounds.masked_fill(bounds != EMPTY, UNKNOWN)
    return bounds.masked_fill(~holds, UNKNOWN) if isinstance(holds, torch.Tensor) else bounds


def _exact(
    facts: Facts,
    grid: Grid,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int | float],
    device: torch.device,
    decide: Decide | None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every tile decided: from what is `known`, else from box arithmetic, else by evaluation."""
    if device.type != "cpu" and decide is None:
        states = evaluate_all(facts.predicate, grid, tensors, scalars, device)
        return states if known is None else torch.where(known == UNKNOWN, states, known)
    if decide is not None and known is not None:
        return decide(known.expand(grid.shape))
    if decide is not None and grid.rows * grid.columns < MANY_TILES:
        return decide(torch.full(grid.shape, UNKNOWN, dtype=torch.int8, device=device))
    boxes = Boxes.grid(grid.q_len, grid.kv_len, grid.block_q, grid.block_kv, grid.batch, grid.heads, device)
    states = classify(facts.predicate, boxes, tensors, scalars).expand(grid.shape)
    if known is not None:
        states = torch.where(known == UNKNOWN, states, known)
    return decide(states) if decide is not None else evaluate_unknown(states, facts.predicate, grid, tensors, scalars)


def _from_states(states: torch.Tensor, by_rows: bool | torch.Tensor, grid: Grid, intervals: Intervals | None) -> TileMap:
    """List form. `by_rows`: whether the row intervals decide PARTIAL tiles."""
    bounded = by_rows if isinstance(by_rows, torch.Tensor) else torch.full((), by_rows, device=states.device)
    group = torch.where(bounded, 1, 2).to(torch.int8).expand_as(states).masked_fill(states == FULL, 0).masked_fill(states == EMPTY, 3)
    counts, offsets, index = pack(group, exact=not states.is_cuda)
    return TileMap(grid.q_len, grid.kv_len, grid.block_q, grid.block_kv, intervals, None, counts, offsets, index)
