"""Kept intervals of every row (or column), as numbers: an interval form evaluated for given lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..analysis import MOST_PIECES, Form
from ..errors import NotInterval
from ..ir import B, Env, Expr, H, evaluate, uses

# entries evaluated at once: bounds are int64 while they are computed, and a million of them at a time would be most of the memory
CHUNK = 1 << 18

_Pieces = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Intervals:
    """Per row the kept key intervals [start, end) (`axis` "row"), or per key column the kept query intervals ("column").

    `starts`, `ends`: int32 [B|1, H|1, N, pieces], clipped to [0, length), ascending, disjoint and not touching; empty ones are
    (0, 0) and come last.

    >>> from flexmask import masks
    >>> masks.sliding_window(2).intervals(4, 4, axis="row")
    Intervals(row, 4 of length 4, 1 piece)
    """

    starts: torch.Tensor
    ends: torch.Tensor
    length: int
    axis: str = "row"

    def __repr__(self) -> str:
        n, pieces = self.starts.shape[-2:]
        return f"Intervals({self.axis}, {n} of length {self.length}, {pieces} piece{'s' * (pieces != 1)})"

    def to_dense(self) -> torch.Tensor:
        """The mask written out, bool [B|1, H|1, Q, KV], whichever axis the intervals belong to: for tests and small pictures.

        >>> from flexmask import masks
        >>> masks.causal.intervals(2, 2, axis="column").to_dense().int().tolist()
        [[[[1, 0], [1, 1]]]]
        """
        places = torch.arange(self.length, device=self.starts.device)
        kept = torch.zeros(*self.starts.shape[:-1], self.length, dtype=torch.bool, device=self.starts.device)
        for start, end in zip(self.starts.unbind(-1), self.ends.unbind(-1), strict=True):
            kept |= (places >= start[..., None]) & (places < end[..., None])
        return kept if self.axis == "row" else kept.transpose(-1, -2)

    def to_flashmask(self, causal: bool = False) -> torch.Tensor:
        """FlashMask's `startend_row_indices`: the *masked* query runs of each key column, int32 [B|1, H|1, KV, 1 | 2 | 4].

        Not causal: 2 numbers (from here down, up to here) where each column keeps one interval, else 4 (two runs [start, end)).
        `causal=True` is for a kernel that masks queries above the diagonal by itself: 1 number (from here down) or 2 (one run).
        Reads the values, so on a GPU this waits. Raises NotInterval for row intervals, and where a column has more masked runs.
        FlashMask: Wang et al., https://arxiv.org/abs/2410.01359.

        >>> from flexmask import masks
        >>> masks.causal.intervals(3, 3).to_flashmask(causal=True).flatten().tolist()
        [3, 3, 3]
        """
        if self.axis != "column":
            raise NotInterval('FlashMask describes columns: ask for intervals(axis="column")')
        return _causal_runs(self) if causal else _masked_runs(self)


def solve(
    form: Form,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int | float],
    *,
    q_len: int,
    kv_len: int,
    batch: int = 1,
    heads: int = 1,
    device: torch.device | str = "cpu",
) -> Intervals:
    """The intervals of the form's pieces for these lengths; its residue and its sorted tables are the caller's concern.

    Work and memory are proportional to the number of rows (or columns). The batch and head dimensions are 1 where no bound depends
    on them. Raises NotInterval where the form has more pieces than are kept and some row needs them; only then values are read.
    """
    count, length = (q_len, kv_len) if form.axis == "row" else (kv_len, q_len)
    bounds = [(p.start, p.stop) for p in form.pieces]
    kept = min(max(1, len(bounds)), MOST_PIECES)
    lead = tuple(n if any(uses(e, leaf) for pair in bounds for e in pair) else 1 for n, leaf in ((batch, B), (heads, H)))
    starts = torch.zeros(*lead, count, kept, dtype=torch.int32, device=device)
    ends = torch.zeros_like(starts)
    step = max(1, CHUNK // max(1, lead[0] * lead[1]))
    for first in range(0, count, step):
        last = min(first + step, count)
        env = _env(form.axis, first, last, q_len, kv_len, lead, tensors, scalars, device)
        shape = (*lead, last - first)
        pieces = [(_bound(a, env, shape, length, device), _bound(z, env, shape, length, device)) for a, z in bounds]
        settled = _settle(pieces, length)
        if any(bool((end > 0).any()) for _, end in settled[kept:]):
            raise NotInterval(f"some {form.axis} keeps more than {MOST_PIECES} pieces")
        for i, (start, end) in enumerate(settled[:kept]):
            starts[:, :, first:last, i], ends[:, :, first:last, i] = start, end
    return Intervals(starts, ends, length, form.axis)


def ascending(table: torch.Tensor) -> bool | torch.Tensor:
    """Whether the table ascends (not strictly) along its last axis: a bool on the CPU, a 0-d bool tensor on a GPU, never a sync."""
    flag = torch.ones((), dtype=torch.bool, device=table.device)
    if table.dim() and table.shape[-1] > 1:
        flag = (table[..., 1:] >= table[..., :-1]).all()
    return flag if table.is_cuda else bool(flag)


def _env(
    axis: str,
    first: int,
    last: int,
    q_len: int,
    kv_len: int,
    lead: tuple[int, ...],
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int | float],
    device: torch.device | str,
) -> Env:
    index = torch.arange(first, last, device=device).view(1, 1, -1)
    indices = {
        "b": torch.arange(lead[0], device=device).view(-1, 1, 1),
        "h": torch.arange(lead[1], device=device).view(1, -1, 1),
        "q_idx" if axis == "row" else "kv_idx": index,
        "q_len": q_len,
        "kv_len": kv_len,
    }
    return Env(indices, tensors, scalars)


def _bound(expr: Expr, env: Env, shape: tuple[int, ...], length: int, device: torch.device | str) -> torch.Tensor:
    value = evaluate(expr, env)
    if not isinstance(value, torch.Tensor):
        return torch.full(shape, min(max(int(value), 0), length), dtype=torch.int32, device=device)
    return value.clamp(0, length).to(torch.int32).expand(shape)


def _settle(pieces: _Pieces, length: int) -> _Pieces:
    """The same kept sets, each row's pieces ascending, disjoint, not touching, the empty ones (0, 0) and last."""
    beyond = length + 1  # an empty piece sorts last and touches nothing
    pieces = [(torch.where(s < e, s, beyond), torch.where(s < e, e, beyond)) for s, e in pieces]
    pieces = _sort(pieces)
    for i in range(1, len(pieces)):
        (s0, e0), (s1, e1) = pieces[i - 1 : i + 1]
        touching = s1 <= e0
        pieces[i] = torch.where(touching, s0, s1), torch.where(touching, torch.maximum(e0, e1), e1)
        pieces[i - 1] = s0.masked_fill(touching, beyond), e0.masked_fill(touching, beyond)
    return [(s.masked_fill(s == beyond, 0), e.masked_fill(s == beyond, 0)) for s, e in _sort(pieces)]


