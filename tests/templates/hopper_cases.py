"""Hopper forward kernels against dense attention in float64: `python tests/templates/hopper_cases.py [case ...]` on a Hopper GPU, or
through hopper_on_cpu.py anywhere. Prints {case: what is wrong} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flexmask.ir import SCORE, H, K, Q, const, load, make
from flexmask.lowering import CaptureSpec, TensorSpec, emit_function
from flexmask.lowering.plan_hopper import HopperPlan, plan_hopper
from flexmask.templates.assemble_hopper import assemble_hopper

Given = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What a kernel is run on. `keeps` gives (start, stop) pairs, ints or tensors over (batch entry, head, query), of kept keys; for a
    crossed plan over (batch entry, head, key), of queries; for one that reads bits, `kept` gives the mask itself."""

    plan: Given
    keeps: Callable[..., list[tuple[Any, Any]]] | None = None
    sizes: tuple[int, ...] = (1, 2, 1, 300, 300)  # batch, heads, key heads, queries, keys
    change: Given = field(default_factory=dict)
    batch_of_keys: int | None = None
    given: tuple[str, ...] = ()  # sinks, peaks, order, broken; "apart": heads are taken one at a time
    scale: float = 0.25
    score: str = ""
    kept: Callable[[int, int, int, int], torch.Tensor] | None = None


def causal(b, h, q):
    return [(0 * q, q + 1)]


def window(b, h, q):
    return [(q - 150, q + 20)]


def later(b, h, q):
    """All keys, or all but the first ten: a short last tile that is FULL."""
    return [((q > 140) * 10 * h, 0 * q + 999)]


def two(b, h, q):
    """A prefix and a window, other ones for each head; rows 100 to 299 keep nothing."""
    hole = (q >= 100) & (q < 300)
    return [(0 * q, torch.where(hole, 0, 40 + 30 * h)), (torch.where(hole, 0, q - 60), torch.where(hole, 0, q + 1))]


