"""Emitted functions against `ir.evaluate` on random tiles. Run as a script under TRITON_INTERPRET=1; prints {case: error} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from flexmask.ir import Env, evaluate, parse
from flexmask.lowering import CaptureSpec, emit_function, emit_values
from flexmask.templates.assemble import _helpers

ROWS, COLUMNS = 16, 32
PROBE = """
@triton.jit
def probe(out, scores, tables, numbers, b, h, q_start, kv_start):
    q_idx = q_start + tl.arange(0, 16)[:, None]
    kv_idx = kv_start + tl.arange(0, 32)[None, :]
    at = tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    score = tl.load(scores + at)
    row = {kind}_row(tables, numbers, b, h, q_idx)
    result = {kind}_mod(tables, numbers, row, {score}b, h, q_idx, kv_idx)
    tl.store(out + at, tl.broadcast_to(result, (16, 32)).to(tl.float32))
"""

MASKS = [
    "kv_idx <= q_idx",
    "True",
    "q_idx < 5",
    "kv_idx < 9",
    "(kv_idx <= q_idx) & (q_idx - kv_idx < s0)",
    "~(q_idx == kv_idx) | (q_idx % 3 == 0)",
    "(q_idx < 7) ^ (kv_idx < 11)",
    "(q_idx - kv_idx) // 4 == 1",
    "(q_idx - kv_idx) % 5 == 2",
    "(q_idx - kv_idx) // -3 < 0",
    "(q_idx - kv_idx) % -4 == -1",
    "(kv_idx - q_idx) % s0 == s1 + 4",
    "q_idx // 4 == kv_idx // 4",
    "(q_idx * q_idx * 100000) % 7 == (kv_idx * 3000000) % 7",
    "q_idx + s2 < kv_idx + s2 + 1",
    "q_idx * 1000003 - kv_idx * 1000003 < 5000000000",
    "q_idx - kv_idx < s3",
    "abs(q_idx - kv_idx) <= 3",
    "-q_idx + kv_idx <= min(q_idx, 4) - max(kv_idx, 3)",
    "sign(q_idx - kv_idx) == -1",
    "(q_idx & kv_idx) == 0",
    "((q_idx | 5) ^ (kv_idx & -2)) != 7",
    "~(q_idx - kv_idx) < 3",
    "(1 << q_idx) // 3 < (1 << kv_idx)",
    "(q_idx - kv_idx) >> 2 == -1",
    "pow(q_idx, 3) % 5 == pow(-1, kv_idx) + 1",
    "pow(2, kv_idx) % 7 == 1",
    "where(q_idx < kv_idx, q_idx == 3, kv_idx < 4)",
    "where(q_idx < 5, q_idx, 20) < kv_idx",
    "t0[q_idx] == t0[kv_idx]",
    "t0[-1] == t0[kv_idx]",
    "t0[q_idx - kv_idx] < 3",
    "t0[0] < 3",
    "t1[b, q_idx] & ~t1[b, kv_idx]",
    "t1[b, kv_idx]",
    "t2[h, q_idx, kv_idx] < 3",
    "t2[h, kv_idx, q_idx] % 2 == q_idx % 2",
    "t3[()] < kv_idx",
    "t4[q_idx] < t4[kv_idx] + 1000000000000",
    "t6[q_idx] // 7 < kv_idx",
    "kv_idx / 3.0 < q_idx",
    "floor(kv_idx / 3) == q_idx // 3",
    "float32(kv_idx) % 2.5 < 1.0",
    "(kv_idx - q_idx + 0.25) // 1.5 == 2.0",
    "isnan(t5[q_idx, kv_idx]) | isinf(1.0 / (q_idx - 3))",
    "bool(q_idx - 3)",
    "int64(t5[kv_idx, q_idx] * 4.0) == 1",
    "int32(q_idx) == int64(kv_idx)",
    "(q_idx < kv_idx) == (kv_idx < 10)",
    "b + h < q_idx",
    "t0[t0[q_idx]] == t0[kv_idx]",
]
SCORES = [
    "score",
    "0.0",
    "s4 * score",
    "30.0 * tanh(score / 30.0)",
    "tanh(score)",
    "tanh(score * 0.01)",
    "score + t5[q_idx, kv_idx]",
    "score + t7[h, q_idx - kv_idx]",
    "score - pow(2.0, -(h + 1) * 8 / 4) * abs(q_idx - kv_idx)",
    "sigmoid(score) + sigmoid(-100.0 * score) + exp(-abs(score)) + exp2(score)",
    "log(abs(score) + 1.0) + log2(abs(score) + 0.5)",
    "sqrt(abs(score)) + rsqrt(abs(score) + 0.1) + erf(score)",
    "sin(score) * cos(score) + sin(score * 1000.0) + cos(score * 1000.0)",
    "floor(score) + ceil(score * 2.0) + trunc(score * 3.0)",
    "round(score * 2.0) + round(0.5 * q_idx)",
    "min(score, 0.5) + max(score, t5[q_idx, kv_idx])",
    "pow(abs(score) + 0.1, 1.7) + pow(score, 3) + pow(score, 2.0)",
    "score // 0.75 + score % 0.75 + score % -0.75",
    "where(q_idx < kv_idx, score, -inf)",
    "where(q_idx < kv_idx, score, 1)",
    "sign(score) * abs(score) + -score",
    "float16(score) + bfloat16(t8[kv_idx])",
    "int64(score * 3.0)",
    "score + q_idx / 3 + t9[q_idx] * 2",
]
# several values of one function: as many as are stored by the probe below
VALUES_PROBE = """
@triton.jit
def probe(out, tables, numbers, b, h, q_start, kv_start, q_len, kv_len):
    q_idx = q_start + tl.arange(0, 16)[:, None]
    kv_idx = kv_start + tl.arange(0, 32)[None, :]
    at = tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    found = several(tables, numbers, b, h, q_idx, kv_idx, q_len, kv_len)
    for i in tl.static_range({count}):
        tl.store(out + 512 * i + at, tl.broadcast_to(found[i], (16, 32)).to(tl.float64))
