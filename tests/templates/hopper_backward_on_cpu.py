"""Hopper backward kernels run on the CPU, as hopper_on_cpu.py does it for the forward; the passes before and after in Triton's interpreter,
so run it with TRITON_INTERPRET=1. As a script it prints {case: what is wrong} as JSON, or, told "mistakes", {mistake: what is wrong}."""

from __future__ import annotations

import json
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import hopper_backward_cases as cases
import hopper_on_cpu as cpu
import torch


def part_of(shared: cpu.Shared, start: int, length: int, dim: int = 0) -> cpu.Shared:
    return cpu.Shared(shared.data.narrow(dim, start, length))


def add_registers(pointer: cpu.Pointer, x: torch.Tensor) -> None:
    """Adds x [64, 64] of an accumulator, four registers of a thread at the address of the first: two columns of a row, then of the row
    eight below."""
    row, column = torch.arange(64)[:, None], torch.arange(64)[None]
    first = (pointer.at // 4).expand(64, 64)[row & ~8, column & ~1]
    assert bool((first % 4 == 0).all()), "an address that is not a multiple of 16 bytes"
    with cpu.ADDING:
        pointer.memory.index_add_(0, (first + row // 8 % 2 * 2 + column % 2).flatten(), x.flatten())


def await_number(pointer: cpu.Pointer, number: torch.Tensor) -> None:
    """Programs run one after the other, so a turn that has not come never will."""
    found = pointer.memory[pointer.places(None)[0]]
    assert int(found) == int(number), f"{int(found)} columns have added to a tile, and it is the turn of number {int(number)}"


def asm(text: str, constraints: str, args: list[Any], **options: Any) -> Any:
    if text.startswith("red"):
        return add_registers(*args)
    if text.startswith("popc"):
        return torch.tensor(int(args[0]).bit_count())
    if "ld.acquire" in text:
        return await_number(*args)
    if "red.release" in text:
        cpu.be_late(10)  # until what was added has arrived
        return cpu.atomic_add(args[0], 1, "release")
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


def allocate(dtype: torch.dtype, shape: Any, layout: Any, value: torch.Tensor | None = None) -> cpu.Shared:
    made = cpu.allocate(dtype, shape, layout)
    if value is not None:
        made.store(value)
    return made


def loaded(case: cases.Case, change: tuple[str, str] = ("", "")) -> Any:
    """The generated module, with its Gluon kernel run here; after a change of its text."""
    cpu.Shared.slice = part_of  # type: ignore[attr-defined]
    cpu.gl.shared_memory_descriptor = SimpleNamespace(reinterpret=lambda x, dtype, shape, layout: cpu.Shared(x.data.view(*shape)))
    cpu.gl.broadcast = torch.broadcast_tensors
    cpu.gl.permute = lambda x, order: x.permute(order)
    cpu.gl.div_rn = lambda x, y: x / y
    cpu.gl.allocate_shared_memory = allocate
    cpu.Shared.dtype = property(lambda shared: shared.data.dtype)  # type: ignore[attr-defined]
    cpu.Pointer.to = lambda pointer, dtype: pointer  # type: ignore[attr-defined]
    cpu.gl.inline_asm_elementwise = asm
    cpu.NAMES.update(tl=cpu.triton.language, warpgroup_mma=multiply, warpgroup_mma_wait=await_products)
    module: Any = cases.load_module(case)
    source = cases.source_of(case)
    if change[0] not in source:
        raise ValueError(f"the kernel has no {change[0]!r} to be changed")
    source = source.replace(*change, 1).replace("@triton.jit", "@gluon.jit").replace("tl.constexpr", "gl.constexpr")
    module.attention_backward, module.TensorDescriptor = cpu.loaded(source).attention_backward, cpu.Descriptor
    return module


MISTAKES = {
    "a wait for the other phase": ("crossed", ("((it // STAGES) & 1) ^ 1)\n    expect", "(it // STAGES) & 1)\n    expect")),
    "a slot that is not given back": ("crossed", ("mbarrier.arrive(empty.index(slot))", "pass")),
    "a slot that is given back too early": (
        "causal",
        ("deps=[s_sent])", "deps=[s_sent])\n    mbarrier.arrive(empty.index(slot))"),
    ),
    "half of the bytes expected": ("causal", ("BLOCK_Q * PADDED_DIM * 4", "BLOCK_Q * PADDED_DIM * 2")),
    "one place for the ds of all steps": ("causal", ("ds_slot = it & 1", "ds_slot = it * 0 + WG")),
    "numbers of rows that are not waited for": (
        "causal",
        ("mbarrier.init(full.index(i), count=2)", "mbarrier.init(full.index(i), count=1)"),
    ),
    "no end of the records": ("causal", ("send_record(bufs, bars, slot, 0, 0, NO_MORE, 0, 0, 0, -1, 2)", "pass")),
    "a list that is read beyond its end": ("two", ("mask=j < steps, other=0", "mask=j < steps + 99, other=0")),
    "a block row of another head": ("a mask for each head", ("h * stride_mh + n", "n")),
    "bounds of another head": ("a mask for each head", ("lead = b * stride_ib + h * stride_ih", "lead = b * stride_ib")),
    "keys beyond the last": ("full, low scores", ("is_full(column, place, m) & whole", "is_full(column, place, m)")),
    "bits that are not waited for": ("bits", ("TILES + LINES * 1024)", "TILES)")),
    "bits of another tile": ("bits", ("pattern_of(tile_map, column, j + 1, steps)", "pattern_of(tile_map, column, j, steps)")),
    "bits of the other keys": ("bits", ("FLAT).index(WG)", "FLAT).index(1 - WG)")),
    "a FULL tile whose last keys do not exist": ("bits, low scores", ("exists = gl.where(kv0", "exists = gl.where(0 * kv0")),
    "a column without bits keeps something": ("bits", ("other=NOTHING", "other=ALL")),
    "a score of another head": ("slopes", ("h = field(record, 5, REC)", "h = field(record, 4, REC)")),
    "a score of other queries": ("slopes", ("(start + FIRST + gl", "(start + gl")),
    "a score of other keys": ("bias by key", ("afresh(kv0) + gl.arange(0, 64, gl.SliceLayout(1, PART))", "gl.arange(0, 64, None)")),
    "a derivative that is left out": ("head gate", ("kept_or(p * slope", "kept_or(p")),
    "a mask of other columns": ("soft-cap", ("words >> (FIRST // 4)", "words")),
    "a slope that is not masked": ("a slope without end where nothing is kept", ("kept_or(p * slope, kept, ZERO)", "p * slope")),
    "queries beyond the last in a FULL tile": ("no number after the last query", ("full & ((m + 1) * BLOCK_Q <= q_len)", "full")),
    "values of other queries": ("gates of queries", ("q_idx = field(record, 0, REC) + gl", "q_idx = gl")),
    "a rank that counts the column itself": ("deterministic", ("<< (place % 32)) - 1", "<< (place % 32 + 1)) - 1")),
    "a turn that is not passed on": ("deterministic", ("if rank >= 0:", "if rank > 0:")),
    "a turn passed on before both have added": (
        "deterministic",
        ("mbarrier.init(taken.index(i), count=2)", "mbarrier.init(taken.index(i), count=1)"),
    ),
    "a step without a turn that takes one": (
        "deterministic, a mask for each head",
        ("gl.where(j < steps, rank_of", "gl.where(j <= steps, rank_of"),
    ),
    "ranks of another head": ("deterministic, a mask for each head", ("lead = line // columns", "lead = line // columns * 0")),
    "a last record that overtakes another": (
        "deterministic",
        ("mbarrier.wait(empty.index(slot), ((it // STAGES) & 1) ^ 1)\n    send", "send"),
    ),
    "a record that is not held until it is read": (
        "deterministic",
        ("mbarrier.init(empty.index(i), count=3)", "mbarrier.init(empty.index(i), count=2)"),
    ),
    "a share that is left where another has not been read": ("causal, narrow", ("meet(SHARE_READ + WG, BOTH)", "pass")),
    "a share that is added before it is there": ("causal, narrow", ("meet(SHARE_THERE + w, BOTH)", "pass")),
    "a share that gives way before it is read": ("causal, narrow", ("tma.store_wait(0)\n        for w", "pass\n        for w")),
    "shares in each other's place": ("causal, narrow", ("[line + w * 16, 0]", "[line + 16 - w * 16, 0]")),
    "a last record that overtakes another, of shares": (
        "causal, narrow",
        ("mbarrier.wait(empty.index(slot), ((it // STAGES) & 1) ^ 1)\n    send", "send"),
    ),
    "cuts of other keys": ("crossed", ("q_len - start, kv0, kv_len", "q_len - start, 0, kv_len")),
    "a column that keeps nothing takes no step": ("a mask for each head, alone", ("(it + steps == 0), 1", "(it + steps == 0), 0")),
}  # fmt: skip


def noticed(name: str, change: tuple[str, str]) -> str:
    """What is wrong with a case whose kernel's text is changed."""
    try:
        return cases.run(cases.CASES[name], "cpu", lambda case: loaded(case, change))
    except (cpu.Hang, AssertionError, threading.BrokenBarrierError) as error:
        return repr(error)


def first_notice(name: str, change: tuple[str, str]) -> str:
    """The same of the first of twenty attempts that shows it, as a race may come out well at times."""
    return next(filter(None, (noticed(name, change) for _ in range(20))), "")


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    if wanted == ["mistakes"]:
        cpu.PATIENCE = 0.3
        json.dump({name: first_notice(*mistake) for name, mistake in MISTAKES.items()}, sys.stdout)
        return
    results = {}
    for name in wanted or cases.CASES:
        begun = time.monotonic()
        results[name] = cases.run(cases.CASES[name], "cpu", loaded)
        print(f"{time.monotonic() - begun:.1f} s {name}: {results[name] or 'as it should be'}", file=sys.stderr, flush=True)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
