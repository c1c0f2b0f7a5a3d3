"""Kernels compiled for GPUs that are not here. Run as a script without TRITON_INTERPRET; prints {case: facts} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexmask.ir import SCORE, K, Q, const, load, make
from flexmask.lowering import CaptureSpec, TensorSpec, emit_function, plan_forward
from flexmask.templates.assemble import assemble

EVALUATED: dict[str, Any] = {"map_form": "list", "runs": "fail", "score": True}
CAUSAL: dict[str, Any] = {"map_form": "range", "pieces": 1}
CASES: dict[str, dict[str, Any]] = {
    "hopper full": {"head_dim": 128, "arch": 90, "loads": "tma"},
    "hopper causal": {"head_dim": 128, "arch": 90, "loads": "tma", **CAUSAL},
    "hopper list, two intervals": {"head_dim": 128, "arch": 90, "loads": "tma", "map_form": "list", "pieces": 2, "runs": "hold"},
    "hopper everything": {"head_dim": 128, "arch": 90, "loads": "tma", **EVALUATED},
    "hopper pointers": {"head_dim": 96, "arch": 90, **EVALUATED},
    "hopper 256": {"head_dim": 256, "arch": 90, "loads": "tma", **CAUSAL},
    "ampere causal": {"head_dim": 128, "arch": 80, **CAUSAL},
    "ampere everything": {"head_dim": 64, "arch": 80, "dtype": "float16", **EVALUATED},
    "ampere 192 and 128": {"head_dim": 192, "v_head_dim": 128, "arch": 80, **EVALUATED},
    "ampere float32": {"head_dim": 64, "arch": 80, "dtype": "float32", **EVALUATED},
}
DOCUMENT = make("eq", (load(0, "int", Q), load(0, "int", K))) & (K <= Q)
SOFTCAP = const(30.0) * make("tanh", (make("truediv", (SCORE, const(30.0))),))


def main() -> None:
    from flexmask.runtime.launch import load as load_module
    from flexmask.templates.offline import compile_offline

    spec = CaptureSpec((TensorSpec("doc", 1, "int32"),))
    mask, score = emit_function("document", DOCUMENT, spec, "mask"), emit_function("softcap", SOFTCAP, CaptureSpec(), "score")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, wanted) in enumerate(CASES.items()):
            plan = plan_forward(**wanted)
            path = Path(folder) / f"kernel_{number}.py"
            path.write_text(assemble(plan, mask if plan.evaluated else None, score if plan.score else None))
            captured = ((torch.zeros(1000, dtype=torch.int32),), ()) if plan.evaluated else ((), ())
            results[name] = asdict(compile_offline(load_module(path), plan, mask=captured))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
