"""Hopper forward kernels compiled for a GPU that is not here. As a script, without TRITON_INTERPRET, it prints {case: facts} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hopper_cases import BITS, LIST, RANGE, Case, Given, plan_of, source_of, tables_of

from flexmask.lowering.plan_hopper import HopperPlan
from flexmask.templates import offline

CASES: dict[str, Case] = {
    "full": Case({"head_dim": 128}),
    "causal, extras": Case({"head_dim": 128, **RANGE, "starts": False}, given=("extras",)),
    "two intervals": Case({"head_dim": 128, **LIST, "pieces": 2, "runs": "hold"}),
    "three intervals, by grid": Case({"head_dim": 64, "dtype": "float16", **LIST, "pieces": 3, "schedule": "grid"}),
    "three warpgroups": Case(
        {"head_dim": 64, **RANGE}, change={"block_q": 192, "consumer_registers": 160, "producer_registers": 32}
    ),
    "crossed": Case({"head_dim": 128, **LIST, "crossed": True}),
    "bits": Case({"head_dim": 128, **BITS, "runs": "hold"}),
    "bits, score": Case({"head_dim": 128, "dtype": "float16", **BITS, "score": True}, score="softcap"),
    "gate": Case({"head_dim": 128, **RANGE, "score": True}, score="gate"),
    "other widths": Case({"head_dim": 64, "v_head_dim": 128, **RANGE}),
    "256, extras": Case({"head_dim": 256, **RANGE}, given=("extras",)),
    "256, three intervals": Case({"head_dim": 256, "dtype": "float16", **LIST, "pieces": 3}),
    "256, crossed": Case({"head_dim": 256, **LIST, "crossed": True}),
    "256, bits, score": Case({"head_dim": 256, **BITS, "score": True}, score="softcap"),
    "256, gate": Case({"head_dim": 256, **RANGE, "score": True}, score="gate"),
    "192": Case({"head_dim": 192, **LIST, "pieces": 2}),
    "192, bits": Case({"head_dim": 192, **BITS}),
    "192/128": Case({"head_dim": 192, "v_head_dim": 128}),
    "192/128, extras": Case({"head_dim": 192, "v_head_dim": 128, **LIST, "pieces": 3}, given=("extras",)),
    "192/128, gate": Case({"head_dim": 192, "v_head_dim": 128, **RANGE, "score": True}, score="gate"),
    "128/256": Case({"head_dim": 128, "v_head_dim": 256, **RANGE}),
    "split": Case({"head_dim": 128, **RANGE, "split": True}),
    "split, 2 heads a tile, bits": Case({"head_dim": 128, **BITS, "split": True, "pack": 2}, given=("extras",)),
    "4 heads a tile": Case({"head_dim": 128, **RANGE, "pack": 4, "split": True}, given=("extras",)),
    "8 heads a tile, bits": Case({"head_dim": 128, **BITS, "pack": 8}, given=("extras",)),
    "2 heads a tile": Case({"head_dim": 64, **RANGE, "pack": 2}),
    "2 heads a tile, crossed": Case({"head_dim": 128, **LIST, "crossed": True, "pack": 2}),
    "256, split": Case({"head_dim": 256, **LIST, "pieces": 2, "split": True, "pack": 2}),
    "192/128, split": Case({"head_dim": 192, "v_head_dim": 128, **RANGE, "split": True}),
    "split, gate": Case({"head_dim": 128, **RANGE, "split": True, "pack": 2, "score": True}, score="gate"),
}  # fmt: skip
# with as few registers as a plan may have, and with fewer
LEAST: Given = {"consumer_registers": 216, "producer_registers": 40}
LIMITS: dict[str, Case] = {
    "at the limit": Case({"head_dim": 256, **RANGE, "starts": False}, change=LEAST),
    "at the limit, crossed": Case({"head_dim": 256, **LIST, "crossed": True}, change=LEAST),
    "beyond it": Case({"head_dim": 256, **LIST, "pieces": 3}, change={**LEAST, "consumer_registers": 200}, given=("unchecked",)),
    "beyond it, score": Case(
        {"head_dim": 128, **RANGE, "score": True}, change={"consumer_registers": 192}, given=("unchecked",), score="gate"
    ),
    "far beyond it": Case({"head_dim": 64, "v_head_dim": 256, **RANGE}, change={"block_kv": 128, "stages": 1}, given=("unchecked",)),
}  # fmt: skip


# the others take minutes
ALWAYS = ("causal, extras", "bits")


def main(names: list[str]) -> None:
    from flexmask.runtime.launch import load as load_module

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names or CASES):
            case = (CASES | LIMITS)[name]
            with mock.patch.object(HopperPlan, "registers", lambda plan: 0) if "unchecked" in case.given else nullcontext():
                plan = plan_of(case)
            path = Path(folder) / f"kernel_{number}.py"
            path.write_text(source_of(case, plan))
            extras: dict[str, Any] = {}
            if plan.map_form != "none":
                extras["order"] = torch.zeros(-(-offline.LENGTH // plan.queries) + 18, dtype=torch.int32)
            if "extras" in case.given:
                extras |= {"sinks": torch.zeros(4), "peaks": torch.zeros(2, 4, offline.LENGTH)}
            tables = (tables_of(case.score, 4, offline.LENGTH, offline.LENGTH), ())
            results[name] = asdict(offline.compile_hopper_offline(load_module(path), plan, tables, extras))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
