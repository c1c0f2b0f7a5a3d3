"""The kernel for few queries through Triton's interpreter, over the zoo, with sinks, dropout and greatest scores, and at odd sizes: run
with TRITON_INTERPRET=1. Prints {case: what is wrong}."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zoo

import flexmask
from flexmask import masks, reference
from flexmask.runtime import few

sys.path.append(str(Path(__file__).parent.parent / "runtime"))
import extras_cases

B, KV = 2, 150
# (query heads, key heads, queries): all of the zoo
SHAPES = {"one query": (4, 2, 1), "heads share a tile": (6, 2, 3)}
# some of it
MORE = {"rows are split": (2, 2, 35), "many heads": (16, 1, 5), "several tiles": (4, 1, 17), "more heads than rows": (32, 1, 2)}
SOME = (
    "full",
    "causal",
    "sliding_window",
    "document_unsorted",
    "random_eviction_heads",
    "two_pieces",
    "from_dense",
    "nothing",
    "empty_rows",
)
SOME_SCORES = ("alibi", "relative_bias", "head_gate", "softcap")
OPTIONS: dict[str, dict[str, Any]] = {
    "a negative scale": {"scale": -0.3}, "no scale": {"scale": 0.0}, "sinks": {"sinks": torch.linspace(-2.0, 3.0, 4)},
}  # fmt: skip


def wrong(mask: flexmask.Mask | None, score: flexmask.Score | None, shape: tuple[int, int, int], keys: int = KV, **options: Any) -> str:
    heads, kv_heads, queries = shape
    torch.manual_seed(0)
    q, k, v = torch.randn(B, heads, queries, 16), torch.randn(B, kv_heads, keys, 16), torch.randn(B, kv_heads, keys, 24)
    options |= {"enable_gqa": True, "return_lse": True}
    try:
        out, lse = flexmask.attention(q, k, v, mask=mask, score=score, backend="triton", **options)
        want, want_lse = reference.attention(q.double(), k.double(), v.double(), mask, score, **options)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:600]
    if not torch.equal(lse.isfinite(), want_lse.isfinite()):
        return "empty rows differ"
    if lse.numel() == 0:
        return "" if out.shape == want.shape else "shapes differ"
    error = max((out.double() - want).abs().max().item(), (lse.double() - want_lse).nan_to_num(0.0).abs().max().item())
    return "" if error < 2e-5 else f"error {error}"


def cases() -> Iterator[tuple[str, str]]:
    for name, shape in (SHAPES | MORE).items():
        sizes = (B, shape[0], shape[2], KV)
        for mask in zoo.MASKS if name in SHAPES else SOME:
            yield f"{name}, mask {mask}", wrong(zoo.MASKS[mask](*sizes), None, shape)
        for score in zoo.SCORES if name in SHAPES else SOME_SCORES:
            yield f"{name}, score {score}", wrong(None, zoo.SCORES[score](*sizes), shape)
    for name, options in OPTIONS.items():
        yield name, wrong(masks.causal, None, (4, 2, 3), **options)
    for keys in (0, 1, 63, 64, 65):
        yield f"{keys} keys", wrong(masks.causal, None, (4, 2, 3), keys)
    yield "no queries", wrong(None, None, (4, 2, 0))
    for name, case in extras_cases.CASES.items():
        for number, given in (("", case), (", five queries", replace(case, sizes=(5, case.sizes[1])))):
            yield name + number, "; ".join(extras_cases.problems(given, "triton", torch.float32, 1e-5))


def main() -> None:
    with mock.patch.object(few, "processors_of", lambda device: 64), mock.patch.object(few, "LEAST_KEYS", 1):
        json.dump(dict(cases()), sys.stdout)


if __name__ == "__main__":
    main()
