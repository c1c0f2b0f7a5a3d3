"""Hopper kernels of the sizes that tuning would try, run on the CPU as by hopper_on_cpu.py and hopper_backward_on_cpu.py. A script for
TRITON_INTERPRET=1: prints {case and sizes: what is wrong} as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import hopper_backward_cases
import hopper_backward_on_cpu
import hopper_cases
import hopper_on_cpu
import torch

from flexmask.lowering import candidates
from flexmask.lowering.tuned import differences

FORWARD = ("causal", "window", "two", "crossed", "bits", "256, causal")
BACKWARD = ("causal", "two", "bits")


def forward(name: str) -> dict[str, str]:
    case, found = hopper_cases.CASES[name], {}
    plan = hopper_cases.plan_of(case)
    for other in candidates(plan):
        changed = replace(case, change={**case.change, **differences(plan, other)})
        module = hopper_on_cpu.loaded(hopper_cases.source_of(changed))
        found[f"{name} {differences(plan, other)}"] = hopper_cases.check(changed, module, "cpu")
    return found


def backward(name: str) -> dict[str, str]:
    case, found, plan_of = hopper_backward_cases.CASES[name], {}, hopper_backward_cases.plan_of
    for other in candidates(plan_of(case)):
        hopper_backward_cases.plan_of = lambda case, plan=other: plan
        found[f"backward {name} {differences(plan_of(case), other)}"] = hopper_backward_cases.run(
            case, "cpu", hopper_backward_on_cpu.loaded
        )
    hopper_backward_cases.plan_of = plan_of
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = [*map(forward, FORWARD), *map(backward, BACKWARD)]
    json.dump({name: wrong for some in results for name, wrong in some.items()}, sys.stdout)
