"""The kernels of every zoo mask and score compiled for one GPU that is not here: `zoo_compiled.py ARCH`, without TRITON_INTERPRET.

Prints {name: {"spills": .., "copies": ..}} as JSON, copies being asynchronous ones in kernels that fetch all else by TMA. Kernels of
equal text (most masks that are row intervals) are compiled once.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import zoo

from flexmask.runtime.checks import Shapes
from flexmask.runtime.choice import Target, choose
from flexmask.runtime.forward import write_kernel
from flexmask.runtime.launch import load
from flexmask.runtime.request import Request
from flexmask.runtime.store import Store
from flexmask.templates.offline import compile_offline

B, H, LENGTH, HEAD_DIM = 2, 4, 1000, 128


def requests() -> Iterator[tuple[str, Any, Any]]:
    for name, make in zoo.MASKS.items():
        yield f"mask {name}", make(B, H, LENGTH, LENGTH).traced(), None
    for name, make in zoo.SCORES.items():
        yield f"score {name}", None, make(B, H, LENGTH, LENGTH).traced()


def main(arch: int) -> None:
    store, facts, found = Store(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, mask, score in requests():
            request = Request(mask, score, Shapes(B, H, H, LENGTH, LENGTH, HEAD_DIM, HEAD_DIM))
            found[name] = {"spills": 0, "copies": 0}
            for choice in choose(store, request, Target(torch.bfloat16, arch, True, "plain Triton is looked at")):
                plan = choice.plan
                text = write_kernel(store, request, plan)
                kernel = text[text.index("import torch") : text.index("def row_bounds")]
                if kernel not in facts:
                    path = Path(folder) / f"kernel_{len(facts)}.py"
                    path.write_text(text)
                    captures = [((), ()) if t is None else (t.tensors, t.scalars) for t in (mask, score)]
                    made = compile_offline(load(path), plan, mask=captures[0], score=captures[1])
                    facts[kernel] = {"spills": made.spills, "copies": made.opcodes.get("LDGSTS", 0)}
                found[name] = {fact: number + facts[kernel][fact] for fact, number in found[name].items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent))
    main(int(sys.argv[1]))
