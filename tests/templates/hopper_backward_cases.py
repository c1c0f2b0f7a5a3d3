"""Hopper backward kernels against autograd of dense attention: `python tests/templates/hopper_backward_cases.py [case ...]` on a Hopper
GPU, or through hopper_backward_on_cpu.py anywhere. Prints {case: what is wrong} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmask.ir import Env, evaluate, parse, simplify
from flexmask.lowering import CaptureSpec, TensorSpec, emit_column
from flexmask.lowering.plan_hopper_backward import HopperBackwardPlan, plan_hopper_backward
from flexmask.templates.assemble_hopper_backward import assemble_hopper_backward


@dataclass(frozen=True)
class Score:
    """A score mod as text that `parse` reads; for each of its tables the indices that it is read by, of "bhqk", or "kinds": three kinds of
    tokens, or "special": some of them; and what is meant, where the text has no value at pairs that are not kept."""

    text: str
    tables: tuple[str, ...] = ()
    meant: str = ""


@dataclass(frozen=True)
class Case:
    """What a kernel is run on. `keeps` says which keys queries keep: (b, h, q, k) -> bool, broadcast."""

    plan: dict[str, Any]
    keeps: Callable[..., Tensor] | None = None
    sizes: tuple[int, ...] = (1, 2, 1, 200, 220)  # batch, heads, key heads, queries, keys
    entries: int = 0  # batch entries of keys and values, if not as many as of queries
    # "order": block columns are begun in another order; "apart": heads are taken one at a
    # time; "transposed": tensors are [B, N, H, D] in memory; "low": all scores are low
    given: tuple[str, ...] = ()
    score: Score | None = None
    stages: int = 2  # three are what autotune may take


def causal(b, h, q, k):
    return k <= q


def window(b, h, q, k):
    return (k <= q) & (k > q - 150)


def two(b, h, q, k):
    """Documents that all see a prefix; rows 100 to 199 keep nothing, nor do keys 256 to 399, a whole block column."""
    kept = (k <= q) & ((q // 170 == k // 170) | (k < 40 + 10 * h))
    return kept & ((q < 100) | (q >= 200)) & ((k < 256) | (k >= 400))


def gapped(b, h, q, k):
    """Queries of each key in three stretches."""
    return (k <= q) & ((q < k + 30) | ((q >= k + 100) & (q < k + 120)) | (q >= 400))


def own(b, h, q, k):
    """Each batch entry and head another mask; one of them keeps nothing."""
    return window(b, h, q, k) & (k >= 60 * (3 - h - b)) & ((h != 1) | (b != 0))


def reach(b, h, q, k):
    """Each query keeps a stretch of keys, of a length that jumps about."""
    return (k <= q) & (k > q - 20 - (q * 79) % 200 - 30 * h)


def upto(b, h, q, k):
    return k < (q * 79) % 290


def scattered(b, h, q, k):
    """Pairs at random, but for tiles that are kept whole, and keys 128 to 255, which keep nothing."""
    mixed = ((q * 40503 + k * 30011 + h * 977) ^ (q * k)) % 1009
    return ((mixed % 3 == 0) | ((q // 128 + k // 128) % 3 == 2)) & ((k < 128) | (k >= 256))


def scattered_own(b, h, q, k):
    """Another one for each batch entry and head, of which some keep nothing at all."""
    return scattered(b, h + 7 * b, q, k + 256 * (h + b)) & ((h + b) % 3 > 0)


def early(b, h, q, k):
    """The second head has no use for the last block column."""
    return (k < 300 - 44 * h) & (k <= q + 290)


SLOPES = Score("score + t0[h] * (kv_idx - q_idx)", ("h",))
BY_BATCH = Score("score - t0[b, h] * abs(kv_idx - q_idx)", ("bh",))
BIAS = Score("score + t0[b, h, kv_idx]", ("bhk",))
CAP = Score("2.0 * tanh(score / 2.0)")
LIST: dict[str, Any] = {"map_form": "list"}
RANGE: dict[str, Any] = {"map_form": "range", "pieces": 1}
CROSSED: dict[str, Any] = {**LIST, "crossed": True}
BITS: dict[str, Any] = {**LIST, "bits": True}
ORDERED: dict[str, Any] = {"deterministic": True}
CASES: dict[str, Case] = {
    "full": Case({"head_dim": 128}),
    "full, narrow": Case({"head_dim": 64}, sizes=(1, 2, 2, 256, 200)),
    "full, one query": Case({"head_dim": 128}, sizes=(1, 2, 1, 1, 129)),
    "full, transposed": Case({"head_dim": 128}, given=("transposed",)),
    "full, low scores": Case({"head_dim": 128}, given=("low",)),
    "causal": Case({"head_dim": 128, **RANGE}, causal),
    "causal, three stages": Case({"head_dim": 128, **RANGE}, causal, given=("order",), stages=3),
    "crossed, three stages": Case({"head_dim": 128, **CROSSED}, reach, (1, 2, 1, 300, 290), stages=3),
    "heads apart": Case({"head_dim": 128, **RANGE}, causal, (2, 4, 2, 300, 500), given=("order", "apart")),
    "heads apart, narrow": Case({"head_dim": 64, **LIST, "pieces": 2}, two, (2, 3, 3, 300, 500), given=("order", "apart")),
    "causal, narrow": Case({"head_dim": 64, **RANGE}, causal, sizes=(1, 4, 1, 300, 300), given=("order",)),
    "causal, float16": Case({"head_dim": 128, "dtype": "float16", **RANGE}, causal, given=("order",)),
    "causal, one batch entry of keys": Case({"head_dim": 64, **RANGE}, causal, (3, 2, 2, 150, 150), entries=1),
    "from the first query": Case({"head_dim": 128, **RANGE, "starts": False}, lambda b, h, q, k: q < 200 - k),
    "window, list": Case({"head_dim": 64, **LIST, "pieces": 1}, window),
    "two": Case({"head_dim": 128, **LIST, "pieces": 2}, two, (1, 2, 1, 500, 500)),
    "two, narrow": Case({"head_dim": 64, **LIST, "pieces": 2}, two, (1, 2, 1, 500, 500)),
    "three": Case({"head_dim": 64, **LIST, "pieces": 3}, gapped, (1, 1, 1, 500, 450)),
    "a mask for each head": Case({"head_dim": 128, **LIST, "pieces": 1}, own, (2, 2, 1, 250, 250)),
    "a mask for each head, alone": Case({"head_dim": 64, **LIST, "pieces": 1}, own, (1, 2, 2, 200, 220)),
    "other head dims": Case({"head_dim": 72, "v_head_dim": 104, **LIST, "pieces": 1}, window, (1, 2, 1, 200, 200)),
    "small head dim": Case({"head_dim": 40, **RANGE}, causal, (1, 2, 1, 200, 200)),
    "crossed": Case({"head_dim": 128, **CROSSED}, reach, (1, 2, 1, 300, 290)),
    "crossed, narrow": Case({"head_dim": 64, **CROSSED}, reach, (1, 2, 1, 300, 290)),
    "crossed, from the first key": Case({"head_dim": 64, **CROSSED, "starts": False}, upto, (1, 1, 1, 300, 300)),
    "bits": Case({"head_dim": 128, **BITS}, scattered, (1, 2, 1, 300, 420)),
    "bits, narrow": Case({"head_dim": 64, **BITS}, scattered, (1, 2, 1, 300, 420)),
    "bits, a mask for each head": Case({"head_dim": 128, **BITS}, scattered_own, (2, 4, 2, 150, 140), given=("order",)),
    "bits, a mask for each head, narrow": Case({"head_dim": 64, **BITS}, scattered_own, (2, 2, 2, 150, 140)),
    "bits, one batch entry of keys": Case({"head_dim": 64, **BITS}, scattered_own, (2, 2, 1, 100, 260), entries=1),
    "bits, one query": Case({"head_dim": 128, **BITS}, scattered, (1, 2, 1, 1, 300)),
    "bits, low scores": Case({"head_dim": 128, **BITS}, lambda b, h, q, k: k > q - 64, (1, 1, 1, 128, 200), given=("low",)),
    "deterministic": Case({"head_dim": 128, **LIST, "pieces": 2, **ORDERED}, two, (1, 2, 1, 500, 500)),
    "deterministic, full": Case({"head_dim": 64, **ORDERED}, sizes=(1, 2, 2, 256, 300)),
    "deterministic, causal": Case({"head_dim": 128, **RANGE, **ORDERED}, causal, (1, 4, 2, 300, 300)),
    "deterministic, one batch entry of keys": Case({"head_dim": 64, **RANGE, **ORDERED}, causal, (3, 2, 2, 150, 150), entries=1),
    "deterministic, a mask for each head": Case({"head_dim": 128, **BITS, **ORDERED}, early, (2, 2, 2, 150, 300)),
    "deterministic, bits": Case({"head_dim": 64, **BITS, **ORDERED}, scattered_own, (2, 4, 2, 300, 300)),
    "deterministic, soft-cap": Case({"head_dim": 128, **RANGE, **ORDERED}, causal, score=CAP),
    "bits hold": Case({"head_dim": 64, **BITS, "runs": "hold"}, scattered),
    "holds": Case({"head_dim": 64, **RANGE, "runs": "hold"}, causal),
    "fails": Case({"head_dim": 64, **RANGE, "runs": "fail"}, causal),
    "slopes": Case({"head_dim": 128, **RANGE}, causal, (1, 4, 2, 200, 220), score=SLOPES),
    "slopes, narrow": Case({"head_dim": 64}, sizes=(2, 2, 1, 129, 260), score=SLOPES),
    "slopes, one batch entry of keys": Case({"head_dim": 64, **RANGE}, causal, (2, 4, 2, 140, 140), 1, score=BY_BATCH),
    "slopes, low scores": Case({"head_dim": 128}, given=("low",), score=SLOPES),
    "bias by key": Case({"head_dim": 128, **LIST, "pieces": 2}, two, (1, 2, 1, 500, 500), score=BIAS),
    "bias by key, narrow": Case({"head_dim": 64, **LIST, "pieces": 1, "runs": "hold"}, own, (2, 2, 1, 250, 200), score=BIAS),
    "soft-cap": Case({"head_dim": 128, **RANGE}, causal, given=("order",), score=CAP),
    "soft-cap, bits": Case({"head_dim": 128, **BITS}, scattered, (1, 2, 1, 300, 420), score=CAP),
    "soft-cap, bits, narrow": Case({"head_dim": 64, **BITS}, scattered_own, (2, 4, 2, 150, 140), score=CAP),
    "soft-cap, crossed": Case({"head_dim": 64, **CROSSED, "dtype": "float16"}, reach, (1, 2, 1, 300, 290), score=CAP),
    "soft-cap, crossed, from the first key": Case({"head_dim": 128, **CROSSED, "starts": False}, upto, (1, 1, 1, 200, 300), score=CAP),
    "head gate": Case({"head_dim": 64, **LIST, "pieces": 3}, gapped, (1, 2, 1, 500, 450), score=Score("score * t0[h]", ("h",))),
    "gates of queries": Case({"head_dim": 128, **BITS}, scattered, (1, 2, 1, 200, 140), score=Score("score * t0[h, q_idx]", ("hq",))),
    "more for later queries": Case(
        {"head_dim": 64, **RANGE},
        causal,
        score=Score("score * max(log(float32(q_idx + 1)) * 0.3, 1.0) + t0[q_idx] * t1[kv_idx]", ("q", "k")),
    ),
    "kinds of tokens": Case(
        {"head_dim": 72, "v_head_dim": 104, **CROSSED},
        reach,
        score=Score("where((t0[q_idx] == t0[kv_idx]) | t1[q_idx], score, 0.5 * score)", ("kinds", "special")),
    ),
    "a score that masks": Case({"head_dim": 128}, score=Score("where(kv_idx < q_idx - 10, score, -inf)")),
    "a score without products": Case({"head_dim": 64}, sizes=(1, 2, 1, 100, 100), score=Score("t0[h, kv_idx]", ("hk",))),
    "a slope without end where nothing is kept": Case(
        {"head_dim": 128, **RANGE}, lambda b, h, q, k: (k > 0) & (k <= q + 1), score=Score("score / kv_idx", meant="score / max(kv_idx, 1)")
    ),
    "a slope without end where no bits are": Case(
        {"head_dim": 64, **BITS}, lambda b, h, q, k: (k > 0) & (q % 3 < 2), score=Score("score / kv_idx", meant="score / max(kv_idx, 1)")
    ),
    "no number after the last query": Case({"head_dim": 128}, score=Score("score / (200 - q_idx)")),
    "no number after the last query, bits": Case(
        {"head_dim": 64, **BITS}, lambda b, h, q, k: k < q + 300, score=Score("score / (200 - q_idx)")
    ),
    "no number after the last query, narrow": Case(
        {"head_dim": 64, **LIST, "pieces": 1}, lambda b, h, q, k: k < q + 300, score=Score("score / (200 - q_idx)")
    ),
}


def intervals(kept: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
    """int32 [.., n, pieces] twice: the stretches of True of bool [.., n, m]; missing ones (0, 0)."""
    edge = kept.new_zeros(*kept.shape[:-1], 1)
    change = torch.cat([kept, edge], -1).int() - torch.cat([edge, kept], -1).int()
    found = []
    for sign in (1, -1):
        number = (change == sign).int().cumsum(-1)
        assert int(number.max()) <= pieces, "the mask has more intervals than the plan"
        at = (change == sign).nonzero()
        bound = torch.zeros(*kept.shape[:-1], pieces, dtype=torch.int32, device=kept.device)
        bound[(*at[:, :-1].T, number[tuple(at.T)].long() - 1)] = at[:, -1].int()
        found.append(bound)
    return found[0], found[1]


def tiles(keep: Tensor, block_q: int, block_kv: int) -> tuple[Tensor, Tensor]:
    """(FULL, kept) tiles, bool [B, H, block columns, block rows], of a mask bool [B, H, Q, KV]; places beyond the ends count as kept."""
    edges = (0, -keep.shape[3] % block_kv, 0, -keep.shape[2] % block_q)
    full = torch.nn.functional.pad(keep, edges, value=True).unflatten(3, (-1, block_kv)).unflatten(2, (-1, block_q))
    some = torch.nn.functional.pad(keep, edges, value=False).unflatten(3, (-1, block_kv)).unflatten(2, (-1, block_q))
    return full.all(5).all(3).mT, some.any(5).any(3).mT


def listed(full: Tensor, some: Tensor) -> dict[str, Tensor]:
    """The list form of a map, with PARTIAL tiles in falling order before the FULL ones."""
    index, counts, offsets = [], [], []
    for whole, kept in zip(full.flatten(0, 2), some.flatten(0, 2), strict=True):
        partial, inside = (kept & ~whole).nonzero().flatten().flip(0).tolist(), (kept & whole).nonzero().flatten().tolist()
        offsets.append((len(index) + len(partial), len(index)))
        counts.append((len(inside), len(partial)))
        index += partial + inside
    shape = (*full.shape[:3], 2)
    numbers = {"counts": torch.tensor(counts).view(shape), "offsets": torch.tensor(offsets).view(shape), "index": torch.tensor(index)}
    return {name: x.to(torch.int32).to(full.device) for name, x in numbers.items()}


def patterns_of(plan: HopperBackwardPlan, keep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bits of the PARTIAL tiles in lists, numbered backwards; FULL ones have numbers that mean nothing."""
    block_q, block_kv, words = plan.block_q, plan.block_kv, []
    edges = (0, -keep.shape[3] % block_kv, 0, -keep.shape[2] % block_q)
    cut = torch.nn.functional.pad(keep, edges, value=False).unflatten(3, (-1, block_kv)).unflatten(2, (-1, block_q)).cpu()
    numbers = torch.full(given["index"].shape, 12345, dtype=torch.int32)
    for b, h, n in torch.cartesian_prod(*(torch.arange(x) for x in given["counts"].shape[:3])).view(-1, 3).tolist():
        begin = int(given["offsets"][b, h, n, 1])
        for at in range(begin, begin + int(given["counts"][b, h, n, 1])):
            numbers[at] = -len(words)
            by_key = cut[b, h, int(given["index"][at]), :, n].mT.unflatten(1, (-1, 32))
            words.append((by_key.long() << torch.arange(32)).sum(-1).to(torch.int32))
    listed_ones = numbers <= 0
    numbers[listed_ones] += len(words) - 1
    words = torch.stack(words[::-1]) if words else torch.zeros(1, block_kv, block_q // 32, dtype=torch.int32)
    return {"patterns": numbers.to(keep.device), "words": words.to(keep.device)}


def ranged(full: Tensor, some: Tensor) -> dict[str, Tensor]:
    """The range form of a map whose kept and FULL tiles are runs."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        first = x.int().argmax(-1)
        return first, first + x.sum(-1)

    (first, last), (first_full, last_full) = run(some), run(full & some)
    return {"ranges": torch.stack([first, first_full, last_full, last], -1).to(torch.int32)}


def column_map(plan: HopperBackwardPlan, keep: Tensor | None) -> dict[str, Tensor]:
    """What `backward` takes of a mask bool [B or 1, H or 1, Q, KV]."""
    if keep is None:
        return {}
    found = tiles(keep, plan.block_q, plan.block_kv)
    given = listed(*found) if plan.map_form == "list" else ranged(*found)
    if plan.bits:
        return {**given, **patterns_of(plan, keep, given)}
    names = ("row_starts", "row_stops") if plan.crossed else ("starts", "stops")
    bounds = intervals(keep if plan.crossed else keep.mT, max(plan.pieces, 1))
    return {**given, **dict(zip(names, bounds, strict=True))}


def ranks(plan: HopperBackwardPlan, keep: Tensor) -> Tensor:
    """The block columns that keep each block row, as bits by their places; beside each word how many are in those before."""
    kept = tiles(keep, plan.block_q, plan.block_kv)[1].mT
    kept = kept.flip(3) if plan.map_form == "list" else kept
    kept = torch.nn.functional.pad(kept, (0, -kept.shape[3] % 32)).unflatten(3, (-1, 32)).long()
    counts, marks = kept.sum(-1), (kept << torch.arange(32, device=keep.device)).sum(-1)
    return torch.stack([marks, counts.cumsum(-1) - counts], -1).to(torch.int32)


def dense(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, keep: Tensor | None, scale: float, score: Score | None, tables: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """(out, lse, gradients of q, k and v) of dense attention in float32."""
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).expand(q.shape[0], -1, -1, -1) for x in leaves[1:])
    scores = leaves[0] @ keys.mT * scale
    if score is not None:
        places = {name: torch.arange(n, device=q.device).view(-1, *(1,) * i) for name, n, i in
                  zip(("b", "h", "q_idx", "kv_idx"), scores.shape, (3, 2, 1, 0), strict=True)}  # fmt: skip
        changed = evaluate(expression(score, score.meant), Env({**places, "score": scores}, tables))
        scores = changed.expand(scores.shape)
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    lse = scores.logsumexp(-1)
    out = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ values
    return out.detach().to(q.dtype), lse.detach(), torch.autograd.grad(out, leaves, dout.float(), materialize_grads=True)


def tensors(case: Case, plan: HopperBackwardPlan, device: str) -> list[Tensor]:
    """q, k, v and dout."""
    batch, heads, kv_heads, q_len, kv_len = case.sizes
    entries, made = case.entries or batch, []
    for b, h, n, dim in ((batch, heads, q_len, plan.head_dim), (entries, kv_heads, kv_len, plan.head_dim),
                         (entries, kv_heads, kv_len, plan.v_head_dim), (batch, heads, q_len, plan.v_head_dim)):  # fmt: skip
        x = torch.randn(b, n, h, dim, device=device).to(getattr(torch, plan.dtype)).transpose(1, 2)
        made.append(x if "transposed" in case.given else x.contiguous())
    if "low" in case.given:  # so low that exp2(0 - lse) is infinite
        made[0][..., 0], made[1][..., 0] = 36.0, -36.0
    return made


def expression(score: Score, text: str = "") -> Any:
    return simplify(parse(text or score.text, [{"kinds": "int", "special": "bool"}.get(indices, "float") for indices in score.tables]))


def tables_of(case: Case, device: str) -> list[Tensor]:
    """The tables of the score mod."""
    batch, heads, _, q_len, kv_len = case.sizes
    sizes, made = {"b": batch, "h": heads, "q": q_len, "k": kv_len}, []
    for indices in case.score.tables if case.score else ():
        if indices == "kinds":
            made.append(torch.randint(3, (max(q_len, kv_len),), device=device))
        elif indices == "special":
            made.append(torch.rand(max(q_len, kv_len), device=device) < 0.2)
        else:  # gates above 0, and slopes that leave distant keys some probability
            made.append(torch.rand([sizes[i] for i in indices], device=device) * (0.02 if indices in ("h", "bh") else 1.0) + 0.01)
    return made


ALL_HEADS = "RESIDENT_BYTES = 24 * 1024 * 1024\n"


def source_of(case: Case) -> str:
    """The file of a case's kernel."""
    plan = plan_of(case)
    if case.score is None:
        source = assemble_hopper_backward(plan)
        assert ALL_HEADS in source
        return source.replace(ALL_HEADS, "RESIDENT_BYTES = 1\n") if "apart" in case.given else source
    dtypes = {"kinds": (1, "int64"), "special": (1, "bool")}
    spec = CaptureSpec(tuple(TensorSpec(name, *dtypes.get(name, (len(name), "float32"))) for name in case.score.tables))
    return assemble_hopper_backward(plan, emit_column("score", expression(case.score), spec), [f"score {case.score.text}"])


def plan_of(case: Case) -> HopperBackwardPlan:
    plan = plan_hopper_backward(**case.plan, score=case.score is not None)
    assert isinstance(plan, HopperBackwardPlan), plan
    return replace(plan, stages=case.stages)


def mask_of(case: Case, device: str) -> Tensor | None:
    """bool [B or 1, H or 1, Q, KV]."""
    if case.keeps is None:
        return None
    batch, heads, _, q_len, kv_len = case.sizes
    b, h, q, k = (torch.arange(n, device=device) for n in (batch, heads, q_len, kv_len))
    keep = case.keeps(b[:, None, None, None], h[:, None, None], q[:, None], k)
    return keep.view(*(1,) * (4 - keep.dim()), *keep.shape)


def load_module(case: Case) -> Any:
    from flexmask.runtime.launch import load

    path = Path(tempfile.mkdtemp()) / "kernel.py"
    path.write_text(source_of(case))
    return load(path)


def run(case: Case, device: str = "cuda", loaded: Callable[[Case], Any] = load_module) -> str:
    """What is wrong with the gradients of a case's kernel, `loaded` as a module; "" if nothing."""
    torch.manual_seed(0)
    plan = plan_of(case)
    module, (q, k, v, dout), keep = loaded(case), tensors(case, plan, device), mask_of(case, device)
    scale, given, tables = plan.head_dim**-0.5, column_map(plan, keep), tables_of(case, device)
    if "order" in case.given:
        columns = -(-k.shape[2] // plan.block_kv)
        given["order"] = torch.tensor([*reversed(range(columns)), *[2] * 9, *[1] * 9], dtype=torch.int32, device=device)  # two are long
    out, lse, wanted = dense(q, k, v, dout, keep, scale, case.score, tables)
    if plan.deterministic and keep is not None:
        given["ranks"] = ranks(plan, keep)
    if plan.runs != "always":
        given["broken"] = torch.full((1,), int(plan.runs == "fail"), dtype=torch.int32, device=device)
    terms, given["score_captures"] = module.row_terms(out, lse, dout), module.pack(tables, [])
    found = module.backward(q, k, v, dout, terms, scale, **given)
    wrong = compare(found, wanted)
    if plan.runs != "always" and not wrong:
        given["broken"] = 1 - given["broken"]
        filled = tuple(torch.full_like(x, 7.0) for x in found)
        after = module.backward(q, k, v, dout, terms, scale, into=filled, **given)
        wrong = "" if all(bool((x == 7.0).all()) for x in after) else "its partner's gradients are overwritten"
    return wrong


def compare(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    """Which gradients are further off than rounding explains."""
    for name, x, y in zip(("dq", "dk", "dv"), found, wanted, strict=True):
        off = float((x.float() - y).norm() / y.norm().clamp(min=1e-6))
        if not off < 1.5e-2:
            return f"{name} is off by {off:.2g}"
    return ""


def main() -> None:
    json.dump({name: run(CASES[name]) for name in sys.argv[1:] or CASES}, sys.stdout)


if __name__ == "__main__":
    main()
