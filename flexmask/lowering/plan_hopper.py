"""HopperPlan: the whole truth for one forward kernel of the Hopper template, or the reason why that template does not serve."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product

# shared memory that one program may use on sm_90
SHARED_BYTES = 227 * 1024
# registers of a multiprocessor on sm_90
REGISTERS = 65536
# rows of queries that one warpgroup multiplies
WARPGROUP_ROWS = 64


@dataclass(frozen=True)
class HopperPlan:
    """One forward kernel for Hopper: what it computes and how.

    `map_form` is "none", "range" or "list"; `pieces` the number of row intervals that PARTIAL tiles compare with, `starts` whether those
    may begin after the first key. A `crossed` kernel compares with one interval of queries a key instead (and `starts` then tells of
    those). One with `bits` has no intervals: beside each PARTIAL tile of its list stands the number of the bits that mask it. `runs` is
    "always", or "hold" or "fail" for a kernel that does nothing unless the map's flag on the device says so. Each of `consumers`
    warpgroups takes 64 rows of a tile. `stages` tiles of keys and values are in flight and `q_stages` of queries. The `schedule` is "grid"
    (a program a tile), "stride" (resident programs, each takes every so many-th tile) or "queue" (resident programs that take the next
    tile when they are done). Registers are those of a thread that multiplies and of one that loads. Of few queries: `pack` heads share a
    tile (2, 4, 8 or 16, half of them for each of two warpgroups), and each tile row's keys are `split` among programs.

    Raises ValueError for what is no kernel, or needs more shared memory or registers than there are.

    >>> plan = plan_hopper(128, map_form="range", pieces=1)
    >>> print(plan)
    hopper forward D128 bfloat16 sm_90, range map, 1 interval a row, tiles 128x128, 2 stages, queue, 232/40 registers
    >>> HopperPlan.from_json(plan.to_json()) == plan
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
    block_q: int
    block_kv: int
    stages: int
    q_stages: int
    schedule: str
    consumer_registers: int
    producer_registers: int
    arch: int
    pack: int = 1
    split: bool = False

    def __post_init__(self) -> None:
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(f"no such plan: {field} is one of {', '.join(map(repr, known))}, not {getattr(self, field)!r}")
        if self.map_form == "none" and (self.pieces or self.crossed or self.bits):
            raise ValueError("without a map every tile is full: a plan has no intervals and no bits then")
        if self.map_form == "range" and (not self.pieces or self.crossed or self.bits):
            raise ValueError("a range map comes from row intervals")
        if self.map_form == "list" and (self.pieces > 0) + self.crossed + self.bits != 1:
            raise ValueError(
                "PARTIAL tiles of a list compare either with intervals of the rows (pieces) or of the keys (crossed), or read bits"
            )
        if self.pack > 1 and (self.consumers != 2 or self.pack not in (2, 4, 8, 16)):
            raise ValueError(
                f"heads that share a tile are 2, 4, 8 or 16, half of them for each of two warpgroups, not {self.pack} for {self.consumers}"
            )
        if min(self.stages, self.q_stages) < 1 or self.shared_bytes() > SHARED_BYTES:
            raise ValueError(f"needs {self.shared_bytes()} bytes of shared memory of {SHARED_BYTES}: use fewer stages or smaller tiles")
        self._check_registers()

    def _check_registers(self) -> None:
        given = self.consumer_registers, self.producer_registers
        if any(number % 8 or not 24 <= number <= 248 for number in given):
            raise ValueError(f"a thread has 24 to 248 registers in steps of 8, not {given[0]} or {given[1]}")
        if (taken := 128 * (self.consumers * given[0] + given[1])) > REGISTERS:
            raise ValueError(f"the warpgroups would take {taken} registers of {REGISTERS}: give each thread fewer")
        if self.registers() > self.consumer_registers:
            raise ValueError(
                f"about {self.registers()} registers a thread are needed of {self.consumer_registers}: use smaller tiles of keys"
            )

    def __str__(self) -> str:
        dims = f"D{self.head_dim}" if self.head_dim == self.v_head_dim else f"D{self.head_dim}/{self.v_head_dim}"
        parts = [f"hopper forward {dims} {self.dtype} sm_{self.arch}", f"{self.map_form} map" if self.map_form != "none" else "no mask"]
        if self.pieces:
            parts.append(f"{self.pieces} interval{'s' * (self.pieces > 1)} a row" + " from the first key" * (not self.starts))
        parts += ["1 interval a key" + " from the first row" * (not self.starts)] * self.crossed
        parts += ["bits of partial tiles"] * self.bits
        parts += [f"where the map's flag says {self.runs}"] * (self.runs != "always")
        parts += ["score mod"] * self.score
        parts += [f"{self.pack} heads a tile"] * (self.pack > 1) + ["rows split"] * self.split
        parts += [f"tiles {self.block_q}x{self.block_kv}", f"{self.stages} stages", self.schedule]
        return ", ".join([*parts, f"{self.consumer_registers}/{self.producer_registers} registers"])

    @property
    def queries(self) -> int:
        """Queries of a tile, and of a tile row of the map."""
        return self.block_q // self.pack

    @property
    def is_few(self) -> bool:
        """Whether this is a kernel for few queries."""
        return self.pack > 1 or self.split

    @property
    def template(self) -> str:
        return "hopper"

    @property
    def evaluated(self) -> bool:
        """No PARTIAL tile evaluates the predicate."""
        return False

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.block_q // WARPGROUP_ROWS

    @property
    def padded_dim(self) -> int:
        return padded_dim(self.head_dim)

    @property
    def padded_v_dim(self) -> int:
        return padded_dim(self.v_head_dim)

    @property
    def wide(self) -> bool:
        """Whether tiles lie in parts, and the output leaves from where the queries lay."""
        return max(self.padded_dim, self.padded_v_dim) > 128

    @property
    def part(self) -> int:
        """The columns of a part: of powers of two the greatest that divides both widths."""
        both = self.padded_dim | self.padded_v_dim
        return both & -both

    def shared_bytes(self) -> int:
        """Shared memory: queries, output (unless rows are split), keys and values of all stages; and records, barriers and the cuts of
        keys."""
        if self.wide:
            halves = self.q_stages * self.block_q * max(self.padded_dim, self.padded_v_dim)
        else:
            halves = self.q_stages * self.block_q * self.padded_dim + self.block_q * self.padded_v_dim * (not self.split)
        halves += self.stages * self.block_kv * (self.padded_dim + self.padded_v_dim)
        return 2 * halves + 512 + self.stages * (32 + self.crossed * self.block_kv * 4)

    def registers(self) -> int:
        """About what a thread that multiplies needs in the loops: output and scores in float32, probabilities in halves, and the rest,
        which is more with a score mod. With fewer the compiler spills in the loops; with as many, a few at the most."""
        return self.padded_v_dim // 2 + self.block_kv // 2 + self.block_kv // 4 + 32 + 16 * self.score + 8 * self.wide

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HopperPlan:
        return cls(**json.loads(text))


