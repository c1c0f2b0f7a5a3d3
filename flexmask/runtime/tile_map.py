"""TileMap: which tiles of a mask are empty, partial or full, as numbers on the tensors' device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .grid import EMPTY, FULL, PARTIAL, Grid
from .intervals import Intervals
from .tile_lists import compacted, ordered, pack, unpack

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class TileMap:
    """The tiles of a mask over q_len x kv_len, nQ = ceil(q_len / block_q) by nK = ceil(kv_len / block_kv).

    A map is by rows (`axis` "row") or by columns ("column"): its lines are the nQ block rows, each over nK block columns, or the
    other way round. Kept tiles come in one of two forms:

    * `ranges` int32 [B|1, H|1, lines, 4]: kept blocks of a line are [first, last), FULL ones [first_full, last_full); the numbers
      are (first, first_full, last_full, last).
    * `counts`, `offsets` int32 [B|1, H|1, lines, 2], `index` int32 [*]: how many FULL and how many PARTIAL blocks a line keeps, and
      where in `index` each begin. With `share` (maps made on a GPU, where the host does not know their size) each line has room for
      so many; one that keeps more is listed as PARTIAL throughout.

    `intervals` decide the places of PARTIAL tiles; or `crossing`, those of the lines of the other axis; or their bits: `patterns` int32
    as long as `index` numbers them, `words` int32 holds them, [*, block_q, ceil(block_kv / 32)] by rows (bit key % 32 of word key // 32 of
    a query) and [*, block_kv, ceil(block_q / 32)] by columns (bit query % 32 of a key's); without any the predicate must be evaluated
    there. `broken` int32 [*], if given, is a flag on the device: a map with intervals or bits holds where broken[0] is 0, its
    partner without them where it is not. `ranks`, where kernels need them, say how many lines go before each that keep
    the same block (`templates.ranks`). A tile is FULL if all its places within the lengths are kept.

    >>> from flexmask import masks
    >>> masks.causal.block_mask(256, 256)
    TileMap(256 x 256, tiles 128 x 128, range form)
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    axis: str = "row"
    intervals: Intervals | None = None
    ranges: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    index: torch.Tensor | None = None
    share: int | None = None
    patterns: torch.Tensor | None = None
    words: torch.Tensor | None = None
    broken: torch.Tensor | None = None
    crossing: Intervals | None = None
    ranks: torch.Tensor | None = None

    def work_order(self) -> torch.Tensor:
        """int32 [lines + 18]: the lines by the number of tiles they keep, most first, and what `lists.order_lines` says of long ones."""
        if self.ranges is not None:
            work = self.ranges[..., 3] - self.ranges[..., 0]
        else:
            assert self.counts is not None
            work = self.counts.sum(-1, dtype=torch.int32)
        work = work.sum((0, 1))
        limits = work.sum() >> torch.arange(8, -1, -1, device=work.device)
        long = (work > limits[:, None]).sum(-1)
        steps = (long > 0).flip(0).cumsum(0).flip(0)
        return torch.cat([work.argsort(descending=True, stable=True), long, (1 << steps) - 1]).int()

    def __repr__(self) -> str:
        form = "range" if self.ranges is not None else "list"
        by = "" if self.axis == "row" else " by columns"
        return f"TileMap({self.q_len} x {self.kv_len}, tiles {self.block_q} x {self.block_kv}, {form} form{by})"

    @property
    def grid(self) -> Grid:
        return Grid(self.q_len, self.kv_len, self.block_q, self.block_kv)

    def states(self) -> torch.Tensor:
        """int8 [B|1, H|1, nQ, nK]: 0 EMPTY, 1 PARTIAL, 2 FULL; exact. Of a map in list form on a GPU this waits for it.

        >>> from flexmask import masks
        >>> masks.sliding_window(2).block_mask(4, 4, block_size=2).states()[0, 0].tolist()
        [[1, 0], [1, 1]]
        """
        states = self._lines()
        return states if self.axis == "row" else states.transpose(-1, -2).contiguous()

    def _lines(self) -> torch.Tensor:
        """States with a row for each line."""
        n = self.grid.along(self.axis).columns
        if self.ranges is not None:
            first, first_full, last_full, last = self.ranges[..., None].unbind(-2)
            place = torch.arange(n, device=self.ranges.device)
            kept, full = (place >= first) & (place < last), (place >= first_full) & (place < last_full)
            return kept.to(torch.int8) + full.to(torch.int8)
        assert self.counts is not None and self.offsets is not None and self.index is not None
        return unpack(self.counts, self.offsets, self.index, n)

    def listed(self) -> TileMap:
        """The same map in list form, with lists of just what is kept. On a GPU this waits."""
        if self.ranges is not None:
            counts, offsets, index = pack(self._lines())
        elif self.share is not None:
            assert self.counts is not None and self.offsets is not None and self.index is not None
            counts, offsets, index = compacted(self.counts, self.offsets, self.index)
        else:
            return self
        return replace(self, ranges=None, counts=counts, offsets=offsets, index=index, share=None, patterns=None, words=None)

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
