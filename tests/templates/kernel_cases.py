"""Generated kernels against dense float64 attention. Run as a script under TRITON_INTERPRET=1; prints {case: error} as JSON.

Tile maps and row intervals are made here from the dense mask, so that the kernel is tested alone.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import traceback
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flexmask.ir import Env, Expr, evaluate, parse
from flexmask.lowering import CaptureSpec, emit_function, plan_forward
from flexmask.runtime.tile_map import TileMap
from flexmask.templates.assemble import assemble

TABLES = ["bool", "int", "float"]
SCALARS = ["int", "float"]
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
SPEC_NAMES = (["keep", "doc", "bias"], ["window", "slope"])


@dataclass(frozen=True)
class Case:
    """One kernel run: the mask and score as texts (t0 bool [Q, KV], t1 int [B, N], t2 float [H, Q, KV]; s0 int, s1 float)."""

    mask: str = ""
    score: str = ""
    form: str = "none"
    pieces: int = 0
    shape: tuple[int, int, int, int, int] = (2, 2, 1, 37, 53)  # batch, heads, kv heads, q_len, kv_len
    dims: tuple[int, int] = (16, 16)
    dtype: str = "float32"
    blocks: tuple[int, int] | None = (16, 16)  # None: the plan's own
    loads: str = "pointer"
    options: dict[str, Any] = field(default_factory=dict)


CAUSAL, WINDOW = "kv_idx <= q_idx", "(kv_idx <= q_idx) & (q_idx - kv_idx < s0)"
TWO, THREE = "(kv_idx < 5) | ((kv_idx <= q_idx) & (q_idx - kv_idx < 7))", "(kv_idx % 20 < 6) & (kv_idx < 46)"
DOCUMENT = "(t1[b, q_idx] == t1[b, kv_idx]) & (kv_idx <= q_idx)"
SOFTCAP, BIAS = "5.0 * tanh(score / 5.0)", "score + t2[h, q_idx, kv_idx]"
RANGE: dict[str, Any] = {"form": "range", "pieces": 1}
LIST: dict[str, Any] = {"form": "list"}

CASES = {
    "full": Case(),
    "full, whole tiles": Case(shape=(1, 2, 2, 32, 48)),
    "one query": Case(shape=(1, 2, 1, 1, 300)),
    "one key": Case(shape=(2, 2, 2, 5, 1)),
    "long and odd": Case(shape=(1, 1, 1, 257, 299), blocks=(32, 64)),
    "no keys": Case(shape=(1, 2, 2, 5, 0)),
    "no queries": Case(shape=(1, 2, 2, 0, 5)),
    "float16": Case(dtype="float16"),
    "head dim 40": Case(dims=(40, 40)),
    "head dim 64 and value dim 24": Case(dims=(64, 24)),
    "head dim 24 and value dim 96": Case(dims=(24, 96)),
    "head dim 5": Case(dims=(5, 5)),
    "eight query heads a key head": Case(shape=(1, 8, 1, 20, 33)),
    "keys shared by the batch": Case(options={"kv_batch": 1}),
    "strided": Case(options={"strided": True}),
    "last dimension strided": Case(options={"last_strided": True}),
    "scale given": Case(options={"scale": 0.3}),
    "scale negative": Case(options={"scale": -0.3}),
    "scale zero": Case(options={"scale": 0.0}),
    "tma": Case(loads="tma", dtype="float16"),
    "tma, padded head dim": Case(loads="tma", dtype="float16", dims=(40, 24)),
    "tma, strided, keys shared": Case(loads="tma", dtype="float16", options={"strided": True, "kv_batch": 1}),
    "tma, causal": Case(CAUSAL, **RANGE, loads="tma", dtype="float16"),
    "causal": Case(CAUSAL, **RANGE),
    "causal, more queries than keys": Case(CAUSAL, **RANGE, shape=(1, 2, 2, 61, 33)),
    "causal, uneven tiles": Case(CAUSAL, **RANGE, blocks=(32, 16)),
    "causal, wide tiles": Case(CAUSAL, **RANGE, blocks=(16, 64), shape=(1, 1, 1, 150, 150)),
    "causal, by the stops alone": Case(CAUSAL, **RANGE, options={"starts": False}),
    "causal, list": Case(CAUSAL, form="list", pieces=1),
    "causal, list, evaluated": Case(CAUSAL, **LIST),
    "window": Case(WINDOW, **RANGE, shape=(1, 2, 1, 70, 70)),
    "window, list": Case(WINDOW, pieces=1, **LIST, shape=(1, 2, 1, 70, 70)),
    "window, its turn": Case(WINDOW, **RANGE, options={"runs": "hold", "broken": 0}),
    "window, not its turn": Case(WINDOW, **RANGE, options={"runs": "hold", "broken": 1}),
    "evaluated, its turn": Case(WINDOW, **LIST, options={"runs": "fail", "broken": 1}),
    "evaluated, done by one before": Case(WINDOW, **LIST, options={"runs": "fail", "broken": 2}),
    "evaluated, not its turn": Case(WINDOW, **LIST, options={"runs": "fail", "broken": 0}),
    "lists stored backwards, with room between": Case(WINDOW, **LIST, options={"backwards": True}),
    "rows that keep nothing": Case("kv_idx < q_idx - 20", **RANGE),
    "rows that keep nothing, evaluated": Case("(kv_idx < q_idx - 20) & (kv_idx % 2 == 0)", **LIST),
    "nothing kept at all": Case("(kv_idx < 0) & (q_idx < 0)", **LIST),
    "everything kept, list": Case("(kv_idx < 1000) & (q_idx < 1000)", pieces=1, **LIST),
    "everything kept, list, evaluated": Case("(kv_idx < 1000) & (q_idx < 1000)", **LIST),
    "everything kept, range": Case("(kv_idx < 1000) & (q_idx < 1000)", **RANGE),
    "short full tile joins evaluated ones": Case("(40 < kv_idx) | (kv_idx % 2 == 0)", **LIST),
    "two intervals": Case(TWO, form="list", pieces=2, shape=(1, 2, 1, 70, 70)),
    "three intervals": Case(THREE, form="list", pieces=3),
    "document, by batch": Case(DOCUMENT, **LIST),
    "document, intervals by batch": Case(DOCUMENT, form="list", pieces=1),
    "by head": Case("kv_idx <= q_idx + 5 * h - 10", **RANGE),
    "by head, evaluated": Case("kv_idx <= q_idx + 5 * h - 10", **LIST),
    "by batch and head": Case("kv_idx % (b + h + 2) == 0", **LIST),
    "bits": Case("t0[q_idx, kv_idx] & (kv_idx <= q_idx + 8)", **LIST, options={"bits": True}),
    "bits, uneven tiles": Case("kv_idx % (b + h + 2) == 0", **LIST, blocks=(16, 64), options={"bits": True}),
    "bits, short full tile": Case("(40 < kv_idx) | (kv_idx % 2 == 0)", **LIST, options={"bits": True, "runs": "hold", "broken": 0}),
    "bool table": Case("t0[q_idx, kv_idx]", **LIST),
    "softcap": Case(score=SOFTCAP),
    "bias": Case(score=BIAS),
    "bias and causal": Case(CAUSAL, BIAS, **RANGE),
    "softcap and document": Case(DOCUMENT, SOFTCAP, **LIST),
    "softcap, scale negative": Case(score=SOFTCAP, options={"scale": -0.3}),
    "slope": Case(CAUSAL, "score + s1 * (kv_idx - q_idx) * (h + 1)", **RANGE),
    "score that masks": Case(score="where(kv_idx < q_idx - 10, score, -inf)"),
    "score that forgets": Case(score="0.5 * kv_idx"),
    "nan query": Case(CAUSAL, **RANGE, options={"nan": "q"}),
    "nan query, full": Case(options={"nan": "q"}),
    "nan key beyond every query": Case("kv_idx < 40", **RANGE, options={"nan": "k"}),
    "nan around the tensors": Case(options={"nan": "around"}),
    "nan around the tensors, causal": Case(CAUSAL, form="list", pieces=1, options={"nan": "around"}),
    "trivial map, causal": Case(CAUSAL, **LIST, options={"trivial": True}),
    "trivial map, document and softcap": Case(DOCUMENT, SOFTCAP, **LIST, options={"trivial": True}),
}


def captures(case: Case) -> tuple[list[torch.Tensor], list[int | float]]:
    batch, heads, _, q_len, kv_len = case.shape
    g = torch.Generator().manual_seed(3)
    longest = max(q_len, kv_len, 1)
    doc = (torch.arange(longest)[None] + 5 * torch.arange(batch)[:, None]) // 13
    return [
        torch.rand(q_len, kv_len, generator=g) < 0.3,
        doc.to(torch.int32),
        torch.randn(heads, q_len, kv_len, generator=g).to(torch.float16),
    ], [9, 0.05]


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, kv_heads, q_len, kv_len = case.shape
    options, dtype = case.options, getattr(torch, case.dtype)
    g = torch.Generator().manual_seed(4)
    sizes = [(batch, heads, q_len, case.dims[0])] + [(options.get("kv_batch", batch), kv_heads, kv_len, d) for d in case.dims]
    made = []
    for b, h, n, d in sizes:
        if options.get("strided"):
            x = torch.randn(b, n, h, d, generator=g).to(dtype).transpose(1, 2)
        elif options.get("last_strided"):
            x = torch.randn(b, h, d, n, generator=g).to(dtype).transpose(2, 3)
        elif options.get("nan") == "around":
            x = torch.full((b, h, n + 40, d + 40), float("nan"), dtype=dtype)[:, :, 10 : 10 + n, 10 : 10 + d]
            x.copy_(torch.randn(b, h, n, d, generator=g))
        else:
            x = torch.randn(b, h, n, d, generator=g).to(dtype)
        made.append(x)
    if options.get("nan") == "q":
        made[0][0, 1, 7] = float("nan")
    if options.get("nan") == "k":
        made[1][:, :, 47] = float("nan")
    return made[0], made[1], made[2]


def dense(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: Expr | None, score: Expr | None) -> Any:
    """(out, lse, keep) in float64."""
    batch, heads, kv_heads, q_len, kv_len = case.shape
    tensors, scalars = captures(case)
    k, v = (x.double().expand(batch, -1, -1, -1).repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    s = q.double() @ k.mT * scale
    grid = {"b": torch.arange(batch)[:, None, None, None], "h": torch.arange(heads)[None, :, None, None]}
    grid |= {"q_idx": torch.arange(q_len)[:, None], "kv_idx": torch.arange(kv_len)[None], "score": s}
    env = Env(grid, tensors, scalars)
    keep = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    if score is not None:
        s = torch.as_tensor(evaluate(score, env)).double().expand(s.shape)
    if mask is not None:
        keep = torch.as_tensor(evaluate(mask, env))
        keep = keep.reshape((1,) * (4 - keep.dim()) + tuple(keep.shape)).expand(
            *keep.shape[:-2] if keep.dim() == 4 else (1, 1), q_len, kv_len
        )
    s = s.masked_fill(~keep, -math.inf)
    lse = s.logsumexp(-1)
    p = torch.where((lse == -math.inf)[..., None], 0.0, (s - lse[..., None]).exp())
    return p @ v, lse, keep


def make_map(case: Case, keep: torch.Tensor, block_q: int, block_kv: int) -> Any:
    """The tile map of a dense mask, by brute force."""
    b, h, q_len, kv_len = keep.shape
    rows, columns = -(-q_len // block_q), -(-kv_len // block_kv)
    tile = lambda m, n: keep[..., m * block_q : (m + 1) * block_q, n * block_kv : (n + 1) * block_kv].flatten(-2)
    states = torch.stack([torch.stack([tile(m, n).any(-1) + 0 + tile(m, n).all(-1) for n in range(columns)], -1) for m in range(rows)], -2)
    made = SimpleNamespace(**dict.fromkeys(each.name for each in fields(TileMap)))
    if "broken" in case.options:
        made.broken = torch.tensor([case.options["broken"], 0], dtype=torch.int32)
    if case.pieces:
        made.intervals = SimpleNamespace(starts=torch.zeros(b, h, q_len, case.pieces, dtype=torch.int32))
        made.intervals.ends = made.intervals.starts.clone()
        fill_intervals(made.intervals, keep)
    ranges, counts, offsets, index = [], [], [], []
    for line in states.reshape(-1, columns):
        full, partial = (line == 2).nonzero().flatten().tolist(), (line == 1).nonzero().flatten().tolist()
        kept = sorted(full + partial)
        ranges.append(
            [kept[0], full[0], full[-1] + 1, kept[-1] + 1] if full else [kept[0], kept[0], kept[0], kept[-1] + 1] if kept else [0] * 4
        )
        counts.append([len(full), len(partial)])
        if case.options.get("backwards"):
            partial = [*partial[::-1], -7]  # room that nobody reads
        offsets.append([len(index), len(index) + len(full)])
        index += full + partial
    if case.options.get("bits"):
        add_bits(made, keep, index, offsets, counts, block_q, block_kv)
    if case.form == "range":
        made.ranges = torch.tensor(ranges, dtype=torch.int32).reshape(b, h, rows, 4)
    else:
        made.counts = torch.tensor(counts, dtype=torch.int32).reshape(b, h, rows, 2)
        made.offsets = torch.tensor(offsets, dtype=torch.int32).reshape(b, h, rows, 2)
        made.index = torch.tensor(index, dtype=torch.int32)
    return made


def add_bits(
    made: Any, keep: torch.Tensor, index: list[int], offsets: list[list[int]], counts: list[list[int]], block_q: int, block_kv: int
) -> None:
    """A pattern for each PARTIAL tile, numbered backwards."""
    rows, words = -(-keep.shape[2] // block_q), []
    made.patterns = torch.full((len(index),), -9, dtype=torch.int32)
    for line, ((_, first), (_, count)) in enumerate(zip(offsets, counts, strict=True)):
        lead, m = divmod(line, rows)
        for place in range(first, first + count):
            tile = keep.flatten(0, 1)[lead, m * block_q : (m + 1) * block_q, index[place] * block_kv : (index[place] + 1) * block_kv]
            padded = torch.zeros(block_q, -(-block_kv // 32) * 32, dtype=torch.int64)
            padded[: tile.shape[0], : tile.shape[1]] = tile
            made.patterns[place] = -1 - len(words)
            words.append((padded.unflatten(1, (-1, 32)) << torch.arange(32)).sum(-1))
    made.patterns += len(words)
    made.words = torch.stack(words[::-1]).to(torch.int32)


def fill_intervals(intervals: Any, keep: torch.Tensor) -> None:
    for b, h, q in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        line = torch.nn.functional.pad(keep[b, h, q].int(), (1, 1)).diff()
        starts, ends = (line == 1).nonzero().flatten(), (line == -1).nonzero().flatten()
        intervals.starts[b, h, q, : len(starts)], intervals.ends[b, h, q, : len(ends)] = starts.int(), ends.int()


def check(case: Case, folder: Path) -> None:
    from flexmask.runtime.launch import launch_forward, load, map_arguments

    mask, score = (parse(text, TABLES, SCALARS) if text else None for text in (case.mask, case.score))
    tensors, scalars = captures(case)
    spec = CaptureSpec.of(tensors, SPEC_NAMES[0], scalars, SPEC_NAMES[1])
    plan = plan_forward(
        case.dims[0], case.dims[1], dtype=case.dtype, arch=90, map_form=case.form, pieces=case.pieces,
        bits=case.options.get("bits", False), starts=case.options.get("starts", True), runs=case.options.get("runs", "always"),
        score=score is not None, loads=case.loads,
    )  # fmt: skip
    if case.blocks is not None:
        plan = replace(plan, block_q=case.blocks[0], block_kv=case.blocks[1])
    source = assemble(
        plan, mask=None if mask is None or not plan.evaluated else emit_function("mask", mask, spec, "mask"),
        score=None if score is None else emit_function("score", score, spec, "score"), header=[repr(case)],
    )  # fmt: skip
    path = folder / f"kernel_{abs(hash(source))}.py"
    path.write_text(source)
    module = load(path)
    q, k, v = inputs(case)
    scale = case.options.get("scale", case.dims[0] ** -0.5)
    expected, expected_lse, keep = dense(case, q, k, v, scale, mask, score)
    both = (tensors, scalars)
    if case.options.get("trivial"):
        out, lse = module.attention(q, k, v, *both, *both, scale=scale)
    else:
        tile_map = None if case.form == "none" else make_map(case, keep, plan.block_q, plan.block_kv)
        into = torch.full(expected.shape, 7.0, dtype=q.dtype), torch.full(expected_lse.shape, 7.0), None
        out, lse, _ = launch_forward(
            module, q, k, v, scale, map_arguments(module, tile_map), both, both, into=into if "runs" in case.options else None
        )
        if plan.runs != "always" and case.options["broken"] != (plan.runs == "fail"):
            expected, expected_lse = expected * 0 + 7, expected_lse * 0 + 7  # what its partner wrote stands
    loose = TOLERANCE[case.dtype]
    torch.testing.assert_close(out.double(), expected, equal_nan=True, atol=loose, rtol=loose)
    torch.testing.assert_close(lse.double(), expected_lse, equal_nan=True, atol=loose, rtol=loose)


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            try:
                check(case, Path(folder))
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()[-1500:]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