"""
VALUES = [
    ["q_idx", "3", "True", "0.5", "-inf", "b", "h", "q_len - kv_len", "kv_idx < q_idx", "s4", "s3"],
    ["q_idx - kv_idx", "(q_idx - kv_idx) * 2", "(q_idx - kv_idx) * 1000000000000", "t0[q_idx] == t0[kv_idx]", "t0[q_idx]"],
    ["left(t10, kv_idx)", "right(t10, kv_idx)", "left(t10, kv_idx) + q_idx", "left(t10, t10[q_idx])", "right(t10, t10[q_idx])"],
    ["left(t10, 5)", "right(t10, -1)", "left(t10, 1099511627776)", "right(t10, b)", "left(t10, t3[()])"],
    ["left(t11, b, kv_idx)", "right(t11, 1, q_idx - 3)", "left(t11, -1, kv_idx)", "right(t11, h % 2, t11[b, q_idx])"],
    ["left(t11, q_idx % 2, kv_idx)", "right(t12, b, h, q_idx)", "left(t12, b, q_idx % 3 - 3, kv_idx)"],
    ["right(t13, kv_idx)", "left(t13, t6[q_idx])", "right(t14, kv_idx * 1000000000)", "left(t14, t4[q_idx])"],
    ["left(t15, float32(kv_idx) / 8.0)", "right(t15, t7[h, q_idx])", "left(t15, t5[q_idx, kv_idx])", "right(t16, q_idx)"],
    ["left(t17, q_idx)", "right(t18, kv_idx)", "left(t18, 0)", "right(t19, bool(kv_idx - 3))"],
]


def captures() -> tuple[list[torch.Tensor], list[int | float], CaptureSpec]:
    g = torch.Generator().manual_seed(1)
    random = lambda low, high, *shape: torch.randint(low, high, shape, generator=g)
    tensors = [
        random(0, 6, 48).int(), random(0, 2, 2, 96).bool()[:, ::2], random(-9, 9, 2, 48, 48).to(torch.int8), torch.tensor(9).short(),
        random(-(2**40), 2**40, 48), torch.randn(48, 48, generator=g).T, random(0, 200, 48).to(torch.uint8),
        torch.randn(2, 95, generator=g), torch.randn(48, generator=g).to(torch.float16), torch.randn(48, generator=g).double(),
    ]  # fmt: skip
    tensors[5][3, 4] = float("nan")
    ascend = lambda x: x.sort(-1).values
    tensors += [
        ascend(random(0, 48, 48)).int(),
        ascend(random(-5, 48, 2, 48)),
        ascend(random(0, 40, 2, 3, 37)).mT.contiguous().mT.to(torch.int16),
        ascend(random(0, 200, 333)).to(torch.uint8),
        ascend(random(-(2**40), 2**40, 200))[::2],
        ascend(torch.randn(97, generator=g)),
        ascend(random(0, 9, 64)).to(torch.int8)[1::3],
        torch.zeros(0, dtype=torch.int32),
        torch.tensor([7]),
        ascend(random(0, 2, 30)),
    ]
    scalars = [4, -1, 2**31 - 5, 2**40, 0.625]
    names = ["doc", "tl", "bad name", "x-1", "import", "bias", "doc", "_rel", "q_idx", "doc_stride_0", *(f"sorted_{i}" for i in range(10))]
    scalar_names = ["window", "window", "doc_size_0", "", "slope"]
    return tensors, scalars, CaptureSpec.of(tensors, names, scalars, scalar_names)


def check(kind: str, text: str, folder: Path) -> None:
    tensors, scalars, spec = captures()
    kinds = [t.kind for t in spec.tensors]
    expr = parse(text, kinds, [k for _, k in spec.scalars])
    mods = emit_function('a"""name\\', expr, spec, kind)
    imports = "import triton\nimport triton.language as tl\n"
    probe = PROBE.format(kind=kind, score="score, " if kind == "score" else "")
    path = folder / f"{kind}_{abs(hash(text))}.py"
    path.write_text("\n\n\n".join([imports, *_helpers([mods]), mods, probe]))
    from flexmask.runtime.launch import load
    from flexmask.templates.launcher import pack

    module = load(path)
    scores = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) * 2
    for b, h, q_start, kv_start in ((0, 1, 0, 0), (1, 0, 16, 0), (1, 1, 32, 16)):
        out = torch.empty(ROWS, COLUMNS)
        module.probe[(1,)](out, scores, *pack(tensors, scalars), b, h, q_start, kv_start)
        q, k = torch.arange(ROWS)[:, None] + q_start, torch.arange(COLUMNS)[None] + kv_start
        indices = {"b": torch.tensor(b), "h": torch.tensor(h), "q_idx": q, "kv_idx": k, "score": scores}
        expected = torch.as_tensor(evaluate(expr, Env(indices, tensors, scalars))).float().expand(ROWS, COLUMNS)
        torch.testing.assert_close(out, expected, equal_nan=True, rtol=3e-6, atol=3e-6)


