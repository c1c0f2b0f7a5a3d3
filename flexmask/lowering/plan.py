"""KernelPlan: the whole truth for one kernel; and how block sizes, warps, stages and loads are chosen for a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from ..errors import BackendError

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# shared memory that one program may use, by compute capability
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024,
                120: 99 * 1024, 121: 99 * 1024}  # fmt: skip
# of 255 registers a thread, those that accumulators and operands may take; the rest is for addresses, masks and statistics
TILE_REGISTERS = 176
PREFERRED = [(128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (16, 32), (16, 16)]


@dataclass(frozen=True)
class KernelPlan:
    """One forward kernel: what it computes (first line of fields) and how.

    `map_form` is "none", "range" or "list"; `pieces` the number of row intervals (0: none); `evaluated` whether mask_mod is compiled
    in; `loads` "pointer" or "tma"; `arch` the compute capability (80, 90, ...).

    >>> plan = plan_forward(head_dim=128, dtype="bfloat16", arch=90, map_form="range", pieces=1, loads="tma")
    >>> print(plan)
    forward D128 bfloat16 sm_90, range map, 1 interval a row, tiles 128x128, 8 warps, 3 stages, tma loads
    >>> KernelPlan.from_json(plan.to_json()) == plan
    True
    """

    head_dim: int
    v_head_dim: int
    dtype: str
    pieces: int
    evaluated: bool
    map_form: str
    score: bool
    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    loads: str
    arch: int

    def __post_init__(self) -> None:
        if self.map_form not in ("none", "range", "list") or self.loads not in ("pointer", "tma") or self.dtype not in ITEM_BYTES:
            raise ValueError(f"no such plan: map_form {self.map_form!r}, loads {self.loads!r}, dtype {self.dtype!r}")
        if not 0 <= self.pieces <= 3:
            raise ValueError(f"a plan has 0 to 3 row intervals, got {self.pieces}")
        if self.map_form == "none" and (self.pieces or self.evaluated):
            raise ValueError("without a map every tile is full: a plan has no intervals and no predicate then")
        if self.map_form != "none" and not (self.pieces or self.evaluated):
            raise ValueError("partial tiles need row intervals or the predicate")

    def __str__(self) -> str:
        dims = f"D{self.head_dim}" if self.head_dim == self.v_head_dim else f"D{self.head_dim}/{self.v_head_dim}"
        parts = [f"forward {dims} {self.dtype} sm_{self.arch}", f"{self.map_form} map" if self.map_form != "none" else "no mask"]
        if self.pieces:
            parts.append(f"{self.pieces} interval{'s' * (self.pieces > 1)} a row")
        parts += ["predicate evaluated"] * self.evaluated + ["score mod"] * self.score
        parts += [f"tiles {self.block_q}x{self.block_kv}", f"{self.num_warps} warps", f"{self.num_stages} stages", f"{self.loads} loads"]
        return ", ".join(parts)

    @property
    def padded_dim(self) -> int:
        return padded(self.head_dim)

    @property
    def padded_v_dim(self) -> int:
        return padded(self.v_head_dim)

    @property
    def precision(self) -> str:
        """How float32 products are made: three tf32 products each, nearly float32's own accuracy. Shorter types are exact anyway."""
        return "tf32x3" if self.dtype == "float32" else "ieee"

    def shared_bytes(self) -> int:
        """Estimate of shared memory: the queries, and keys and values of all stages."""
        item = ITEM_BYTES[self.dtype]
        return item * (self.block_q * self.padded_dim + self.num_stages * self.block_kv * (self.padded_dim + self.padded_v_dim))

    def tile_registers(self) -> int:
        """Estimate of registers a thread for the output, the scores, the probabilities, and queries held as an operand."""
        output, scores = self.block_q * self.padded_v_dim, self.block_q * self.block_kv
        item = ITEM_BYTES[self.dtype]
        values = output + scores + scores * item / 4
        if self.dtype == "float32":  # tf32x3 keeps the high and the low part of both operands
            values += scores + self.block_q * self.padded_dim * 2
        elif self.arch < 90:
            values += self.block_q * self.padded_dim / 2
        if self.score or self.evaluated:
            values += scores / 2
        return int(values / (32 * self.num_warps))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> KernelPlan:
        return cls(**json.loads(text))


def padded(dim: int) -> int:
    """The tile width for a head dim: the next power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def plan_forward(
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    dtype: str = "bfloat16",
    arch: int = 90,
    map_form: str = "none",
    pieces: int = 0,
    evaluated: bool = False,
    score: bool = False,
    loads: str = "pointer",
) -> KernelPlan:
    """The plan for a forward kernel on a GPU of compute capability `arch`: the first of the preferred tiles that fits.

    Raises BackendError for a dtype, head dim or GPU that no kernel is made for.
    """
    if dtype not in ITEM_BYTES:
        raise BackendError(f"GPU kernels take float16, bfloat16 or float32, not {dtype}. Cast q, k and v, or use backend='reference'.")
    if arch < 80:
        raise BackendError(f"GPU kernels need compute capability 8.0 or later; this GPU has {arch / 10}.")
    v_head_dim = v_head_dim or head_dim
    if not 1 <= min(head_dim, v_head_dim) <= max(head_dim, v_head_dim) <= 256:
        raise BackendError(f"GPU kernels take head dims from 1 to 256, got {head_dim} and {v_head_dim}.")
    if loads == "tma" and arch < 90:
        raise BackendError(f"TMA loads need compute capability 9.0 or later, not {arch / 10}.")
    fixed = KernelPlan(
        head_dim, v_head_dim, dtype, pieces, evaluated, map_form, score, block_q=16, block_kv=16, num_warps=4, num_stages=1,
        loads=loads, arch=arch,
    )  # fmt: skip
    return next(plan for plan in _candidates(fixed) if fits(plan))


def fits(plan: KernelPlan) -> bool:
    """Whether the estimates stay within the GPU's registers and shared memory."""
    limit = SHARED_BYTES.get(plan.arch, SHARED_BYTES[86])
    spare = plan.block_q * plan.block_kv * 4 if plan.score or plan.evaluated else 2048
    return plan.tile_registers() <= TILE_REGISTERS and plan.shared_bytes() + spare <= limit


def shrink(plan: KernelPlan) -> KernelPlan | None:
    """The next smaller plan, for a GPU that turned `plan` down; None where there is none."""
    smaller = (p for p in _candidates(plan) if p.shared_bytes() < plan.shared_bytes() and p.tile_registers() <= TILE_REGISTERS)
    return next(smaller, None)


def _candidates(fixed: KernelPlan) -> Iterator[KernelPlan]:
    """Tiles from the most to the least wanted; the last ones fit anywhere."""
    for block_q, block_kv in PREFERRED:
        for num_warps, num_stages in _ways(fixed, block_q, block_kv):
            yield replace(fixed, block_q=block_q, block_kv=block_kv, num_warps=num_warps, num_stages=num_stages)


def _ways(fixed: KernelPlan, block_q: int, block_kv: int) -> list[tuple[int, int]]:
    """(warps, stages) for a tile, best first."""
    warps = 8 if block_q == 128 else 4
    if block_q < 64:
        return [(4, 2), (4, 1)]
    if fixed.arch >= 90 and fixed.dtype != "float32":
        return [(warps, 3), (warps, 2), (warps, 1)]
    return [(warps, 2), (warps, 1)]
