"""Maps made by generated kernels, of every zoo mask. Run as a script under TRITON_INTERPRET=1; prints {mask: what is wrong} as JSON.

Arguments, if any, are parts of the names of the masks to try.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
import zoo
from test_zoo_through_the_house import states_of

import flexmask
from flexmask import reference
from flexmask.runtime.maps import Extent, find_device_maps
from flexmask.runtime.store import Store
from flexmask.runtime.tile_map import TileMap
from flexmask.runtime.variants import Variant, by_predicate, hopper_variants, variants

SIZES = (1, 2, 35, 41)
BLOCKS = {"row": (24, 8), "column": (16, 13)}


def problems(
    mask: flexmask.Mask, sizes: tuple[int, int, int, int], store: Store, device: str = "cpu", blocks: Any = None, everywhere: bool = True
) -> list[str]:
    """What is wrong with the maps of the mask, by rows and by columns, for each kernel that it may need; and `everywhere` with the map
    that evaluates the predicate, whether a kernel needs it or not."""
    batch, heads, q_len, kv_len = sizes
    traced, wrong = mask.traced(), []
    facts, dense = store.facts(traced)[1], reference.dense_mask(mask, *sizes, device=device)
    extent = Extent(q_len, kv_len, batch, heads, torch.device(device))
    for axis, (block_q, block_kv) in (blocks or BLOCKS).items():
        want = states_of(dense, block_q, block_kv)
        plain, hopper = (find(facts, traced.promised, axis) for find in (variants, hopper_variants))
        if plain[0].map_form == "none":
            continue
        for chosen in [plain, hopper] if everywhere and hopper != plain else [plain]:
            made = find_device_maps(
                store, traced, extent, tuple((variant, block_q, block_kv) for variant in chosen), axis, ranked=len(chosen)
            )
            for _ in range(min(2, len(chosen))):
                turns = [each for variant, each in zip(chosen, made.maps, strict=True) if is_its_turn(variant, each)]
                wrong += [f"{axis}: {chosen}: turns {len(turns)}"] * (len(turns) != 1)
                wrong += [f"{axis}: {chosen}: {what}" for each in turns for what in differences(each, want, dense)]
                wrong += [f"{axis}: {chosen}: ranks" for each in turns if not ranks_hold(each)]
                made.refill()  # in place, to the same effect
        if not everywhere:
            continue
        alone = find_device_maps(store, traced, extent, ((by_predicate(), block_q, block_kv),), axis).maps[0]
        wrong += [f"{axis}: evaluated"] * (not same(alone.states(), want))
        wrong += [f"{axis}: listed"] * (not same(alone.listed().states(), want))
    return wrong


def ranks_hold(made: TileMap) -> bool:
    """Whether the map's ranks say how many lines go before each that keep a block."""
    kept = (made._lines() != 0).mT.long()  # [B, H, blocks, lines]
    kept = kept if made.ranges is not None else kept.flip(-1)
    place = torch.arange(kept.shape[3], device=kept.device)
    words, earlier = made.ranks[:, :, :, place // 32].long().unbind(-1), (1 << place % 32) - 1
    bits = ((words[0] & earlier)[..., None] >> torch.arange(32, device=kept.device) & 1).sum(-1)
    return torch.equal(words[0] >> place % 32 & 1, kept) and torch.equal(words[1] + bits, kept.cumsum(-1) - kept)


def is_its_turn(variant: Variant, made: TileMap) -> bool:
    """Whether the kernel of this map does something."""
    return variant.runs == "always" or int(made.broken[0]) == {"hold": 0, "fail": 1}[variant.runs]


def differences(made: TileMap, want: torch.Tensor, dense: torch.Tensor) -> list[str]:
    """What of a map is not as the mask."""
    wrong = ["states"] * (not same(made.states(), want))
    for name, intervals in (("intervals", made.intervals), ("crossing", made.crossing)):
        wrong += [name] * (intervals is not None and not torch.equal(intervals.to_dense().expand_as(dense), dense))
    return wrong + ["bits"] * (made.words is not None and not bits_agree(made, dense))


def bits_agree(made: TileMap, dense: torch.Tensor) -> bool:
    """Whether the bits of each PARTIAL tile are what the mask keeps of it."""
    shifts = torch.arange(32, device=dense.device)
    for place in torch.cartesian_prod(*map(torch.arange, made.counts.shape[:3])).tolist():
        begin, count = made.offsets[*place, 1].item(), made.counts[*place, 1].item()
        for tile, pattern in zip(made.index[begin : begin + count].tolist(), made.patterns[begin : begin + count].tolist(), strict=True):
            i, j = (place[2], tile) if made.axis == "row" else (tile, place[2])
            kept = ((made.words[pattern].long()[..., None] >> shifts) & 1).flatten(1).bool()
            kept = kept if made.axis == "row" else kept.mT
            want = dense[*place[:2], i * made.block_q : (i + 1) * made.block_q, j * made.block_kv : (j + 1) * made.block_kv]
            if not torch.equal(kept[: want.shape[0], : want.shape[1]], want):
                return False
    return True


def same(states: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(states.expand(*want.shape[:2], *states.shape[2:]), want)


def main() -> None:
    found, store = {}, Store()
    for name, make in zoo.MASKS.items():
        if len(sys.argv) > 1 and not any(part in name for part in sys.argv[1:]):
            continue
        try:
            axis = ("row", "column")[len(found) % 2]  # each mask along one of them, for the sake of time
            found[name] = problems(make(*SIZES), SIZES, store, blocks={axis: BLOCKS[axis]}, everywhere=len(found) % 5 == 0)
        except Exception:
            found[name] = [traceback.format_exc()[-1500:]]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
