"""Compile a generated kernel for a GPU that is not present: registers, spills, shared memory, and instructions used.

Needs triton (its wheel brings the assembler and the disassembler) but no GPU and no driver. Not in a process that interprets kernels.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..lowering import KernelPlan

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9]+)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel. `spills` counts loads and stores of registers that did not fit (LDL and STL)."""

    arch: int
    registers: int
    spills: int
    shared_bytes: int
    opcodes: dict[str, int]


class _OfflineDriver:
    """Stands in for the CUDA driver as far as compiling goes."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"offline-{self.target.arch}"  # its own cache of compiled kernels for each architecture

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def _compiling_for(arch: int) -> Iterator[None]:
    from triton.runtime.driver import driver

    before = getattr(driver, "_active", None)  # the private name, as `driver.active` would look for a GPU
    driver.set_active(_OfflineDriver(arch))
    try:
        yield
    finally:
        driver._active = before


def compile_offline(
    module: Any,
    plan: KernelPlan,
    arch: int | None = None,
    mask: tuple[Sequence[torch.Tensor], Sequence[int | float]] = ((), ()),
    score: tuple[Sequence[torch.Tensor], Sequence[int | float]] = ((), ()),
) -> Compiled:
    """Compile `module` (a loaded kernel file of `plan`) for `arch`, by default the plan's; captures are CPU tensors and numbers."""
    arguments = _arguments(module, plan, mask, score)
    with _compiling_for(arch or plan.arch):
        kernel = module.attention_forward.warmup(*arguments, grid=(1,), num_warps=plan.num_warps, num_stages=plan.num_stages)
    text = _run_on(kernel.asm["cubin"], "nvdisasm", "-c")
    usage = _run_on(kernel.asm["cubin"], "cuobjdump", "-res-usage")
    opcodes = Counter(_INSTRUCTION.findall(text))
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or not opcodes:
        raise RuntimeError(f"the disassembler printed nothing useful: {text[:200]} {usage[:200]}")
    spills = opcodes["LDL"] + opcodes["STL"]
    return Compiled(arch or plan.arch, int(registers.group(1)), spills, kernel.metadata.shared, dict(opcodes))


def _arguments(module: Any, plan: KernelPlan, mask: Any, score: Any) -> list[Any]:
    """Arguments of the kernel as a call would pass them, by way of the launcher itself."""
    recorded: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: recorded.extend(args)

    kernel, module.attention_forward = module.attention_forward, Recorder()
    dtype = getattr(torch, plan.dtype)
    q, k = torch.empty(2, 4, 1000, plan.head_dim, dtype=dtype), torch.empty(2, 2, 1000, plan.head_dim, dtype=dtype)
    v = torch.empty(2, 2, 1000, plan.v_head_dim, dtype=dtype)
    bounds = torch.zeros(1, 1, 1000, plan.pieces, dtype=torch.int32) if plan.pieces else None
    tiles = -(-1000 // plan.block_q)
    given: dict[str, torch.Tensor] = {}
    if plan.map_form == "range":
        given["ranges"] = torch.zeros(1, 1, tiles, 4, dtype=torch.int32)
    elif plan.map_form == "list":
        given["counts"] = torch.zeros(1, 1, tiles, 3, dtype=torch.int32)
        given["offsets"] = given["index"] = torch.zeros(1, 1, tiles, dtype=torch.int32)
    try:
        module.forward(q, k, v, 0.125, module.pack(*mask), module.pack(*score), bounds, bounds, **given)
    finally:
        module.attention_forward = kernel
    return recorded


def _run_on(cubin: bytes, tool: str, option: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(path), option, file.name], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
