"""HopperBackwardPlan: the whole truth for a backward kernel made for Hopper GPUs; and whom that serves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from .plan import ITEM_BYTES
from .plan_hopper import padded_dim, refusal

# rows a step by padded head dim: what two warpgroups of 64 keys hold in registers beside dk and dv
_BLOCK_Q = {64: 128, 128: 64}


@dataclass(frozen=True)
class HopperBackwardPlan:
    """One kernel for dq, dk and dv: what it computes (first lines of fields) and how.

    `map_form` is "none", "range" or "list", of the map by columns; `pieces` the number of intervals of queries that each key of a PARTIAL
    tile is kept by, or, `crossed`, none, as each query has one interval of keys, or, with `bits`, none, as those stand in the map (list
    form); `starts` whether intervals may begin after the first place; `deterministic` whether columns add to dq one after the other;
    `runs` is "always", or "hold" or "fail" for a kernel that returns at once unless the map's flag on the device says so. Rows come in
    blocks of `block_q` through a ring of `stages`, keys stay in blocks of `block_kv`.

    >>> plan = plan_hopper_backward(head_dim=128, map_form="range", pieces=1)
    >>> print(plan)
    hopper backward D128 bfloat16 sm_90, range map, 1 interval a column, tiles 64x128, 2 stages
    >>> HopperBackwardPlan.from_json(plan.to_json()) == plan
    True
    """

    head_dim: int
    v_head_dim: int
    dtype: str
    map_form: str
    pieces: int
    crossed: bool
    bits: bool
    starts: bool
    runs: str
    score: bool
    deterministic: bool
    block_q: int
    block_kv: int
    stages: int
    consumer_registers: int
    producer_registers: int
    arch: int

    def __post_init__(self) -> None:
        if self.map_form not in ("none", "range", "list") or self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"no such plan: map_form {self.map_form!r}, dtype {self.dtype!r}")
        if self.runs not in ("always", "hold", "fail"):
            raise ValueError(f'a kernel runs "always", or where its map\'s intervals "hold" or "fail"; got {self.runs!r}')
        if self.padded_dim != self.padded_v_dim or _BLOCK_Q.get(self.padded_dim) != self.block_q or self.block_kv != 128:
            raise ValueError(f"no such tiles: {self.block_q}x{self.block_kv} for head dims {self.head_dim} and {self.v_head_dim}")
        if self.bits and (self.crossed or self.pieces or self.map_form != "list"):
            raise ValueError(f"bits go with a list map and no intervals; got a {self.map_form} map and {self.pieces} intervals")
        if self.crossed and (self.pieces or self.map_form != "list"):
            raise ValueError(f"crossed intervals go with a list map and no others; got a {self.map_form} map and {self.pieces} intervals")
        if not self.crossed and not self.bits and not (1 <= self.pieces <= 3 if self.map_form != "none" else self.pieces == 0):
            raise ValueError(f"a plan has 1 to 3 intervals, none without a map; got {self.pieces} ({self.map_form} map)")
        if self.stages < 2:
            raise ValueError(f"no such plan: there are at least two stages, not {self.stages}")

    def __str__(self) -> str:
        dims = f"D{self.head_dim}" if self.head_dim == self.v_head_dim else f"D{self.head_dim}/{self.v_head_dim}"
        parts = [f"hopper backward {dims} {self.dtype} sm_{self.arch}", f"{self.map_form} map" if self.map_form != "none" else "no mask"]
        if self.pieces or self.crossed:
            count = "1 interval a row" if self.crossed else f"{self.pieces} interval{'s' * (self.pieces > 1)} a column"
            parts.append(count + (" from the first place" if not self.starts else ""))
        parts += ["bits of partial tiles"] * self.bits
        parts += [f"where the intervals {self.runs}"] * (self.runs != "always")
        parts += ["score mod"] * self.score + ["deterministic"] * self.deterministic
        return ", ".join([*parts, f"tiles {self.block_q}x{self.block_kv}", f"{self.stages} stages"])

    @property
    def template(self) -> str:
        return "hopper"

    @property
    def axis(self) -> str:
        """The axis of the map that the kernel walks."""
        return "column"

    @property
    def evaluated(self) -> bool:
        """Whether PARTIAL tiles evaluate the predicate: never."""
        return False

    @property
    def padded_dim(self) -> int:
        return padded_dim(self.head_dim)

    @property
    def padded_v_dim(self) -> int:
        return padded_dim(self.v_head_dim)

    def shared_bytes(self) -> int:
        """Estimate of shared memory: a ring of queries and dout with their numbers (and cuts or bits), keys and values, two turns of
        ds, and two shares of dq where columns do not take turns."""
        item, dim = ITEM_BYTES[self.dtype], self.padded_dim
        slot = self.block_q * (2 * dim * item + (12 if self.crossed else 8)) + 16
        slot += self.block_q * self.block_kv // 8 * self.bits
        shares = 2 * 64 * 64 * 4 * (not self.deterministic)
        return self.stages * slot + self.block_kv * (2 * dim * item + 2 * self.block_q * item) + shares

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HopperBackwardPlan:
        return cls(**json.loads(text))


def plan_hopper_backward(
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    dtype: str = "bfloat16",
    arch: int = 90,
    map_form: str = "none",
    pieces: int = 0,
    crossed: bool = False,
    starts: bool = True,
    runs: str = "always",
    score: bool = False,
    deterministic: bool = False,
    evaluated: bool = False,
    bits: bool = False,
    heavy: bool = False,
) -> HopperBackwardPlan | str:
    """The plan for the Hopper backward kernel, or why there is none, as a clause for `explain`. `map_form` and `pieces` are those of the
    map by columns; `evaluated` says that PARTIAL tiles would need the predicate, `bits` that they read bits; `heavy` that the score mod
    reads a table at places that depend on query and key, or on the score, or computes very much for each pair.

    >>> plan_hopper_backward(128, arch=80)
    'it is made for compute capability 9.0, and this GPU has 8.0'
    """
    v_head_dim = v_head_dim or head_dim
    evaluated = evaluated or (map_form == "list" and not pieces and not crossed and not bits)
    if reason := refusal(head_dim, v_head_dim, dtype, arch, evaluated, score and heavy) or _refused_widths(head_dim, v_head_dim):
        return reason
    block_q = _BLOCK_Q[padded_dim(head_dim)]
    return HopperBackwardPlan(
        head_dim, v_head_dim, dtype, map_form, pieces, crossed, bits, starts, runs, score, deterministic, block_q, 128, 2, 240, 24, arch
    )


def _refused_widths(head_dim: int, v_head_dim: int) -> str:
    """Why the backward kernel does not take head dims that the forward kernel does; "" where it takes them."""
    if padded_dim(head_dim) != padded_dim(v_head_dim):
        return f"head dims {head_dim} and {v_head_dim} are padded to two different widths, and the backward kernel needs one"
    if padded_dim(head_dim) not in _BLOCK_Q:
        return f"the backward kernel takes head dims up to 128, not {head_dim} and {v_head_dim}"
    return ""
