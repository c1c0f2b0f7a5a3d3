"""Tile maps and intervals of a traced mask for given lengths, through the store."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..analysis import Facts, Form, NotInterval
from ..errors import ShapeError
from ..frontend import Traced, check_promises
from ..ir import TRUE
from ..options import read_options
from . import device_map, host_map
from .checks import check_captures
from .device_map import DeviceMaps
from .grid import Grid
from .intervals import Intervals, ascending, solve
from .recipes import Wanted, find_recipes
from .store import Store
from .tile_map import TileMap
from .variants import Variant, by_intervals, by_predicate, variants


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU in this process (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Extent:
    """The index space a mask is asked about: `batch` x `heads` x `q_len` x `kv_len`, on `device`."""

    q_len: int
    kv_len: int
    batch: int
    heads: int
    device: torch.device

    def grid(self, facts: Facts, block_q: int, block_kv: int) -> Grid:
        """The tiles, with one batch entry (head) where the mask is the same for all."""
        return Grid(self.q_len, self.kv_len, block_q, block_kv, self.batch if facts.uses_b else 1, self.heads if facts.uses_h else 1)


def extent_of(traced: Traced, q_len: int, kv_len: int, batch: int | None, heads: int | None, device: torch.device | str | None) -> Extent:
    """The extent, with the captures' device where none is given, checked against the captures.

    Raises ShapeError for negative lengths, and where a mask that depends on the batch entry or head is asked about without one.
    """
    if q_len < 0 or kv_len < 0:
        raise ShapeError(f"lengths are not negative; got q_len {q_len}, kv_len {kv_len}.")
    found = torch.device(device) if device is not None else next((t.device for t in traced.tensors), torch.device("cpu"))
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())  # where torch puts tensors made on "cuda"
    extent = Extent(q_len, kv_len, 1 if batch is None else batch, 1 if heads is None else heads, found)
    check_captures(traced, batch=extent.batch, heads=extent.heads, q_len=q_len, kv_len=kv_len, device=found)
    return extent


def check_given(facts: Facts, batch: int | None, heads: int | None) -> None:
    """A mask that depends on b or h has no map without knowing how many there are."""
    for used, given, word in ((facts.uses_b, batch, "batch"), (facts.uses_h, heads, "heads")):
        if used and given is None:
            raise ShapeError(f"the mask depends on the {word.rstrip('s')} index: pass {word}=...")


def find_map(store: Store, traced: Traced, extent: Extent, block_q: int, block_kv: int, axis: str = "row") -> tuple[Facts, TileMap]:
    """What is known of the mask, and its exact tile map for this extent, built at most once for each version of its captures.

    Where it depends on values which map a mask has, they are looked at: on a GPU this waits. `find_device_maps` does not.
    """
    key, facts = store.facts(traced)
    if extent.device.type == "cpu":
        return facts, _host_map(store, key, facts, traced, extent.grid(facts, block_q, block_kv), axis)
    first = variants(facts, traced.promised, axis)[0]
    made = _device_map(store, traced, extent, (by_predicate() if first.bits else first, block_q, block_kv), axis)
    if made.broken is not None and bool(made.broken[0]):
        made = _device_map(store, traced, extent, (by_predicate(), block_q, block_kv), axis)
    return facts, made if made.ranges is not None else made.listed()


def _host_map(store: Store, key: str, facts: Facts, traced: Traced, grid: Grid, axis: str) -> TileMap:
    def build() -> TileMap:
        _check(traced)
        sizes = {"q_len": grid.q_len, "kv_len": grid.kv_len, "batch": grid.batch, "heads": grid.heads}
        blocks = {"block_q": grid.block_q, "block_kv": grid.block_kv}
        return host_map.build(facts, traced.tensors, traced.scalars, **sizes, **blocks, axis=axis, promised=traced.promised)

    made: TileMap = store.tile_map((key, traced.scalars, grid, axis), traced.tensors, build)
    return made


def _device_map(store: Store, traced: Traced, extent: Extent, wanted: Wanted, axis: str) -> TileMap:
    """One map with room for every tile."""
    return find_device_maps(store, traced, extent, (wanted,), axis, exact=True).maps[0]


def find_device_maps(
    store: Store, traced: Traced, extent: Extent, wanted: tuple[Wanted, ...], axis: str = "row", exact: bool = False, ranked: int = 0
) -> DeviceMaps:
    """The maps for each (variant, block_q, block_kv) of the mask, on a GPU, without a wait; built once for each version of its captures.

    Lists longer than memory allows are cut short to the same effect, unless they must be `exact`. The first `ranked` maps come with the
    ranks of their lines.
    """
    key, facts = store.facts(traced)
    lead = (extent.batch if facts.uses_b else 1, extent.heads if facts.uses_h else 1)
    place = (key, traced.scalars, wanted, extent.q_len, extent.kv_len, lead, extent.device, axis, exact, ranked)

    def build() -> DeviceMaps:
        _check(traced)
        grids = [extent.grid(facts, block_q, block_kv) for _, block_q, block_kv in wanted]
        room = max(g.tiles for g in grids) if exact else device_map.MOST_ENTRIES
        recipes = find_recipes(store, traced, facts, wanted, axis)
        return device_map.build(recipes, (traced.tensors, traced.scalars), grids, extent.device, room, ranked)

    made: DeviceMaps = store.tile_map(place, traced.tensors, build)
    return made


def _check(traced: Traced) -> None:
    """Under FLEXMASK_DEBUG, whether promised tables do ascend."""
    if traced.promised and read_options().debug:
        check_promises(traced)


def refill_maps(store: Store, traced: Traced) -> None:
    """Make every kept map of the mask on a GPU again in place, from the captured tensors' present values."""
    for made in store.maps_of(store.key_of(traced), traced.tensors):
        if isinstance(made, DeviceMaps):
            made.refill()


def host_variant(traced: Traced, facts: Facts, extent: Extent, axis: str = "row") -> Variant:
    """The one kernel that a mask on CPU tensors needs, as values may be looked at."""
    form = facts.rows if axis == "row" else facts.columns
    if facts.predicate is TRUE:
        return variants(None)[0]
    if not isinstance(form, Form) or form.residue is not None:
        return by_predicate()
    held = host_map.find_intervals(form, (traced.tensors, traced.scalars), extent.grid(facts, 128, 128), traced.promised)
    return by_predicate() if held is None else by_intervals(facts, axis, "always")


def find_intervals(traced: Traced, form: Form | NotInterval, extent: Extent) -> Intervals:
    """The form's intervals for this extent. Raises NotInterval, at the user's line, where the mask has none. On a GPU this waits."""
    if isinstance(form, NotInterval):
        raise NotInterval(form.reason, form.culprit, form.at or traced.locate(traced.expr))
    if form.residue is not None:
        raise NotInterval("a part of the mask keeps scattered places", str(form.residue), traced.locate(form.residue))
    for number in form.sorted_tables:
        if number not in traced.promised and not bool(ascending(traced.tensors[number])):
            raise NotInterval(f"`{traced.tensor_names[number]}` does not ascend", "", traced.locate(traced.expr))
    sizes = {"q_len": extent.q_len, "kv_len": extent.kv_len, "batch": extent.batch, "heads": extent.heads}
    return solve(form, traced.tensors, traced.scalars, **sizes, device=extent.device)
