"""The bits kernel compiled for GPUs that are not here. Run as a script without TRITON_INTERPRET; prints {case: facts} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from maps_compiled import BUSY, EVICT, compiled, facts_of, record

from flexmask.ir import parse
from flexmask.lowering import CaptureSpec, emit_function
from flexmask.runtime.launch import load
from flexmask.templates.assemble_bits import assemble_bits, slots_for, words_in_line

DILATED = "(kv_idx <= q_idx) & ((q_idx - kv_idx) % s0 == 0)"
# (mask, axis, block_q, block_kv, GPU)
BITS = {
    "dilated": (DILATED, "row", 128, 128, 90),
    "evict, odd blocks": (EVICT, "column", 100, 72, 80),
    "busy": (BUSY, "row", 128, 128, 90),
    "busy, small blocks": (BUSY, "row", 16, 32, 80),
    "busy, great blocks": (BUSY, "column", 256, 256, 90),
}
# the same kernel for other lengths and numbers: some divisible by 16, some 1
CALLS = [((1, 1, 500, 700), 1, 7), ((1, 1, 512, 1024), 16, 64), ((3, 1, 1, 1), 0, 1), ((16, 16, 33, 1), -5, 16)]


def module_of(case: tuple[str, str, int, int, int], path: Path) -> Any:
    spec = CaptureSpec.of([torch.zeros(2, 1000, dtype=torch.int32)], ["evict"], [7], ["window"])
    text = emit_function("mask", parse(case[0], ["int"], ["int"]), spec, "mask")
    path.write_text(assemble_bits(axis=case[1], block_q=case[2], block_kv=case[3], mask=text))
    return load(path)


def launch(module: Any, case: tuple[str, str, int, int, int], sizes: tuple[int, int, int, int], window: int, pool: int) -> Any:
    batch, heads, q_len, kv_len = sizes
    line, places = case[2:4] if case[1] == "row" else case[3:1:-1]
    lines = -(-(q_len if case[1] == "row" else kv_len) // line)
    counts, index = torch.zeros(batch, heads, lines, 2, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    words = torch.zeros(pool, line, words_in_line(places), dtype=torch.int32)
    slots, packed = torch.zeros(slots_for(pool), dtype=torch.int64), module.pack([torch.zeros(1, 1000, dtype=torch.int32)], [window])
    given = (counts, counts, index, index, words, slots, index, packed, q_len, kv_len, 64)
    return record(module, "make_bits", lambda: module.bits(*given))


def main() -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, case) in enumerate(BITS.items()):
            module = module_of(case, Path(folder) / f"bits_{number}.py")
            launches = [launch(module, case, *call) for call in (CALLS if name == "dilated" else CALLS[:1])]
            found[name] = facts_of(compiled(launches[0], case[4]))
            found["kernels"] = found.get("kernels") or len({compiled(x, case[4]).hash for x in launches})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
