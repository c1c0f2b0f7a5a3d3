"""Hopper backward kernels run on the CPU, as hopper_on_cpu.py does it for the forward; the passes before and after in Triton's interpreter,
so run it with TRITON_INTERPRET=1. As a script it prints {case: what is wrong} as JSON."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import hopper_backward_cases as cases
import hopper_on_cpu as cpu
import torch

from flexmask.lowering.plan_hopper_backward import HopperBackwardPlan
from flexmask.templates.assemble_hopper_backward import assemble_hopper_backward

ADDING = threading.Lock()


def part_of(shared: cpu.Shared, start: int, length: int, dim: int) -> cpu.Shared:
    return cpu.Shared(shared.data.narrow(dim, start, length))


def add_registers(pointer: cpu.Pointer, x: torch.Tensor) -> None:
    """Adds x [64, 64] of an accumulator, four registers of a thread at the address of the first: two columns of a row, then of the row eight
    below."""
    row, column = torch.arange(64)[:, None], torch.arange(64)[None]
    first = (pointer.at // 4).expand(64, 64)[row & ~8, column & ~1]
    assert bool((first % 4 == 0).all()), "an address that is not a multiple of 16 bytes"
    with ADDING:
        pointer.memory.index_add_(0, (first + row // 8 % 2 * 2 + column % 2).flatten(), x.flatten())


def asm(text: str, constraints: str, args: list[Any], **options: Any) -> Any:
    if text.startswith("red"):
        return add_registers(*args)
    return args[0] if text.startswith("mov") else cpu.asm(text, constraints, args, **options)


class Product(cpu.Product):
    """A product in flight, which may begin with another one."""

    def value(self) -> torch.Tensor:
        a, b, start, use_acc = self.operands
        product = (a.data if isinstance(a, cpu.Shared) else a).float() @ b.data.float()
        return (start.value() if isinstance(start, Product) else start) + product if use_acc else product


def multiply(a: Any, b: cpu.Shared, acc: Any, use_acc: bool = True, is_async: bool = True) -> Product:
    return Product(a, b, acc, use_acc)


def await_products(number: int, deps: list[Product]) -> Any:
    found = tuple(product.done() for product in deps)
    return found if len(found) > 1 else found[0]


def loaded(plan: HopperBackwardPlan) -> Any:
    """The generated module, with its Gluon kernel run here."""
    cpu.Shared.slice = part_of  # type: ignore[attr-defined]
    cpu.Shared.dtype = property(lambda shared: shared.data.dtype)  # type: ignore[attr-defined]
    cpu.Pointer.to = lambda pointer, dtype: pointer  # type: ignore[attr-defined]
    cpu.gl.inline_asm_elementwise = asm
    cpu.NAMES.update(warpgroup_mma=multiply, warpgroup_mma_wait=await_products)
    module: Any = cases.load_module(plan)
    source = assemble_hopper_backward(plan).replace("@triton.jit", "@gluon.jit").replace("tl.constexpr", "gl.constexpr")
    module.attention_backward, module.TensorDescriptor = cpu.loaded(source).attention_backward, cpu.Descriptor
    return module


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    results = {}
    for name in wanted or cases.CASES:
        begun = time.monotonic()
        results[name] = cases.run(cases.CASES[name], "cpu", loaded)
        print(f"{time.monotonic() - begun:.1f} s {name}: {results[name] or 'as it should be'}", file=sys.stderr, flush=True)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
