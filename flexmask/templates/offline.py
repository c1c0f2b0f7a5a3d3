"""Compile a generated kernel for a GPU that is not present: registers, spills, shared memory, and instructions used.

Needs triton (its wheel brings the assembler and the disassembler) but no GPU and no driver. Not in a process that interprets kernels.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..lowering import KernelPlan
from ..lowering.plan_backward import BackwardPlan
from ..lowering.plan_hopper import HopperPlan
from .disassembly import exposed_of, loops_of, opcodes_of, undefined_of

# keywords of a host function
Extras = Mapping[str, Any]
NO_EXTRAS: Extras = {}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel. `spills` counts loads and stores of registers that did not fit (LDL and STL), `loop_spills` those
    of them in the innermost loops that multiply matrices, `exposed` the exponentials there (MUFU) behind which no asynchronous product
    (HGMMA) is hidden: all of its warpgroup's have been waited for. `undefined` are instructions that read a uniform register which nothing
    has written: the compiler's mistake, and a wrong result."""

    arch: int
    registers: int
    spills: int
    shared_bytes: int
    opcodes: dict[str, int]
    loop_spills: int
    exposed: int
    undefined: tuple[str, ...]


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
    extras: Extras = NO_EXTRAS,
) -> Compiled:
    """Compile `module` (a loaded kernel file of `plan`) for `arch`, by default the plan's; captures are CPU tensors and numbers. `extras`
    are the sinks, dropout and peaks that the host function takes. Of split rows the kernel that joins the portions is compiled too."""

    def call() -> None:
        _call_forward(module, plan, mask, score, extras)

    return _compile(module.attention_forward, _forward_arguments(module, plan, call, arch), plan, arch or plan.arch)


def _forward_arguments(module: Any, plan: KernelPlan | HopperPlan, call: Callable[[], object], arch: int | None = None) -> list[Any]:
    """What a call gives the kernel. Of split rows, the kernel that joins their portions is compiled on the way."""
    if not plan.split:
        return _recorded(module, "attention_forward", call)
    joined: list[Any] = []
    arguments = _recorded(module, "attention_forward", lambda: joined.extend(_recorded(module, "join_portions", call)))
    width = 1 << (plan.v_head_dim - 1).bit_length()
    with _compiling_for(arch or plan.arch):
        module.join_portions.warmup(*joined, TOGETHER=4, WIDTH=width, grid=(1,), num_warps=1)
    return arguments


def compile_backward_offline(
    module: Any,
    plan: BackwardPlan,
    arch: int | None = None,
    mask: tuple[Sequence[torch.Tensor], Sequence[int | float]] = ((), ()),
    score: tuple[Sequence[torch.Tensor], Sequence[int | float]] = ((), ()),
    grads: Sequence[torch.Tensor | float] = (),
    extras: Extras = NO_EXTRAS,
) -> Compiled:
    """The same for a backward kernel; `grads` are CPU tensors (and limits) as its host function takes them, for a plan that scatters."""
    kernel = "attention_backward_q" if plan.part == "dq" else "attention_backward_kv"
    arguments = _recorded(module, kernel, lambda: _call_backward(module, plan, mask, score, grads, extras))
    return _compile(getattr(module, kernel), arguments, plan, arch or plan.arch)


def compile_hopper_offline(
    module: Any,
    plan: HopperPlan,
    score: tuple[Sequence[torch.Tensor], Sequence[int | float]] = ((), ()),
    extras: Extras = NO_EXTRAS,
) -> Compiled:
    """The same for a forward kernel of the Hopper template."""
    bounds = _bounds(plan)
    given = {"row_starts": bounds, "row_stops": bounds, **_map(plan, plan.queries), **extras}
    if plan.crossed:
        given["column_starts"] = given["column_stops"] = torch.zeros(1, 1, LENGTH, 1, dtype=torch.int32)
    mods = (module.pack((), ()), module.pack(*score))
    arguments = _forward_arguments(module, plan, lambda: module.forward(*_tensors(plan), 0.125, *mods, **given))
    with _compiling_for(plan.arch):
        kernel = module.attention_forward.warmup(*arguments, grid=(1,), num_warps=4, enable_fp_fusion=True)
    return _facts(kernel, plan.arch)


