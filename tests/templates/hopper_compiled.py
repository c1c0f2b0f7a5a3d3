"""Hopper forward kernels compiled for a GPU that is not here. As a script, without TRITON_INTERPRET, it prints {case: facts} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hopper_cases import BITS, LIST, RANGE, Case, plan_of, source_of, tables_of

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
}  # fmt: skip


# the others take half a minute
ALWAYS = ("causal, extras", "bits")


def main(names: list[str]) -> None:
    from flexmask.runtime.launch import load as load_module
    from flexmask.templates.offline import LENGTH, compile_hopper_offline

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names or CASES):
            case = CASES[name]
            plan = plan_of(case)
            path = Path(folder) / f"kernel_{number}.py"
            path.write_text(source_of(case))
            extras: dict[str, Any] = {}
            if case.given:
                order = torch.zeros(-(-LENGTH // plan.block_q), dtype=torch.int32)
                extras = {"sinks": torch.zeros(4), "peaks": torch.zeros(2, 4, LENGTH), "order": order}
            tables = (tables_of(case.score, 4, LENGTH, LENGTH), ())
            results[name] = asdict(compile_hopper_offline(load_module(path), plan, tables, extras))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
