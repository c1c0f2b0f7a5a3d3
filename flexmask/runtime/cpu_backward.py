"""Gradients of attention on CPU tensors, over the tiles that the forward visits: exact, and the same from run to run."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import SCORE, const, derivative, evaluate_all
from .cpu_walk import Given, Mod, Unit, Walk, gather, scratch, weigh
from .extras import NO_EXTRAS, Extras
from .segments import Chunk
from .table_gradients import TableGradients, gradient_loads
from .tile_map import TileMap

# scores held at once, with two or three numbers for each where the forward has one
SCORES = 1 << 19
# fewer keys than this at once make poor matmuls
FEWEST_KEYS = 512
# sums and differences of numbers below this are finite in float32
LARGEST = 1e30
ZERO, ONE = const(0.0), const(1.0)
# places [.., keys offset : offset + n] of a chunk that carry no gradient, as a bool tensor that broadcasts to them
Hidden = list[tuple[slice, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the shapes and dtypes of q, k, v, of the score's captured float tables by their numbers, and of the sinks if any: of
    the dtype that the computation has."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tables: dict[int, torch.Tensor]
    sinks: torch.Tensor | None = None


@torch.no_grad()
def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    scale: float,
    tile_map: TileMap | None = None,
    mask: Mod | None = None,
    score: Mod | None = None,
    tables: Collection[int] | None = None,
    extras: Extras = NO_EXTRAS,
) -> Gradients:
    """Gradients in q, k, v, the score's tables and the sinks, given dout [B, Hq, Q, Dv] and dlse [B, Hq, Q] (None: 0), any strides.

    The other arguments are those of `cpu.forward` (the map by rows), and its results out and lse. `tables` names the captured tensors
    whose gradients are wanted; None means every float tensor that the score's value depends on. Computes in float64 where q is
    float64, else in float32, sums included; memory grows with the lengths, not with their product. Scores are computed anew from q, k
    and lse. Deterministic: everything is added in one order. Pairs that are not kept and rows that keep nothing give and get exactly
    0, whatever q, k, v and dout hold there, NaN and infinities included.

    >>> import torch
    >>> from flexmask.runtime.cpu import forward
    >>> from flexmask.runtime.cpu_backward import backward
    >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 5)
    >>> out, lse, _ = forward(q, k, v, scale=0.5)
    >>> backward(q, k, v, out, lse, torch.ones_like(out), scale=0.5).v[0, 0, :, 0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    work = _Work(Given(q, k, v, scale, tile_map, mask, score, extras))
    work.prepare(out, lse, dout, dlse)
    work.changes = None if score is None else _Changes(score, tables, work.dtype)
    for unit in work.units():
        work.run(unit)
    if work.factor != 1:
        work.dv.mul_(work.factor)
    dk, dv = (sums.view(x.shape).to(x.dtype) for sums, x in ((work.dk, k), (work.dv, v)))
    return Gradients(work.dq.view(q.shape), dk, dv, {} if work.changes is None else work.changes.tables.result(), work.sinks_gradient())


@dataclass(frozen=True)
class _Rows:
    """A unit's block row: scaled queries and dout [pairs, rows, ..], lse (inf where empty) and delta [pairs, rows, 1]."""

    unit: Unit
    queries: slice
    q: torch.Tensor
    dout: torch.Tensor
    level: torch.Tensor
    delta: torch.Tensor

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """[pairs, rows, ..] as [pairs, group, queries, ..]."""
        return x.view(len(x), self.unit.g1 - self.unit.g0, -1, x.shape[-1])


class _Changes:
    """What a score mod does to gradients: its slopes, and the tables that get some."""

    def __init__(self, score: Mod, wanted: Collection[int] | None, dtype: torch.dtype):
        self.slope = derivative(score[0], SCORE)
        self.loads = [(load, slope) for load, slope in gradient_loads(score[0]) if wanted is None or load.value in wanted]
        self.tables = TableGradients({load.value: score[1][load.value] for load, _ in self.loads}, dtype)
        # evaluated together, as they share parts
        self.exprs = [score[0], self.slope, *[part for load, slope in self.loads for part in (slope, *load.args)]]

    def apply(self, ds: torch.Tensor, values: list[Any], hidden: Hidden) -> None:
        """ds [pairs, group, queries, keys], the gradient in the score's value, becomes that in q.k; the tables get theirs."""
        rest = iter(values[2:])
        for load, slope in self.loads:
            part, factor = ds, next(rest)
            if slope is not ONE:
                part = ds * factor
                _hide(part, hidden)
            self.tables.add(load.value, [next(rest) for _ in load.args], part)
        if self.slope is ZERO:
            ds.zero_()
        elif self.slope is not ONE:
            ds.mul_(torch.as_tensor(values[1]))
            _hide(ds, hidden)


class _Work(Walk):
    """One call, and its results."""

    changes: _Changes | None = None

    def __init__(self, given: Given):
        super().__init__(given, SCORES, FEWEST_KEYS)
        self.factor = 1.0 if self.dropout is None else self.dropout[2]
        self.dq = torch.zeros(self.q.shape, dtype=given.q.dtype)
        self.dk, self.dv = (torch.zeros(x.shape, dtype=self.dtype) for x in (self.k, self.v))

    def prepare(self, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None) -> None:
        """What the rows need besides q, and whether all numbers are `tame`: no product of theirs is an infinity, so 0 times it is 0."""
        empty = lse == -math.inf
        self._any_empty = bool(empty.any())
        delta = (dout.to(self.dtype) * out.to(self.dtype)).sum(-1)
        if dlse is not None:
            delta -= dlse
        # exp(score - inf) is 0, the weight of every key in a row that keeps nothing
        self._level = self.pairs(lse.to(self.dtype).masked_fill(empty, math.inf))
        self._delta, self._dout = self.pairs(delta.masked_fill_(empty, 0)), self.pairs(dout)
        q, k, v, grad, rest = (_reach(x) for x in (self.q, self.k, self.v, dout, delta))
        self._finite = all(math.isfinite(x) for x in (q, k, grad))
        largest = (q * k * abs(self.scale) * self.q.shape[-1], grad * v * self.v.shape[-1] * self.factor, rest)
        self._tame = self._finite and all(x < LARGEST for x in largest)

    def sinks_gradient(self) -> torch.Tensor | None:
        """[Hq]: what a sink takes from every row, by the probability that it has there."""
        if self.extras.sinks is None:
            return None
        level, delta = (x.reshape(self.batch, self.heads, self.q_len) for x in (self._level, self._delta))
        share = (self.extras.sinks.to(self.dtype)[:, None] - level).exp_()
        return share.mul_(delta).sum((0, 2)).neg_()

    def run(self, unit: Unit) -> None:
        inputs = self.dense(self.k, unit), self.dense(self.v, unit)
        sums = self.part(self.dk, unit), self.part(self.dv, unit)
        count = 2 if self.changes is None else 3
        buffers = scratch(count * self.most_scores(unit), self.dtype).view(count, -1)
        for i in range(len(unit.rows)):
            chunks = self.chunks(unit, i)
            if chunks:
                rows = self._rows_of(unit, self.queries(i))
                parts = [self._chunk(rows, chunk, inputs, sums, buffers) for chunk in chunks]
                self.dq[unit.heads][:, :, rows.queries] = rows.by_head(sum(parts[1:], parts[0]).mul_(self.scale))

    def _rows_of(self, unit: Unit, queries: slice) -> _Rows:
        q, dout = (x[unit.heads][:, :, queries].to(self.dtype).flatten(1, 2) for x in (self.q, self._dout))
        level, delta = (x[unit.heads][:, :, queries].flatten(1, 2).unsqueeze(-1) for x in (self._level, self._delta))
        return _Rows(unit, queries, q * self.scale, dout, level, delta)

    def _chunk(
        self,
        rows: _Rows,
        chunk: Chunk,
        inputs: tuple[torch.Tensor, torch.Tensor],
        sums: tuple[torch.Tensor, torch.Tensor],
        buffers: torch.Tensor,
    ) -> torch.Tensor:
        """Adds to dk and dv what one chunk of keys gets from the rows, and returns what these get: dq [pairs, rows, D], not yet scaled."""
        k, v = (gather(x, chunk) for x in inputs)
        shape = (*rows.q.shape[:2], chunk.width)
        # the products stay beside the weights where slopes depend on them
        ds, p, products = (x[: math.prod(shape)].view(shape) for x in (buffers[0], buffers[1], buffers[-1]))
        torch.bmm(rows.q, k.mT, out=products)
        hidden = self._hidden(rows, chunk)
        values = self._score_values(rows, chunk, products)
        if values:
            rows.by_head(p).copy_(torch.as_tensor(values[0]))
        self._weights(rows, p, hidden)
        torch.bmm(rows.dout, v.mT, out=ds)
        dropped = self.dropped(rows.unit, rows.queries, chunk)
        if dropped is not None:
            ds.mul_(self.factor).masked_fill_(dropped, 0)
        ds.sub_(rows.delta).mul_(p)
        if dropped is not None:
            p.masked_fill_(dropped, 0)
        self._add(sums[1], p, rows.dout, chunk)
        if not self._tame:
            _hide(rows.by_head(ds), hidden)
        if self.changes is not None:
            self.changes.apply(rows.by_head(ds), values, hidden)
        self._add(sums[0], ds, rows.q, chunk)
        return torch.bmm(ds, k) if self._finite else weigh(ds, k)

    def _hidden(self, rows: _Rows, chunk: Chunk) -> Hidden:
        """The masked places of a chunk, and the rows that keep nothing or that the score turned to -inf."""
        hidden = [
            (slice(span.offset, span.offset + span.last - span.first), self.masked(rows.unit, rows.queries, span)) for span in chunk.spans
        ]
        if self._any_empty:
            hidden.append((slice(None), rows.by_head(rows.level == math.inf)))
        return hidden

    def _score_values(self, rows: _Rows, chunk: Chunk, products: torch.Tensor) -> list[Any]:
        """The score mod's value, slopes and indices, each broadcastable to [pairs, group, queries, keys]."""
        if self.changes is None or self.score is None:
            return []
        return evaluate_all(self.changes.exprs, self.env(self.score, rows.unit, rows.queries, self.keys(chunk), rows.by_head(products)))

    def _weights(self, rows: _Rows, p: torch.Tensor, hidden: Hidden) -> None:
        """Scores p become exp(p - lse) in place, 0 where hidden."""
        p.sub_(rows.level).exp_()
        if self._tame and self.changes is None:
            _cap(rows.by_head(p), hidden)
        else:
            _hide(rows.by_head(p), hidden)

    def _add(self, sums: torch.Tensor, weights: torch.Tensor, x: torch.Tensor, chunk: Chunk) -> None:
        """Adds weights^T @ x [pairs, keys, ..] to the chunk's rows of sums [pairs, KV, ..]."""
        offset = 0
        for first, last in chunk.runs:
            part = weights[..., offset : offset + last - first].mT
            if self._finite:
                sums[:, first:last].baddbmm_(part, x)
            else:
                sums[:, first:last].add_(weigh(part, x))
            offset += last - first


def _hide(x: torch.Tensor, hidden: Hidden) -> None:
    """Zeros at hidden places: a product with 0 would keep a NaN."""
    for keys, places in hidden:
        x[..., keys].masked_fill_(places, 0)


def _cap(x: torch.Tensor, hidden: Hidden) -> None:
    """The same where no number is NaN or below 0: the lesser of each and 0 or inf, which is faster than a fill of every head."""
    for keys, places in hidden:
        limit = x.new_full(places.shape, math.inf).masked_fill_(places, 0)
        torch.minimum(x[..., keys], limit, out=x[..., keys])


def _reach(x: torch.Tensor) -> float:
    """The greatest magnitude; NaN if one is."""
    if not x.numel():
        return 0.0
    low, high = x.aminmax()
    return float(torch.maximum(-low, high))
