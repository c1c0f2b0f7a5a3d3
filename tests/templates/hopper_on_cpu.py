"""Generated Hopper kernels run on the CPU.

Gluon's names stand for torch operations, warpgroups are threads; barriers of both kinds, copies by TMA and products in flight are
simulated: a wrong phase hangs (and is told), data that is read too early or too late is NaN or has changed.
Layouts, registers and speed are not simulated; addresses are checked. As a script it prints {case: what is wrong} as JSON.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from hopper_masks_on_cpu import masked, packed
from triton.tools.tensor_descriptor import TensorDescriptor

PATIENCE = 20.0  # seconds until a wait counts as a hang
LATE = 2e-3  # seconds at most that a copy takes, and that a warpgroup stands still when others may go on
PROGRAMS = 3


class Hang(Exception):
    pass


class Waiting:
    """A condition that all kinds of barriers of a program share, so that an error anywhere ends every wait."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.errors: list[BaseException] = []

    def until(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not ready():
            if self.errors or not self.changed.wait(max(0.0, end - time.monotonic())):
                raise Hang(what)


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were expected have come."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


@dataclass
class Program:
    number: int
    waiting: Waiting
    barriers: dict[int, Barrier]
    named: dict[str, list[int]]
    kept: list[torch.Tensor]  # shared memory, so that no address is used twice
    copies: list[threading.Thread]


ADDING = threading.Lock()
HERE = threading.local()
GRID = [0]


class Pointer:
    """An address in a tensor's memory, which knows its ends."""

    def __init__(self, memory: torch.Tensor, at: Any = 0):
        self.memory, self.at = memory, at

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.at + other)

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.at - other)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        at, valid = torch.broadcast_tensors(torch.as_tensor(self.at).long(), torch.as_tensor(True if mask is None else mask))
        assert bool(((at >= 0) & (at < self.memory.numel()) | ~valid).all()), "an address beyond a tensor"
        return at, valid