def three(b, h, q):
    return [(0 * q, 10 + 0 * q), (100 + q // 2, 140 + q // 2), (q + 250 + b, q + 290)]


def evicted(b, h, k):
    """Keys that are seen from themselves on, for a while."""
    return [(k, k + 1 + (k * 37) % 400 + 20 * h)]


def scattered(batch, heads, q_len, kv_len):
    """Random bits in a third of the tiles, all of another third; rows that keep nothing in PARTIAL tiles; the first head's first tile row
    keeps nothing, its second only the FULL last tile, and the third only FULL ones."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randint(3, (batch, heads, -(-q_len // 128), -(-kv_len // 128)), generator=generator)
    kinds[0, 0, 0], kinds[0, 0, 1:2], kinds[0, 0, 2:3] = 0, 0, 2
    kinds[0, 0, 1:2, -1:] = 2
    kinds = kinds.repeat_interleave(128, 2)[:, :, :q_len].repeat_interleave(128, 3)[..., :kv_len]
    some = torch.rand(kinds.shape, generator=generator) < torch.rand(*kinds.shape[:3], 1, generator=generator) - 0.2
    return (kinds == 2) | (kinds == 1) & some


def everything(*sizes):
    return torch.ones(sizes, dtype=torch.bool)


def nothing(*sizes):
    return torch.zeros(sizes, dtype=torch.bool)


def ending(b, h, q):
    """The queries being the last of 900."""
    return [(0 * q, q + 751)]


def band_and_prefix(b, h, q):
    return [(0 * q, 20 + 0 * q), (q + 60, 2 * q + 100)]


def alike(batch, heads, q_len, kv_len):
    """The same for all heads."""
    return scattered(batch, 1, q_len, kv_len).expand(batch, heads, q_len, kv_len)


LIST: Given = {"map_form": "list"}
BITS: Given = {**LIST, "bits": True}
RANGE: Given = {"map_form": "range", "pieces": 1}
CASES: dict[str, Case] = {
    "full": Case({"head_dim": 64}),
    "full, wide, one row": Case({"head_dim": 128}, sizes=(2, 4, 2, 1, 129), given=("sinks", "peaks")),
    "full, whole tiles": Case({"head_dim": 64}, sizes=(1, 2, 2, 256, 256)),
    "causal": Case({"head_dim": 128, **RANGE, "starts": False}, causal),
    "causal, more keys": Case({"head_dim": 64, **RANGE, "starts": False}, lambda b, h, q: [(0 * q, q + 200)], (1, 1, 1, 200, 500)),
    "window": Case({"head_dim": 64, **RANGE}, window, (2, 2, 1, 500, 450)),
    "window, beyond the last key": Case({"head_dim": 64, **RANGE}, window, (1, 1, 1, 700, 200)),
    "band": Case({"head_dim": 64, **RANGE}, lambda b, h, q: [(q - 450, q + 300)], (1, 2, 1, 1000, 1000)),
    "all but the first keys": Case({"head_dim": 64, **LIST, "pieces": 1}, later, (1, 2, 1, 300, 300)),
    "two": Case({"head_dim": 64, **LIST, "pieces": 2}, two, (2, 4, 2, 500, 500)),
    "two, by grid": Case({"head_dim": 64, **LIST, "pieces": 2, "schedule": "grid"}, two, (1, 2, 2, 500, 500)),
    "two, by stride": Case({"head_dim": 64, **LIST, "pieces": 2, "schedule": "stride"}, two, (1, 2, 2, 500, 500), given=("order",)),
    "two, one stage": Case({"head_dim": 64, **LIST, "pieces": 2}, two, (1, 2, 2, 500, 500), {"stages": 1, "q_stages": 1}),
    "two, small tiles": Case({"head_dim": 64, **LIST, "pieces": 2}, two, (1, 2, 2, 500, 500), {"block_kv": 64, "stages": 3}),
    "two, three warpgroups": Case(
        {"head_dim": 64, **LIST, "pieces": 2}, two, (1, 2, 2, 500, 500),
        {"block_q": 192, "consumer_registers": 160, "producer_registers": 32},
    ),
    "heads apart": Case({"head_dim": 64, **RANGE}, causal, (2, 4, 2, 500, 500), given=("order", "apart")),
    "heads apart, by stride": Case(
        {"head_dim": 64, **LIST, "pieces": 2, "schedule": "stride"}, two, (2, 3, 1, 600, 500), given=("order", "apart")
    ),
    "heads apart, by grid": Case(
        {"head_dim": 64, **BITS, "schedule": "grid"}, None, (1, 3, 1, 400, 300), kept=scattered, given=("order", "apart")
    ),
    "heads apart, in their own order": Case({"head_dim": 64, **LIST, "crossed": True}, evicted, (1, 3, 1, 500, 520), given=("apart",)),
    "three": Case({"head_dim": 64, "dtype": "float16", **LIST, "pieces": 3}, three, (2, 2, 1, 400, 600), given=("sinks", "peaks", "order")),
    "other head dims": Case({"head_dim": 72, "v_head_dim": 104, **RANGE}, window, batch_of_keys=1, sizes=(2, 2, 1, 200, 200)),
    "crossed": Case({"head_dim": 64, **LIST, "crossed": True}, evicted, (1, 2, 1, 500, 520)),
    "crossed, from the first row": Case(
        {"head_dim": 64, **LIST, "crossed": True, "starts": False}, lambda b, h, k: [(0 * k, (k * 29) % 300)], (1, 1, 1, 300, 300)
    ),
    "negative scale": Case({"head_dim": 64, **RANGE}, causal, scale=-0.25, given=("peaks",)),
    "no scale": Case({"head_dim": 64, **RANGE}, causal, scale=0.0),
    "holds": Case({"head_dim": 64, **RANGE, "runs": "hold"}, causal, given=("broken 0",)),
    "does not hold": Case({"head_dim": 64, **RANGE, "runs": "hold"}, causal, given=("broken 1",)),
    "bits": Case({"head_dim": 64, **BITS}, None, (2, 2, 1, 500, 460), kept=scattered, given=("sinks", "peaks")),
    "bits, whole tiles": Case({"head_dim": 128, **BITS}, None, (1, 2, 2, 384, 640), {"q_stages": 1, "stages": 1}, kept=scattered),
    "bits, small tiles": Case({"head_dim": 64, **BITS}, None, (1, 2, 1, 300, 350), {"block_kv": 64, "stages": 3}, kept=scattered),
    "bits, three warpgroups": Case(
        {"head_dim": 64, "dtype": "float16", **BITS}, None, (1, 2, 1, 500, 333),
        {"block_q": 192, "consumer_registers": 160, "producer_registers": 32}, kept=scattered,
    ),
    "bits, one row": Case({"head_dim": 64, **BITS, "schedule": "grid"}, None, (1, 3, 1, 1, 700), kept=scattered),
    "bits, score": Case({"head_dim": 64, **BITS, "score": True}, None, (1, 2, 1, 300, 500), kept=scattered, score="slopes"),
    "no bits, as all is kept": Case({"head_dim": 64, **BITS}, None, (1, 1, 1, 300, 300), kept=everything),
    "no bits, as nothing is kept": Case({"head_dim": 64, **BITS}, None, (1, 1, 1, 300, 300), kept=nothing, given=("sinks", "peaks")),
    "bits that hold": Case({"head_dim": 64, **BITS, "runs": "hold"}, None, kept=scattered, given=("broken 0",)),
    "bits that do not hold": Case({"head_dim": 64, **BITS, "runs": "hold"}, None, kept=scattered, given=("broken 2", "order")),
    "fails": Case({"head_dim": 64, **RANGE, "runs": "fail"}, causal, given=("broken 1",)),
    "failed, and another kernel has done it": Case({"head_dim": 64, **RANGE, "runs": "fail"}, causal, given=("broken 2",)),
    "256": Case({"head_dim": 256}, sizes=(2, 2, 1, 200, 300), given=("sinks", "peaks")),
    "256, causal": Case({"head_dim": 256, **RANGE, "starts": False}, causal, (1, 4, 2, 300, 200)),
    "256, two": Case({"head_dim": 248, "v_head_dim": 256, **LIST, "pieces": 2}, two, (1, 2, 1, 400, 400)),
    "256, bits": Case({"head_dim": 256, "dtype": "float16", **BITS}, None, (1, 2, 1, 300, 350), kept=scattered, given=("sinks", "peaks")),
    "256, crossed": Case({"head_dim": 256, **LIST, "crossed": True}, evicted, (1, 2, 1, 500, 520)),
    "256, slopes": Case({"head_dim": 256, **RANGE, "score": True}, causal, score="slopes"),
    "192, window": Case({"head_dim": 192, **RANGE}, window, (1, 2, 1, 500, 450)),
    "160, three": Case({"head_dim": 160, **LIST, "pieces": 3}, three, (1, 2, 1, 400, 600)),
    "192/128": Case({"head_dim": 192, "v_head_dim": 128}, sizes=(1, 2, 2, 1, 300), given=("peaks",)),
    "192/128, causal": Case({"head_dim": 192, "v_head_dim": 128, **RANGE, "starts": False}, causal, (2, 2, 1, 400, 400), given=("order",)),
    "192/128, bits": Case({"head_dim": 192, "v_head_dim": 128, **BITS}, None, (1, 2, 1, 500, 460), kept=scattered),
    "192/128, crossed": Case({"head_dim": 192, "v_head_dim": 128, **LIST, "crossed": True}, evicted, (1, 2, 1, 300, 520)),
    "192/128, two tiles of queries": Case(
        {"head_dim": 192, "v_head_dim": 128, **RANGE}, window, (1, 4, 1, 300, 250), {"block_kv": 64, "q_stages": 2}
    ),
    "128/256": Case({"head_dim": 128, "v_head_dim": 256, **RANGE, "schedule": "grid"}, window, (1, 2, 1, 300, 300)),
    "64/192": Case({"head_dim": 64, "v_head_dim": 192, **RANGE, "schedule": "stride"}, window, (1, 4, 1, 300, 300)),
    "128/64": Case({"head_dim": 128, "v_head_dim": 64, **RANGE}, window, (1, 2, 1, 300, 300)),
    "64/128": Case({"head_dim": 48, "v_head_dim": 96, **BITS}, None, (1, 2, 1, 300, 300), kept=scattered),
    "split": Case({"head_dim": 64, "split": True}, sizes=(2, 2, 1, 130, 700), given=("sinks", "peaks")),
    "split, causal": Case({"head_dim": 128, **RANGE, "starts": False, "split": True}, ending, (1, 2, 1, 150, 900)),
    "split, window": Case({"head_dim": 64, **RANGE, "split": True}, window, (2, 2, 1, 500, 450), given=("order", "peaks", "7 portions")),
    "split, band": Case({"head_dim": 64, **RANGE, "split": True}, lambda b, h, q: [(q - 450, q + 300)], (1, 2, 1, 600, 1000)),
    "split, two": Case({"head_dim": 64, **LIST, "pieces": 2, "split": True}, two, (2, 4, 2, 500, 500), given=("apart", "order")),
    "split, by stride": Case(
        {"head_dim": 64, **LIST, "pieces": 2, "split": True, "schedule": "stride"}, two, (1, 2, 2, 500, 500), given=("2 portions",)
    ),
    "split, bits": Case({"head_dim": 64, **BITS, "split": True}, None, (2, 2, 1, 500, 700), kept=scattered, given=("sinks", "peaks")),
    "split, crossed": Case({"head_dim": 64, **LIST, "crossed": True, "split": True}, evicted, (1, 2, 1, 500, 720)),
    "split, score": Case(
        {"head_dim": 64, **RANGE, "split": True, "score": True}, window, (1, 2, 1, 300, 500), score="gate", given=("peaks",)
    ),
    "split, 192/128": Case({"head_dim": 192, "v_head_dim": 128, **RANGE, "split": True}, window, (1, 2, 1, 300, 500)),
    "split, 256": Case({"head_dim": 256, **BITS, "split": True, "pack": 2}, None, (1, 2, 1, 100, 500), kept=alike, given=("5 portions",)),
    "split, 80/24": Case({"head_dim": 80, "v_head_dim": 24, "split": True}, sizes=(1, 2, 1, 70, 300), given=("2 portions",)),
    "split, where it does not hold": Case({"head_dim": 64, **RANGE, "runs": "hold", "split": True}, causal, given=("broken 1",)),
    "2 heads a tile": Case({"head_dim": 64, "pack": 2}, sizes=(2, 4, 2, 64, 300), given=("sinks", "peaks")),
    "2 heads a tile, causal": Case({"head_dim": 128, **RANGE, "pack": 2}, causal, (1, 4, 1, 170, 300), given=("order",)),
    "2 heads a tile, bits": Case({"head_dim": 64, **BITS, "pack": 2}, None, (2, 4, 2, 100, 500), kept=alike),
    "2 heads a tile, crossed": Case(
        {"head_dim": 64, **LIST, "crossed": True, "pack": 2}, lambda b, h, k: [(k // 2, k // 2 + 30)], (1, 2, 1, 150, 300)
    ),
    "2 heads a tile, score": Case({"head_dim": 64, **RANGE, "pack": 2, "score": True}, causal, (1, 4, 2, 100, 300), score="gate"),
    "2 heads a tile, 256": Case({"head_dim": 256, **RANGE, "pack": 2}, causal, (2, 2, 1, 100, 300), given=("sinks",)),
    "4 heads a tile": Case({"head_dim": 64, "pack": 4}, sizes=(2, 8, 2, 40, 300), given=("sinks", "peaks")),
    "4 heads a tile, two": Case({"head_dim": 128, **LIST, "pieces": 2, "pack": 4}, band_and_prefix, (1, 4, 1, 70, 300), given=("order",)),
    "4 heads a tile, crossed": Case(
        {"head_dim": 64, **LIST, "crossed": True, "pack": 4}, lambda b, h, k: [(k // 4, k // 4 + 20)], (1, 8, 2, 75, 300)
    ),
    "8 heads a tile, bits": Case(
        {"head_dim": 64, **BITS, "pack": 8, "split": True}, None, (2, 8, 1, 37, 500), kept=alike, given=("sinks", "peaks")
    ),
    "8 heads a tile, score": Case({"head_dim": 64, **RANGE, "pack": 8, "score": True}, causal, (1, 8, 1, 30, 300), score="gate"),
    "16 heads a tile, slopes": Case({"head_dim": 128, "pack": 16, "split": True, "score": True}, sizes=(1, 32, 2, 7, 300), score="slopes"),
    "4 heads a tile, 256": Case({"head_dim": 256, **RANGE, "pack": 4}, causal, (2, 4, 1, 50, 300), given=("sinks", "peaks")),
    "4 heads a tile, 192/128, split": Case(
        {"head_dim": 192, "v_head_dim": 128, **RANGE, "pack": 4, "split": True}, causal, (1, 4, 1, 50, 300), given=("peaks",)
    ),
    "2 heads a tile, split": Case({"head_dim": 64, **LIST, "pieces": 3, "pack": 2, "split": True}, three, (2, 4, 2, 64, 600)),
    "softcap": Case({"head_dim": 64, **RANGE, "score": True}, causal, score="softcap"),
    "slopes": Case({"head_dim": 64, "score": True}, score="slopes", given=("sinks", "peaks")),
    "gate": Case({"head_dim": 64, **LIST, "pieces": 2, "score": True}, two, (1, 2, 2, 500, 500), score="gate"),
}  # fmt: skip

SLOPES = CaptureSpec((TensorSpec("slopes", 1, "float32"),), ())
GATE = CaptureSpec((TensorSpec("gate", 2, "float16"), TensorSpec("of_key", 1, "float32")), ())
SCORES: dict[str, tuple[Any, CaptureSpec]] = {
    "softcap": (const(3.0) * make("tanh", (make("truediv", (SCORE, const(3.0))),)), CaptureSpec()),
    "slopes": (SCORE + load(0, "float", H) * (K - Q), SLOPES),
    "gate": (SCORE * load(0, "float", H, Q) + load(1, "float", K), GATE),
}


def tables_of(score: str, heads: int, q_len: int, kv_len: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if score == "slopes":
        return [torch.linspace(0.01, 0.2, heads)]
    return [torch.rand(heads, q_len, generator=generator).half(), torch.randn(kv_len, generator=generator)] if score == "gate" else []


def changed(score: str, s: torch.Tensor, tables: list[torch.Tensor]) -> torch.Tensor:
    """The score mods again, on dense scores [B, H, Q, KV]."""
    if score == "softcap":
        return 3.0 * torch.tanh(s / 3.0)
    if score == "slopes":
        q, k = torch.arange(s.shape[2])[:, None], torch.arange(s.shape[3])
        return s + tables[0].double()[:, None, None] * (k - q)
    return s * tables[0].double()[..., None] + tables[1].double() if score == "gate" else s


ALL_HEADS = "RESIDENT_BYTES = 24 * 1024 * 1024\n"


def plan_of(case: Case) -> HopperPlan:
    plan = plan_hopper(**case.plan)
    assert not isinstance(plan, str), plan
    return replace(plan, **case.change)


def source_of(case: Case, plan: HopperPlan | None = None) -> str:
    text = emit_function(case.score, SCORES[case.score][0], SCORES[case.score][1], "score") if case.score else None
    source = assemble_hopper(plan or plan_of(case), text, [case.score] if case.score else [])
    return source.replace(ALL_HEADS, "RESIDENT_BYTES = 1\n") if "apart" in case.given else source


def intervals_of(case: Case, crossed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """starts and stops, int32 [1, heads, places, pieces], clipped; empty ones (0, 0)."""
    batch, heads, _, q_len, kv_len = case.sizes
    places, limit = (kv_len, q_len) if crossed else (q_len, kv_len)
    assert case.keeps is not None
    at = (torch.arange(batch)[:, None, None], torch.arange(heads)[:, None], torch.arange(places))
    shape = (batch, heads, places)
    pairs = [
        (torch.as_tensor(a).expand(shape).clamp(0, limit), torch.as_tensor(z).expand(shape).clamp(0, limit)) for a, z in case.keeps(*at)
    ]
    starts, stops = torch.stack([a for a, _ in pairs], -1), torch.stack([z for _, z in pairs], -1)
    empty = starts >= stops
    return torch.where(empty, 0, starts).int().contiguous(), torch.where(empty, 0, stops).int().contiguous()


def dense(case: Case, crossed: bool) -> torch.Tensor:
    """The mask, bool [batch, heads, Q, KV]."""
    batch, heads, _, q_len, kv_len = case.sizes
    if case.kept is not None:
        return case.kept(batch, heads, q_len, kv_len)
    if case.keeps is None:
        return torch.ones(batch, heads, q_len, kv_len, dtype=torch.bool)
    starts, stops = intervals_of(case, crossed)
    other = torch.arange(q_len if crossed else kv_len)
    keep = ((other >= starts[..., None]) & (other < stops[..., None])).any(-2)
    return keep.transpose(-1, -2) if crossed else keep


def states_of(keep: torch.Tensor, block_q: int, block_kv: int) -> torch.Tensor:
    """0 EMPTY, 1 PARTIAL, 2 FULL by tile."""
    rows = [part.any(-2) * 1 + part.all(-2) * 1 for part in keep.split(block_q, -2)]  # by key: none, some or all rows
    return torch.stack([torch.stack([part.amax(-1).clamp(max=1) + (part.amin(-1) == 2) * 1 for part in row.split(block_kv, -1)], -1)
                        for row in rows], -2)  # fmt: skip


def map_of(states: torch.Tensor, form: str) -> Given:
    """A tile map in range or list form."""
    batch, heads, lines, _ = states.shape
    if form == "range":
        found = torch.zeros(batch, heads, lines, 4, dtype=torch.int32)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in states.shape[:3])).tolist():
            line = states[tuple(at)]
            kept, full = (line > 0).nonzero().flatten().tolist(), (line == 2).nonzero().flatten().tolist()
            ends = [kept[0], *([full[0], full[-1] + 1] if full else [kept[0]] * 2), kept[-1] + 1] if kept else [0] * 4
            assert len(kept) == ends[3] - ends[0] and len(full) == ends[2] - ends[1], "no runs"
            found[tuple(at)] = torch.tensor(ends)
        return {"ranges": found}
    counts, offsets, index = [], [], []
    for line in states.reshape(-1, states.shape[-1]):
        full, part = (line == 2).nonzero().flatten().tolist(), (line == 1).nonzero().flatten().tolist()
        counts.append([len(full), len(part)])
        offsets.append([len(index), len(index) + len(full)])
        index += full + part[::-1]
    shape = (batch, heads, lines, 2)
    return {
        "counts": torch.tensor(counts, dtype=torch.int32).reshape(shape),
        "offsets": torch.tensor(offsets, dtype=torch.int32).reshape(shape),
        "index": torch.tensor(index, dtype=torch.int32),
    }  # fmt: skip


def bits_of(keep: torch.Tensor, listed: Given, block_q: int, block_kv: int) -> Given:
    """Words of the tiles that a list map names as PARTIAL, each different one once; 99 stands where no pattern is needed."""
    batch, heads, lines, _ = listed["counts"].shape
    keep = torch.nn.functional.pad(keep, (0, -keep.shape[3] % block_kv, 0, -keep.shape[2] % block_q))
    tiles = keep.unflatten(3, (-1, block_kv)).unflatten(2, (-1, block_q)).transpose(3, 4)
    patterns, known = torch.full_like(listed["index"], 99), dict[bytes, int]()
    words = torch.zeros(0, block_q, block_kv // 32, dtype=torch.int32)
    for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, lines))).tolist():
        first, part = int(listed["offsets"][b, h, m, 1]), int(listed["counts"][b, h, m, 1])
        for at in range(first, first + part):
            tile = tiles[b, h, m, int(listed["index"][at])].unflatten(1, (-1, 32))
            word = (tile.long() << torch.arange(32)).sum(-1).int()
            patterns[at] = known.setdefault(word.numpy().tobytes(), len(known))
            words = torch.cat([words, word[None]])[: len(known)]
    return {"patterns": patterns, "words": words.contiguous()}


def arguments(case: Case, plan: HopperPlan) -> Given:
    """What `forward` takes besides q, k, v, the scale and captures; on the CPU."""
    _, heads, _, q_len, _ = case.sizes
    given: Given = {}
    if plan.map_form != "none":
        given = map_of(states_of(dense(case, plan.crossed), plan.queries, plan.block_kv), plan.map_form)
        if plan.bits:
            given |= bits_of(dense(case, False), given, plan.queries, plan.block_kv)
        else:
            names = ("column_starts", "column_stops") if plan.crossed else ("row_starts", "row_stops")
            given |= dict(zip(names, intervals_of(case, plan.crossed), strict=True))
    if "sinks" in case.given:
        given["sinks"] = torch.linspace(-1, 2, heads)
    if "peaks" in case.given:
        given["peaks"] = torch.full(case.sizes[:2] + case.sizes[3:4], float("nan"))
    if "order" in case.given:
        rows = -(-q_len // plan.queries)
        given["order"] = torch.tensor([*range(rows), *[1] * 18], dtype=torch.int32)  # one of them is long, in the last heads
    for flag in (0, 1, 2):
        if f"broken {flag}" in case.given:
            given["broken"] = torch.tensor([flag], dtype=torch.int32)
    return given


def check(case: Case, module: Any, device: str) -> str:
    """Run the kernel twice (a queue must be left as it was found); what differs from dense attention."""
    plan = plan_of(case)
    torch.manual_seed(0)
    batch, heads, key_heads, q_len, kv_len = case.sizes
    dtype = getattr(torch, plan.dtype)
    q = torch.randn(batch, heads, q_len, plan.head_dim).to(dtype)
    k = torch.randn(case.batch_of_keys or batch, key_heads, kv_len, plan.head_dim).to(dtype)
    v = torch.randn(case.batch_of_keys or batch, key_heads, kv_len, plan.v_head_dim).to(dtype)
    tables = tables_of(case.score, heads, q_len, kv_len)
    given = {name: x.to(device) for name, x in arguments(case, plan).items()}
    idle = plan.runs != "always" and given["broken"].item() != (plan.runs == "fail")
    if idle:  # nor is anything to be trusted then
        for name in {"counts", "offsets", "order"} & given.keys():
            given[name] += 1 << 20
    into = (torch.full((batch, heads, q_len, plan.v_head_dim), 7.0, dtype=dtype), torch.full((batch, heads, q_len), 7.0))
    queue = torch.zeros(1, dtype=torch.int32, device=device)
    more = {"portions": int(next((told.split()[0] for told in case.given if "portions" in told), 4))} if plan.split else {}
    captures = module.pack([t.to(device) for t in tables], [])
    for _ in range(2):
        mine = tuple(x.clone().to(device) for x in into)
        out, lse = module.forward(
            *(x.to(device) for x in (q, k, v)),
            case.scale,
            ((), ()),
            captures,
            **given,
            **more,
            queue=queue,
            into=mine if idle or _ else None,
        )
    if int(queue) != 0:
        return f"the queue was left at {int(queue)}"
    if idle:
        return "" if bool((out == 7).all() & (lse == 7).all()) else "a kernel that should do nothing wrote something"
    return compare(case, plan, (q, k, v), tables, out.cpu(), lse.cpu(), {n: x.cpu() for n, x in given.items()})


def compare(case: Case, plan: HopperPlan, sources: tuple, tables: list, out: torch.Tensor, lse: torch.Tensor, given: Given) -> str:
    q, k, v = (x.double() for x in sources)
    group = q.shape[1] // k.shape[1]
    s = changed(case.score, q @ k.repeat_interleave(group, 1).transpose(-1, -2) * case.scale, tables)
    s = s.masked_fill(~dense(case, plan.crossed), float("-inf"))
    peaks = s.amax(-1)
    wide = s
    if "sinks" in given:
        wide = torch.cat([s, given["sinks"].double()[:, None, None].expand(*s.shape[:3], 1)], -1)
    total = wide.logsumexp(-1)
    p = torch.exp(s - torch.where(total.isinf(), 0.0, total)[..., None])
    wanted = p @ v.repeat_interleave(group, 1)
    wrong = [f"{name} off by {found:.3g}" for name, found in (
        ("out", (out.double() - wanted).abs().max().item()), ("lse", difference(lse, total)),
        ("peaks", difference(given["peaks"], peaks) if "peaks" in given else 0.0),
    ) if not found < 0.02]  # fmt: skip
    return ", ".join(wrong)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The greatest difference; equal infinities do not differ."""
    return float(torch.where(found.double() == wanted, 0.0, (found.double() - wanted).abs()).max())


def main(names: list[str]) -> None:
    from flexmask.runtime.launch import load as load_module

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names or CASES):
            path = Path(folder) / f"kernel_{number}.py"
            path.write_text(source_of(CASES[name]))
            results[name] = check(CASES[name], load_module(path), "cuda")
            print(name, results[name] or "as it should be", file=sys.stderr, flush=True)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
