"""Emitted gradient functions against torch's autograd of `ir.evaluate`. Run as a script under TRITON_INTERPRET=1; prints {case: error}.

Tiles cover lengths that are no multiples of them; some pairs count for nothing, and there ds is NaN.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import zoo

from flexmask.ir import FLOAT, Env, Expr, evaluate, make, parse, simplify, substitute, walk
from flexmask.lowering import CaptureSpec, emit_function, emit_gradient, gradient_tables, most_additions
from flexmask.templates.assemble import _helpers

PROBE = """
ROWS, COLUMNS = tl.constexpr({rows}), tl.constexpr({columns})


@triton.jit
def probe(slopes, scores, gradients, keeps, grads, tables, numbers, b, h, q_len, kv_len):
    q_idx = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    kv_idx = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = q_idx * kv_len + kv_idx
    inside = (q_idx < q_len) & (kv_idx < kv_len)
    valid = tl.load(keeps + at, mask=inside, other=0) != 0
    score = tl.load(scores + at, mask=inside, other=0.0)
    ds = tl.load(gradients + at, mask=inside, other=float("nan"))
    row = score_row(tables, numbers, b, h, q_idx)
    slope = score_slope(tables, numbers, row, score, b, h, q_idx, kv_idx)
    tl.store(slopes + at, tl.broadcast_to(slope, (ROWS, COLUMNS)), mask=inside)
    score_scatter(grads, tables, numbers, row, score, b, h, q_idx, kv_idx, ds, valid)
"""
# those whose sums are also made in fixed point, in two launches
FIXED = [
    "score * t1[()] + t1[()]",
    "score + t3[b, h, q_idx, kv_idx // 8] * t3[1 - b, h, 3, kv_idx]",
    "score + t5[max(q_idx - kv_idx, -3)] * score + t5[kv_idx - q_idx]",
    "score + t5[min(max(q_idx - kv_idx, -2), 1) + 5] * score",
    "score + t0[t6[kv_idx]] + t7[t6[q_idx] % 4, h]",
    "score + t0[int64(abs(score) * 3.0)] * score",
]
TILES = [(16, 32), (16, 16), (64, 16)]
BATCH, HEADS, Q_LEN, KV_LEN = 2, 2, 19, 37

SCORES = [
    "score",
    "0.0",
    "int64(score)",
    "s0 * tanh(score / s0)",
    "s0",
    "t0[h]",
    "score + t0[kv_idx] - t0[q_idx]",
    "score * t0[q_idx] * t0[kv_idx]",
    "score + t0[0] * score + t0[-1] + t0[h]",
    "score * t1[()] + t1[()]",
    "score + t2[q_idx, kv_idx]",
    "score + t2[kv_idx, q_idx] * score",
    "score + t3[b, h, q_idx, kv_idx] * 0.5",
    "score + t3[b, h, q_idx, kv_idx // 8] * t3[1 - b, h, 3, kv_idx]",
    "score * t4[b, h, q_idx % 3, 0, kv_idx % 2]",
    "score + t5[q_idx - kv_idx]",
    "score + t5[max(q_idx - kv_idx, -3)] * score + t5[kv_idx - q_idx]",
    "score + t5[q_idx - kv_idx - 60]",
    "score + t7[where(q_idx < kv_idx, 0, min((q_idx - kv_idx) // 4, 3)), h] * score + t5[t6[abs(q_idx - kv_idx)]]",
    "score + t5[min(max(q_idx - kv_idx, -2), 1) + 5] * score",
    "score + t5[min(max(q_idx - kv_idx, 30), 50)] + t3[1, h, min(max(q_idx - kv_idx, 3), 9), max(kv_idx - q_idx, 5)]",
    "score + t5[q_idx + 30]",
    "score + t0[t6[kv_idx]] + t7[t6[q_idx] % 4, h]",
    "score + t0[int64(abs(score) * 3.0)] * score",
    "score + where(t6[q_idx] == t6[kv_idx], t0[h], 0.0)",
    "where(kv_idx <= q_idx, score * t0[q_idx], -inf)",
    "sqrt(max(score, 0.0)) * t0[kv_idx]",
    "log(abs(t0[h]) + 1.0) * (score + t8[kv_idx]) - t8[q_idx] / (1.0 + abs(score))",
    "score / t0[q_idx] + pow(abs(t0[kv_idx]) + 0.5, 1.5) * exp(-abs(score)) + pow(score, 3)",
    "max(score, t0[kv_idx]) + min(t0[q_idx] * 2.0, 1) + max(t0[q_idx], t0[q_idx] + 0.0)",
    "score + t9[q_idx] * (q_idx - kv_idx) + floor(t9[kv_idx])",
    "sin(t0[h] * score) + cos(t0[q_idx]) * erf(score) + rsqrt(abs(t0[kv_idx]) + 1.0) + log2(abs(score) + 1.0)",
    "float16(score * 2.0) + bfloat16(t0[kv_idx]) + score % 0.75 + score % (abs(t0[h]) + 0.5)",
]


def captures() -> tuple[list[torch.Tensor], list[int | float], CaptureSpec]:
    """Tables of every number of dimensions; strided, narrow and integer ones among them; some with the names of the functions' own."""
    g = torch.Generator().manual_seed(1)
    real = lambda *shape: torch.randn(shape, generator=g)
    tensors = [
        real(40), torch.tensor(1.5), real(40, 40).T, real(2, 2, 19, 40)[..., :37], real(2, 2, 3, 1, 2).mT.contiguous().mT, real(23),
        torch.randint(0, 9, (40,), generator=g), real(4, 2).double(), real(80)[::2].to(torch.float16), real(40).to(torch.bfloat16),
    ]  # fmt: skip
    names = ["ds", "valid", "grads", "sent", "bias", "relative", "place", "kept", "", "score"]
    return tensors, [0.625], CaptureSpec.of(tensors, names, [0.625], ["s"])


