"""The box test run by torch: summaries of its terms for each block, and from them a state for each tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..analysis import BoxTest
from ..ir import FLOAT, B, Env, Expr, H, Q, const, evaluate, make, uses
from .grid import EMPTY, FULL, PARTIAL, Grid

# of a tile that the test does not decide
UNKNOWN = 3
# positions of an axis at which a term is evaluated at a time; a block that is longer is evaluated at once
POSITIONS = 1 << 18
# values held for each tile while a test is evaluated: its expression nodes
_PER_TILE = 16
# a tile that the test does not decide may be looked at in parts, this many along each axis; and so many such tiles at a time
PARTS, _PARTED = 8, 1 << 11


def classify(
    test: BoxTest,
    grid: Grid,
    tensors: Sequence[torch.Tensor] = (),
    scalars: Sequence[int | float] = (),
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """int8 [B|1, H|1, nQ, nK] (`grid.shape`): EMPTY (0) where the tile keeps nothing, FULL (2) where it keeps all, else UNKNOWN (3).

    `tensors` and `scalars` are what the mask captures. O(lengths + tiles) work; memory besides the result does not grow with the
    number of tiles. Nothing is waited for on a GPU.

    >>> from flexmask.analysis import box_test
    >>> from flexmask.ir import K, Q
    >>> classify(box_test(K <= Q, 0), Grid(6, 6, 2, 2))[0, 0].tolist()
    [[3, 0, 0], [2, 3, 0], [2, 2, 3]]
    """
    states = torch.empty(grid.shape, dtype=torch.int8, device=device)
    if states.numel() == 0:
        return states
    tables = (*tensors, *summaries(test, grid, tensors, scalars, device))
    state, leaves = _state(test), _lead(grid, torch.device(device))
    columns = torch.arange(grid.columns, device=device)
    for first, last in grid.spans(_PER_TILE):
        rows = torch.arange(first, last, device=device).view(-1, 1)
        states[:, :, first:last] = evaluate(state, Env({**leaves, "q_idx": rows, "kv_idx": columns}, tables, scalars))
    return states


def classify_parts(
    where: torch.Tensor, test: BoxTest, grid: Grid, tensors: Sequence[torch.Tensor] = (), scalars: Sequence[int | float] = ()
) -> torch.Tensor:
    """int8 [tiles]: what the test says of PARTS x PARTS smaller tiles within each tile at `where`, EMPTY, PARTIAL, FULL or UNKNOWN.

    `where`: int64 [tiles, 4], batch entry, head, block row and block column; the block sizes are multiples of PARTS.

    >>> from flexmask.analysis import box_test
    >>> from flexmask.ir import K, Q
    >>> classify_parts(torch.tensor([[0, 0, 0, 0]]), box_test(K <= Q, 0), Grid(16, 16, 16, 16)).tolist()
    [1]
    """
    fine = Grid(grid.q_len, grid.kv_len, grid.block_q // PARTS, grid.block_kv // PARTS, grid.batch, grid.heads)
    tables = (*tensors, *summaries(test, fine, tensors, scalars, where.device))
    state, part = _state(test), torch.arange(PARTS, device=where.device)
    found = [torch.empty(0, dtype=torch.int8, device=where.device)]
    for some in where.split(_PARTED):
        b, h, i, j = (x.view(-1, 1, 1) for x in some.unbind(-1))
        rows, columns = (i * PARTS + part.view(-1, 1)).clamp(max=fine.rows - 1), (j * PARTS + part).clamp(max=fine.columns - 1)
        leaves = {"b": b, "h": h, "q_idx": rows, "kv_idx": columns, "q_len": grid.q_len, "kv_len": grid.kv_len}
        states = torch.as_tensor(evaluate(state, Env(leaves, tables, scalars))).expand(len(some), PARTS, PARTS).flatten(1)
        empty, full = states == EMPTY, states == FULL
        one_kind = torch.where(empty.all(-1), EMPTY, torch.where(full.all(-1), FULL, UNKNOWN))
        found.append(torch.where(empty.any(-1) & full.any(-1), PARTIAL, one_kind).to(torch.int8))
    return torch.cat(found)


def summaries(
    test: BoxTest,
    grid: Grid,
    tensors: Sequence[torch.Tensor] = (),
    scalars: Sequence[int | float] = (),
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, ...]:
    """Minimum and maximum of each term of `test.rows`, then of `test.columns`, in each block: pairs of tensors [B|1, H|1, blocks].

    int64 (bools as 0 and 1), or float32 for float terms: a block with a NaN has NaN in both; float64 values are rounded outwards.

    >>> from flexmask.analysis import box_test
    >>> from flexmask.ir import K, Q
    >>> [x.tolist() for x in summaries(box_test(K <= Q, 0), Grid(5, 4, 2, 4))]
    [[[[0, 2, 4]]], [[[1, 3, 4]]], [[[0]]], [[[3]]]]
    """
    return tuple(end for term in test.terms for end in _summary(term, grid, tensors, scalars, torch.device(device)))


def _state(test: BoxTest) -> Expr:
    """The state of a tile as one expression."""
    return make("where", (test.some, make("where", (test.every, const(FULL), const(UNKNOWN))), const(EMPTY)))


def _lead(grid: Grid, device: torch.device) -> dict[str, int | torch.Tensor]:
    """Values of the batch entry, the head and the lengths, along the first two of four axes."""
    b, h = torch.arange(grid.batch, device=device), torch.arange(grid.heads, device=device)
    return {"b": b.view(-1, 1, 1, 1), "h": h.view(-1, 1, 1), "q_len": grid.q_len, "kv_len": grid.kv_len}


def _summary(
    term: Expr, grid: Grid, tensors: Sequence[torch.Tensor], scalars: Sequence[int | float], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    axis, length, block = ("q_idx", grid.q_len, grid.block_q) if uses(term, Q) else ("kv_idx", grid.kv_len, grid.block_kv)
    lead = (grid.batch if uses(term, B) else 1, grid.heads if uses(term, H) else 1)
    leaves = _lead(grid, device)
    parts = []
    for first, last in _runs(length, block, lead[0] * lead[1]):
        place = torch.arange(first, last, device=device)
        values = evaluate(term, Env({**leaves, axis: place}, tensors, scalars))
        parts.append(_ends(values.expand(*lead, 1, last - first).squeeze(2), block))
    lo, hi = (torch.cat(ends, -1) for ends in zip(*parts, strict=True))
    return (_rounded(lo, -torch.inf), _rounded(hi, torch.inf)) if term.kind == FLOAT else (lo, hi)


def _runs(length: int, block: int, lead: int) -> Iterator[tuple[int, int]]:
    """[first, last) of whole blocks, few positions at a time."""
    step = max(1, POSITIONS // (block * lead)) * block
    return ((first, min(first + step, length)) for first in range(0, length, step))


def _ends(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum over each block of the last axis, the last of which may be short."""
    values = values.long() if values.dtype == torch.bool else values
    whole = values.shape[-1] // block * block
    parts = [values[..., :whole].unflatten(-1, (-1, block))] if whole else []
    parts += [values[..., None, whole:]] if whole < values.shape[-1] else []
    return torch.cat([x.amin(-1) for x in parts], -1), torch.cat([x.amax(-1) for x in parts], -1)


def _rounded(ends: torch.Tensor, towards: float) -> torch.Tensor:
    """As float32, and no nearer to the middle."""
    single = ends.float()
    if ends.dtype != torch.float64:
        return single
    inside = single.double() > ends if towards < 0 else single.double() < ends
    return torch.where(inside, torch.nextafter(single, torch.full_like(single, towards)), single)
