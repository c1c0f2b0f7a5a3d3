"""BackwardPlan: the whole truth for one of the two kernels of a backward pass; and how its sizes are chosen for a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from ..errors import BackendError
from .plan import ITEM_BYTES, SHARED_BYTES, padded

# Tiles whose kernels were checked to spill no register where tiles are multiplied (but for four of 255 with newer compilers in one of them;
# what lives while a line of tiles is walked may be put aside): (block_q, block_kv, warps, stages) by the greater padded head dim, for
# kernels with intervals or without a map; with a predicate or score mod in the loop; and with one that reads a table at (query, key), so
# holds an address for each pair, or scatters. In "dq" the queries stay and the keys pass by; in "dkdv" the other way round, and two
# accumulators are held. For sm_90 and head dims 64 and 128 the fastest of those measured.
Tile = tuple[int, int, int, int]
Row = tuple[Tile, Tile, Tile]
Table = dict[int, Row]
_TMA: dict[str, Table] = {
    "dq": {
        64: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
        128: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2)),
        256: ((64, 64, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2)),
    },
    "dkdv": {
        64: ((128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
        128: ((64, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2)),
        256: ((32, 64, 8, 2), (32, 64, 8, 2), (16, 64, 8, 1)),
    },
}
_HOPPER: dict[str, Table] = {
    "dq": {
        64: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
        128: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    },
    "dkdv": {
        64: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
        128: ((32, 64, 4, 3), (32, 64, 4, 2), (32, 64, 8, 2)),
        256: ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    },
}
_AMPERE: dict[str, Table] = {
    "dq": {
        64: ((64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        128: ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
        256: ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "dkdv": {
        64: ((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        128: ((64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 1)),
        256: ((16, 64, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    },
}
_SMALL: Table = {
    64: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    128: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_FLOAT32: dict[str, Table] = {"dq": _SMALL, "dkdv": _SMALL}
# what a kernel does about the gradients of captured tables, and how a plan says it
SCATTERS = {"": "", "float": "table gradients", "peak": "peaks of table gradients", "fixed": "table gradients in fixed point"}


@dataclass(frozen=True)
class BackwardPlan:
    """One backward kernel: what it computes (first fields) and how.

    `part` is "dq", the gradient of the queries by a map by rows, or "dkdv", those of keys and values by a map by columns; `map_form`,
    `pieces`, `starts` and `runs` are as in a KernelPlan, of the map of that axis. `scatter` says what the kernel of dq does about the
    gradients of captured tables: nothing (""), adds floats ("float"), or, of two launches whose sums are the same in any order, finds the
    peaks (and no dq: "peak") or adds integers ("fixed").

    >>> plan = plan_backward("dkdv", head_dim=128, dtype="bfloat16", arch=80, map_form="range", pieces=1)
    >>> print(plan)
    backward dkdv D128 bfloat16 sm_80, range map, 1 interval a column, tiles 64x64, 8 warps, 2 stages, pointer loads
    >>> BackwardPlan.from_json(plan.to_json()) == plan
    True
    """

    part: str
    head_dim: int
    v_head_dim: int
    dtype: str
    map_form: str
    pieces: int
    starts: bool
    runs: str
    score: bool
    scatter: str
    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    loads: str
    arch: int

    def __post_init__(self) -> None:
        if self.part not in ("dq", "dkdv"):
            raise ValueError(f'a backward kernel computes "dq" or "dkdv"; got {self.part!r}')
        if self.map_form not in ("none", "range", "list") or self.loads not in ("pointer", "tma") or self.dtype not in ITEM_BYTES:
            raise ValueError(f"no such plan: map_form {self.map_form!r}, loads {self.loads!r}, dtype {self.dtype!r}")
        if self.runs not in ("always", "hold", "fail"):
            raise ValueError(f'a kernel runs "always", or where its map\'s intervals "hold" or "fail"; got {self.runs!r}')
        if not 0 <= self.pieces <= 3 or (self.map_form == "none" and self.pieces) or (self.map_form == "range" and not self.pieces):
            raise ValueError(f"a plan has 0 to 3 intervals, none without a map, some with ranges; got {self.pieces} ({self.map_form} map)")
        if self.scatter not in SCATTERS:
            raise ValueError(f'captured tables are given nothing (""), "float", "peak" or "fixed"; got {self.scatter!r}')
        if self.scatter and not (self.score and self.part == "dq"):
            raise ValueError("gradients of captured tables come from the dq kernel of a score mod")

    def __str__(self) -> str:
        dims = f"D{self.head_dim}" if self.head_dim == self.v_head_dim else f"D{self.head_dim}/{self.v_head_dim}"
        form = f"{self.map_form} map" if self.map_form != "none" else "no mask"
        parts = [f"backward {self.part} {dims} {self.dtype} sm_{self.arch}", form]
        if self.pieces:
            line = "row" if self.part == "dq" else "column"
            parts.append(f"{self.pieces} interval{'s' * (self.pieces > 1)} a {line}" + (" from the first place" if not self.starts else ""))
        parts += [f"where the intervals {self.runs}"] * (self.runs != "always")
        parts += ["predicate evaluated"] * self.evaluated + ["score mod"] * self.score
        parts += [SCATTERS[self.scatter]] * bool(self.scatter)
        parts += [f"tiles {self.block_q}x{self.block_kv}", f"{self.num_warps} warps", f"{self.num_stages} stages", f"{self.loads} loads"]
        return ", ".join(parts)

    @property
    def axis(self) -> str:
        """The axis of the map that the kernel walks: "row" or "column"."""
        return "row" if self.part == "dq" else "column"

    @property
    def evaluated(self) -> bool:
        """Whether PARTIAL tiles evaluate the predicate, for want of intervals."""
        return self.map_form == "list" and not self.pieces

    @property
    def padded_dim(self) -> int:
        return padded(self.head_dim)

    @property
    def padded_v_dim(self) -> int:
        return padded(self.v_head_dim)

    @property
    def precision(self) -> str:
        """How float32 products are made, as in a KernelPlan."""
        return "tf32x3" if self.dtype == "float32" and max(self.padded_dim, self.padded_v_dim) <= 128 else "ieee"

    def shared_bytes(self) -> int:
        """Estimate of shared memory: what stays, all stages of what passes by, a tile of probabilities or their gradients, and tiles of a
        captured table if mods may load one, and of peaks (both launches have the same tiles)."""
        item, dims = ITEM_BYTES[self.dtype], self.padded_dim + self.padded_v_dim
        stay, pass_by = (self.block_q, self.block_kv) if self.part == "dq" else (self.block_kv, self.block_q)
        pairs = self.block_q * self.block_kv
        tables = self.num_stages * pairs * 2 if self.score or self.evaluated else 0
        tables += self.num_stages * pairs * 4 if self.scatter in ("peak", "fixed") else 0
        return item * (stay * dims + self.num_stages * pass_by * dims + pairs) + tables

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BackwardPlan:
        return cls(**json.loads(text))


def plan_backward(
    part: str,
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    dtype: str = "bfloat16",
    arch: int = 90,
    map_form: str = "none",
    pieces: int = 0,
    starts: bool = True,
    runs: str = "always",
    score: bool = False,
    scatter: str = "",
    loads: str = "pointer",
    heavy: bool = False,
    gathers: bool = False,
    pipelined: bool = True,
) -> BackwardPlan:
    """The plan for a backward kernel on a GPU of compute capability `arch`: tiles by head dim and kind of kernel, shrunk to fit it.

    `heavy` says that the predicate or the score mod reads a table at places that depend on query and key, or computes very much;
    `gathers` that it is only the score mod, which reads single entries, and that nothing else is held: no smaller tiles then; not
    `pipelined` that it reads one at places computed from the score: Triton's compiler breaks down over fetching those ahead.
    Raises BackendError for a dtype, head dim or GPU that no kernel is made for.
    """
    if dtype not in ITEM_BYTES:
        raise BackendError(f"GPU kernels take float16, bfloat16 or float32, not {dtype}. Cast q, k and v, or use backend='reference'.")
    if arch < 80 or (loads == "tma" and arch < 90):
        needed = "TMA loads need compute capability 9.0" if loads == "tma" else "GPU kernels need compute capability 8.0"
        raise BackendError(f"{needed} or later; this GPU has {arch / 10}.")
    v_head_dim = v_head_dim or head_dim
    if not 1 <= min(head_dim, v_head_dim) <= max(head_dim, v_head_dim) <= 256:
        raise BackendError(f"GPU kernels take head dims from 1 to 256, got {head_dim} and {v_head_dim}.")
    evaluated = map_form == "list" and not pieces
    gathers = gathers and loads == "tma" and dtype != "float32"
    work = 2 if (heavy or scatter) and not gathers else 1 if score or evaluated else 0
    tile = _row(part, max(padded(head_dim), padded(v_head_dim)), dtype, arch, loads)[work]
    plan = BackwardPlan(part, head_dim, v_head_dim, dtype, map_form, pieces, starts, runs, score, scatter, *tile, loads, arch)
    plan = plan if pipelined else replace(plan, num_stages=1)
    if scatter in ("peak", "fixed"):
        # both launches must sum over the same tiles; the second holds the places of peaks and sums beside everything else
        plan = replace(plan, block_kv=min(plan.block_kv, 32))
    fitting: BackwardPlan | None = plan
    while fitting is not None and fitting.shared_bytes() > SHARED_BYTES.get(arch, SHARED_BYTES[86]):
        fitting = shrink_backward(fitting)
    if fitting is None:
        raise BackendError(f"no kernel for head dims {head_dim} and {v_head_dim} in {dtype} fits a GPU of compute capability {arch / 10}.")
    return fitting


def _row(part: str, dim: int, dtype: str, arch: int, loads: str) -> Row:
    tables = _FLOAT32 if dtype == "float32" else _AMPERE if arch < 90 or arch >= 120 else _TMA if loads == "tma" else _HOPPER
    table = tables["dq" if part == "dq" else "dkdv"]
    return table[next(limit for limit in table if dim <= limit)]


def shrink_backward(plan: BackwardPlan) -> BackwardPlan | None:
    """The next smaller plan, for a GPU that turned `plan` down: fewer stages, then less that passes by, then less that stays; None at
    the end.

    >>> plan = plan_backward("dkdv", head_dim=128, arch=80)
    >>> shrink_backward(plan).num_stages, shrink_backward(shrink_backward(plan)).block_q
    (1, 32)
    """
    if plan.num_stages > 1:
        return replace(plan, num_stages=plan.num_stages - 1)
    passing, staying = ("block_kv", "block_q") if plan.part == "dq" else ("block_q", "block_kv")
    for name, warps in ((passing, plan.num_warps), (staying, 4)):
        if getattr(plan, name) > 16:
            return replace(plan, **{name: getattr(plan, name) // 2, "num_warps": warps})
    return None
