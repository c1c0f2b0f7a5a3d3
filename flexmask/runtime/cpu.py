"""Attention on CPU tensors by torch matmuls that skip empty tiles: exact, no compiler, any platform."""

from __future__ import annotations

import math

import torch

from ..ir import evaluate
from .cpu_walk import Given, Mod, Unit, Walk, blocks, gather, scratch, weigh
from .extras import NO_EXTRAS, Extras
from .segments import Chunk
from .tile_map import TileMap

__all__ = ["Mod", "blocks", "forward"]

# scores held at once: small enough for the caches, large enough to keep calls few
SCORES = 1 << 20
# fewer keys than this at once make poor matmuls
FEWEST_KEYS = 512
# output [.., Dv], lse and greatest score [.., 1] of some rows over some of their keys
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    tile_map: TileMap | None = None,
    mask: Mod | None = None,
    score: Mod | None = None,
    extras: Extras = NO_EXTRAS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(out [B, Hq, Q, Dv] of q's dtype, lse [B, Hq, Q], peaks) of q [B, Hq, Q, D], k [B|1, Hkv, KV, D], v [B|1, Hkv, KV, Dv], any
    strides.

    Computes in float64 where q is float64, else in float32, which is lse's dtype too. EMPTY tiles of `tile_map` cost nothing; row
    intervals or the `mask` expression decide in PARTIAL ones. Without a map the mask is evaluated everywhere. A row that keeps
    nothing gives 0 and lse -inf, or its head's sink. A NaN in a query stays in its row, one in a key or value reaches only rows that
    keep it. `extras` brings sinks and dropout, and says whether peaks are wanted (else None): the greatest scores of the rows,
    [B, Hq, Q] like lse, -inf where nothing is kept.

    >>> import torch
    >>> from flexmask.runtime.cpu import forward
    >>> out, lse, _ = forward(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 5), scale=0.5)
    >>> out.shape, lse[0, 0].exp()
    (torch.Size([1, 1, 2, 5]), tensor([3., 3.]))
    """
    work = _Work(Given(q, k, v, scale, tile_map, mask, score, extras))
    for unit in work.units():
        work.run(unit)
    return work.out, work.lse, work.peaks


class _Work(Walk):
    """One call, and its results."""

    def __init__(self, given: Given):
        super().__init__(given, SCORES, FEWEST_KEYS)
        self.out = torch.empty(*given.q.shape[:3], given.v.shape[-1], dtype=given.q.dtype)
        self.lse = torch.empty(*given.q.shape[:3], dtype=self.dtype)
        self.peaks = torch.empty_like(self.lse) if given.extras.peaks else None
        self._out, self._lse = self.pairs(self.out), self.pairs(self.lse)
        self._peaks = None if self.peaks is None else self.pairs(self.peaks)
        self._finite = math.isfinite(given.v.sum(dtype=self.dtype))

    def run(self, unit: Unit) -> None:
        tensors = self.q[unit.heads], self.dense(self.k, unit), self.dense(self.v, unit)
        scores = scratch(self.most_scores(unit), self.dtype)
        for i in range(len(unit.rows)):
            self._row(unit, i, tensors, scores)

    def _row(self, unit: Unit, i: int, tensors: tuple[torch.Tensor, ...], scores: torch.Tensor) -> None:
        """One block row of a unit: fills its part of the results."""
        queries, chunks = self.queries(i), self.chunks(unit, i)
        q, k, v = tensors
        if not chunks:
            nothing = q.new_full((), -math.inf, dtype=self.dtype)
            self._store(unit, queries, (torch.zeros_like(nothing), nothing, nothing))
            return
        block = q[:, :, queries].to(self.dtype).mul(self.scale).flatten(1, 2)
        found = self._part(block, k, v, unit, queries, chunks[0], scores)
        for chunk in chunks[1:]:
            found = _merge(found, self._part(block, k, v, unit, queries, chunk, scores))
        self._store(unit, queries, found)

    def _store(self, unit: Unit, queries: slice, found: Part) -> None:
        """The results of a block row, with what its sinks and the dropped pairs make of them."""
        shape = (unit.last - unit.first, unit.g1 - unit.g0, -1)
        out, lse, top = (x.view(*shape, x.shape[-1]) if x.dim() else x for x in found)
        sinks = self.sinks(unit)
        if sinks is not None:
            alone, lse = lse, torch.logaddexp(lse, sinks[..., None])
            out = out * (alone - _level(lse)).exp_()
        if self.dropout is not None:
            out = out * self.dropout[2]
        self._out[unit.heads][:, :, queries] = out
        self._lse[unit.heads][:, :, queries] = lse[..., 0] if lse.dim() else lse
        if self._peaks is not None:
            self._peaks[unit.heads][:, :, queries] = top[..., 0] if top.dim() else top

    def _part(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, unit: Unit, queries: slice, chunk: Chunk, buffer: torch.Tensor
    ) -> Part:
        """Attention of the rows [pairs, rows, ..] to the keys of one chunk. The scores lie in `buffer`."""
        shape = (len(q), q.shape[1], chunk.width)
        scores = buffer[: math.prod(shape)].view(shape)
        torch.bmm(q, gather(k, chunk).transpose(1, 2), out=scores)
        if self.score is not None or chunk.spans:
            self._change(scores.view(len(q), unit.g1 - unit.g0, -1, chunk.width), unit, queries, chunk)
        top = scores.amax(-1, keepdim=True)
        torch.softmax(scores, -1, out=scores)
        # softmax is 1 / sum at the greatest score
        lse = top - scores.amax(-1, keepdim=True).log_()
        dropped = self.dropped(unit, queries, chunk)
        if dropped is not None:
            scores.masked_fill_(dropped, 0)
        values = gather(v, chunk)
        out = torch.bmm(scores, values) if self._finite else weigh(scores, values)
        nothing = top == -math.inf
        if bool(nothing.any()):
            out.masked_fill_(nothing, 0)
            lse.masked_fill_(nothing, -math.inf)
        return out, lse, top

    def _change(self, scores: torch.Tensor, unit: Unit, queries: slice, chunk: Chunk) -> None:
        """The score mod, then the mask, on scores [pairs, group, block_q, keys], in place."""
        if self.score is not None:
            value = evaluate(self.score[0], self.env(self.score, unit, queries, self.keys(chunk), scores))
            scores.copy_(torch.as_tensor(value))
        for span in chunk.spans:
            scores[..., span.offset : span.offset + span.last - span.first].masked_fill_(self.masked(unit, queries, span), -math.inf)


def _merge(one: Part, two: Part) -> Part:
    """Attention to the keys of both parts, from attention to each."""
    lse = torch.logaddexp(one[1], two[1])
    level = _level(lse)
    return one[0] * (one[1] - level).exp_() + two[0] * (two[1] - level).exp_(), lse, torch.maximum(one[2], two[2])


def _level(lse: torch.Tensor) -> torch.Tensor:
    """-inf as 0, from which -inf may be subtracted."""
    return lse.masked_fill(lse == -math.inf, 0)