class Shared:
    """Shared memory: a view of a tensor."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.data.shape[0]
        return Shared(self.data[int(i)])

    def reshape(self, shape: Any) -> Shared:
        return Shared(self.data.view(*shape))

    def permute(self, order: Any) -> Shared:
        return Shared(self.data.permute(*order))

    def store(self, x: torch.Tensor) -> None:
        assert self.data.shape == x.shape and self.data.dtype == x.dtype
        self.data.copy_(x)

    def load(self, layout: Any) -> torch.Tensor:
        return self.data.clone()


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> torch.Tensor:
    at, valid = pointer.places(mask)
    return torch.where(valid, pointer.memory[torch.where(valid, at, 0)] if pointer.memory.numel() else other, other).to(
        pointer.memory.dtype
    )


def store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    at, valid = pointer.places(mask)
    pointer.memory[at[valid]] = torch.as_tensor(x, dtype=pointer.memory.dtype).expand(at.shape)[valid]


def atomic_add(pointer: Pointer, x: int, sem: str) -> torch.Tensor:
    old = pointer.memory[pointer.at].clone()
    pointer.memory[pointer.at] += x
    return old


def allocate(dtype: torch.dtype, shape: Any, layout: Any) -> Shared:
    data = torch.full(tuple(map(int, shape)), math.nan if dtype.is_floating_point else -77, dtype=dtype)
    HERE.program.kept.append(data)
    return Shared(data)


def be_late(times: int = 1) -> None:
    time.sleep(random.random() * times * LATE)


def barrier_at(place: Shared) -> Barrier:
    return HERE.program.barriers[place.data.data_ptr()]


def init(place: Shared, count: int) -> None:
    HERE.program.barriers[place.data.data_ptr()] = Barrier(int(count), int(count))


def change(barrier: Barrier, arrivals: int, size: int, waiting: Waiting) -> None:
    with waiting.changed:
        barrier.pending -= arrivals
        barrier.bytes += size
        barrier.settle()
        waiting.changed.notify_all()


def arrive(place: Shared, count: int = 1) -> None:
    change(barrier_at(place), count, 0, HERE.program.waiting)
    be_late()  # whoever waited for it may go on first


def wait(place: Shared, phase: Any, pred: Any = True) -> None:
    if not pred:
        return
    barrier, waiting = barrier_at(place), HERE.program.waiting
    with waiting.changed:
        waiting.until(lambda: barrier.phase != int(phase), "a wait for a phase that does not end")


def asm(text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    if "selp.f32" in text:
        return masked(text, pack, *args)
    if text.startswith("cvt") and dtype == torch.int32:
        return packed(*args)
    if text.startswith("cvt"):
        return args[0].to(dtype)
    if text.startswith("shfl.sync.idx"):
        return args[0]
    if "@p st.shared" in text:
        assert not bool((args[0] < 0).any()), "a store that was to happen never"
        return args[0]
    kind, number, threads = re.match(r"bar\.(\w+) (\d+), (\d+)", text).groups()  # type: ignore[union-attr]
    waiting = HERE.program.waiting
    with waiting.changed:
        state = HERE.program.named.setdefault(number, [0, 0])  # threads that have come, and how often it was complete
        state[0] += HERE.threads
        assert state[0] <= int(threads), f"too many at barrier {number}"
        before = state[1]
        if state[0] == int(threads):
            state[:] = [0, before + 1]
            waiting.changed.notify_all()
        if kind == "sync":
            waiting.until(lambda: state[1] != before, f"a wait at barrier {number}")
    return None


class Descriptor:
    def __init__(self, base: torch.Tensor, shape: Any, strides: Any, block: list[int], layout: Any):
        self.base, self.shape, self.strides, self.dtype, self.layout = base, shape, strides, base.dtype, layout
        self.block_type = SimpleNamespace(shape=list(block))

    def parts(self, at: list[Any]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """What exists of a tile of the tensor, and where it lies in the tile."""
        at = list(map(int, at))
        assert all(0 <= x < n for x, n in zip(at[:2], self.shape[:2], strict=True)), "a tile of a head that does not exist"
        ends = [max(x, min(x + n, size)) for x, n, size in zip(at, self.block_type.shape, self.shape, strict=True)]
        whole = torch.as_strided(self.base, self.shape, self.strides)
        return whole[tuple(slice(x, e) for x, e in zip(at, ends, strict=True))], tuple(
            slice(0, e - x) for x, e in zip(at, ends, strict=True)
        )


def tma_load(source: Descriptor, at: list[Any], full: Shared, target: Shared) -> None:
    """Comes after a while; until then the target is NaN (-77, if of integers)."""
    part, place = source.parts(at)
    barrier, waiting = barrier_at(full), HERE.program.waiting
    target.data.fill_(math.nan if target.data.dtype.is_floating_point else -77)

    def bring() -> None:
        be_late()
        tile = torch.zeros_like(target.data)
        tile[place] = part
        target.data.copy_(tile)
        change(barrier, 0, -target.data.numel() * target.data.element_size(), waiting)

    thread = threading.Thread(target=bring)
    HERE.program.copies.append(thread)
    thread.start()


def leave(source: Shared, place: tuple[slice, ...], bring: Callable[[torch.Tensor], Any], times: int) -> None:
    """What is in shared memory after a while, or when it is waited for, goes there."""

    def later() -> None:
        be_late(times)
        with ADDING:
            bring(source.data[place])

    thread = threading.Thread(target=later)
    HERE.leaving.append(thread)
    thread.start()


def tma_store(target: Descriptor, at: list[Any], source: Shared) -> None:
    part, place = target.parts(at)
    leave(source, place, part.copy_, 1)


def tma_add(target: Descriptor, at: list[Any], source: Shared) -> None:
    part, place = target.parts(at)
    leave(source, place, part.add_, 10)  # takes longer than a copy


def store_wait(pending: int) -> None:
    while len(HERE.leaving) > pending:
        HERE.leaving.pop(0).join()


class Product:
    """A product in flight: its operands must stay as they are until it has been waited for. It may add to another one in flight."""

    def __init__(self, a: Any, b: Shared, start: torch.Tensor | Product, use_acc: bool):
        self.operands = a, b, start, use_acc
        self.early = self.value()

    def value(self) -> torch.Tensor:
        a, b, start, use_acc = self.operands
        product = (a.data if isinstance(a, Shared) else a).float() @ b.data.float()
        if not use_acc:
            return product
        return product + (start.value() if isinstance(start, Product) else start)

    def done(self) -> torch.Tensor:
        found = self.value()
        assert torch.equal(found.nan_to_num(7.0), self.early.nan_to_num(7.0)), "an operand changed while the product was in flight"
        return found


def multiply(a: Any, b: Shared, acc: torch.Tensor | Product, use_acc: bool = True, is_async: bool = True) -> Product:
    product = Product(a, b, acc, use_acc)
    HERE.flying.append(product)
    return product


def await_products(number: int, deps: Sequence[Product]) -> Any:
    HERE.flying = HERE.flying[-number:] if number else []
    assert not any(product in HERE.flying for product in deps), "a product that may still be in flight"
    found = tuple(product.done() for product in deps)
    return found[0] if len(found) == 1 else found


def specialise(parts: list[Any], warps: list[int], registers: list[int]) -> None:
    program = HERE.program

    def work(function: Callable[..., None], args: tuple[Any, ...], size: int) -> None:
        HERE.program, HERE.flying, HERE.leaving, HERE.threads = program, [], [], 32 * size
        torch.set_num_threads(1)
        try:
            function(*args)
            assert not HERE.leaving, "output that has not left"
        except BaseException as error:
            with program.waiting.changed:
                program.waiting.errors.append(error)
                program.waiting.changed.notify_all()

    threads = [threading.Thread(target=work, args=(*part, size)) for part, size in zip(parts, [4, *warps], strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads + program.copies:
        thread.join()
    if program.waiting.errors:
        raise program.waiting.errors[0]
    assert all(state[0] == 0 for state in program.named.values()), "somebody is left at a named barrier"
    assert all(barrier.bytes == 0 for barrier in program.barriers.values()), "bytes that were expected have not come"


def pointers(x: Any) -> Any:
    """Arguments as the kernel sees them."""
    if isinstance(x, torch.Tensor):
        size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        return Pointer(torch.as_strided(x, (size,), (1,)))
    return tuple(map(pointers, x)) if isinstance(x, tuple) else x


class Kernel:
    def __init__(self, function: Callable[..., None]):
        self.function = function

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            GRID[0] = grid[0]
            for number in range(grid[0]):
                HERE.program = Program(number, Waiting(), {}, {}, [], [])
                self.function(*map(pointers, args))

        return launch


def number(x: Any) -> torch.Tensor:
    return torch.as_tensor(x)


def both(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda a, b, **_: function(number(a), number(b))


def identity(x: Any, *_: Any) -> Any:
    return x


LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout", "NVMMASharedLayout")
TYPES = ("int1", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
gl = SimpleNamespace(
    constexpr=identity, to_tensor=number, convert_layout=identity, static_range=range, cdiv=lambda a, b: (number(a) + b - 1) // b,
    program_id=lambda axis: number(HERE.program.number), num_programs=lambda axis: GRID[0],
    arange=lambda a, z, layout=None: torch.arange(a, z, dtype=torch.int32), reshape=lambda x, shape: x.reshape(shape),
    full=lambda shape, x, dtype, layout=None: torch.full(tuple(shape), x, dtype=dtype), where=lambda c, a, b: torch.where(number(c), a, b),
    split=lambda x: (x[..., 0], x[..., 1]), join=lambda x, y: torch.stack([x, y], -1),
    sum=lambda x, axis: x.sum(axis, dtype=x.dtype), max=lambda x, axis: x.amax(axis),
    maximum=both(torch.fmax), minimum=both(torch.fmin), abs=torch.abs, exp=torch.exp, exp2=torch.exp2, log=torch.log, log2=torch.log2,
    load=load, store=store, atomic_add=atomic_add, allocate_shared_memory=allocate, inline_asm_elementwise=asm, warp_specialize=specialise,
    _core=SimpleNamespace(builtin=identity),
    **{name: lambda *_, **__: None for name in LAYOUTS},
    **{name: getattr(torch, "bool" if name == "int1" else name) for name in TYPES},
)  # fmt: skip
mbarrier = SimpleNamespace(
    init=init, wait=wait, MBarrierLayout=lambda: None, arrive=arrive,
    expect=lambda place, size: change(barrier_at(place), 1, int(size), HERE.program.waiting),
)  # fmt: skip
gluon = SimpleNamespace(jit=lambda function=None, **options: function or Kernel, constexpr_function=identity)
NAMES = {
    "gl": gl, "gluon": gluon, "mbarrier": mbarrier, "fence_async_shared": lambda: None, "warpgroup_mma": multiply,
    "warpgroup_mma_wait": await_products, "GluonDescriptor": Descriptor, "TensorDescriptor": TensorDescriptor, "torch": torch,
    "tl": SimpleNamespace(constexpr=int),
    "triton": SimpleNamespace(cdiv=triton.cdiv, jit=lambda function=None, **options: function or identity),
    "tma": SimpleNamespace(async_load=tma_load, async_store=tma_store, async_atomic_add=tma_add, store_wait=store_wait),
}  # fmt: skip


def add_portions(memory: Sequence[torch.Tensor], out: Any, lse: Any, broken: Any, sinks: Any, peaks: Any, runs: str) -> None:
    """What plain Triton's kernel does."""
    if runs != "always" and int(broken) != (runs == "fail"):
        return
    sums, totals, heights = memory
    height = heights.amax(0)
    if peaks is not None:
        peaks.copy_(height * math.log(2))
    if sinks is not None:
        sums, totals = torch.cat([sums, 0 * sums[:1]]), torch.cat([totals, 0 * totals[:1] + 1])
        heights = torch.cat([heights, (sinks / math.log(2))[:, None].expand_as(heights[:1])])
    height = heights.amax(0)
    factor = torch.exp2(heights - torch.where(height.isinf(), 0.0, height))
    total = (totals * factor).sum(0)
    out.copy_((sums * factor[..., None]).sum(0) / torch.where(total == 0, 1.0, total)[..., None])
    lse.copy_((height + total.log2()) * math.log(2))


def loaded(source: str) -> Any:
    """A generated file as a module whose kernel runs here."""
    text = re.sub(r"^(from|import) .*\n", "", source, flags=re.MULTILINE).replace(".type.layout", "").replace(".value", "")
    names: dict[str, Any] = dict(NAMES)
    exec(compile(text.replace('getattr(gl, "barrier", None) or gl.thread_barrier', "lambda: None"), "generated", "exec"), names)
    names["processors"] = lambda device: PROGRAMS
    if names.get("SPLIT"):
        names["add_portions"] = lambda *given: add_portions(*given, runs=names["RUNS"])
    return SimpleNamespace(**names)


def main(wanted: list[str]) -> None:
    from hopper_cases import CASES, check, source_of

    torch.set_num_threads(1)
    results = {}
    for name in wanted or CASES:
        begun = time.monotonic()
        results[name] = check(CASES[name], loaded(source_of(CASES[name])), "cpu")
        print(f"{time.monotonic() - begun:.1f} s {name}: {results[name] or 'as it should be'}", file=sys.stderr, flush=True)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
