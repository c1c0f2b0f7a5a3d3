"""Gradients of captured tables by generated kernels: near those of the dense reference, and the same bits in whatever order programs run.

Run as a script under TRITON_INTERPRET=1; prints {case: what is wrong} as JSON. Programs run here from the first to the last and in a
random order, which changes the sums of floats.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import flexmask
from flexmask import masks, reference
from flexmask.runtime import backward, forward
from flexmask.runtime.checks import check_inputs
from flexmask.runtime.request import Request
from flexmask.runtime.store import Store

Index = torch.Tensor
Tables = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A score mod over tables, and the call. `make(tables)` gives the mod."""

    shapes: tuple[tuple[int, ...], ...]
    make: Callable[[Tables], Callable[..., Any]]
    mask: Callable[[], flexmask.Mask] | None = lambda: masks.causal
    sizes: tuple[int, int, int, int, int] = (2, 2, 1, 35, 40)  # batch, heads, key heads, queries, keys
    kv_batch: int = 2
    spread: float = 0.0  # values of dout range over this many powers of ten, by row
    dtype: torch.dtype = torch.float32
    tolerance: float = 2e-5
    by_row: bool = False  # whether rows of the table are compared each by itself
    order_matters: bool = False  # whether it is seen that sums of floats differ
    options: dict[str, Any] = field(default_factory=dict)


def bias(tables: Tables) -> Callable[..., Any]:
    (table,) = tables
    return lambda score, h, q_idx, kv_idx: score + table[h, q_idx, kv_idx]


def slope(tables: Tables) -> Callable[..., Any]:
    (table,) = tables
    return lambda score, h, q_idx, kv_idx: score + table[h] * (kv_idx - q_idx) * 0.1


def distance(tables: Tables) -> Callable[..., Any]:
    (table,) = tables
    return lambda score, h, q_idx, kv_idx: score + table[h, torch.clamp(q_idx - kv_idx + 8, 0, 16)] * score


def several(tables: Tables) -> Callable[..., Any]:
    gain, column, single = tables
    return lambda score, h, q_idx, kv_idx: torch.tanh(score * gain[h]) + column[q_idx] * column[-1 - kv_idx] + single[()] * score


