"""Kernels that drop pairs, compiled for GPUs that are not here. Run as a script without TRITON_INTERPRET; prints {case: facts} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexmask.lowering import plan_forward
from flexmask.lowering.plan_backward import plan_backward
from flexmask.templates.assemble import assemble
from flexmask.templates.assemble_backward import assemble_backward

CAUSAL: dict[str, Any] = {"map_form": "range", "pieces": 1}
TMA: dict[str, Any] = {"arch": 90, "loads": "tma", **CAUSAL}
AMPERE: dict[str, Any] = {"arch": 80, **CAUSAL}
# keys and values in kernels of the kind that `runtime.backward` chooses for dropout
CASES: dict[str, dict[str, Any]] = {
    "hopper forward": {"part": "forward", "head_dim": 128, **TMA},
    "hopper dq": {"part": "dq", "head_dim": 128, **TMA},
    "hopper dkdv, 64": {"part": "dkdv", "head_dim": 64, "heavy": True, **TMA},
    "hopper dkdv": {"part": "dkdv", "head_dim": 128, "heavy": True, **TMA},
    "ampere forward": {"part": "forward", "head_dim": 128, **AMPERE},
    "ampere dkdv": {"part": "dkdv", "head_dim": 64, **AMPERE},
}


def main() -> None:
    from flexmask.runtime.launch import load
    from flexmask.templates.offline import compile_backward_offline, compile_offline

    seed, results = torch.zeros(1, dtype=torch.int64), {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, wanted) in enumerate(CASES.items()):
            path, extras = Path(folder) / f"kernel_{number}.py", {"dropout": (seed, 1 << 22, 4 / 3)}
            if wanted["part"] == "forward":
                plan = plan_forward(**{k: v for k, v in wanted.items() if k != "part"})
                path.write_text(assemble(plan))
                more = {"sinks": torch.zeros(4), "peaks": torch.zeros(2, 4, 1000)}
                results[name] = asdict(compile_offline(load(path), plan, extras=extras | more))
            else:
                plan_back = plan_backward(**wanted)
                path.write_text(assemble_backward(plan_back))
                results[name] = asdict(compile_backward_offline(load(path), plan_back, extras=extras))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
