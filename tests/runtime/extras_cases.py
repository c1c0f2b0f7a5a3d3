"""Sinks, dropout and greatest scores through a backend against autograd through the reference. Run as a script under TRITON_INTERPRET=1
for the kernels; prints {case: what is wrong} as JSON."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass, replace
from typing import Any

import torch

import flexmask
from flexmask import masks, reference, scores
from flexmask.runtime import backward, forward
from flexmask.runtime.checks import check_inputs
from flexmask.runtime.extras import Extras
from flexmask.runtime.request import Request
from flexmask.runtime.store import default_store

SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """One call: sizes, mods, and what else it brings. `score` is given a float table [Hq, Q] that gets a gradient."""

    mask: Any = None
    score: Any = None
    sinks: bool = False
    dropout_p: float = 0.0
    peaks: bool = False
    seed: int = 1234567890123456789
    sizes: tuple[int, int] = (37, 53)  # queries, keys
    heads: tuple[int, int] = (4, 2)  # query heads, key heads
    batch: tuple[int, int] = (2, 2)  # of queries, of keys
    dims: tuple[int, int] = (16, 16)


def capped(table):
    @flexmask.score
    def capped(score, h, q_idx, kv_idx):
        return 4.0 * torch.tanh((score + table[h, q_idx]) / 4.0) * (1.0 + 0.01 * kv_idx)

    return capped


LATE = masks.causal & flexmask.mask(lambda b, h, q_idx, kv_idx: (q_idx >= 9) & (q_idx != 20))  # some rows keep nothing
ODD = LATE & flexmask.mask(lambda b, h, q_idx, kv_idx: (kv_idx * 7 + q_idx * 3 + h) % 5 < 2)  # no intervals
EVERYTHING: dict[str, Any] = {"sinks": True, "dropout_p": 0.3, "peaks": True}
CASES = {
    "nothing more": Case(LATE),
    "sinks": Case(sinks=True),
    "sinks, rows that keep nothing": Case(LATE, sinks=True, peaks=True),
    "dropout": Case(dropout_p=0.3),
    "dropout of almost everything": Case(masks.causal, dropout_p=0.95, seed=-5),
    "dropout of less than can be counted": Case(masks.causal, dropout_p=1e-9, seed=0),
    "greatest scores": Case(masks.causal, peaks=True),
    "greatest changed scores": Case(LATE, capped, peaks=True),
    "everything": Case(**EVERYTHING),
    "everything, rows that keep nothing": Case(LATE, **EVERYTHING),
    "everything, evaluated": Case(ODD, **EVERYTHING),
    "everything, with a score": Case(LATE, capped, **EVERYTHING),
    "everything, evaluated, with a score": Case(ODD, capped, **EVERYTHING, seed=-(1 << 63)),
    "everything, keys shared by the batch": Case(LATE, **EVERYTHING, batch=(3, 1), heads=(4, 1)),
    "everything, several tiles": Case(masks.sliding_window(70), **EVERYTHING, sizes=(150, 170), batch=(1, 1), heads=(2, 2)),
    "everything, head dims 40 and 24": Case(masks.causal, scores.softcap(3.0), **EVERYTHING, dims=(40, 24)),
    "everything, no keys": Case(**EVERYTHING, sizes=(5, 0)),
}


def inputs(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """[q, k, v, dout, dlse], sinks, table, seed."""
    (b, kv_b), (h, kv_h), (q_len, kv_len), (d, dv) = case.batch, case.heads, case.sizes, case.dims
    g = torch.Generator().manual_seed(0)
    shapes = (b, h, q_len, d), (kv_b, kv_h, kv_len, d), (kv_b, kv_h, kv_len, dv), (b, h, q_len, dv), (b, h, q_len)
    made = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    sinks = torch.linspace(-2, 3, h).to(dtype)
    return made, sinks, torch.randn(h, q_len, generator=g), torch.tensor([case.seed])


def prepared(case: Case, table: torch.Tensor) -> Case:
    return replace(case, score=case.score(table)) if case.score is capped else case


def ours(case: Case, backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    (q, k, v, dout, dlse), sinks, table, seed = inputs(case, dtype)
    case, store = prepared(case, table), default_store()
    extras = Extras(sinks if case.sinks else None, case.dropout_p, seed if case.dropout_p else None, case.peaks)
    traces = [None if mod is None else mod.traced() for mod in (case.mask, case.score)]
    request = Request(*traces, check_inputs(q, k, v, True))
    wanted = [0] if case.score is not None and request.score_tensors else []
    run, run_back = (getattr(module, f"run_{backend}") for module in (forward, backward))
    found = run(store, request, q, k, v, SCALE, extras)
    saved = backward.Saved(q, k, v, found.out, found.lse)
    grads = run_back(store, request, saved, dout, dlse, SCALE, wanted, extras)
    return {**found._asdict(), "dq": grads.dq, "dk": grads.dk, "dv": grads.dv, "sinks": grads.sinks, "table": grads.tables.get(0)}


def expected(case: Case) -> dict[str, torch.Tensor | None]:
    (q, k, v, dout, dlse), sinks, table, seed = inputs(case, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks, table)]
    case = prepared(case, table)
    out, lse, peaks = reference.attention(
        q, k, v, case.mask, case.score, SCALE, enable_gqa=True, return_lse=True, return_max_scores=True,
        sinks=sinks if case.sinks else None, dropout_p=case.dropout_p, seed=seed,
    )  # fmt: skip
    kept = lse.isfinite()
    total = (out * dout).sum() + (lse[kept] * dlse[kept]).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    names = ("dq", "dk", "dv", "sinks", "table")
    return {"out": out.detach(), "lse": lse.detach(), "peaks": peaks, **dict(zip(names, grads, strict=True))}


def problems(case: Case, backend: str, dtype: torch.dtype, tolerance: float) -> list[str]:
    """What is not as the reference has it."""
    found, want, wrong = ours(case, backend, dtype), expected(case), []
    for name, value in found.items():
        needed = {"peaks": case.peaks, "sinks": case.sinks, "table": case.score is capped}.get(name, True)
        if (value is not None) != needed:
            wrong.append(f"{name} is{' not' * needed} there")
        elif value is not None:
            greatest = want[name][want[name].isfinite()].abs().max().clamp(min=1).item() if want[name].isfinite().any() else 1.0
            if not torch.allclose(value.double(), want[name].double(), atol=tolerance * greatest, rtol=tolerance):
                wrong.append(f"{name}: {(value.double() - want[name].double()).abs().nan_to_num(9e9).max().item()} of {greatest}")
    return wrong


def main() -> None:
    results = {}
    for name, case in CASES.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        try:
            results[name] = problems(case, "triton", torch.float32, 1e-5)
        except Exception:
            results[name] = [traceback.format_exc()[-1500:]]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