def _sort(pieces: _Pieces) -> _Pieces:
    """Each row's pieces by start: bubble sort, for torch.sort is slow on rows of three."""
    pieces = list(pieces)
    for stop in range(len(pieces) - 1, 0, -1):
        for i in range(stop):
            (s0, e0), (s1, e1) = pieces[i : i + 2]
            swap = s1 < s0
            pieces[i] = torch.where(swap, s1, s0), torch.where(swap, e1, e0)
            pieces[i + 1] = torch.where(swap, s0, s1), torch.where(swap, e0, e1)
    return pieces


def _gaps(of: Intervals) -> _Pieces:
    """The complement: runs [start, end) of masked places, ascending, empty ones last as (length + 1, length + 1)."""
    beyond, previous, runs = of.length + 1, torch.zeros_like(of.starts[..., 0]), []
    for start, end in zip(of.starts.unbind(-1), of.ends.unbind(-1), strict=True):
        empty = start == end
        runs.append((previous, start.masked_fill(empty, of.length)))
        previous = torch.where(empty, of.length, end)
    runs.append((previous, torch.full_like(previous, of.length)))
    return _sort([(torch.where(s < e, s, beyond), torch.where(s < e, e, beyond)) for s, e in runs])


def _masked_runs(of: Intervals) -> torch.Tensor:
    runs, nothing = _gaps(of), of.length + 1
    if not bool((of.ends[..., 1:] > 0).any()):  # one kept interval: rows before it and rows after it are masked
        return torch.stack([of.ends[..., 0], of.starts[..., 0]], -1)
    if any(bool((s < nothing).any()) for s, _ in runs[2:]):
        raise NotInterval("a column has more than two masked runs, and FlashMask holds two")
    (s0, e0), (s1, e1) = [(s.masked_fill(s == nothing, of.length), e.masked_fill(s == nothing, of.length)) for s, e in runs[:2]]
    return torch.stack([s1, e1, s0, e0], -1).to(torch.int32)


def _causal_runs(of: Intervals) -> torch.Tensor:
    """What is masked on and below the diagonal of each column."""
    diagonal = torch.arange(of.starts.shape[-2], device=of.starts.device, dtype=torch.int32)
    first_kept = torch.where(of.ends[..., 0] > 0, of.starts[..., 0], of.length)
    if bool((first_kept < diagonal).any()):
        raise NotInterval("a column keeps queries above the diagonal: export with causal=False")
    below = [(torch.maximum(s, diagonal), e) for s, e in _gaps(of)]
    runs = _settle([(s.clamp(max=of.length), e.clamp(max=of.length)) for s, e in below], of.length)
    if any(bool((e > s).any()) for s, e in runs[1:]):
        raise NotInterval("a column has more than one masked run below the diagonal, and FlashMask holds one")
    start, end = runs[0]
    start, end = start.masked_fill(start == end, of.length), end.masked_fill(start == end, of.length)
    one = [start] if bool((end == of.length).all()) else [start, end]
    return torch.stack(one, -1).to(torch.int32)