CHOICES: dict[str, tuple[object, ...]] = {
    "dtype": ("bfloat16", "float16"),
    "map_form": ("none", "range", "list"),
    "pieces": (0, 1, 2, 3),
    "runs": ("always", "hold", "fail"),
    "block_q": (128, 192),
    "block_kv": (64, 128),
    "schedule": ("grid", "queue", "stride"),
    "arch": (90,),
}


def padded_dim(dim: int) -> int:
    """The width of tiles for a head dim, as TMA's swizzle asks for: a multiple of 64. Raises ValueError beyond 256."""
    if not 1 <= dim <= 256:
        raise ValueError(f"tiles hold head dims from 1 to 256, not {dim}")
    return -(-dim // 64) * 64


def plan_hopper(
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
    evaluated: bool = False,
    bits: bool = False,
    heavy: bool = False,
    narrow: bool = False,
    schedule: str = "queue",
    pack: int = 1,
    split: bool = False,
) -> HopperPlan | str:
    """The plan of a Hopper forward kernel, or why this template does not serve, as a clause for `explain`.

    `evaluated` says that PARTIAL tiles would need the predicate; `heavy` that the score mod reads a table at places
    that depend on query and key; `narrow` that rows keep few keys, so that most tiles are PARTIAL. Of few queries: `pack` and `split` as in
    HopperPlan.

    >>> print(plan_hopper(192, 128))
    hopper forward D192/128 bfloat16 sm_90, no mask, tiles 128x128, 2 stages, queue, 240/24 registers
    >>> plan_hopper(320)
    'its tiles hold head dims up to 256, not 320'
    """
    v_head_dim = v_head_dim or head_dim
    if reason := refusal(head_dim, v_head_dim, dtype, arch, evaluated, score and heavy):
        return reason
    dims = padded_dim(head_dim), padded_dim(v_head_dim)
    # a third warpgroup pays where heads are small enough for it and most tiles are FULL
    tall = dims == (64, 64) and map_form != "list" and not (narrow or score or pack > 1)
    consumer, producer = (160, 32) if tall else (240, 24) if max(dims) > 128 else (232, 40)
    q_stages = 1 if schedule == "grid" or max(dims) > 128 else 2
    least = HopperPlan(
        head_dim, v_head_dim, dtype, map_form, pieces, crossed, bits, starts, runs, score,
        192 if tall else 128, 64, 2, q_stages, schedule, consumer, producer, arch, pack, split,
    )  # fmt: skip
    return _grown(least, 3 if tall else 4)


def _grown(plan: HopperPlan, most: int) -> HopperPlan:
    """The plan with 128 keys a tile, where two such tiles fit, and as many stages up to `most` as do."""
    for block_kv, stages in product((128, 64), range(most, 1, -1)):
        with suppress(ValueError):
            return replace(plan, block_kv=block_kv, stages=stages)
    return plan


def refusal(head_dim: int, v_head_dim: int, dtype: str, arch: int, evaluated: bool, heavy: bool) -> str:
    """Why neither Hopper kernel takes such tensors, masks or scores; "" where the forward kernel does."""
    if arch != 90:
        return f"it is made for compute capability 9.0, and this GPU has {arch / 10}"
    if dtype not in CHOICES["dtype"]:
        return f"it multiplies bfloat16 and float16, not {dtype}"
    if max(head_dim, v_head_dim) > 256:
        return f"its tiles hold head dims up to 256, not {max(head_dim, v_head_dim)}"
    if head_dim % 8 or v_head_dim % 8:
        return f"TMA needs head dims that are multiples of 8, got {head_dim} and {v_head_dim}"
    if evaluated:
        return "partial tiles would need the predicate itself, and it compares with intervals or reads bits only"
    if heavy:
        return "the score mod reads a table at (query, key), or computes too much for the registers left"
    return ""
