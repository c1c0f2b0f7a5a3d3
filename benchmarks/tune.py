"""The sizes that `autotune=True` would try, measured on this GPU for the benchmark's masks, and what the table of sizes should say.

    python -m benchmarks.tune [--masks full causal ...] [--lengths 8192 32768] [--head-dim 128 64] [--forward] [--json FILE]

For each mask, length and head dim: milliseconds of the forward and of the backward pass as planned and with each candidate for the
kernel that has its turn. Then, for each class of masks that kernels do not tell apart (flexmask/lowering/tuned.py), the sizes that are
fastest by the geometric mean of all its cases, as an entry for flexmask/lowering/tuned.json: where they gain 2 % and make no case slower
by as much. What the table has already is part of what is planned, and of the new entry.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import flexmask
from benchmarks import masks as zoo
from benchmarks.figures import make_case
from flexmask.lowering import Plan
from flexmask.lowering.tuned import SIZES, Entry, changed, entry_key, table
from flexmask.runtime import backward_kernels, forward
from flexmask.runtime.checks import check_inputs
from flexmask.runtime.choice import Target, arch_of, is_narrow
from flexmask.runtime.request import Request
from flexmask.runtime.store import default_store
from flexmask.runtime.tuning import WORTH, Sizes, Tuned

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Row:
    """Milliseconds of a pass of one case by sizes, () as planned, and the kind of the kernel whose sizes they are."""

    mask: str
    length: int
    key: Key
    planned: Plan
    times: dict[Sizes, float]

    def gain(self, sizes: Sizes) -> float:
        return self.times[()] / self.times[sizes]


def measure(name: str, length: int, head_dim: int, trains: bool) -> list[Row]:
    """The rows of a case, one for each kernel that has its turn in it."""
    case, store = make_case(name, length, head_dim), default_store()
    torch.manual_seed(0)
    shape = (case.batch, case.heads, length, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=trains) for _ in range(3))
    mask = zoo.build(name, length, "cuda")
    store.clear()
    out = flexmask.compile(mask, autotune=True)(q, k, v)
    if trains:
        torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    request = Request(mask.traced(), None, check_inputs(q, k, v, False))
    narrow, plans = is_narrow(store, request), planned(request, q)
    found = []
    for each in (each for some in store.tuned.values() for each in some):
        plan = plans[each.chain][each.number]
        found.append(Row(name, length, entry_key(plan, narrow), plan, dict(each.times)))
        print(shown(found[-1], each), flush=True)
    return found


def planned(request: Request, q: torch.Tensor) -> dict[str, list[Plan]]:
    """The plans of all chains of kernels, before anything is measured."""
    target, store = Target(q.dtype, arch_of(q.device), True), default_store()
    subjects = forward.subject(store, request, target, q.device), backward_kernels.subject(store, request, q, target)
    return {chain: list(plans) for subject in subjects for chain, plans in subject.plans().items()}


def shown(row: Row, found: Tuned) -> str:
    times = ", ".join(f"{words(row.planned, sizes)} {ms:.3f}" for sizes, ms in sorted(row.times.items(), key=lambda each: each[1]))
    return (
        f"{row.mask:20s} {row.length:6d} {' '.join(map(str, row.key)):44s} | planned {row.times[()]:.3f} ms | {times} | x{found.gain:.3f}"
    )


def words(plan: Plan, sizes: Sizes) -> str:
    """Sizes in short: 128x64/3."""
    plan = changed(plan, dict(sizes)) or plan
    given = asdict(plan)
    return f"{plan.block_q}x{plan.block_kv}" + "".join(f"/{given[name]}" for name in ("num_warps", "num_stages", "stages") if name in given)


def entries(rows: Iterable[Row], gpu: str) -> list[Entry]:
    """What the table should say: for each kind of kernel the best sizes of those that were measured in all of its cases."""
    kinds: dict[Key, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.key, []).append(row)
    found = []
    for key, some in kinds.items():
        sizes = best(some)
        if sizes:
            gains = [row.gain(sizes) for row in some]
            cases = ", ".join(f"{row.mask} {row.length} {gain:.2f}" for row, gain in zip(some, gains, strict=True))
            found.append(entry(key, some[0].planned, sizes, f"{gpu}, {datetime.date.today().isoformat()}: times as fast {cases}"))
    return found


def best(rows: list[Row]) -> Sizes:
    """The sizes with the greatest mean gain that make no row slower than chance might; () where as planned is best."""
    planned = {tuple(getattr(row.planned, name, 0) for name in SIZES) for row in rows}
    known = [sizes for sizes in rows[0].times if all(sizes in row.times for row in rows)] if len(planned) == 1 else []
    means = {sizes: math.exp(sum(math.log(row.gain(sizes)) for row in rows) / len(rows)) for sizes in known}
    good = [sizes for sizes in known if means[sizes] >= WORTH and min(row.gain(sizes) for row in rows) >= 1 / WORTH]
    return max(good, key=lambda sizes: means[sizes], default=())


def entry(key: Key, plan: Plan, sizes: Sizes, measured: str) -> Entry:
    template, part, dtype, head_dim, mask = key
    new = Entry(f"sm_{plan.arch}", template, part, dtype, head_dim, mask, {}, "")
    old = [each.plan for each in table() if replace(each, plan={}, measured="") == new]
    return replace(new, plan={**(old[0] if old else {}), **dict(sizes)}, measured=measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", nargs="+", default=list(zoo.NAMES), choices=zoo.NAMES, metavar="MASK")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    parser.add_argument("--forward", action="store_true", help="forward alone")
    parser.add_argument("--json", help="write all that was measured there")
    given = parser.parse_args()
    rows: list[Row] = []
    for head_dim in given.head_dim:
        for name, length in [(name, length) for length in given.lengths for name in given.masks]:
            try:
                rows += measure(name, length, head_dim, not given.forward)
            except Exception as error:  # the next mask may do
                print(f"{name:20s} {length:6d} FAILED {type(error).__name__}: {str(error)[:400]}", flush=True)
    found = entries(rows, torch.cuda.get_device_name())
    print("\nentries for flexmask/lowering/tuned.json:\n" + ",\n".join(each.to_json() for each in found))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            kept = [{**asdict(row), "times": [[dict(sizes), ms] for sizes, ms in row.times.items()]} for row in rows]
            json.dump({"gpu": torch.cuda.get_device_name(), "rows": kept, "entries": [asdict(each) for each in found]}, file, indent=1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # so that everything is measured anew
        os.environ["FLEXMASK_CACHE_DIR"] = folder
        main()
