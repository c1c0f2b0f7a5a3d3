"""How the CPU goes through the kept tiles of a mask: which heads and keys at a time, which places to mask, what a mod is there."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..ir import Env, Expr, evaluate
from .dropout import dropped, row_keys
from .extras import Extras
from .segments import EVALUATED, Chunk, Segment, Span, cut, segments, width
from .tile_map import TileMap

# a mod's expression with its captured tensors and scalars
Mod = tuple[Expr, Sequence[torch.Tensor], Sequence[int | float]]

# of the memory for scores, what a thread keeps from call to call at most
KEPT_BYTES = 1 << 23
_LOCAL = threading.local()


def blocks(q_len: int, kv_len: int) -> tuple[int, int]:
    """The block sizes (queries, keys) that suit the CPU: short sequences lose more to the masked half of a tile than to calls."""
    side = 64 if max(q_len, kv_len) <= 1024 else 128
    return min(side, max(1, q_len)), min(side, max(1, kv_len))


@dataclass(frozen=True)
class Unit:
    """Heads that share a row of the map and are multiplied together: (batch entry, kv head) pairs [first, last), group [g0, g1)."""

    first: int
    last: int
    g0: int
    g1: int
    rows: list[list[Segment]]
    where: tuple[int, int]
    keys: int  # at a time

    @property
    def heads(self) -> tuple[slice, slice]:
        return slice(self.first, self.last), slice(self.g0, self.g1)


class Given(NamedTuple):
    """What a call on the CPU works on: q [B, Hq, Q, D], k [B | 1, Hkv, KV, D], v [B | 1, Hkv, KV, Dv], and how."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    tile_map: TileMap | None
    mask: Mod | None
    score: Mod | None
    extras: Extras


