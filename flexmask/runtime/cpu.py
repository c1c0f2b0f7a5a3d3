"""Attention on CPU tensors by torch matmuls that skip empty tiles: exact, no compiler, any platform."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..ir import Env, Expr, evaluate
from .segments import EVALUATED, Chunk, Segment, Span, cut, segments, width
from .tile_map import TileMap

# a mod's expression with its captured tensors and scalars
Mod = tuple[Expr, Sequence[torch.Tensor], Sequence[int | float]]

# scores held at once: small enough for the caches, large enough to keep calls few
SCORES = 1 << 20
# fewer keys than this at once make poor matmuls
FEWEST_KEYS = 512
# of the memory for scores, what a thread keeps from call to call at most
KEPT_BYTES = 1 << 23
_LOCAL = threading.local()


def blocks(q_len: int, kv_len: int) -> tuple[int, int]:
    """The block sizes (queries, keys) that suit `forward`: short sequences lose more to the masked half of a tile than to calls."""
    side = 64 if max(q_len, kv_len) <= 1024 else 128
    return min(side, max(1, q_len)), min(side, max(1, kv_len))


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, Hq, Q, Dv] of q's dtype, lse [B, Hq, Q]) of q [B, Hq, Q, D], k [B|1, Hkv, KV, D], v [B|1, Hkv, KV, Dv], any strides.

    Computes in float64 where q is float64, else in float32, which is lse's dtype too. EMPTY tiles of `tile_map` cost nothing; row
    intervals or the `mask` expression decide in PARTIAL ones. Without a map the mask is evaluated everywhere. A row that keeps
    nothing gives 0 and lse -inf. A NaN in a query stays in its row, one in a key or value reaches only rows that keep it.

    >>> import torch
    >>> from flexmask.runtime.cpu import forward
    >>> out, lse = forward(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 5), scale=0.5)
    >>> out.shape, lse[0, 0].exp()
    (torch.Size([1, 1, 2, 5]), tensor([3., 3.]))
    """
    work = _Work(q, k, v, scale, tile_map, mask, score)
    for unit in work.units():
        work.run(unit)
    return work.out, work.lse


@dataclass(frozen=True)
class _Unit:
    """Heads that share a row of the map and are multiplied together: (batch entry, kv head) pairs [first, last), group [g0, g1)."""

    first: int
    last: int
    g0: int
    g1: int
    rows: list[list[Segment]]
    where: tuple[int, int]
    keys: int  # at a time


