"""Tile maps on a GPU beside torch's compiled `create_block_mask`, in one process, interleaved; states checked in the same run.

    python -m benchmarks.maps [--lengths 8192 32768 131072 1048576] [--masks causal ...] [--json FILE]

For each mask and length, tiles of 128 x 128: GPU milliseconds (triton.testing.do_bench), milliseconds as the caller waits for it
(from the call to the end of a synchronise), and peak memory beyond the inputs. flexmask's is what an attention call builds when a
captured tensor changed: everything its kernels read, for every kernel that may have its turn. No host sync is allowed while it is
built. "promised" masks hold their ids in `flexmask.sorted`. At 1048576 the rival does not run, and the 128K documents are repeated
eight times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

import flexmask
from benchmarks import masks as zoo
from benchmarks.rivals import plain
from benchmarks.rows import measured, options
from benchmarks.timing import bench
from flexmask.runtime.maps import Extent, find_device_maps, find_map
from flexmask.runtime.store import default_store
from flexmask.runtime.variants import variants

BLOCK = 128
# beyond this the rival's own temporaries do not fit the memory
LONGEST_RIVAL = 131072
PROMISED = ("causal_document", "document", "causal_blockwise", "prefix_lm_document")
NAMES = (*zoo.NAMES, *(f"{name}, promised" for name in PROMISED))
LONG = ("causal_document, promised", "causal", "sliding_window", "causal_document", "document", "global_sliding", "prefix_lm_causal")


@dataclass
class Row:
    """One mask at one length: (GPU ms, waited ms, peak MiB) of each contestant."""

    mask: str
    length: int
    figures: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    states_agree: bool | None = None


def fresh(mask: flexmask.Mask, length: int) -> Any:
    """All maps that an attention call needs, built anew without a wait."""
    store, traced = default_store(), mask.traced()
    store.forget_maps()
    facts = store.facts(traced)[1]
    wanted = tuple((variant, BLOCK, BLOCK) for variant in variants(facts, traced.promised))
    return find_device_maps(store, traced, Extent(length, length, 1, 1, torch.device("cuda")), wanted)


def figures(build: Callable[[], Any]) -> tuple[float, float, float]:
    for _ in range(3):
        build()
    torch.cuda.synchronize()
    default_store().forget_maps()
    torch.cuda.reset_peak_memory_stats()
    before, waited = torch.cuda.memory_allocated(), []
    for _ in range(15):
        start = time.perf_counter()
        made = build()
        torch.cuda.synchronize()
        waited.append(1e3 * (time.perf_counter() - start))
        del made
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return bench(build), statistics.median(waited), peak


def without_sync(build: Callable[[], Any]) -> None:
    """Raises where `build` waits for the GPU."""
    build()  # loading kernels may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        build()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def agree(mask: flexmask.Mask, block_mask: Any, length: int) -> bool:
    """Whether every block is in the same state as in torch's mask."""
    found = find_map(default_store(), mask.traced(), Extent(length, length, 1, 1, torch.device("cuda")), BLOCK, BLOCK)[1]
    mine = found.to_torch(mask)
    parts = ("kv_num_blocks", "full_kv_num_blocks", "kv_indices", "full_kv_indices")
    return all(torch.equal(getattr(mine, part), getattr(block_mask, part)) for part in parts)


def measure(name: str, length: int) -> Row:
    row = Row(name, length)
    mask = build_mask(name, length)
    build = lambda: fresh(mask, length)
    contestants = {"flexmask": build} if name != "full" else {}
    if contestants:
        without_sync(build)
    if length <= LONGEST_RIVAL:
        torch.compiler.reset()
        make = torch.compile(create_block_mask)
        mod = plain(zoo.build(name.removesuffix(", promised"), length, "cuda"))
        contestants["create_block_mask"] = lambda: make(mod, None, None, length, length, device="cuda")
    for label, run in contestants.items():
        try:
            row.figures[label] = figures(run)
        except Exception as error:
            row.failures[label] = f"{type(error).__name__}: {str(error)[:200]}"
    if "create_block_mask" in row.figures and "flexmask" in row.figures:
        row.states_agree = agree(mask, contestants["create_block_mask"](), length)
    return row


def build_mask(name: str, length: int) -> flexmask.Mask:
    plain_name, promised = name.removesuffix(", promised"), name.endswith("promised")
    if plain_name in zoo.DOCUMENT_FREE:
        return zoo.build(plain_name, length, "cuda")
    documents = zoo.samples(min(length, 131072))[0]
    repeated = tuple(zoo.shifted(d, 131072 * i) for i in range(max(1, length // 131072)) for d in documents)
    return zoo.MASKS[plain_name](zoo.Sequence(length, repeated, torch.device("cuda"), promised=promised))


def show(row: Row) -> str:
    cells = [f"{label} {gpu:.4f} ms, waited {waited:.3f} ms, {peak:.1f} MiB" for label, (gpu, waited, peak) in row.figures.items()]
    text = f"{row.mask:28s} {row.length:8d} | " + " | ".join(cells)
    if len(row.figures) == 2:
        ours, theirs = row.figures["flexmask"], row.figures["create_block_mask"]
        text += f" | x{theirs[0] / ours[0]:.1f}, waited x{theirs[1] / ours[1]:.1f} | states {'agree' if row.states_agree else 'DIFFER'}"
    return text + "".join(f"\n    {label} failed: {why}" for label, why in row.failures.items())


def main() -> None:
    given = options(argparse.ArgumentParser(description=__doc__.splitlines()[0]), [8192, 32768, 131072, 1048576], NAMES)
    cases = [(name, length) for length in given.lengths for name in given.masks if length <= LONGEST_RIVAL or name in LONG]
    measured(cases, measure, show, given.json)


if __name__ == "__main__":
    main()