def _compile(kernel: Any, arguments: list[Any], plan: KernelPlan | BackwardPlan, arch: int) -> Compiled:
    with _compiling_for(arch):
        kernel = kernel.warmup(*arguments, grid=(1,), num_warps=plan.num_warps, num_stages=plan.num_stages)
    return _facts(kernel, arch)


def _facts(kernel: Any, arch: int) -> Compiled:
    """What the disassembly of a compiled kernel shows."""
    text = _run_on(kernel.asm["cubin"], "nvdisasm", "-c")
    usage = _run_on(kernel.asm["cubin"], "cuobjdump", "-res-usage")
    opcodes = opcodes_of(text)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or not opcodes:
        raise RuntimeError(f"the disassembler printed nothing useful: {text[:200]} {usage[:200]}")
    spills = opcodes["LDL"] + opcodes["STL"]
    loops = loops_of(text)
    loop_spills = sum(count["LDL"] + count["STL"] for count in map(opcodes_of, loops))
    seen = dict(opcodes), loop_spills, sum(map(exposed_of, loops)), undefined_of(text)
    return Compiled(arch, int(registers.group(1)), spills, kernel.metadata.shared, *seen)


def _recorded(module: Any, name: str, call: Callable[[], object]) -> list[Any]:
    """Arguments of the kernel as a call would pass them, by way of the launcher itself."""
    recorded: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: recorded.extend(args)

    kernel = getattr(module, name)
    setattr(module, name, Recorder())
    try:
        call()
    finally:
        setattr(module, name, kernel)
    return recorded


LENGTH = 1000


def _tensors(plan: KernelPlan | BackwardPlan | HopperPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v."""
    dtype, n = getattr(torch, plan.dtype), LENGTH
    sizes = ((2, 4, n, plan.head_dim), (2, 2, n, plan.head_dim), (2, 2, n, plan.v_head_dim))
    q, k, v = (torch.empty(size, dtype=dtype) for size in sizes)
    return q, k, v


def _map(plan: KernelPlan | BackwardPlan | HopperPlan, block: int) -> dict[str, torch.Tensor]:
    """A map with lines of `block` places."""
    lines, given = -(-LENGTH // block), {}
    if plan.map_form == "range":
        given["ranges"] = torch.zeros(1, 1, lines, 4, dtype=torch.int32)
    elif plan.map_form == "list":
        given["counts"] = given["offsets"] = torch.zeros(1, 1, lines, 2, dtype=torch.int32)
        given["index"] = torch.zeros(lines, dtype=torch.int32)
    if isinstance(plan, (KernelPlan, HopperPlan)) and plan.bits:
        given["patterns"] = torch.zeros(lines, dtype=torch.int32)
        given["words"] = torch.zeros(1, plan.queries, plan.block_kv // 32, dtype=torch.int32)
    if plan.runs != "always":
        given["broken"] = torch.zeros(1, dtype=torch.int32)
    return given


def _bounds(plan: KernelPlan | BackwardPlan | HopperPlan) -> torch.Tensor | None:
    return torch.zeros(1, 1, LENGTH, plan.pieces, dtype=torch.int32) if plan.pieces else None


def _call_forward(module: Any, plan: KernelPlan, mask: Any, score: Any, extras: Extras) -> None:
    bounds, given = _bounds(plan), _map(plan, plan.queries)
    module.forward(*_tensors(plan), 0.125, module.pack(*mask), module.pack(*score), bounds, bounds, **given, **extras)


def _call_backward(module: Any, plan: BackwardPlan, mask: Any, score: Any, grads: Sequence[torch.Tensor | float], extras: Extras) -> None:
    (q, k, v), bounds = _tensors(plan), _bounds(plan)
    given = {"starts": bounds, "stops": bounds, **_map(plan, plan.block_q if plan.part == "dq" else plan.block_kv)}
    dout = q.new_empty(*q.shape[:3], plan.v_head_dim)
    terms = torch.empty(2, 4, 1024), torch.empty(2, 4, 1024)
    mods = (module.pack(*mask), module.pack(*score))
    if plan.part == "dq":
        module.backward_q(q, k, v, dout, terms, 0.125, *mods, grads=grads, **given, **extras)
    else:
        module.backward_kv(q, k, v, dout, terms, 0.125, *mods, **given, **extras)


def _run_on(cubin: bytes, tool: str, option: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(path), option, file.name], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