class Walk:
    """One call's q, k, v as [pairs, group, N, D], pairs being (batch entry, kv head), and the way through its map.

    `scores` are held at once, of at least `fewest` keys.
    """

    def __init__(self, given: Given, scores: int, fewest: int):
        q, k, v, scale, tile_map, mask, score, extras = given
        self.batch, self.heads, self.q_len, _ = q.shape
        self.kv_heads, self.kv_len = k.shape[1], k.shape[2]
        self.group = self.heads // max(1, self.kv_heads)
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.map, self.mask, self.score, self.scale = tile_map, mask, score, scale
        self.block_q, self.block_kv = (tile_map.block_q, tile_map.block_kv) if tile_map else blocks(self.q_len, self.kv_len)
        self.q, self.k, self.v = self.pairs(q), k.flatten(0, 1), v.flatten(0, 1)
        self.extras, self.dropout = extras, extras.dropout
        self._scores, self._fewest = scores, fewest
        self._shared = self.batch > 1 and 1 in (k.shape[0], v.shape[0])
        self._places = torch.arange(self.kv_len)
        self._columns = self._places.int()

    def pairs(self, x: torch.Tensor) -> torch.Tensor:
        """[B, Hq, ..] as [pairs, group, ..]."""
        return x.reshape(self.batch * self.kv_heads, self.group, *x.shape[2:])

    def units(self) -> Iterator[Unit]:
        """Every head once. Pairs go together where the map is the same for them, as many as suit the caches."""
        if not self.batch * self.heads * self.q_len:
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
                        yield Unit(start, min(start + most, last), g0, g0 + group, rows, (b, h), keys)

    def _rows(self, b: int, h: int) -> list[list[Segment]]:
        if self.map is not None:
            return segments(self.map, b, h)
        columns, count = -(-self.kv_len // self.block_kv), -(-self.q_len // self.block_q)
        return [[(0, columns, 0 if self.mask is None else EVALUATED)]] * count

    def _sizes(self, rows: list[list[Segment]], group: int) -> tuple[int, int]:
        """Keys at a time, and pairs at a time."""
        widest = max((width(row, self.block_kv, self.kv_len) for row in rows), default=1)
        height = group * self.block_q
        keys = max(1, min(widest, max(self._fewest, self._scores // height)))
        return keys, max(1, self._scores // (height * keys))

    def _stretches(self, b: int, h: int, by_batch: bool, by_head: bool) -> list[tuple[int, int]]:
        """Runs of pairs that share the map's entry (b, h) and lie one after the other in k and v."""
        entries = [b] if by_batch else list(range(self.batch))
        if by_head:
            pairs = [entry * self.kv_heads + h // self.group for entry in entries]
            return [(pair, pair + 1) for pair in pairs]
        if by_batch or self._shared:
            return [(entry * self.kv_heads, (entry + 1) * self.kv_heads) for entry in entries]
        return [(0, self.batch * self.kv_heads)]

    def queries(self, i: int) -> slice:
        """The rows of block row `i`."""
        return slice(i * self.block_q, min((i + 1) * self.block_q, self.q_len))

    def chunks(self, unit: Unit, i: int) -> list[Chunk]:
        """What block row `i` keeps, in chunks."""
        return cut(unit.rows[i], unit.keys, self.block_kv, self.kv_len)

    def most_scores(self, unit: Unit) -> int:
        """Scores in the largest chunk of a unit."""
        return (unit.last - unit.first) * (unit.g1 - unit.g0) * min(self.block_q, self.q_len) * unit.keys

    def part(self, x: torch.Tensor, unit: Unit) -> torch.Tensor:
        """The unit's pairs of x [pairs, KV, ..], or of x [kv heads, KV, ..] that all batch entries share."""
        start = unit.first % self.kv_heads if len(x) < self.batch * self.kv_heads else unit.first
        return x[start : start + unit.last - unit.first]

    def dense(self, x: torch.Tensor, unit: Unit) -> torch.Tensor:
        """The unit's keys or values, [pairs, KV, D], as matmuls take them without copying."""
        part = self.part(x, unit).to(self.dtype)
        return part if part.stride(-1) == 1 and part.stride(-2) >= part.shape[-1] else part.contiguous()

    def masked(self, unit: Unit, queries: slice, span: Span) -> torch.Tensor:
        """The places in a span that are not kept, broadcastable to [pairs, group, block_q, keys]."""
        if span.evaluated:
            assert self.mask is not None
            env = self.env(self.mask, unit, queries, self._places[span.first : span.last])
            return torch.as_tensor(evaluate(self.mask[0], env)).logical_not()
        assert self.map is not None and self.map.intervals is not None
        columns, bounds = self._columns[span.first : span.last], self.map.intervals
        b, h = (min(x, n - 1) for x, n in zip(unit.where, bounds.starts.shape[:2], strict=True))
        starts, ends = (x[b, h, queries, :, None] for x in (bounds.starts, bounds.ends))
        masked = (columns < starts[:, 0]).logical_or_(columns >= ends[:, 0])
        for piece in range(1, starts.shape[1]):
            masked.logical_and_((columns < starts[:, piece]).logical_or_(columns >= ends[:, piece]))
        return masked

    def keys(self, chunk: Chunk) -> torch.Tensor:
        """kv_idx in a chunk."""
        return torch.cat([self._places[a:z] for a, z in chunk.runs])

    def env(self, mod: Mod, unit: Unit, queries: slice, keys: torch.Tensor, score: torch.Tensor | None = None) -> Env:
        """A mod's captures, and the indices at a unit's block row and these keys: its values broadcast to [pairs, group, block_q, keys]."""
        b, h, q_idx = self._rows_at(unit, queries)
        indices = {
            "b": b,
            "h": h,
            "q_idx": q_idx,
            "kv_idx": keys,
            "score": score,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
        }
        return Env(indices, mod[1], mod[2])

    def _rows_at(self, unit: Unit, queries: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Batch entry, query head and query, broadcastable to [pairs, group, block_q, 1]."""
        pair = torch.arange(unit.first, unit.last).view(-1, 1, 1, 1)
        h = pair % self.kv_heads * self.group + torch.arange(unit.g0, unit.g1).view(-1, 1, 1)
        return pair // self.kv_heads, h, torch.arange(queries.start, queries.stop).view(-1, 1)

    def dropped(self, unit: Unit, queries: slice, chunk: Chunk) -> torch.Tensor | None:
        """Whether pairs are dropped, bool [pairs, rows, keys], the rows of a group's heads after each other; None without dropout."""
        if self.dropout is None:
            return None
        seed, threshold, _ = self.dropout
        return dropped(row_keys(seed, *self._rows_at(unit, queries)), self.keys(chunk), threshold).flatten(1, 2)

    def sinks(self, unit: Unit) -> torch.Tensor | None:
        """The unit's sinks, broadcastable to [pairs, group, queries]."""
        if self.extras.sinks is None:
            return None
        return self.extras.sinks.to(self.dtype)[self._rows_at(unit, slice(0, 1))[1][..., 0]]


def scratch(count: int, dtype: torch.dtype) -> torch.Tensor:
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


def gather(x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """The chunk's rows of x [pairs, KV, ..], side by side."""
    parts = [x[:, a:z] for a, z in chunk.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def weigh(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """p @ x where x holds infinities or NaN, which a weight of 0 must not let through."""
    out = torch.bmm(p, x.nan_to_num(0, 0, 0))
    sign, infinite = p.sign(), (x == math.inf).to(p.dtype) - (x == -math.inf).to(p.dtype)
    kept = sign.abs()
    surplus, count = torch.bmm(sign, infinite), torch.bmm(kept, infinite.abs())
    above, below = surplus > -count, surplus < count
    nan = torch.bmm(kept, x.isnan().to(p.dtype)) > 0
    out.masked_fill_(above, math.inf).masked_fill_(below, -math.inf)
    return out.masked_fill_(nan | (above & below), math.nan)
