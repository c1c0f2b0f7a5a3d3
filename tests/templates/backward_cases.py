"""Generated backward kernels against autograd on dense float64 attention. Run as a script under TRITON_INTERPRET=1; prints {case: error}.

Maps, by rows for dq and by columns for dk and dv, are made from the dense mask, so that the kernels are tested alone.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import kernel_cases
import torch
from kernel_cases import BIAS, CAUSAL, DOCUMENT, SOFTCAP, SPEC_NAMES, THREE, TWO, WINDOW, captures, inputs, make_map

from flexmask.ir import parse
from flexmask.lowering import CaptureSpec, emit_function, emit_gradient
from flexmask.lowering.plan_backward import plan_backward
from flexmask.templates.assemble_backward import assemble_backward
from flexmask.templates.backward_passes import backward

TOLERANCE = {"float32": 2e-5, "float16": 5e-3}
Blocks = tuple[int, int]
TWICE = (2, 2, 1, 37, 53)


@dataclass(frozen=True)
class Case:
    """One backward pass; mask and score as in kernel_cases. `rows` and `columns` are the (form, pieces) of the two maps."""

    mask: str = ""
    score: str = ""
    rows: tuple[str, int] = ("none", 0)
    columns: tuple[str, int] = ("none", 0)
    shape: tuple[int, int, int, int, int] = (1, 2, 1, 37, 53)  # batch, heads, kv heads, q_len, kv_len
    dims: tuple[int, int] = (16, 16)
    dtype: str = "float32"
    blocks: tuple[Blocks, Blocks] = ((16, 32), (32, 32))  # of dq, and of dk and dv
    loads: str = "pointer"
    options: dict[str, Any] = field(default_factory=dict)


RANGE: dict[str, Any] = {"rows": ("range", 1), "columns": ("range", 1)}
ONE: dict[str, Any] = {"rows": ("list", 1), "columns": ("list", 1)}
EVALUATED: dict[str, Any] = {"rows": ("list", 0), "columns": ("list", 0)}

CASES = {
    "full": Case(),
    "one query": Case(shape=(1, 2, 1, 1, 150)),
    "one key": Case(shape=(2, 2, 2, 5, 1)),
    "long and odd": Case(shape=(1, 1, 1, 129, 170), blocks=((32, 64), (64, 32))),
    "no keys": Case(shape=(1, 2, 2, 5, 0)),
    "no queries": Case(shape=(1, 2, 2, 0, 5)),
    "float16": Case(dtype="float16"),
    "head dim 24 and value dim 96": Case(dims=(24, 96)),
    "head dim 5": Case(dims=(5, 5)),
    "eight query heads a key head": Case(shape=(1, 8, 1, 20, 17)),
    "keys shared by the batch": Case(shape=TWICE, options={"kv_batch": 1}),
    "keys shared by the batch and by heads, causal": Case(CAUSAL, **RANGE, shape=(3, 4, 2, 37, 37), options={"kv_batch": 1}),
    "keys shared by the batch, document": Case(DOCUMENT, shape=TWICE, **ONE, options={"kv_batch": 1}),
    "strided": Case(shape=TWICE, options={"strided": True}),
    "last dimension strided": Case(options={"last_strided": True}),
    "scale negative": Case(options={"scale": -0.3}),
    "scale zero": Case(options={"scale": 0.0}),
    "gradient of the log-sum-exp": Case(options={"dlse": True}),
    "gradient of the log-sum-exp of empty rows": Case("kv_idx < q_idx - 20", **ONE, options={"dlse": True}),
    "great scores": Case(CAUSAL, **RANGE, options={"scale": 12.0}),
    "very negative scores": Case("kv_idx <= q_idx + 3", "score - 100.0", **RANGE),
    "tma, padded head dim": Case(loads="tma", dtype="float16", dims=(40, 24)),
    "tma, rows that must be copied": Case(loads="tma", dtype="float16", dims=(20, 12)),
    "tma, strided, keys shared": Case(loads="tma", dtype="float16", shape=TWICE, options={"strided": True, "kv_batch": 1}),
    "tma, causal": Case(CAUSAL, **RANGE, loads="tma", dtype="float16"),
    "tma, document, evaluated": Case(DOCUMENT, **EVALUATED, loads="tma", dtype="float16"),
    "causal, by the stops alone, gradient of a sum": Case(CAUSAL, **RANGE, options={"starts": False, "dout": "expanded"}),
    "causal, more queries than keys": Case(CAUSAL, **RANGE, shape=(1, 2, 2, 61, 33)),
    "causal, uneven tiles": Case(CAUSAL, **RANGE, blocks=((32, 16), (16, 32))),
    "causal, wide tiles": Case(CAUSAL, **RANGE, blocks=((16, 64), (64, 16)), shape=(1, 1, 1, 100, 100)),
    "causal, evaluated": Case(CAUSAL, **EVALUATED),
    "causal, one pass by intervals, the other evaluated": Case(CAUSAL, rows=("range", 1), columns=("list", 0)),
    "causal, one pass evaluated, the other by intervals": Case(CAUSAL, rows=("list", 0), columns=("range", 1)),
    "lists stored backwards, with room between": Case(WINDOW, **EVALUATED, options={"backwards": True}),
    "two kernels, where the intervals hold": Case(WINDOW, **ONE, options={"broken": 0}),
    "a kernel before computed all": Case(WINDOW, **RANGE, options={"spared": 0}),
    "a kernel before that computed all was not the first": Case(WINDOW, **RANGE, options={"spared": 2}),
    "no kernel before computed anything": Case(WINDOW, **RANGE, options={"spared": 1}),
    "two kernels, where they fail": Case(WINDOW, **ONE, options={"broken": 1}),
    "rows that keep nothing": Case("kv_idx < q_idx - 20", **RANGE),
    "nothing kept at all": Case("(kv_idx < 0) & (q_idx < 0)", **EVALUATED),
    "everything kept, evaluated": Case("(kv_idx < 1000) & (q_idx < 1000)", **EVALUATED),
    "short full tile joins evaluated ones": Case("((40 < kv_idx) | (kv_idx % 2 == 0)) & ((30 < q_idx) | (q_idx % 3 != 0))", **EVALUATED),
    "two intervals": Case(TWO, rows=("list", 2), columns=("list", 1), shape=(1, 2, 1, 70, 70)),
    "three intervals": Case(THREE, rows=("list", 3), columns=("list", 1)),
    "three intervals a key": Case("(q_idx % 15 < 6) & (kv_idx < 46) & (q_idx < 45)", rows=("list", 1), columns=("list", 3)),
    "document, intervals by batch": Case(DOCUMENT, shape=TWICE, **ONE),
    "by head": Case("kv_idx <= q_idx + 5 * h - 10", **RANGE, shape=(1, 4, 2, 37, 53)),
    "by head, evaluated": Case("kv_idx <= q_idx + 5 * h - 10", **EVALUATED, shape=(1, 4, 2, 37, 53)),
    "bool table": Case("t0[q_idx, kv_idx]", **EVALUATED),
    "softcap": Case(score=SOFTCAP),
    "bias": Case(score=BIAS),
    "bias and causal": Case(CAUSAL, BIAS, **RANGE),
    "softcap and document": Case(DOCUMENT, SOFTCAP, shape=TWICE, **EVALUATED),
    "slope": Case(CAUSAL, "score + s1 * (kv_idx - q_idx) * (h + 1)", **RANGE),
    "score that masks": Case(score="where(kv_idx < q_idx - 10, score, -inf)"),
    "a slope without end where nothing is kept": Case(
        "(0 < kv_idx) & (kv_idx <= q_idx + 1)", "score / kv_idx", **ONE, options={"meant": "score / max(kv_idx, 1)"}
    ),
    "table gradient": Case(score=BIAS, options={"scatter": True}),
    "table gradient, causal": Case(CAUSAL, BIAS, **RANGE, options={"scatter": True}),
    "table gradient, document, heads and keys shared": Case(
        DOCUMENT, BIAS, **EVALUATED, shape=(2, 4, 2, 37, 53), options={"scatter": True, "kv_batch": 1}
    ),
}


def gradients(case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """(q, k, v, dout, out, lse, dlse); what is expected of dq, dk, dv and the bias; the dense mask."""
    tensors = captures(case)[0]
    texts = (case.mask, case.options.get("meant", case.score))
    mask, score = (parse(text, kernel_cases.TABLES, kernel_cases.SCALARS) if text else None for text in texts)
    q, k, v = inputs(case)
    g = torch.Generator().manual_seed(5)
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=g).to(q.dtype)
    if case.options.get("dout") == "expanded":
        dout = torch.ones((), dtype=q.dtype).expand(dout.shape)
    leaves = [x.double().requires_grad_() for x in (q, k, v, tensors[2])]
    scale = case.options.get("scale", case.dims[0] ** -0.5)
    with dense_tables([*tensors[:2], leaves[3]]):
        out, lse, keep = kernel_cases.dense(case, *leaves[:3], scale, mask, score)
    dlse = torch.randn(lse.shape, generator=g)
    heights = lse.masked_fill(lse.isinf(), 0.0) if case.options.get("dlse") else lse * 0
    heights = torch.where(lse.isinf(), 0.0, heights)
    total = (out * dout.double()).sum() + (heights * dlse.double()).sum()
    expected = [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, grads_of(total, leaves), strict=True)]
    return [q, k, v, dout, out.detach().to(q.dtype), lse.detach().float(), dlse], expected, keep


def grads_of(total: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    return torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None,) * len(leaves)


class dense_tables:
    """kernel_cases.dense with these tables for its own."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors = tensors

    def __enter__(self) -> None:
        self.before = kernel_cases.captures
        kernel_cases.captures = lambda case: (self.tensors, self.before(case)[1])

    def __exit__(self, *_: object) -> None:
        kernel_cases.captures = self.before