def computed(tables: Tables) -> Callable[..., Any]:
    (table,) = tables
    place = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(3))
    return lambda score, q_idx, kv_idx: score + table[place[kv_idx], place[q_idx] % 3] + table[torch.abs(q_idx - kv_idx) // 20, 0] * score


def one_entry(tables: Tables) -> Callable[..., Any]:
    (table,) = tables
    return lambda score, q_idx, kv_idx: score + table[(q_idx * kv_idx) % 2]


def broadcast(tables: Tables) -> Callable[..., Any]:
    (table,) = tables
    return lambda score, b, q_idx, kv_idx: score + table[b, q_idx % 4, kv_idx]


def pairs(tables: Tables) -> Callable[..., Any]:
    (table,) = tables
    return lambda score, q_idx, kv_idx: score + table[q_idx, kv_idx]


def documents() -> flexmask.Mask:
    doc = torch.arange(60).remainder(7).repeat(2, 1)  # does not ascend, so the predicate is evaluated
    return masks.causal & masks.document(doc)


CASES = {
    "a bias, heads and keys shared, no mask": Case(((2, 35, 40),), bias, mask=None, sizes=(2, 2, 1, 20, 40), kv_batch=1),
    "a slope for each head": Case(((2,),), slope),
    "a table by distance": Case(((2, 17),), distance, order_matters=True),
    "several tables, one read at two places": Case(((2,), (60,), ()), several, sizes=(1, 2, 1, 35, 40), tolerance=1e-4),
    "computed places of a table": Case(((5, 3),), computed, sizes=(2, 2, 1, 35, 30), order_matters=True),
    "entries that every pair adds to": Case(((2,),), one_entry, sizes=(1, 2, 1, 70, 40), order_matters=True),
    "a broadcast view": Case(((2, 1, 53),), broadcast, options={"expand": (2, 4, 53)}),
    "a mask that is evaluated": Case(((2, 17),), distance, mask=documents, sizes=(2, 2, 1, 53, 53)),
    "entries that nothing reaches": Case(((2, 60, 60),), bias, mask=lambda: masks.sliding_window(3)),
    "rows thirty orders of magnitude apart": Case(((60, 60),), pairs, mask=None, spread=30, by_row=True),
    "sums over thirty orders of magnitude": Case(((2,),), slope, spread=30),
    "an infinity in dout": Case(((60, 60),), pairs, options={"poison": math.inf}),
    "NaN in dout": Case(((2,),), slope, options={"poison": math.nan}),
    "float16": Case(((2, 17),), distance, dtype=torch.float16, tolerance=1e-2),
    "no keys": Case(((2,),), slope, sizes=(2, 2, 1, 35, 0)),
}  # fmt: skip


def prepared(case: Case) -> tuple[Any, ...]:
    """q, k, v, dout, dlse, the tables and the score mod over them."""
    g = torch.Generator().manual_seed(0)
    B, H, Hkv, Q, KV = case.sizes
    kv_batch = min(B, case.kv_batch)
    q, k, v, dout = (torch.randn(*s, 16, generator=g) for s in ((B, H, Q), (kv_batch, Hkv, KV), (kv_batch, Hkv, KV), (B, H, Q)))
    dout *= 10.0 ** (torch.rand(B, H, Q, 1, generator=g) * case.spread - case.spread / 2)
    tables = tuple(torch.randn(shape, generator=g) for shape in case.shapes)
    if "expand" in case.options:
        tables = tuple(t.expand(case.options["expand"]) for t in tables)
    tensors = [x.to(case.dtype) for x in (q, k, v, dout)]
    if "poison" in case.options:
        tensors[3][0, 1, 7, 2] = case.options["poison"]
    return tensors, tables, flexmask.score(case.make(tables))


def expected(case: Case, tensors: list[torch.Tensor], tables: Tables, score: flexmask.Score) -> list[torch.Tensor]:
    """The tables' gradients by autograd through the dense float64 reference."""
    leaves = [t.requires_grad_() for t in tables]
    q, k, v, dout = (x.double() for x in tensors)
    mask = None if case.mask is None else case.mask()
    out = reference.attention(q, k, v, mask, score, scale=0.25, enable_gqa=True)
    loss = (out * dout).sum() + sum(0.0 * leaf.sum() for leaf in leaves)
    found = torch.autograd.grad(loss, leaves)
    for table in tables:
        table.requires_grad_(False)
    return list(found)


@contextlib.contextmanager
def order(kind: str) -> Iterator[None]:
    """Programs of a launch run in another order."""
    from triton.runtime.interpreter import interpreter_builder as builder

    original = builder.set_grid_idx

    def place(x: int, y: int, z: int) -> None:
        count = builder.grid_dim[0]
        original(x if kind == "forward" else random.Random(count).sample(range(count), count)[x], y, z)

    builder.set_grid_idx = place
    try:
        yield
    finally:
        builder.set_grid_idx = original


def problems(case: Case, store: Store) -> list[str]:
    tensors, tables, score = prepared(case)
    q, k, v, dout = tensors
    want = expected(case, tensors, tables, score)
    mask = None if case.mask is None else case.mask().traced()
    request = Request(mask, score.traced(), check_inputs(q, k, v, True))
    numbers = [next(n for n, t in enumerate(score.traced().tensors) if t is table) for table in tables]
    out, lse = forward.run_cpu(store, request, q, k, v, 0.25)[:2]
    saved = backward.Saved(q, k, v, out, lse)
    found: dict[bool, list[list[torch.Tensor]]] = {}
    for deterministic, kind in [(False, "forward"), (True, "forward"), (True, "random"), (False, "random")][: 3 + case.order_matters]:
        with order(kind):
            run = backward.run_triton(store, request, saved, dout, None, 0.25, numbers, deterministic=deterministic)
        found.setdefault(deterministic, []).append([run.dq, run.dk, run.dv, *(run.tables[n] for n in numbers)])
    wrong = ["other bits in another order"] * (not same(*found[True]))
    wrong += ["floats do not mind the order"] * (case.order_matters and same(*found[False]))
    for number, (fixed, floats, wanted) in enumerate(zip(found[True][0][3:], found[False][0][3:], want, strict=True)):
        wrong += [f"table {number}: {text}" for text in unlike(fixed, floats, wanted, case.tolerance, case.by_row)]
    return wrong


def unlike(fixed: torch.Tensor, floats: torch.Tensor, wanted: torch.Tensor, tolerance: float, by_row: bool) -> list[str]:
    """What is wrong with a gradient: within the tolerance of its greatest entry (or of each row's), NaN where floats are not finite."""
    if not torch.equal(fixed.isnan(), ~floats.isfinite()):
        return ["NaN elsewhere than with floats"]
    known = wanted.isfinite() & floats.isfinite()
    wrong = []
    for name, values in (("fixed", fixed), ("float", floats)):
        errors = torch.where(known, (values - wanted).abs(), 0.0).double()
        level = torch.where(known, wanted.abs(), 0.0).double()
        level = level.amax(-1, keepdim=True) if by_row else level.max()
        error = (errors / level.clamp(min=1e-30)).amax().item()
        wrong += [f"{name} is wrong by {error:.1e}"] * (not error <= tolerance)
    return wrong


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)) for a, b in zip(some, others, strict=True))


def main() -> None:
    found, store = {}, Store()
    for name, case in CASES.items():
        if len(sys.argv) > 1 and not any(part in name for part in sys.argv[1:]):
            continue
        try:
            found[name] = problems(case, store)
        except Exception:
            found[name] = [traceback.format_exc()[-1500:]]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