def check_values(texts: list[str], folder: Path) -> None:
    """One function of several values, each against `evaluate`; integers exactly."""
    tensors, scalars, spec = captures()
    kinds = [t.kind for t in spec.tensors]
    exprs = [parse(text, kinds, [k for _, k in spec.scalars]) for text in texts]
    several = emit_values("several", "b, h, q_idx, kv_idx, q_len, kv_len", exprs, spec, 'Several\\ """values.')
    imports = "import triton\nimport triton.language as tl\n"
    path = folder / f"values_{abs(hash(several))}.py"
    path.write_text("\n\n\n".join([imports, *_helpers([several]), several, VALUES_PROBE.format(count=len(exprs))]))
    from flexmask.runtime.launch import load
    from flexmask.templates.launcher import pack

    module = load(path)
    for b, h, q_start, kv_start in ((0, 1, 0, 0), (1, 0, 16, 0), (1, 1, 32, 16)):
        out = torch.empty(len(exprs), ROWS, COLUMNS, dtype=torch.float64)
        module.probe[(1,)](out, *pack(tensors, scalars), b, h, q_start, kv_start, 48, 47)
        q, k = torch.arange(ROWS)[:, None] + q_start, torch.arange(COLUMNS)[None] + kv_start
        indices = {"b": torch.tensor(b).view(1, 1), "h": torch.tensor(h).view(1, 1), "q_idx": q, "kv_idx": k, "q_len": 48, "kv_len": 47}
        for text, expr, found in zip(texts, exprs, out, strict=True):
            wanted = torch.as_tensor(evaluate(expr, Env(indices, tensors, scalars))).double().expand(ROWS, COLUMNS)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, msg=lambda m, text=text: f"{text}: {m}")


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, texts in (("mask", MASKS), ("score", SCORES)):
            for text in texts:
                try:
                    check(kind, text, Path(folder))
                    results[f"{kind} {text}"] = ""
                except Exception:
                    results[f"{kind} {text}"] = traceback.format_exc()[-1500:]
        for texts in VALUES:
            try:
                check_values(texts, Path(folder))
                results["; ".join(texts)] = ""
            except Exception:
                results["; ".join(texts)] = traceback.format_exc()[-1500:]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
