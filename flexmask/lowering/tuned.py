"""Other sizes for a planned kernel: those that a small table holds as measured, and those worth a measurement on the user's GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from .plan import SHARED_BYTES, KernelPlan, Tile
from .plan_backward import BackwardPlan
from .plan_hopper import SHARED_BYTES as HOPPER_SHARED_BYTES
from .plan_hopper import HopperPlan
from .plan_hopper_backward import HopperBackwardPlan

Plan = KernelPlan | BackwardPlan | HopperPlan | HopperBackwardPlan
P = TypeVar("P", bound=Plan)
# fields of plans that may be tuned; all of them numbers
SIZES = ("block_q", "block_kv", "num_warps", "num_stages", "stages", "q_stages", "consumer_registers", "producer_registers")
MOST_CANDIDATES = 8

# Tiles (block_q, block_kv, warps, stages) worth a try, by the greater padded head dim: on GPUs with TMA, on others, and in float32. For 128
# with TMA those of docs/benchmarks.md; elsewhere those that the planner takes for one kind of kernel or another, and near ones.
Tiles = dict[int, tuple[Tile, ...]]
_NEW: Tiles = {
    64: ((64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 8, 2)),
    128: ((128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4), (128, 32, 8, 3)),
    256: ((128, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
}
_OLD: Tiles = {
    64: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3), (64, 32, 8, 2)),
    128: ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2)),
    256: ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 4, 2), (128, 32, 8, 1)),
}
_FLOAT32: Tiles = {
    64: ((32, 32, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (16, 32, 4, 2)),
    128: ((16, 16, 4, 2), (16, 32, 4, 2)),
    256: ((16, 16, 8, 1), (16, 16, 4, 1)),
}
_BACKWARD_NEW: dict[str, Tiles] = {
    "dq": {
        64: ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2)),
        128: ((64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3), (64, 32, 8, 2)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2)),
    },
    "dkdv": {
        64: ((128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2), (64, 64, 8, 2)),
        128: ((64, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2)),
        256: ((32, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 1)),
    },
}
_BACKWARD_OLD: dict[str, Tiles] = {
    "dq": {
        64: ((64, 32, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 2)),
        128: ((64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        256: ((64, 32, 8, 1), (32, 32, 8, 1), (64, 16, 8, 1)),
    },
    "dkdv": {
        64: ((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 2)),
        128: ((64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 1)),
        256: ((16, 64, 8, 1), (16, 32, 8, 1), (32, 64, 8, 1)),
    },
}
_SMALL: Tiles = {64: ((32, 32, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1)), 128: ((16, 16, 4, 1), (16, 16, 8, 1)), 256: ((16, 16, 8, 1),)}


def candidates(plan: P) -> tuple[P, ...]:
    """Plans for the same kernel with other sizes, at most eight, that may be faster than `plan` on one mask or another. None that the
    plan's own checks refuse, or that by its estimate needs more shared memory than a program may use.

    >>> from flexmask.lowering import plan_hopper
    >>> for plan in candidates(plan_hopper(128, map_form="range", pieces=1)):
    ...     print(f"{plan.block_q}x{plan.block_kv}, {plan.stages} stages")
    128x64, 3 stages
    128x64, 4 stages
    """
    found: list[P] = []
    for sizes in _proposals(plan):
        other = changed(plan, sizes)
        if other is not None and other != plan and other not in found:
            found.append(other)
    return tuple(found[:MOST_CANDIDATES])


def changed(plan: P, sizes: Mapping[str, int]) -> P | None:
    """The plan with these sizes; None where there is no such plan, or it does not fit the GPU's shared memory, or must stay as it is."""
    if getattr(plan, "scatter", "") in ("peak", "fixed"):
        return None  # two launches must sum over the same tiles, whatever the GPU
    if getattr(plan, "is_few", False):
        return None  # its tiles are made for the queries of a call
    if not sizes.keys() <= {field.name for field in fields(plan)} & set(SIZES):
        return None
    try:
        other = replace(plan, **sizes)  # type: ignore[arg-type]
    except ValueError:
        return None
    return other if other.shared_bytes() <= _room(other) else None


def differences(plan: Plan, other: Plan) -> dict[str, int]:
    """The sizes of `other` that are not those of `plan`.

    >>> from flexmask.lowering import plan_hopper
    >>> plan = plan_hopper(128)
    >>> differences(plan, candidates(plan)[0])
    {'block_kv': 64, 'stages': 3}
    """
    before, after = asdict(plan), asdict(other)
    return {name: after[name] for name in SIZES if name in after and after[name] != before[name]}


def _room(plan: Plan) -> int:
    """Bytes of shared memory that a program may use."""
    if isinstance(plan, HopperPlan | HopperBackwardPlan):
        return HOPPER_SHARED_BYTES
    return SHARED_BYTES.get(plan.arch, SHARED_BYTES[86])


