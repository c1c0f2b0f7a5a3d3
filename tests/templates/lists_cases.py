"""Kernels of lists and ranks against brute force. Run as a script under TRITON_INTERPRET=1; prints {case: what is wrong} as JSON."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass

import torch

from flexmask.runtime.tile_lists import unpack

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class States:
    """A table of states [B, H, rows, columns], `kept` of ten tiles kept; `share` 0: as many as columns."""

    shape: tuple[int, int, int, int]
    kept: int = 5
    share: int = 0
    slab: int = 1000
    flag: int | None = None


@dataclass(frozen=True)
class Pieces:
    """Row intervals of a kind, by rows of `length` over `other` indices, in tiles of `block`."""

    kind: str
    lead: tuple[int, int] = (1, 1)
    length: int = 50
    other: int = 70
    block: tuple[int, int] = (16, 8)
    pieces: int = 1
    share: int = 0


@dataclass(frozen=True)
class Order:
    """Lines [B, H, lines] to be put in order by their work."""

    shape: tuple[int, int, int]
    ranges: bool = False
    most: int = 9  # tiles in a list


@dataclass(frozen=True)
class Turn:
    """The flags of the map before."""

    flags: tuple[int, ...]


@dataclass(frozen=True)
class Ranked:
    """Lines [B, H, lines, blocks] whose ranks are wanted: random states, `kept` of ten tiles kept; or `ranges`, a run for each line."""

    shape: tuple[int, int, int, int]
    kept: int = 5
    ranges: bool = False
    share: int = 0


@dataclass(frozen=True)
class NeverMade:
    """Ranks of a map whose memory is as it was found: `junk` throughout. Nothing is read or written beyond its ends."""

    junk: int


Checked = States | Pieces | Order | Turn | Ranked | NeverMade
CASES: dict[str, Checked] = {
    "states": States((2, 2, 5, 20)),
    "one tile": States((1, 1, 1, 1), 10),
    "one column": States((1, 3, 7, 1)),
    "many columns": States((1, 1, 2, 2100)),
    "nothing kept": States((1, 1, 3, 5), 0),
    "everything kept": States((1, 1, 3, 5), 10),
    "slabs": States((2, 2, 7, 20), slab=3),
    "small shares": States((1, 2, 12, 20), 3, share=6),
    "small shares, slabs": States((2, 1, 12, 20), 3, share=6, slab=5),
    "shares of one": States((1, 1, 12, 20), 1, share=1),
    "small shares, many columns": States((1, 1, 2, 2100), share=1000),
    "asked for": States((1, 1, 3, 5), flag=1),
    "not asked for": States((1, 1, 3, 5), flag=0),
    "causal": Pieces("causal"),
    "causal, short last tile kept whole": Pieces("causal", length=90, other=67, block=(8, 16)),
    "causal, uneven blocks": Pieces("causal", block=(7, 11)),
    "causal, blocks of one": Pieces("causal", length=9, other=12, block=(1, 1)),
    "causal, small shares": Pieces("causal", length=80, other=80, share=4),
    "window": Pieces("window", length=100, other=100),
    "window, tall blocks": Pieces("window", length=100, other=100, block=(64, 3)),
    "window and sink": Pieces("sink", length=100, other=100, pieces=2),
    "window and sink, three pieces": Pieces("sink", length=100, other=100, pieces=3),
    "random": Pieces("random", (2, 3), pieces=2),
    "random, one piece": Pieces("random", length=33),
    "random, three pieces": Pieces("random", (2, 1), pieces=3, block=(8, 4)),
    "random, many columns": Pieces("random", length=7, other=1500, block=(4, 2), pieces=3),
    "random, small shares": Pieces("random", (2, 1), pieces=3, block=(8, 4), share=5),
    "rows alike, many columns": Pieces("alike", length=9, other=1500, block=(4, 2), pieces=3),
    "everything": Pieces("all", pieces=2),
    "nothing": Pieces("nothing", (2, 2), pieces=2),
    "one row": Pieces("random", length=1),
    "one index": Pieces("all", other=1),
    "no rows": Pieces("nothing", length=0),
    "no indices": Pieces("nothing", other=0),
    "order of lists": Order((2, 3, 50)),
    "order of ranges": Order((1, 2, 200), ranges=True),
    "order of many lines": Order((1, 1, 300), most=4),
    "order of lines alike": Order((1, 1, 130), most=1),
    "order of one line": Order((4, 4, 1)),
    "order of no lines": Order((1, 1, 0)),
    "order by some of the heads": Order((5, 7, 140)),
    "the map before holds": Turn((0, 1, 0)),
    "the map before does not": Turn((1, 1, 0)),
    "a single flag": Turn((0,)),
    "many flags": Turn((1, *[i % 2 for i in range(200)])),
    "ranks in lists": Ranked((2, 3, 7, 20)),
    "ranks, one tile": Ranked((1, 1, 1, 1), 10),
    "ranks of more lines than a word has bits": Ranked((1, 2, 75, 9)),
    "ranks of just a word": Ranked((1, 1, 32, 9)),
    "ranks in many blocks": Ranked((1, 1, 5, 1100)),
    "ranks, everything kept": Ranked((1, 2, 70, 130), 10),
    "ranks, nothing kept": Ranked((1, 2, 5, 6), 0),
    "ranks in ranges": Ranked((2, 2, 40, 30), ranges=True),
    "ranks in long ranges": Ranked((1, 1, 3, 1200), ranges=True),
    "ranks in small shares": Ranked((1, 2, 12, 20), 3, share=5),
    "ranks of no lines": Ranked((1, 1, 0, 5)),
    "ranks in no blocks": Ranked((1, 1, 5, 0)),
    **{f"ranks of memory that holds {junk}": NeverMade(junk) for junk in (-7, 5, 42, 1 << 30, -(1 << 30))},
}


def room(lead: tuple[int, int], rows: int, columns: int, share: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """counts, offsets, index, share and iota, filled with what must not be believed."""
    share = share or columns
    iota = lead[0] * lead[1] * rows * share
    index = torch.full((iota + columns,), -5, dtype=torch.int32)
    index[iota:] = torch.arange(columns)
    counts = torch.full((*lead, rows, 2), -5, dtype=torch.int32)
    return counts, counts.clone(), index, share, iota


def assert_listed(states: torch.Tensor, counts: torch.Tensor, offsets: torch.Tensor, index: torch.Tensor, share: int) -> None:
    """The lists hold just these states; rows that outgrow their share hold everything between their ends as PARTIAL."""
    flat, columns = states.flatten(0, 2), states.shape[3]
    for row, (state, count, offset) in enumerate(zip(flat, counts.view(-1, 2).tolist(), offsets.view(-1, 2).tolist(), strict=True)):
        full, partial = (index[at : at + n].tolist() for at, n in zip(offset, count, strict=True))
        kept = state.nonzero().flatten().tolist()
        if len(kept) > share:
            assert full == [], row
            assert partial == list(range(kept[0], kept[-1] + 1)), row
        else:
            assert full == (state == FULL).nonzero().flatten().tolist(), (row, full)
            assert partial[::-1] == (state == PARTIAL).nonzero().flatten().tolist(), (row, partial)
            assert offset[0] == row * share or not full
            assert offset[1] + count[1] == (row + 1) * share or not partial
    assert index[len(index) - columns :].tolist() == list(range(columns))


def check_states(case: States) -> None:
    from flexmask.templates.lists import list_states

    g = torch.Generator().manual_seed(6)
    kept = torch.rand(case.shape, generator=g) * 10 < case.kept
    states = (kept * torch.randint(1, 3, case.shape, generator=g)).to(torch.int8)
    counts, offsets, index, share, iota = room(case.shape[:2], *case.shape[2:], case.share)
    flag = None if case.flag is None else torch.tensor([case.flag, 1 - case.flag], dtype=torch.int32)
    for first in range(0, case.shape[2], case.slab):
        slab = states[:, :, first : first + case.slab].contiguous()
        list_states(slab, counts, offsets, index, first, share, iota, evaluated_only_if=flag)
    if case.flag == 0:
        assert (counts == -5).all() and (offsets == -5).all() and (index[:iota] == -5).all()
    else:
        assert_listed(states, counts, offsets, index, share)


def bounds_of(case: Pieces) -> torch.Tensor:
    """keep [B, H, length, other]."""
    g = torch.Generator().manual_seed(7)
    row, place = torch.arange(case.length)[:, None], torch.arange(case.other)
    shape = (*case.lead, case.length, case.other)
    if case.kind in ("random", "alike"):
        ends = torch.randint(0, case.other + 1, (*case.lead, case.length, 2 * case.pieces), generator=g).sort(-1).values
        ends = ends[:, :, :1] + (row % 3) if case.kind == "alike" else ends
        return sum((place >= ends[..., i : i + 1]) & (place < ends[..., i + 1 : i + 2]) for i in range(0, 2 * case.pieces, 2)) > 0
    keep = {
        "causal": place <= row,
        "window": (place <= row) & (row - place < 20),
        "sink": (place <= row) & ((row - place < 20) | (place < 5)),
        "all": row + place >= 0,
        "nothing": row + place < 0,
    }[case.kind]
    return keep.expand(shape)


def settled(keep: torch.Tensor, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """starts, stops int32 [B, H, length, pieces] of the runs in each row."""
    starts = torch.zeros(*keep.shape[:3], pieces, dtype=torch.int32)
    stops = torch.zeros_like(starts)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        line = torch.nn.functional.pad(keep[b, h, row].int(), (1, 1)).diff()
        first, last = (line == 1).nonzero().flatten(), (line == -1).nonzero().flatten()
        starts[b, h, row, : len(first)], stops[b, h, row, : len(last)] = first.int(), last.int()
    return starts, stops


def states_of(keep: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows, columns = (-(-n // side) for n, side in zip(keep.shape[2:], block, strict=True))
    states = torch.zeros(*keep.shape[:2], rows, columns, dtype=torch.int8)
    for i in range(rows):
        for j in range(columns):
            tile = keep[:, :, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].flatten(2)
            states[:, :, i, j] = tile.any(-1).to(torch.int8) + tile.all(-1).to(torch.int8)
    return states


def check_pieces(case: Pieces) -> None:
    from flexmask.templates.lists import list_intervals

    keep = bounds_of(case)
    starts, stops = settled(keep, case.pieces)
    states = states_of(keep, case.block)
    counts, offsets, index, share, iota = room(case.lead, *states.shape[2:], case.share)
    list_intervals(starts, stops, counts, offsets, index, share, iota, *case.block, case.other)
    assert_listed(states, counts, offsets, index, share)


def check_order(case: Order) -> None:
    from flexmask.templates.lists import ORDER_LEADS, order_lines

    table = torch.randint(0, case.most, (*case.shape, 4 if case.ranges else 2), generator=torch.Generator().manual_seed(8)).int()
    work = table[..., 3] - table[..., 0] if case.ranges else table.sum(-1)
    leads = work.flatten(0, 1)
    some = leads[:: -(-len(leads) // ORDER_LEADS)].sum(0)
    lines = case.shape[2]
    order = torch.full((lines + 18,), -1, dtype=torch.int32)
    order_lines(table, order, case.ranges)
    assert order[:lines].tolist() == sorted(range(lines), key=lambda line: -some[line])
    if lines:
        long = [int((some > (some.clamp(min=0).sum() >> 8 - level)).sum()) for level in range(9)]
        assert order[lines : lines + 9].tolist() == long
        assert order[lines + 9 :].tolist() == [2 ** sum(n > 0 for n in long[level:]) - 1 for level in range(9)]


def check_turn(case: Turn) -> None:
    from flexmask.templates.lists import pass_turn

    flags, own = torch.tensor(case.flags, dtype=torch.int32), torch.full((len(case.flags) + 1,), -1, dtype=torch.int32)
    pass_turn(flags, own[:-1])
    assert own.tolist() == [2 * (case.flags[0] == 0), *case.flags[1:], -1]


def ranked_map(case: Ranked) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """(ranges or counts, offsets, index, which blocks are kept: [B, H, places, blocks])."""
    from flexmask.templates.lists import list_states

    generator, (*lead, lines, blocks) = torch.Generator().manual_seed(9), case.shape
    if case.ranges:
        ends = torch.randint(0, blocks + 1, (*lead, lines, 2), generator=generator).sort(-1).values.int()
        place = torch.arange(blocks)
        return ends[..., [0, 0, 0, 1]].contiguous(), None, None, (place >= ends[..., :1]) & (place < ends[..., 1:])
    states = torch.randint(1, 3, case.shape, generator=generator) * (torch.randint(10, case.shape, generator=generator) < case.kept)
    counts, offsets, index, share, iota = room((lead[0], lead[1]), lines, blocks, case.share)
    list_states(states.to(torch.int8), counts, offsets, index, 0, share, iota)
    return counts, offsets, index, (unpack(counts, offsets, index, blocks) != 0).flip(2)


def check_ranks(case: Ranked) -> None:
    from flexmask.templates.ranks import rank_lines

    table, offsets, index, kept = ranked_map(case)
    place = torch.arange(case.shape[2])
    ranks = torch.zeros(*case.shape[:2], case.shape[3], -(-len(place) // 32), 2, dtype=torch.int32)
    rank_lines(table, offsets, index, ranks)
    words, before = ranks[:, :, :, place // 32].long().unbind(-1)  # as kernels read them
    earlier = words & ((1 << place % 32) - 1)
    assert torch.equal((words >> place % 32 & 1).bool(), kept.mT)
    bits = (earlier[..., None] >> torch.arange(32) & 1).sum(-1)
    assert torch.equal(before + bits, kept.mT.long().cumsum(3) - kept.mT.long())


def check_never_made(case: NeverMade) -> None:
    from flexmask.templates.ranks import rank_lines

    junk = torch.full((1, 1, 35, 4), case.junk, dtype=torch.int32)
    junk[..., 3] = -case.junk
    listed = junk[..., :2].contiguous()
    for table, offsets, index in ((junk, None, None), (listed, listed, torch.full((100,), case.junk, dtype=torch.int32))):
        memory = torch.zeros(50, 2, 2, dtype=torch.int32)
        rank_lines(table, offsets, index, memory[5:45].view(1, 1, 40, 2, 2))
        assert not memory[:5].any() and not memory[45:].any()


def check(case: Checked) -> None:
    if isinstance(case, States):
        check_states(case)
    elif isinstance(case, Pieces):
        check_pieces(case)
    elif isinstance(case, Order):
        check_order(case)
    elif isinstance(case, Ranked):
        check_ranks(case)
    elif isinstance(case, NeverMade):
        check_never_made(case)
    else:
        check_turn(case)


def main() -> None:
    from flexmask.templates.interpreter import repair_interpreter

    repair_interpreter()
    results = {}
    for name, case in CASES.items():
        try:
            check(case)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()[-1500:]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
