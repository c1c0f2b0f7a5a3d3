"""Hopper backward kernels compiled on any machine. Run as a script without TRITON_INTERPRET; prints {case: facts} as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from hopper_backward_cases import CASES, column_map, load_module, mask_of, plan_of, tables_of, tensors

from flexmask.templates import offline

# those that differ in their code
ALWAYS = ["two", "crossed, narrow", "holds", "bits", "bits hold", "soft-cap", "slopes, narrow", "deterministic"]
# and every deterministic one and score mod, which take two minutes
ORDERED = [name for name in CASES if name.startswith("deterministic, ")]
COMPILED = ALWAYS + ORDERED + [name for name, case in CASES.items() if case.score and name not in (*ALWAYS, *ORDERED)]
KERNELS = ("row_terms_kernel", "attention_backward", "gather_queries")


def recorded(module: Any, call: Any) -> dict[str, list[Any]]:
    """The arguments of each kernel in a call of host functions, which starts none of them."""
    found: dict[str, list[Any]] = {}

    def record(left: tuple[str, ...]) -> None:
        if left:
            found[left[0]] = offline._recorded(module, left[0], lambda: record(left[1:]))
        else:
            call()

    record(KERNELS)
    return found


def compiled(name: str) -> dict[str, Any]:
    """Facts about the kernel of a case; the passes before and after it are compiled too."""
    case = CASES[name]
    plan = plan_of(case)
    module, (q, k, v, dout), given = load_module(case), tensors(case, plan, "cpu"), column_map(plan, mask_of(case, "cpu"))
    given["score_captures"] = module.pack(tables_of(case, "cpu"), [])
    if plan.map_form != "none" and not plan.deterministic:
        given["order"] = torch.zeros(-(-k.shape[2] // plan.block_kv) + 18, dtype=torch.int32)
    if plan.deterministic and plan.map_form != "none":
        given["ranks"] = torch.zeros(100, dtype=torch.int32)
    if plan.runs != "always":
        given["broken"] = torch.zeros(1, dtype=torch.int32)

    def call() -> None:
        terms = module.row_terms(dout, dout.new_zeros(dout.shape[:3]).float(), dout)
        module.backward(q, k, v, dout, terms, 0.125, **given)

    arguments, options = recorded(module, call), SimpleNamespace(num_warps=4, num_stages=1)
    with offline._compiling_for(plan.arch):
        module.row_terms_kernel.warmup(*arguments["row_terms_kernel"], ROWS=32, grid=(1,))
        module.gather_queries.warmup(*arguments["gather_queries"], grid=(1,))
    return asdict(offline._compile(module.attention_backward, arguments["attention_backward"], options, plan.arch))


if __name__ == "__main__":
    json.dump({name: compiled(name) for name in sys.argv[1:] or COMPILED}, sys.stdout)
