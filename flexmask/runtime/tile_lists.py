"""Tables of tile states as lists of blocks, and back. A line of tiles is a block row, or a block column in a map by columns."""

from __future__ import annotations

import torch

from .grid import EMPTY, FULL, PARTIAL


def pack(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(counts, offsets, index) of states int8 [B, H, lines, n]: lists of just what is kept, so their size must be known on the host.

    counts int32 [B, H, lines, 2] are (FULL, PARTIAL) tiles of a line, offsets int32 [B, H, lines, 2] where each begins in index int32 [*].
    """
    lead = states.shape[:-1]
    flat = states.flatten(0, 2)
    groups = [flat == FULL, flat == PARTIAL]
    counts = torch.stack([g.sum(-1) for g in groups], -1)
    ends = counts.flatten().cumsum(0)
    offsets = (ends - counts.flatten()).view(counts.shape)
    index = torch.empty(int(ends[-1]) if len(ends) else 0, dtype=torch.int32, device=states.device)
    for g, chosen in enumerate(groups):
        line, column = chosen.nonzero(as_tuple=True)
        earlier = counts[:, g].cumsum(0) - counts[:, g]
        place = offsets[line, g] + torch.arange(len(line), device=states.device) - earlier[line]
        index[place] = column.to(torch.int32)
    return counts.to(torch.int32).view(*lead, 2), offsets.to(torch.int32).view(*lead, 2), index


def unpack(counts: torch.Tensor, offsets: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    """States int8 [B, H, lines, n] of lists laid out in any way. Their sizes are read, so on a GPU this waits."""
    lead = counts.shape[:-1]
    counts, offsets = counts.flatten(0, -2).long(), offsets.flatten(0, -2).long()
    states = torch.full((len(counts), n), EMPTY, dtype=torch.int8, device=counts.device)
    for g, kind in enumerate((FULL, PARTIAL)):
        line, place = _places(counts[:, g], offsets[:, g])
        states[line, index[place].long()] = kind
    return states.view(*lead, n)


def compacted(counts: torch.Tensor, offsets: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same lists side by side, without room between them, each ascending. Their sizes are read, so on a GPU this waits."""
    ends = counts.flatten().long().cumsum(0)
    begin = ends - counts.flatten()
    line, place = _places(counts.flatten().long(), offsets.flatten().long())
    found = index[place].long()
    # lists may be stored in either direction: order by (list, block)
    order = torch.argsort(line * (int(found.max()) + 1 if len(found) else 1) + found)
    return counts, begin.to(torch.int32).view(counts.shape), found[order].to(torch.int32)


def _places(counts: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every entry of every list: the number of its list, and its place in the index."""
    which = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    within = torch.arange(len(which), device=counts.device) - (counts.cumsum(0) - counts)[which]
    return which, offsets[which] + within


def ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many, which) columns of each row are chosen, int32: the chosen ones ascending, then the others, as torch orders them."""
    order = torch.sort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)
