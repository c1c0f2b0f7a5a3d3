"""Backward kernels compiled for GPUs that are not here. Run as a script without TRITON_INTERPRET; prints {case: facts} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexmask.ir import SCORE, K, Q, const, load, make
from flexmask.lowering import CaptureSpec, TensorSpec, emit_function, emit_gradient
from flexmask.lowering.plan_backward import plan_backward
from flexmask.templates.assemble_backward import assemble_backward

CAUSAL: dict[str, Any] = {"map_form": "range", "pieces": 1}
TWO: dict[str, Any] = {"map_form": "list", "pieces": 2, "runs": "hold"}
BUSY: dict[str, Any] = {"map_form": "list", "runs": "fail", "score": True, "heavy": True}
TMA: dict[str, Any] = {"arch": 90, "loads": "tma"}
CASES: dict[str, dict[str, Any]] = {
    "hopper dq, causal": {"part": "dq", "head_dim": 128, **TMA, **CAUSAL},
    "hopper dkdv, causal": {"part": "dkdv", "head_dim": 128, **TMA, **CAUSAL},
    "hopper dkdv, full": {"part": "dkdv", "head_dim": 64, **TMA},
    "hopper dq, two intervals": {"part": "dq", "head_dim": 64, **TMA, **TWO},
    "hopper dkdv, busy": {"part": "dkdv", "head_dim": 128, **TMA, **BUSY},
    "hopper dq, table gradients": {"part": "dq", "head_dim": 128, **TMA, **BUSY, "scatter": "float"},
    "hopper dq, peaks of table gradients": {"part": "dq", "head_dim": 128, **TMA, **BUSY, "scatter": "peak"},
    "hopper dq, table gradients in fixed point": {"part": "dq", "head_dim": 128, **TMA, **BUSY, "scatter": "fixed"},
    "ampere dq, table gradients in fixed point": {"part": "dq", "head_dim": 64, "arch": 80, **BUSY, "scatter": "fixed"},
    "hopper dkdv, pointers, 256": {"part": "dkdv", "head_dim": 256, "arch": 90, **CAUSAL},
    "ampere dq, causal": {"part": "dq", "head_dim": 128, "arch": 80, **CAUSAL},
    "ampere dkdv, busy": {"part": "dkdv", "head_dim": 64, "arch": 80, "dtype": "float16", **BUSY},
    "ampere dkdv, float32": {"part": "dkdv", "head_dim": 64, "arch": 80, "dtype": "float32", **CAUSAL},
}
DOCUMENT = make("eq", (load(0, "int", Q), load(0, "int", K))) & (K <= Q)
SOFTCAP = const(30.0) * make("tanh", (make("truediv", (SCORE, const(30.0))),))
BIAS = CaptureSpec((TensorSpec("bias", 2, "float16"),))
SCORE_MOD = SOFTCAP + load(0, "float", Q, K)


NUMBERS = torch.zeros(1000, 1000)
FIXED: list[Any] = [NUMBERS.long(), NUMBERS.int(), 2.0**40]
GRADS: dict[str, list[Any]] = {"": [], "float": [NUMBERS], "peak": FIXED, "fixed": FIXED}


def source_of(wanted: dict[str, Any]) -> str:
    plan = plan_backward(**wanted)
    mask = emit_function("document", DOCUMENT, CaptureSpec((TensorSpec("doc", 1, "int32"),)), "mask") if plan.evaluated else None
    texts = (None, None)
    if plan.score:
        gradient = emit_gradient(SCORE_MOD, BIAS, scatter=plan.scatter or "float")
        texts = (emit_function("softcap and bias", SCORE_MOD, BIAS, "score"), gradient)
    return assemble_backward(plan, mask, *texts, ["mask document"])


def main() -> None:
    from flexmask.runtime.launch import load as load_module
    from flexmask.templates.offline import compile_backward_offline

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, wanted) in enumerate(CASES.items()):
            plan = plan_backward(**wanted)
            path = Path(folder) / f"kernel_{number}.py"
            path.write_text(source_of(wanted))
            captured = ((torch.zeros(1000, dtype=torch.int32),), ()) if plan.evaluated else ((), ())
            table = ((torch.zeros(1000, 1000, dtype=torch.float16),), ()) if plan.score else ((), ())
            results[name] = asdict(compile_backward_offline(load_module(path), plan, mask=captured, score=table, grads=GRADS[plan.scatter]))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