def make_module(case: Case, part: str, folder: Path) -> Any:
    from flexmask.runtime.launch import load

    tensors, scalars = captures(case)
    spec = CaptureSpec.of(tensors, SPEC_NAMES[0], scalars, SPEC_NAMES[1])
    mask, score = (parse(text, kernel_cases.TABLES, kernel_cases.SCALARS) if text else None for text in (case.mask, case.score))
    form, pieces = case.rows if part == "dq" else case.columns
    plan = plan_backward(
        part, *case.dims, dtype=case.dtype, map_form=form, pieces=pieces, starts=part == "dkdv" or case.options.get("starts", True),
        runs=case.options.get("runs", "always"), score=score is not None, loads=case.loads,
        scatter="float" if part == "dq" and case.options.get("scatter") else "",
    )  # fmt: skip
    block_q, block_kv = case.blocks[part == "dkdv"]
    plan = replace(plan, block_q=block_q, block_kv=block_kv)
    source = assemble_backward(
        plan, mask=emit_function("mask", mask, spec, "mask") if plan.evaluated else None,
        score=None if score is None else emit_function("score", score, spec, "score"),
        gradient=None if score is None else emit_gradient(score, spec), header=[repr(case)],
    )  # fmt: skip
    path = folder / f"kernel_{abs(hash(source))}.py"
    path.write_text(source)
    return load(path)