def expected(expr: Expr, tensors: list[torch.Tensor], scalars: Any, scores: torch.Tensor, ds: torch.Tensor) -> tuple[Any, list[Any]]:
    """The slopes [B, H, Q, KV] and the gradients of the tables that carry one, by autograd; ds is 0 where a pair counts for nothing."""
    loads = [node for node in walk(expr) if node.op == "load" and node.kind == FLOAT]
    free = {load: make("index", (), f"free {i}", FLOAT) for i, load in enumerate(loads)}
    b, h, q, k = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    env: dict[str, Any] = {"b": b, "h": h, "q_idx": q, "kv_idx": k, "score": scores.double().requires_grad_()}
    places = {}
    for load in loads:
        indices = [torch.as_tensor(evaluate(substitute(i, free), Env(env, tensors, scalars))).expand(q.shape) for i in load.args]
        places[load], entries = entries_at(tensors[load.value].double(), indices, q.shape)
        env[free[load].value] = entries.requires_grad_()
    variables = [env["score"], *(env[free[load].value] for load in loads)]
    value = torch.as_tensor(evaluate(substitute(expr, free), Env(env, tensors, scalars)))
    value = value.double().expand(q.shape) + 0.0 * variables[0]
    slopes = torch.autograd.grad(value.sum(), variables, allow_unused=True)
    wanted = {i: torch.zeros(tensors[i].numel(), dtype=torch.float64) for i in gradient_tables(expr)}
    for load, slope in zip(loads, slopes[1:], strict=True):
        if slope is not None and load.value in wanted:
            counts = (places[load] >= 0) & (ds != 0)
            wanted[load.value].index_put_((places[load][counts],), (slope * ds)[counts], accumulate=True)
    return slopes[0], list(wanted.values())


