"""Tables of tiles as lists of block columns, and back."""

from __future__ import annotations

import torch

from .grid import EMPTY, FULL, PARTIAL

GROUPS = 3  # full, bounded, evaluated


def pack(group: torch.Tensor, exact: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(counts, offsets, index) of the tiles of each block row, by group and ascending within; int8 `group` [B, H, nQ, nK], 3 = left out.

    `exact` lists hold what is kept and nothing else, but their size must be known on the host. Without it nothing is waited for:
    each block row has room for nK entries, and its offset is its number times nK.
    """
    counts = torch.stack([(group == g).sum(-1, dtype=torch.int32) for g in range(GROUPS)], -1)
    if exact:
        return (counts, *_exact(group, counts))
    lead, columns = group.shape[:-1], group.shape[-1]
    index = torch.sort(group, dim=-1, stable=True).indices.to(torch.int32).flatten()
    offsets = torch.arange(counts[..., 0].numel(), dtype=torch.int32, device=group.device) * columns
    return counts, offsets.view(lead), index


def _exact(group: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat, per_row = group.flatten(0, 2), counts.flatten(0, 2).long()
    total = per_row.sum(-1)
    offsets = total.cumsum(0) - total
    index = torch.empty(int(total.sum()), dtype=torch.int32, device=group.device)
    begin = offsets[:, None] + per_row.cumsum(-1) - per_row
    for g in range(GROUPS):
        row, column = (flat == g).nonzero(as_tuple=True)
        earlier = per_row[:, g].cumsum(0) - per_row[:, g]
        place = begin[row, g] + torch.arange(len(row), device=group.device) - earlier[row]
        index[place] = column.to(torch.int32)
    return offsets.to(torch.int32).view(counts.shape[:-1]), index


def unpack(counts: torch.Tensor, index: torch.Tensor, columns: int) -> torch.Tensor:
    """States int8 [B, H, nQ, nK] of the lists that `pack` made."""
    lead = counts.shape[:-1]
    rows = counts[..., 0].numel()
    states = torch.full((rows, columns), EMPTY, dtype=torch.int8, device=counts.device)
    full, kept = counts[..., 0].flatten(), counts.sum(-1).flatten()
    if len(index) == rows * columns:  # every block row has nK places, kept or not
        place = torch.arange(columns, device=counts.device)
        kind = (place < full[:, None]).to(torch.int8) + (place < kept[:, None]).to(torch.int8)
        return states.scatter_(1, index.view(rows, columns).long(), kind).view(*lead, columns)
    row = torch.repeat_interleave(kept.long(), output_size=len(index))
    place = torch.arange(len(index), device=counts.device) - (kept.cumsum(0) - kept)[row]
    states[row, index.long()] = torch.where(place < full[row], FULL, PARTIAL).to(torch.int8)
    return states.view(*lead, columns)


def ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many, which) columns of each row are chosen, int32: the chosen ones ascending, then the others, as torch orders them."""
    order = torch.sort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)
