"""Kernels of tiles, lists and ranks compiled for GPUs elsewhere. Run as a script without TRITON_INTERPRET; prints {case: facts} as JSON."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexmask.ir import parse
from flexmask.lowering import CaptureSpec, emit_function, emit_values
from flexmask.runtime.launch import load as load_module
from flexmask.templates.assemble import assemble_tiles
from flexmask.templates.disassembly import opcodes_of
from flexmask.templates.offline import _compiling_for, _run_on

EVICT = "(kv_idx <= q_idx) & (q_idx < t0[b, kv_idx])"
BUSY = (
    "(((q_idx * q_idx + kv_idx * 7) % 13 < 5) | (t0[b, q_idx] == t0[b, kv_idx]) & (kv_idx // s0 % 3 == q_idx // s0 % 3))"
    " & (kv_idx * kv_idx <= q_idx * s0)"
)
BOX = ("t1[b, 0, kv_idx] <= q_idx * 128 + 127", "t2[b, 0, kv_idx] <= q_idx * 128")
# (mask, axis, block_q, block_kv, GPU)
TILES = {
    "evict": (EVICT, "row", 128, 128, 90),
    "evict, by columns": (EVICT, "column", 128, 128, 90),
    "evict, ampere": (EVICT, "row", 128, 64, 80),
    "busy": (BUSY, "row", 128, 128, 90),
    "busy, by columns": (BUSY, "column", 64, 128, 90),
    "odd blocks": (EVICT, "row", 100, 72, 90),
}
# (pieces, block, other block)
LISTS = {"states": None, "one piece": (1, 128, 64), "two pieces": (2, 64, 128), "three pieces": (3, 128, 128)}
# (kernel, whether the map is in range form)
RANKS = {"marks of lists": ("mark_kernel", False), "marks of ranges": ("mark_kernel", True), "counts of marks": ("count_kernel", True)}
# the same kernel for other lengths and numbers: some divisible by 16, some 1
LENGTHS = [(1, 1, 500, 700), (1, 1, 512, 1024), (3, 1, 1, 1), (16, 16, 33, 1)]


def record(module: Any, name: str, call: Callable[[], Any]) -> tuple[Any, Any, Any]:
    """(kernel, arguments, options) as `call` launches it."""
    recorded: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: recorded.extend([args, options])

    kernel = getattr(module, name)
    setattr(module, name, Recorder())
    try:
        call()
    finally:
        setattr(module, name, kernel)
    return kernel, *recorded


def compiled(launch: tuple[Any, Any, Any], arch: int) -> Any:
    kernel, args, options = launch
    with _compiling_for(arch):
        return kernel.warmup(*args, grid=(1,), **options)


def facts_of(made: Any) -> dict[str, int]:
    opcodes = opcodes_of(_run_on(made.asm["cubin"], "nvdisasm", "-c"))
    usage = re.search(r"REG:(\d+)", _run_on(made.asm["cubin"], "cuobjdump", "-res-usage"))
    assert usage is not None and opcodes
    return {"registers": int(usage[1]), "spills": opcodes["LDL"] + opcodes["STL"]}


def tiles_module(case: tuple[str, str, int, int, int], path: Path) -> Any:
    mask, axis, block_q, block_kv, _ = case
    summaries = [torch.zeros(2, 1, 8, dtype=torch.int64)] * 2
    captured = [torch.zeros(2, 1000, dtype=torch.int32)], ["evict"], [7], ["window"]
    spec = CaptureSpec.of(*captured)
    wide = CaptureSpec.of([*captured[0], *summaries], ["evict", "least", "most"], *captured[2:])
    box = emit_values("box_test", "b, h, q_idx, kv_idx, q_len, kv_len", [parse(x, ["int"] * 3, ["int"]) for x in BOX], wide, "Boxes.")
    text = emit_function("mask", parse(mask, ["int"], ["int"]), spec, "mask")
    sizes: dict[str, Any] = {"axis": axis, "block_q": block_q, "block_kv": block_kv}
    path.write_text(assemble_tiles(**sizes, mask=text, box=box, bounds=[(0,), ()]))
    return load_module(path)


def launch_tiles(module: Any, case: tuple[str, str, int, int, int], sizes: tuple[int, int, int, int], window: int) -> Any:
    batch, heads, q_len, kv_len = sizes
    rows, columns = -(-q_len // case[2]), -(-kv_len // case[3])
    rows, columns = (rows, columns) if case[1] == "row" else (columns, rows)
    states, broken = torch.zeros(batch, heads, rows, columns, dtype=torch.int8), torch.zeros(2, dtype=torch.int32)
    hulls, table = torch.zeros(2, batch, heads, rows, 2, dtype=torch.int32), torch.zeros(1, 1000, dtype=torch.int32)
    least = torch.zeros(1, 1, 7, dtype=torch.int64)
    packed = module.pack([table], [window]), module.pack([table, least, least], [window])
    return record(module, "decide_tiles", lambda: module.tiles(states, 0, *packed, q_len, kv_len, hulls=hulls, broken=broken))


def launch_lists(case: tuple[int, int, int] | None, sizes: tuple[int, int, int, int]) -> Any:
    from flexmask.templates import lists

    batch, heads, length, other = sizes
    pieces, block, other_block = case or (1, 128, 128)
    rows, columns = -(-length // block), -(-other // other_block)
    counts, index = torch.zeros(batch, heads, rows, 2, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    if case is None:
        states = torch.zeros(batch, heads, rows, columns, dtype=torch.int8)
        given = (states, counts, counts, index, 0, length, other)
        return record(lists, "states_kernel", lambda: lists.list_states(*given, evaluated_only_if=index))
    starts = torch.zeros(batch, heads, length, pieces, dtype=torch.int32)
    given = (starts, starts, counts, counts, index, length, other, block, other_block, other)
    return record(lists, "intervals_kernel", lambda: lists.list_intervals(*given))


def launch_ranks(case: tuple[str, bool], sizes: tuple[int, int, int, int]) -> Any:
    from flexmask.templates import ranks

    name, ranges = case
    batch, heads, blocks, lines = sizes
    table = torch.zeros(batch, heads, lines, 4 if ranges else 2, dtype=torch.int32)
    listed = (None, None) if ranges else (table, torch.zeros(9, dtype=torch.int32))
    made = torch.zeros(batch, heads, blocks, -(-lines // 32), 2, dtype=torch.int32)
    other = "mark_kernel" if name == "count_kernel" else "count_kernel"
    return record(ranks, name, lambda: record(ranks, other, lambda: ranks.rank_lines(table, *listed, made)))


def main() -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, case) in enumerate(TILES.items()):
            module = tiles_module(case, Path(folder) / f"tiles_{number}.py")
            launches = [launch_tiles(module, case, sizes, n) for sizes, n in zip(LENGTHS, (1, 16, 0, -5), strict=True)]
            found[name] = facts_of(compiled(launches[0], case[4]))
            if name == "evict":
                found["tiles kernels"] = len({compiled(x, 90).hash for x in launches})
    for name, given in LISTS.items():
        made = [compiled(launch_lists(given, sizes), 90) for sizes in LENGTHS]
        found[name] = facts_of(made[0]) | {"kernels": len({x.hash for x in made})}
    for name, ranked in RANKS.items():
        made = [compiled(launch_ranks(ranked, sizes), 90) for sizes in LENGTHS]
        found[name] = facts_of(made[0]) | {"kernels": len({x.hash for x in made})}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
