"""Survey kernels compiled for GPUs that are not here. Run as a script without TRITON_INTERPRET; prints {case: facts} as JSON."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from survey_cases import BY_BATCH, CASES, CAUSAL, DOCUMENT, SCATTERED, Case, buffers, documents, runs

from flexmask.runtime.launch import load as load_module
from flexmask.templates.disassembly import opcodes_of
from flexmask.templates.offline import _compiling_for, _run_on

LARGE: dict[str, Any] = {"sizes": (1, 1, 500, 700), "blocks": (128, 128)}
COMPILED: dict[str, Case] = {
    "causal": Case(CAUSAL, **LARGE),
    "documents": Case(DOCUMENT, bounds=(DOCUMENT, CAUSAL), tensors=(documents(),), tables=(0,), **LARGE),
    "documents by batch": Case(BY_BATCH, tensors=(documents(2).long(),), tables=(0,), **LARGE),
    "three runs": Case(runs("row", *SCATTERED[:3]), **LARGE),
    "eight runs": Case(runs("row", *SCATTERED, *SCATTERED[:3]), **LARGE),
    "all at once": replace(CASES["all at once"], blocks=(128, 64)),
    "tall blocks": replace(CASES["all at once"], blocks=(1024, 512)),
}


# the same kernel for other lengths and numbers: some divisible by 16, some 1
OTHERS = [(1, 1, 500, 700), (1, 1, 512, 1024), (3, 1, 1, 1), (16, 16, 33, 1)]


def compiled(module: Any, case: Case, arch: int) -> tuple[Any, int]:
    """The kernel of a loaded survey module as compiled for a call, and its warps."""
    recorded: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: recorded.extend([args, options])

    kernel, module.survey_block = module.survey_block, Recorder()
    batch, heads, q_len, kv_len = case.sizes
    module.survey(module.pack(case.tensors, case.scalars), q_len, kv_len, batch, heads, **buffers(case))
    with _compiling_for(arch):
        made = kernel.warmup(*recorded[0], grid=(1,), **recorded[1])
    module.survey_block = kernel
    return made, recorded[1]["num_warps"]


def facts_of(module: Any, case: Case, arch: int) -> dict[str, int]:
    made, warps = compiled(module, case, arch)
    opcodes = opcodes_of(_run_on(made.asm["cubin"], "nvdisasm", "-c"))
    usage = re.search(r"REG:(\d+)", _run_on(made.asm["cubin"], "cuobjdump", "-res-usage"))
    assert usage is not None and opcodes
    return {"registers": int(usage[1]), "spills": opcodes["LDL"] + opcodes["STL"], "warps": warps}


def main() -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for number, (name, case) in enumerate(COMPILED.items()):
            path = Path(folder) / f"survey_{number}.py"
            path.write_text(case.source())
            module = load_module(path)
            found |= {f"{name}, sm_{arch}": facts_of(module, case, arch) for arch in (80, 90)}
            if name == "all at once":
                calls = [replace(case, sizes=sizes, scalars=(n,)) for sizes, n in zip(OTHERS, (1, 16, 0, -5), strict=True)]
                found["kernels"] = len({compiled(module, call, 90)[0].hash for call in calls})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent))
    main()