def entries_at(table: torch.Tensor, indices: list[torch.Tensor], shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Where entries stand in a contiguous table (-1: outside), and the entries; negative indices count from the end."""
    flat, inside = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
    for index, size in zip(indices, table.shape, strict=True):
        index = torch.where(index < 0, index + size, index)
        inside &= (index >= 0) & (index < size)
        flat = flat * size + index
    flat = torch.where(inside, flat, -1)
    return flat, torch.where(inside, table.flatten()[flat], 0.0)


def probe_text(expr: Expr, spec: CaptureSpec, tile: tuple[int, int] = TILES[0], scatter: str = "float") -> str:
    """A module with the emitted functions and a kernel that calls them."""
    functions = [emit_function("a score", expr, spec, "score"), emit_gradient(expr, spec, scatter=scatter)]
    probe = PROBE.format(rows=tile[0], columns=tile[1])
    return "\n\n\n".join(["import triton\nimport triton.language as tl\n", *_helpers(functions), *functions, probe])


def check(
    expr: Expr, captured: tuple[list[torch.Tensor], Any, CaptureSpec], folder: Path, tile: tuple[int, int], fixed: bool = False
) -> None:
    from flexmask.runtime.launch import load
    from flexmask.runtime.table_buffers import FixedBuffers, FloatBuffers
    from flexmask.templates.launcher import pack

    tensors, scalars, spec = captured
    modules = []
    for scatter in ("peak", "fixed") if fixed else ("float",):
        path = folder / f"gradient_{len(list(folder.iterdir()))}.py"
        path.write_text(probe_text(expr, spec, tile, scatter))
        modules.append(load(path))
    shape, generator = (BATCH, HEADS, Q_LEN, KV_LEN), torch.Generator().manual_seed(2)
    scores, ds = (torch.randn(shape, generator=generator) * 2 for _ in range(2))
    keeps = (torch.rand(shape, generator=generator) < 0.7).to(torch.int8)
    slopes, tables = torch.empty(shape), {i: tensors[i].flatten() for i in gradient_tables(expr)}
    most = {i: most_additions(expr, i, shape, tile) for i in tables}
    cpu = torch.device("cpu")
    buffers = FixedBuffers.zeros(tables, cpu, most) if fixed else FloatBuffers.zeros(tables, cpu)
    grid = (-(-Q_LEN // tile[0]), -(-KV_LEN // tile[1]))
    for module, b, h in itertools.product(modules, range(BATCH), range(HEADS)):
        given = torch.where(keeps[b, h] != 0, ds[b, h], float("nan"))
        module.probe[grid](slopes[b, h], scores[b, h], given, keeps[b, h], buffers.grads, *pack(tensors, scalars), b, h, Q_LEN, KV_LEN)
    wanted, sums = expected(expr, tensors, scalars, scores, ds * keeps)
    known = wanted.isfinite()
    torch.testing.assert_close(slopes[known].double(), wanted[known], rtol=2e-5, atol=2e-5)
    for grad, total in zip(buffers.result(tables).values(), sums, strict=True):
        torch.testing.assert_close(grad.double(), total, rtol=2e-4, atol=2e-4)


def zoo_score(name: str) -> tuple[Expr, tuple[list[torch.Tensor], Any, CaptureSpec]]:
    traced = zoo.SCORES[name](BATCH, HEADS, Q_LEN, KV_LEN).traced()
    spec = CaptureSpec.of(traced.tensors, traced.tensor_names, traced.scalars, traced.scalar_names)
    return simplify(traced.expr), (list(traced.tensors), traced.scalars, spec)


def main() -> None:
    results = {}
    captured = captures()
    kinds = [t.kind for t in captured[2].tensors]
    cases = {text: (simplify(parse(text, kinds, ["float"])), captured) for text in SCORES}
    cases |= {f"fixed {text}": cases[text] for text in FIXED}
    cases |= {f"zoo {name}": zoo_score(name) for name in zoo.SCORES}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            try:
                for tile in TILES if "t5[" in name else TILES[:1]:
                    check(*case, Path(folder), tile, name.startswith("fixed"))
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()[-1500:]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
