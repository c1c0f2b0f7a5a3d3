"""Tile maps and intervals of a traced mask for given lengths, through the store."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..analysis import Facts, Form, NotInterval
from ..errors import ShapeError
from ..frontend import Traced
from ..ir import show
from ..lowering import CaptureSpec, emit_function
from ..templates.assemble import assemble_tiles
from . import launch, tile_map
from .checks import check_captures
from .intervals import Intervals, ascending, solve
from .store import Store
from .tile_map import TileMap


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


def extent_of(traced: Traced, q_len: int, kv_len: int, batch: int | None, heads: int | None, device: torch.device | str | None) -> Extent:
    """The extent, with the captures' device where none is given, checked against the captures.

    Raises ShapeError for negative lengths, and where a mask that depends on the batch entry or head is asked about without one.
    """
    if q_len < 0 or kv_len < 0:
        raise ShapeError(f"lengths are not negative; got q_len {q_len}, kv_len {kv_len}.")
    found = torch.device(device) if device is not None else next((t.device for t in traced.tensors), torch.device("cpu"))
    extent = Extent(q_len, kv_len, 1 if batch is None else batch, 1 if heads is None else heads, found)
    check_captures(traced, batch=extent.batch, heads=extent.heads, q_len=q_len, kv_len=kv_len, device=found)
    return extent


def check_given(facts: Facts, batch: int | None, heads: int | None) -> None:
    """A mask that depends on b or h has no map without knowing how many there are."""
    for used, given, word in ((facts.uses_b, batch, "batch"), (facts.uses_h, heads, "heads")):
        if used and given is None:
            raise ShapeError(f"the mask depends on the {word.rstrip('s')} index: pass {word}=...")


def find_map(store: Store, traced: Traced, extent: Extent, block_q: int, block_kv: int, as_lists: bool = False) -> tuple[Facts, TileMap]:
    """What is known of the mask, and its tile map for this extent, built at most once for each version of its captures.

    `as_lists` asks for the list form, for a kernel that reads no other.
    """
    key, facts = store.facts(traced)
    kept_batch = extent.batch if facts.uses_b else 1
    kept_heads = extent.heads if facts.uses_h else 1
    place = (extent.q_len, extent.kv_len, kept_batch, kept_heads, extent.device)
    made = store.tile_map(
        (key, traced.scalars, place, block_q, block_kv, as_lists),
        traced.tensors,
        lambda: _build(store, facts, traced, extent, block_q, block_kv, as_lists),
    )
    return facts, made


def _build(store: Store, facts: Facts, traced: Traced, extent: Extent, block_q: int, block_kv: int, as_lists: bool) -> TileMap:
    def decide(states: torch.Tensor) -> torch.Tensor:
        module = store.kernel(
            (store.key_of(traced), "tiles", block_q, block_kv), lambda: launch.load(_kernel_file(store, facts, traced, block_q, block_kv))
        )
        return launch.decide_tiles(module, states, (traced.tensors, traced.scalars), extent.q_len, extent.kv_len)

    made = tile_map.build(
        facts,
        traced.tensors,
        traced.scalars,
        q_len=extent.q_len,
        kv_len=extent.kv_len,
        batch=extent.batch,
        heads=extent.heads,
        block_q=block_q,
        block_kv=block_kv,
        device=extent.device,
        evaluate_undecided=decide if extent.device.type == "cuda" or interpreting() else None,
    )
    return made.listed() if as_lists else made


def _kernel_file(store: Store, facts: Facts, traced: Traced, block_q: int, block_kv: int) -> Path:
    """The file of the planning kernel, which decides by evaluation what box arithmetic leaves open."""
    names = str(traced.names())
    key = hashlib.sha256(f"tiles {block_q} {block_kv} {store.key_of(traced)} {traced.name} {names}".encode()).hexdigest()

    def write() -> str:
        header = [f"tiles of mask {traced.name}", f"    {show(facts.predicate, traced.names())}"]
        mask = emit_function("mask_mod", facts.predicate, capture_spec(traced), "mask")
        return assemble_tiles(block_q, block_kv, mask, header)

    return store.kernel_file(key, write)


def capture_spec(traced: Traced) -> CaptureSpec:
    """What generated code needs to know of the captures."""
    return CaptureSpec.of(traced.tensors, traced.tensor_names, traced.scalars, traced.scalar_names)


def find_intervals(traced: Traced, form: Form | NotInterval, extent: Extent) -> Intervals:
    """The form's intervals for this extent. Raises NotInterval, at the user's line, where the mask has none."""
    if isinstance(form, NotInterval):
        raise NotInterval(form.reason, form.culprit, form.at or traced.locate(traced.expr))
    if form.residue is not None:
        raise NotInterval("a part of the mask keeps scattered places", str(form.residue), traced.locate(form.residue))
    for number in form.sorted_tables:
        if not bool(ascending(traced.tensors[number])):
            raise NotInterval(f"`{traced.tensor_names[number]}` does not ascend", "", traced.locate(traced.expr))
    return solve(
        form,
        traced.tensors,
        traced.scalars,
        q_len=extent.q_len,
        kv_len=extent.kv_len,
        batch=extent.batch,
        heads=extent.heads,
        device=extent.device,
    )
