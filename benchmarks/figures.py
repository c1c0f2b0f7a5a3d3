"""What a case is, what was measured of it, and the figures that follow: TFLOP/s by exact area and by blocks, ratios, means."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import flexmask
from benchmarks import masks as zoo
from flexmask.ir import Env, evaluate

TOKENS = 16384  # of a batch, at least
HEADS = {8192: 32, 32768: 8, 131072: 4}  # of queries
OTHER_HEADS = 8
DENSE = ("full", "causal")
PARTS = ("forward", "backward")
OPERATIONS = {"forward": 4, "backward": 10}  # for each kept pair and each of head_dim
OURS, FLEX = "flexmask", "FlexAttention"
BLOCK = 128


@dataclass(frozen=True)
class Case:
    """One mask at one size. `promised`: flexmask is told that document ids ascend; `per_head`: each head evicts keys of its own."""

    mask: str
    length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    sample: int = 0
    promised: bool = False
    per_head: bool = False

    @property
    def name(self) -> str:
        group = self.heads // self.kv_heads
        return f"{self.mask} {self.length} D{self.head_dim}" + (f" GQA{group}" if group > 1 else "")


def make_case(mask: str, length: int, head_dim: int = 128, group: int = 1, **more: Any) -> Case:
    """The case as the grid has it: at least 16384 tokens, 32 heads at 8192 (64 where their dim is 64), 8 at 32768, 4 at 131072."""
    heads = HEADS.get(length, OTHER_HEADS) * (2 if length == 8192 and head_dim == 64 else 1)
    return Case(mask, length, max(1, TOKENS // length), heads, heads // group, head_dim, **more)


@dataclass
class Row:
    """What was measured of a case, by contestant: median milliseconds of each part, MiB at the peak of forward and backward, the largest
    error of sampled rows (out, then relative of dq, dk, dv) against float64, and how far all gradients are from FlexAttention's."""

    case: Case
    kept_pairs: int = 0
    block_pairs: int = 0
    ms: dict[str, dict[str, float]] = field(default_factory=lambda: {part: {} for part in PARTS})
    peak_mib: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    gradient_error: dict[str, float] = field(default_factory=dict)
    difference: float = math.nan
    maps: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def density(self) -> float:
        return self.block_pairs / self.case.length**2

    def tflops(self, part: str, label: str = OURS, blocks: bool = False) -> float:
        """By kept pairs, or by the pairs of non-empty blocks."""
        c, pairs = self.case, self.block_pairs if blocks else self.kept_pairs
        return 1e-9 * OPERATIONS[part] * c.batch * c.heads * c.head_dim * pairs / self.ms[part].get(label, math.nan)

    def ratio(self, part: str, label: str) -> float:
        """How many times as fast as the rival flexmask is."""
        return self.ms[part].get(label, math.nan) / self.ms[part].get(OURS, math.nan)

    def best_flex(self, part: str) -> str:
        """The fastest of FlexAttention's backends; its default where none was measured."""
        backends = [label for label in self.ms[part] if label.startswith(FLEX)]
        return min(backends, key=self.ms[part].__getitem__, default=FLEX)

    def of_full(self, part: str, rows: Iterable[Row]) -> float:
        """Block TFLOP/s as a share of flexmask's own rate without a mask at the same size."""
        c = self.case
        same = [r for r in rows if r.case.mask == "full" and _size(r.case) == _size(c)]
        return self.tflops(part, blocks=True) / same[0].tflops(part) if same else math.nan


def _size(case: Case) -> tuple[int, ...]:
    return case.length, case.batch, case.heads, case.kv_heads, case.head_dim


def load(path: str | Path) -> tuple[dict[str, Any], list[Row]]:
    """What `python -m benchmarks.kernels` wrote: everything but the rows, and the rows."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    return data, in_order(row_from(d) for d in data.pop("rows", []))


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By head dim, group, length and mask, as the grid has them, whenever they were measured."""
    return sorted(rows, key=lambda r: (-r.case.head_dim, r.case.heads // r.case.kv_heads, r.case.length, zoo.NAMES.index(r.case.mask)))


def row_from(data: dict[str, Any]) -> Row:
    return Row(**{**data, "case": Case(**data["case"])})


def kept_pairs(mask: flexmask.Mask, length: int, chunk: int = 1024, device: str = "cuda") -> tuple[int, int]:
    """Kept pairs of batch entry 0, head 0, and the pairs of its non-empty 128 x 128 blocks, by evaluation in row chunks."""
    traced = mask.traced()
    k_idx = torch.arange(length, device=device)
    kept = blocks = 0
    for start in range(0, length, chunk):
        rows = min(chunk, length - start)
        q_idx = torch.arange(start, start + rows, device=device)[:, None]
        env = Env({"b": 0, "h": 0, "q_idx": q_idx, "kv_idx": k_idx}, traced.tensors, traced.scalars)
        keep = torch.as_tensor(evaluate(traced.expr, env), device=device).expand(rows, length)
        kept += int(keep.sum())
        blocks += int(keep.reshape(rows // BLOCK, BLOCK, length // BLOCK, BLOCK).any(3).any(1).sum())
    return kept, blocks * BLOCK * BLOCK


def mean(ratios: Iterable[float]) -> float:
    """The geometric mean of those that were measured."""
    known = [math.log(ratio) for ratio in ratios if math.isfinite(ratio)]
    return math.exp(sum(known) / len(known)) if known else math.nan


def summary(rows: list[Row]) -> list[str]:
    """What a run comes to, a line each: against every rival, FlexAttention's best backend, and flexmask's own full rate."""
    lines = []
    for part in PARTS:
        labels = list(dict.fromkeys(label for row in rows for label in row.ms[part] if label != OURS))
        for label in labels:
            lines.append(_line(f"{part}, times as fast as {label}", [(row.ratio(part, label), row) for row in rows]))
        sparse = [row for row in rows if row.case.mask not in DENSE]
        if len({label for label in labels if label.startswith(FLEX)}) > 1:
            against = [(row.ratio(part, row.best_flex(part)), row) for row in sparse]
            lines.append(_line(f"{part}, sparse masks, times as fast as FlexAttention's best backend", against))
        for length in sorted({row.case.length for row in sparse}):
            shares = [(row.of_full(part, rows), row) for row in sparse if row.case.length == length]
            lines.append(_line(f"{part}, sparse masks at {length}, block TFLOP/s over the full rate", shares))
    return [line for line in lines if line]


def _line(what: str, found: list[tuple[float, Row]]) -> str:
    known = [(value, row.case.name) for value, row in found if math.isfinite(value)]
    if not known:
        return ""
    least, where = min(known)
    return f"{what}: mean {mean(value for value, _ in known):.2f}, least {least:.2f} ({where}), of {len(known)}"
