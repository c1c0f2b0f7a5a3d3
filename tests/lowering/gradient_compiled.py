"""The probe of the gradient cases compiled for sm_90 on any machine. Run as a script without TRITON_INTERPRET; prints {case: ptx}."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from gradient_cases import captures, probe_text

from flexmask.ir import parse, simplify
from flexmask.lowering import gradient_tables

CASES = [
    "s0 * tanh(score / s0)",
    "score + t3[b, h, q_idx, kv_idx]",
    "score * t0[h] + t0[q_idx] + t8[kv_idx] + t1[()]",
    "score + t5[q_idx - kv_idx] * score",
]


def main() -> None:
    from flexmask.runtime.launch import load
    from flexmask.templates.launcher import pack
    from flexmask.templates.offline import _compiling_for

    tensors, scalars, spec = captures()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(CASES):
            expr = simplify(parse(text, [t.kind for t in spec.tensors], ["float"]))
            path = Path(folder) / f"compiled_{number}.py"
            path.write_text(probe_text(expr, spec))
            module, x = load(path), torch.empty(64)
            grads = tuple(torch.empty(64) for _ in gradient_tables(expr))
            arguments = (x, x, x, x.to(torch.int8), grads, *pack(tensors, scalars), 0, 0, 19, 37)
            with _compiling_for(90):
                found[text] = module.probe.warmup(*arguments, grid=(1,)).asm["ptx"]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