def map_of(case: Case, part: str, keep: torch.Tensor) -> dict[str, Any]:
    """The map that a part walks, as keywords of its host function; a map by columns is one by rows of the mask turned round."""
    form, pieces = case.rows if part == "dq" else case.columns
    if form == "none":
        return {}
    block_q, block_kv = case.blocks[part == "dkdv"]
    like = kernel_cases.Case(form=form, pieces=pieces, options=case.options)
    made = make_map(like, keep, block_q, block_kv) if part == "dq" else make_map(like, keep.mT.contiguous(), block_kv, block_q)
    given = {name: getattr(made, name) for name in ("ranges", "counts", "offsets", "index", "broken")}
    if pieces:
        given |= {"starts": made.intervals.starts, "stops": made.intervals.ends}
    return given


def passes(case: Case, part: str, keep: torch.Tensor, folder: Path) -> list[Any]:
    """The kernels of a part with their maps; with a flag two of them, of which one must not believe its intervals."""
    if "broken" not in case.options:
        return [(make_module(case, part, folder), map_of(case, part, keep))]
    holding = replace(case, options=case.options | {"runs": "hold"})
    failing = replace(case, **EVALUATED, options=case.options | {"runs": "fail"})
    made = [(make_module(each, part, folder), map_of(each, part, keep)) for each in (holding, failing)]
    if case.options["broken"]:
        made[0][1]["stops"].zero_()
    return made


class Fused:
    """Stands in for a kernel of all three gradients, which finds sevens."""

    def __init__(self, module: Any):
        self.row_terms, self.pack = module.row_terms, module.pack

    def backward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full_like(x, 7.0) for x in (q, k, v))


def check(case: Case, folder: Path) -> None:
    (q, k, v, dout, out, lse, dlse), expected, keep = gradients(case)
    scale, scatter = case.options.get("scale", case.dims[0] ** -0.5), case.options.get("scatter", False)
    table, rows, fused = torch.zeros(case.shape[1], *case.shape[3:]), passes(case, "dq", keep, folder), []
    if "spared" in case.options:
        fused = [(Fused(rows[0][0]), {"broken": torch.tensor([case.options["spared"]], dtype=torch.int32)})]
        expected[0] = expected[0] if case.options["spared"] == 1 else torch.full_like(expected[0], 7.0)
    found = backward(
        rows, passes(case, "dkdv", keep, folder), q, k, v, out, lse, dout, dlse if case.options.get("dlse") else None, scale=scale,
        mask=captures(case), score=captures(case), grads=[table] * scatter, fused=fused,
    )  # fmt: skip
    for name, result, wanted in zip(("dq", "dk", "dv", "table"), [*found[:3], table][: 3 + scatter], expected, strict=False):
        assert name == "table" or result.dtype == q.dtype
        assert math.isfinite(result.double().sum()), f"{name} is not finite"
        loose = TOLERANCE[case.dtype] * max(1.0, wanted.abs().max().item() if wanted.numel() else 1.0)
        torch.testing.assert_close(result.double(), wanted, atol=loose, rtol=loose, msg=lambda text, name=name: f"{name}: {text}")


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if len(sys.argv) > 1 and name not in sys.argv[1:]:
                continue
            try:
                check(case, Path(folder))
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()[-1500:]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
