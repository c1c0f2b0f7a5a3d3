"""KernelPlan: the whole truth for one kernel; and how block sizes, warps, stages and loads are chosen for a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from ..errors import BackendError

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# shared memory that one program may use, by compute capability
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024,
                120: 99 * 1024, 121: 99 * 1024}  # fmt: skip
# Tiles whose kernels were checked to spill no register: (block_q, block_kv, warps, stages) by the greater padded head dim, for kernels
# without a map; with row intervals; with row intervals that are narrow (windows, documents: small tiles waste less at both ends); with
# a predicate or score mod in the loop; and with one that reads a table at (query, key), so holds an address for each pair. For sm_90
# and head dims 64 and 128 the fastest of those measured (docs/benchmarks.md). From Hopper on wgmma reads operands from shared memory,
# which leaves room for 128 x 128; TMA keeps addresses out of registers. On Ampere the queries sit in registers.
Tile = tuple[int, int, int, int]
Row = tuple[Tile, Tile, Tile, Tile, Tile]
_TMA: dict[int, Row] = {
    64: ((64, 128, 4, 2), (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2)),
    128: ((128, 128, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    256: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
}
# where TMA brings all else and a score mod gathers entries of such a table: tiles of which two fit a processor at a time
_GATHERING: dict[int, Tile] = {128: (64, 64, 4, 3)}
_HOPPER: dict[int, Row] = {
    64: ((64, 128, 4, 2), (64, 128, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3), (64, 32, 8, 2)),
    128: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
    256: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
}
_AMPERE: dict[int, Row] = {
    64: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
    128: ((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 1)),
    256: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
}
_FLOAT32: dict[int, Row] = {
    64: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    128: ((16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}


@dataclass(frozen=True)
class KernelPlan:
    """One forward kernel: what it computes (first line of fields) and how.

    `map_form` is "none", "range" or "list"; `pieces` the number of row intervals that PARTIAL tiles compare with (0: they evaluate the
    predicate, or read their `bits` from the map), `starts` whether those may begin after the first key; `runs` is "always", or "hold" or
    "fail" for a kernel that returns at once unless the map's flag on the device says so; `loads` "pointer" or "tma"; `arch` the compute
    capability (80, 90, ...). Of few queries: up to `pack` heads share a tile, and each tile row's keys are `split` among programs.

    >>> plan = plan_forward(head_dim=128, dtype="bfloat16", arch=90, map_form="range", pieces=1, loads="tma")
    >>> print(plan)
    forward D128 bfloat16 sm_90, range map, 1 interval a row, tiles 128x128, 8 warps, 3 stages, tma loads
    >>> KernelPlan.from_json(plan.to_json()) == plan
    True
    """

    head_dim: int
    v_head_dim: int
    dtype: str
    map_form: str
    pieces: int
    bits: bool
    starts: bool
    runs: str
    score: bool
    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    loads: str
    arch: int
    pack: int = 1
    split: bool = False

    def __post_init__(self) -> None:
        if self.map_form not in ("none", "range", "list") or self.loads not in ("pointer", "tma") or self.dtype not in ITEM_BYTES:
            raise ValueError(f"no such plan: map_form {self.map_form!r}, loads {self.loads!r}, dtype {self.dtype!r}")
        if self.runs not in ("always", "hold", "fail"):
            raise ValueError(f'a kernel runs "always", or where its map\'s intervals "hold" or "fail"; got {self.runs!r}')
        if not 0 <= self.pieces <= 3:
            raise ValueError(f"a plan has 0 to 3 row intervals, got {self.pieces}")
        if self.map_form == "none" and self.pieces:
            raise ValueError("without a map every tile is full: a plan has no intervals then")
        if self.map_form == "range" and not self.pieces:
            raise ValueError("a range map comes from row intervals")
        if self.bits and (self.map_form != "list" or self.pieces):
            raise ValueError("bits belong to the PARTIAL tiles of a list, where there are no intervals")
        if self.pack not in (1, 2, 4, 8, 16, 32, 64, 128) or self.pack > self.block_q:
            raise ValueError(f"heads that share a tile are a power of two up to its {self.block_q} rows, not {self.pack}")

    def __str__(self) -> str:
        dims = f"D{self.head_dim}" if self.head_dim == self.v_head_dim else f"D{self.head_dim}/{self.v_head_dim}"
        parts = [f"forward {dims} {self.dtype} sm_{self.arch}", f"{self.map_form} map" if self.map_form != "none" else "no mask"]
        if self.pieces:
            parts.append(f"{self.pieces} interval{'s' * (self.pieces > 1)} a row" + (" from the first key" if not self.starts else ""))
        parts += ["bits of partial tiles"] * self.bits
        parts += [f"where the map's flag says {self.runs}"] * (self.runs != "always")
        parts += ["predicate evaluated"] * self.evaluated + ["score mod"] * self.score
        parts += [f"up to {self.pack} heads a tile"] * (self.pack > 1) + ["rows split"] * self.split
        parts += [f"tiles {self.block_q}x{self.block_kv}", f"{self.num_warps} warps", f"{self.num_stages} stages", f"{self.loads} loads"]
        return ", ".join(parts)

    @property
    def evaluated(self) -> bool:
        """Whether PARTIAL tiles evaluate the predicate, for want of row intervals and bits."""
        return self.map_form == "list" and not self.pieces and not self.bits

    @property
    def is_few(self) -> bool:
        """Whether this is the kernel for few queries."""
        return self.pack > 1 or self.split

    @property
    def queries(self) -> int:
        """Queries of a tile, and of a tile row of the map."""
        return self.block_q // self.pack

    @property
    def padded_dim(self) -> int:
        return padded(self.head_dim)

    @property
    def padded_v_dim(self) -> int:
        return padded(self.v_head_dim)

    @property
    def precision(self) -> str:
        """How float32 products are made: as three tf32 products each, nearly as exact as float32, or ("ieee") without tensor cores where
        those would not fit the registers. Shorter types are multiplied exactly anyway."""
        return "tf32x3" if self.dtype == "float32" and max(self.padded_dim, self.padded_v_dim) <= 128 else "ieee"

    def shared_bytes(self) -> int:
        """Estimate of shared memory: the queries, keys and values of all stages, and a tile of a captured table if mods may load one."""
        item = ITEM_BYTES[self.dtype]
        tables = self.num_stages * self.block_q * self.block_kv * 2 if self.score or self.evaluated else 0
        keys = self.num_stages * self.block_kv * (self.padded_dim + self.padded_v_dim)
        return item * (self.block_q * self.padded_dim + keys) + tables

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
    bits: bool = False,
    starts: bool = True,
    runs: str = "always",
    score: bool = False,
    loads: str = "pointer",
    narrow: bool = False,
    heavy: bool = False,
    gathers: bool = False,
    pipelined: bool = True,
    pack: int = 1,
    rows: int = 0,
    split: bool = False,
) -> KernelPlan:
    """The plan for a forward kernel on a GPU of compute capability `arch`: tiles by head dim and kind of kernel, shrunk to fit it.

    `narrow` says that rows keep a stretch of keys cut at both ends, rather than all up to some key or all from one;
    `heavy` that the predicate or the score mod reads a table at places that depend on query and key, or computes very much;
    `gathers` that it is only the score mod, which reads single entries; not `pipelined` that it reads one at places computed from the
    score: Triton's compiler breaks down over fetching those ahead. Tiles of few queries (`pack` and `split`) have so many `rows` at most.
    Raises BackendError for a dtype, head dim or GPU that no kernel is made for.
    """
    v_head_dim = v_head_dim or head_dim
    _check(head_dim, v_head_dim, dtype, arch, loads)
    masked = map_form == "list" and not pieces  # by the predicate, or by bits, which come through registers and shared memory
    work = 4 if heavy else 3 if score or masked else 0 if map_form == "none" else 2 if narrow else 1
    dim = max(padded(head_dim), padded(v_head_dim))
    block_q, block_kv, num_warps, num_stages = _sizes(dim, dtype, arch, loads, work, gathers)
    if pack > 1 or split:
        block_q, block_kv, num_warps, num_stages = _sizes_of_few(dim, dtype, arch, work, rows) or (
            min(block_q, rows), min(block_kv, 64), 4, num_stages,
        )  # fmt: skip
    num_stages = num_stages if pipelined else 1
    plan: KernelPlan | None = KernelPlan(
        head_dim, v_head_dim, dtype, map_form, pieces, bits, starts, runs, score, block_q, block_kv, num_warps, num_stages, loads, arch,
        pack, split,
    )  # fmt: skip
    while plan is not None and plan.shared_bytes() > SHARED_BYTES.get(arch, SHARED_BYTES[86]):
        plan = shrink(plan)
    if plan is None:
        raise BackendError(f"no kernel for head dims {head_dim} and {v_head_dim} in {dtype} fits a GPU of compute capability {arch / 10}.")
    return plan


def _check(head_dim: int, v_head_dim: int, dtype: str, arch: int, loads: str) -> None:
    """Raises BackendError for what no kernel is made for."""
    if dtype not in ITEM_BYTES:
        raise BackendError(f"GPU kernels take float16, bfloat16 or float32, not {dtype}. Cast q, k and v, or use backend='reference'.")
    if arch < 80:
        raise BackendError(f"GPU kernels need compute capability 8.0 or later; this GPU has {arch / 10}.")
    if not 1 <= min(head_dim, v_head_dim) <= max(head_dim, v_head_dim) <= 256:
        raise BackendError(f"GPU kernels take head dims from 1 to 256, got {head_dim} and {v_head_dim}.")
    if loads == "tma" and arch < 90:
        raise BackendError(f"TMA loads need compute capability 9.0 or later, not {arch / 10}.")


def _sizes(dim: int, dtype: str, arch: int, loads: str, work: int, gathers: bool) -> Tile:
    """Tiles, warps and stages by the greater padded head dim and by what a kernel does."""
    if gathers and loads == "tma" and dtype != "float32" and dim in _GATHERING:
        return _GATHERING[dim]
    return _row(dim, dtype, arch, loads)[work]


def _sizes_of_few(dim: int, dtype: str, arch: int, work: int, rows: int) -> Tile | None:
    """The same where queries are few and the shared memory great: as many keys in flight as that holds, by one program a multiprocessor.
    Of many rows, kernels that evaluate mods take fewer keys at a time, as they have addresses of many pairs to keep."""
    if dtype == "float32" or SHARED_BYTES.get(arch, 0) < SHARED_BYTES[90]:
        return None
    heavy = work if rows > 32 else 0
    return rows, 32 if heavy == 4 else 64 if heavy == 3 or dim > 128 else 128, 8 if rows > 64 else 4, 3


def _row(dim: int, dtype: str, arch: int, loads: str) -> Row:
    table = _FLOAT32 if dtype == "float32" else _AMPERE if arch < 90 or arch >= 120 else _TMA if loads == "tma" else _HOPPER
    return table[next(limit for limit in table if dim <= limit)]


def shrink(plan: KernelPlan) -> KernelPlan | None:
    """The next smaller plan, for a GPU that turned `plan` down: fewer stages, then fewer keys, then fewer queries; None at the end.

    >>> plan = plan_forward(head_dim=128, arch=80)
    >>> shrink(plan).num_stages, shrink(shrink(plan)).block_kv
    (1, 32)
    """
    if plan.num_stages > 1:
        return replace(plan, num_stages=plan.num_stages - 1)
    if plan.block_kv > 16:
        return replace(plan, block_kv=plan.block_kv // 2)
    if plan.block_q > max(16, plan.pack):
        return replace(plan, block_q=plan.block_q // 2, num_warps=4)
    return None
