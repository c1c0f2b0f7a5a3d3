"""The kernels that rank lines against brute force. Run as a script under TRITON_INTERPRET=1; prints {case: what is wrong} as JSON."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass

import torch

from flexmask.runtime.tile_lists import pack, unpack


@dataclass(frozen=True)
class Ranked:
    """A table of states [B, H, lines, blocks], `kept` of ten tiles kept; or `ranges`, a run for each line; with a `share`, lists of no more
    room, of which those that have more list all from their first block to their last."""

    shape: tuple[int, int, int, int]
    kept: int = 5
    ranges: bool = False
    share: int = 0


CASES = {
    "lists": Ranked((2, 3, 7, 20)),
    "one tile": Ranked((1, 1, 1, 1), 10),
    "more lines than a word has bits": Ranked((1, 2, 75, 9)),
    "just a word": Ranked((1, 1, 32, 9)),
    "many blocks": Ranked((1, 1, 5, 1100)),
    "everything kept": Ranked((1, 2, 70, 130), 10),
    "nothing kept": Ranked((1, 2, 5, 6), 0),
    "ranges": Ranked((2, 2, 40, 30), ranges=True),
    "long ranges": Ranked((1, 1, 3, 1200), ranges=True),
    "small shares": Ranked((1, 2, 12, 20), 3, share=5),
    "no lines": Ranked((1, 1, 0, 5)),
    "no blocks": Ranked((1, 1, 5, 0)),
}


def runs(shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Ranges int32 [B, H, lines, 4], some of them empty."""
    ends = torch.randint(0, shape[3] + 1, (*shape[:3], 2)).sort(-1).values
    return torch.stack([ends[..., 0], ends[..., 0], ends[..., 0], ends[..., 1]], -1).int()


def lists(case: Ranked) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(counts, offsets, index) of random states."""
    states = torch.randint(1, 3, case.shape) * (torch.rand(case.shape) * 10 < case.kept)
    if not case.share:
        return pack(states.to(torch.int8))
    from flexmask.templates.lists import list_states

    lines, columns = states.flatten(0, 2).shape
    counts = torch.zeros(*case.shape[:3], 2, dtype=torch.int32)
    index = torch.zeros(lines * case.share + columns, dtype=torch.int32)
    index[lines * case.share :] = torch.arange(columns)
    offsets = counts.clone()
    list_states(states.to(torch.int8), counts, offsets, index, 0, case.share, lines * case.share)
    return counts, offsets, index


def found(ranks: torch.Tensor, lines: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks the lines keep, and how many lines go before each, as kernels read it: [B, H, blocks, places]."""
    place = torch.arange(lines)
    words, before = ranks[:, :, :, place // 32].long().unbind(-1)
    earlier = words & ((1 << place % 32) - 1)
    return (words >> place % 32 & 1).bool(), before + (earlier[..., None] >> torch.arange(32) & 1).sum(-1)


def check(case: Ranked) -> None:
    from flexmask.templates.ranks import rank_lines

    torch.manual_seed(0)
    _, _, lines, blocks = case.shape
    if case.ranges:
        table, offsets, index = runs(case.shape), None, None
        place = torch.arange(blocks)
        kept = (place >= table[..., :1]) & (place < table[..., 3:])
    else:
        table, offsets, index = lists(case)
        kept = (unpack(table, offsets, index, blocks) != 0).flip(2)
    ranks = torch.zeros(*case.shape[:2], blocks, -(-lines // 32), 2, dtype=torch.int32)
    rank_lines(table, offsets, index, ranks)
    keeps, before = found(ranks, lines)
    assert torch.equal(keeps, kept.mT)
    assert torch.equal(before, kept.mT.long().cumsum(3) - kept.mT.long())


def check_never_made() -> None:
    """Lists with numbers as memory had them are read within their memory."""
    from flexmask.templates.ranks import rank_lines

    for junk in (-7, 5, 1 << 30, -(1 << 30)):
        ranks = torch.zeros(1, 1, 40, 2, 2, dtype=torch.int32)
        listed = torch.full((1, 1, 35, 2), junk, dtype=torch.int32)
        rank_lines(listed, listed, torch.full((100,), junk, dtype=torch.int32), ranks)
        ranks = torch.zeros(1, 1, 40, 2, 2, dtype=torch.int32)
        rank_lines(torch.tensor([junk, 0, 0, -junk]).int().expand(1, 1, 35, 4).contiguous(), None, None, ranks)


def main() -> None:
    from flexmask.templates.interpreter import repair_interpreter

    repair_interpreter()
    results = {}
    for name, run in {**{name: lambda case=case: check(case) for name, case in CASES.items()}, "never made": check_never_made}.items():
        try:
            run()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()[-1500:]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