class _Work:
    """One call: its tensors as [pairs, group, N, D], pairs being (batch entry, kv head)."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        tile_map: TileMap | None,
        mask: Mod | None,
        score: Mod | None,
    ):
        self.batch, self.heads, self.q_len, _ = q.shape
        self.kv_heads, self.kv_len = k.shape[1], k.shape[2]
        self.group = self.heads // max(1, self.kv_heads)
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.map, self.mask, self.score = tile_map, mask, score
        self.block_q, self.block_kv = (tile_map.block_q, tile_map.block_kv) if tile_map else blocks(self.q_len, self.kv_len)
        self.out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
        self.lse = torch.empty(*q.shape[:3], dtype=self.dtype)
        self.scale = scale
        self._q, self._out, self._lse = (self._pairs(x) for x in (q, self.out, self.lse))
        self._k, self._v = k.flatten(0, 1), v.flatten(0, 1)
        self._shared = self.batch > 1 and 1 in (k.shape[0], v.shape[0])
        self._finite = math.isfinite(v.sum(dtype=self.dtype))
        self._places = torch.arange(self.kv_len)
        self._columns = self._places.int()

    def _pairs(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(self.batch * self.kv_heads, self.group, *x.shape[2:])

    def units(self) -> Iterator[_Unit]:
        """Every head once. Pairs go together where the map is the same for them, as many as suit the caches."""
        if not self.lse.numel():
            return
        by_batch, by_head = (1, 1) if self.map is None else _lead(self.map)
        for b in range(by_batch):
            for h in range(by_head):
                rows = self._rows(b, h)
                group = self.group if by_head == 1 else 1
                keys, most = self._sizes(rows, group)
                g0 = h % self.group if by_head > 1 else 0
                for first, last in self._stretches(b, h, by_batch > 1, by_head > 1):
                    for start in range(first, last, most):
                        yield _Unit(start, min(start + most, last), g0, g0 + group, rows, (b, h), keys)

    def _rows(self, b: int, h: int) -> list[list[Segment]]:
        if self.map is not None:
            return segments(self.map, b, h)
        columns, count = -(-self.kv_len // self.block_kv), -(-self.q_len // self.block_q)
        return [[(0, columns, 0 if self.mask is None else EVALUATED)]] * count

    def _sizes(self, rows: list[list[Segment]], group: int) -> tuple[int, int]:
        """Keys at a time, and pairs at a time."""
        widest = max((width(row, self.block_kv, self.kv_len) for row in rows), default=1)
        height = group * self.block_q
        keys = max(1, min(widest, max(FEWEST_KEYS, SCORES // height)))
        return keys, max(1, SCORES // (height * keys))

    def _stretches(self, b: int, h: int, by_batch: bool, by_head: bool) -> list[tuple[int, int]]:
        """Runs of pairs that share the map's entry (b, h) and lie one after the other in k and v."""
        entries = [b] if by_batch else list(range(self.batch))
        if by_head:
            pairs = [entry * self.kv_heads + h // self.group for entry in entries]
            return [(pair, pair + 1) for pair in pairs]
        if by_batch or self._shared:
            return [(entry * self.kv_heads, (entry + 1) * self.kv_heads) for entry in entries]
        return [(0, self.batch * self.kv_heads)]

    def run(self, unit: _Unit) -> None:
        pairs, group = slice(unit.first, unit.last), slice(unit.g0, unit.g1)
        tensors = self._q[pairs, group], self._dense(self._k, unit), self._dense(self._v, unit)
        out, lse = self._out[pairs, group], self._lse[pairs, group]

        scores = _scratch(out.shape[0] * out.shape[1] * min(self.block_q, self.q_len) * unit.keys, self.dtype)
        for i in range(len(unit.rows)):
            self._row(unit, i, tensors, scores, out, lse)

    def _row(
        self, unit: _Unit, i: int, tensors: tuple[torch.Tensor, ...], scores: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """One block row of a unit: fills its part of out [pairs, group, Q, Dv] and lse [pairs, group, Q]."""
        queries = slice(i * self.block_q, min((i + 1) * self.block_q, self.q_len))
        chunks = cut(unit.rows[i], unit.keys, self.block_kv, self.kv_len)
        if not chunks:
            out[:, :, queries], lse[:, :, queries] = 0, -math.inf
            return
        q, k, v = tensors
        block = q[:, :, queries].to(self.dtype).mul(self.scale).flatten(1, 2)
        found = self._part(block, k, v, unit, queries, chunks[0], scores)
        for chunk in chunks[1:]:
            found = _merge(found, self._part(block, k, v, unit, queries, chunk, scores))
        out[:, :, queries] = found[0].view(*q.shape[:2], -1, out.shape[-1])
        lse[:, :, queries] = found[1].view(*q.shape[:2], -1)

    def _dense(self, x: torch.Tensor, unit: _Unit) -> torch.Tensor:
        """The unit's keys or values, [pairs, KV, D], as matmuls take them without copying."""
        start = unit.first % self.kv_heads if len(x) < self.batch * self.kv_heads else unit.first
        part = x[start : start + unit.last - unit.first].to(self.dtype)
        return part if part.stride(-1) == 1 and part.stride(-2) >= part.shape[-1] else part.contiguous()

    def _part(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, unit: _Unit, queries: slice, chunk: Chunk, buffer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention [pairs, rows, Dv] to the keys of one chunk, and its lse [pairs, rows, 1]. The scores lie in `buffer`."""
        shape = (len(q), q.shape[1], chunk.width)
        scores = buffer[: math.prod(shape)].view(shape)
        torch.bmm(q, _gather(k, chunk).transpose(1, 2), out=scores)
        if self.score is not None or chunk.spans:
            self._change(scores.view(len(q), unit.g1 - unit.g0, -1, chunk.width), unit, queries, chunk)
        top = scores.amax(-1, keepdim=True)
        torch.softmax(scores, -1, out=scores)
        # softmax is 1 / sum at the greatest score
        lse = top - scores.amax(-1, keepdim=True).log_()
        values = _gather(v, chunk)
        out = torch.bmm(scores, values) if self._finite else _weigh(scores, values)
        nothing = top == -math.inf
        if bool(nothing.any()):
            out.masked_fill_(nothing, 0)
            lse.masked_fill_(nothing, -math.inf)
        return out, lse

    def _change(self, scores: torch.Tensor, unit: _Unit, queries: slice, chunk: Chunk) -> None:
        """The score mod, then the mask, on scores [pairs, group, block_q, keys], in place."""
        if self.score is not None:
            keys = torch.cat([self._places[a:z] for a, z in chunk.runs])
            scores.copy_(self._evaluate(self.score, unit, queries, keys, scores))
        for span in chunk.spans:
            masked = self._masked(unit, queries, span)
            scores[..., span.offset : span.offset + span.last - span.first].masked_fill_(masked, -math.inf)

    def _masked(self, unit: _Unit, queries: slice, span: Span) -> torch.Tensor:
        if span.evaluated:
            assert self.mask is not None
            return self._evaluate(self.mask, unit, queries, self._places[span.first : span.last]).logical_not()
        assert self.map is not None and self.map.intervals is not None
        columns, bounds = self._columns[span.first : span.last], self.map.intervals
        b, h = (min(x, n - 1) for x, n in zip(unit.where, bounds.starts.shape[:2], strict=True))
        starts, ends = (x[b, h, queries, :, None] for x in (bounds.starts, bounds.ends))
        masked = (columns < starts[:, 0]).logical_or_(columns >= ends[:, 0])
        for piece in range(1, starts.shape[1]):
            masked.logical_and_((columns < starts[:, piece]).logical_or_(columns >= ends[:, piece]))
        return masked

    def _evaluate(self, mod: Mod, unit: _Unit, queries: slice, keys: torch.Tensor, score: torch.Tensor | None = None) -> torch.Tensor:
        """The mod's value, broadcastable to [pairs, group, block_q, keys]."""
        pair = torch.arange(unit.first, unit.last).view(-1, 1, 1, 1)
        indices = {
            "b": pair // self.kv_heads,
            "h": pair % self.kv_heads * self.group + torch.arange(unit.g0, unit.g1).view(-1, 1, 1),
            "q_idx": torch.arange(queries.start, queries.stop).view(-1, 1),
            "kv_idx": keys,
            "score": score,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
        }
        return torch.as_tensor(evaluate(mod[0], Env(indices, mod[1], mod[2])))


def _scratch(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Room for that many numbers. It outlives the call, for the first touch of new memory is slow; each thread has its own."""
    buffer = getattr(_LOCAL, "buffer", None)
    size = count * dtype.itemsize
    if buffer is None or len(buffer) < size:
        with torch.inference_mode(False):  # a later call may be outside it
            buffer = torch.empty(size, dtype=torch.uint8)
        if size <= KEPT_BYTES:
            _LOCAL.buffer = buffer
    return buffer[:size].view(dtype)


def _lead(tile_map: TileMap) -> tuple[int, int]:
    """Batch entries and heads that the map tells apart."""
    numbers = tile_map.ranges if tile_map.ranges is not None else tile_map.counts
    assert numbers is not None
    return numbers.shape[0], numbers.shape[1]


def _gather(x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    parts = [x[:, a:z] for a, z in chunk.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _merge(one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the keys of both parts, from attention to each."""
    lse = torch.logaddexp(one[1], two[1])
    level = lse.masked_fill(lse == -math.inf, 0)
    return one[0] * (one[1] - level).exp_() + two[0] * (two[1] - level).exp_(), lse


def _weigh(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """p @ v where v holds infinities or NaN, which a weight of 0 must not let through."""
    out = torch.bmm(p, v.nan_to_num(0, 0, 0))
    kept = (p != 0).to(p.dtype)
    nan, above, below = (torch.bmm(kept, x.to(p.dtype)) > 0 for x in (v.isnan(), v == math.inf, v == -math.inf))
    out.masked_fill_(above, math.inf).masked_fill_(below, -math.inf)
    return out.masked_fill_(nan | (above & below), math.nan)