def _proposals(plan: Plan) -> Iterable[dict[str, int]]:
    if isinstance(plan, HopperPlan):
        return _hopper(plan)
    if isinstance(plan, HopperBackwardPlan):
        return [{"stages": 2}, {"stages": 3}]
    # one stage may mean that Triton's compiler breaks down over more (see `plan_forward`)
    most = 1 if plan.num_stages == 1 else 9
    names = ("block_q", "block_kv", "num_warps", "num_stages")
    tiles = [(*tile[:3], min(tile[3], most)) for tile in _tiles(plan)]
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


def _tiles(plan: KernelPlan | BackwardPlan) -> tuple[Tile, ...]:
    """Tiles for plain Triton."""
    new = 90 <= plan.arch < 120
    if isinstance(plan, BackwardPlan):
        table = _SMALL if plan.dtype == "float32" else (_BACKWARD_NEW if new else _BACKWARD_OLD)[plan.part]
    else:
        table = _FLOAT32 if plan.dtype == "float32" else _NEW if new else _OLD
    dim = max(plan.padded_dim, plan.padded_v_dim)
    return table[next(limit for limit in table if dim <= limit)]


def _hopper(plan: HopperPlan) -> list[dict[str, int]]:
    """Sizes of keys' tiles, each with the two greatest numbers of stages that fit; at head dim 64 also tiles of 192 queries, where the map
    has ranges (maps of lists come in blocks of powers of two) and no score mod takes registers."""
    heights: list[dict[str, int]] = [{}]
    if plan.padded_dim == plan.padded_v_dim == 64 and plan.map_form != "list" and not plan.score:
        low = {"block_q": 128, "consumer_registers": 232, "producer_registers": 40}
        heights = [low, {"block_q": 192, "consumer_registers": 160, "producer_registers": 32}]
    found = []
    for height in heights:
        for block_kv in (64, 128):
            tried = [{**height, "block_kv": block_kv, "stages": stages} for stages in (2, 3, 4, 5, 6)]
            found += [sizes for sizes in tried if changed(plan, sizes) is not None][-2:]
    return found


@dataclass(frozen=True)
class Entry:
    """What was measured to be faster than what the planner takes: for kernels on `gpu` (a GPU's name, or "sm_90" and the like) of a
    template ("triton" or "hopper"), part ("forward", "dq", "dkdv", "fused"), dtype, padded head dim and class of masks, the sizes that
    differ; and where that was `measured`."""

    gpu: str
    template: str
    part: str
    dtype: str
    head_dim: int
    mask: str
    plan: Mapping[str, int]
    measured: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def table() -> tuple[Entry, ...]:
    """The entries of tuned.json."""
    return _read()


@lru_cache(maxsize=1)
def _read() -> tuple[Entry, ...]:
    text = Path(__file__).with_name("tuned.json").read_text(encoding="utf-8")
    return tuple(Entry(**entry) for entry in json.loads(text))


def from_table(plan: P, narrow: bool, gpu: str = "") -> tuple[P, str]:
    """The plan with the sizes that the table has for its kind, and where they were measured; or as it is, and "". An entry for the GPU's
    name goes before one for its compute capability. `narrow` says that rows keep stretches cut at both ends."""
    key = entry_key(plan, narrow)
    for name in (gpu, f"sm_{plan.arch}"):
        for entry in table():
            if entry.gpu == name and _key(entry) == key:
                other = changed(plan, entry.plan)
                return (plan, "") if other is None or other == plan else (other, entry.measured)
    return plan, ""


def entry_key(plan: Plan, narrow: bool) -> tuple[Any, ...]:
    """What an entry for the plan is found by, besides the GPU: template, part, dtype, padded head dim and class of masks.

    >>> from flexmask.lowering import plan_hopper
    >>> entry_key(plan_hopper(80, map_form="range", pieces=1), narrow=True)
    ('hopper', 'forward', 'bfloat16', 128, 'range 1 narrow')
    """
    hopper = isinstance(plan, HopperPlan | HopperBackwardPlan)
    part = "fused" if isinstance(plan, HopperBackwardPlan) else plan.part if isinstance(plan, BackwardPlan) else "forward"
    dim = max(plan.padded_dim, plan.padded_v_dim)
    return "hopper" if hopper else "triton", part, plan.dtype, dim, mask_class(plan, narrow)


def _key(entry: Entry) -> tuple[Any, ...]:
    return entry.template, entry.part, entry.dtype, entry.head_dim, entry.mask


def mask_class(plan: Plan, narrow: bool) -> str:
    """Masks (and scores) that are alike to a kernel, as a short text: "none", "range 1", "range 1 narrow", "list 2", "list crossed",
    "list bits", "list bits narrow", "list evaluated"; each with ", score" or what else the kernel does."""
    if plan.map_form == "none":
        words = ["none"]
    else:
        crossed, bits = (getattr(plan, name, False) for name in ("crossed", "bits"))
        words = [plan.map_form, "crossed" if crossed else "bits" if bits else str(plan.pieces) if plan.pieces else "evaluated"]
        words += ["narrow"] * (narrow and (plan.pieces == 1 or bits))
    scatter = getattr(plan, "scatter", "")
    return " ".join(words) + ", score" * plan.score + f", scatter {scatter}" * bool(scatter)
