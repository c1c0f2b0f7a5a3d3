"""Random masks through the generated kernels, forward and backward, in Triton's interpreter: `random_training_cases.py COUNT` with
TRITON_INTERPRET=1. Each with grouped heads or not, sinks or not, dropout or not, a score that captures a table or none, its gradient
deterministic or not, against the float64 reference. Prints how many passed; raises at the first that does not."""

from __future__ import annotations

import sys
from dataclasses import astuple, dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import predicates

import flexmask
from flexmask import reference

SCORES = {
    "by distance": lambda table: lambda score, b, h, q_idx, kv_idx: score + table[h, (q_idx - kv_idx).clamp(0, 8)],
    "by head": lambda table: lambda score, b, h, q_idx, kv_idx: score * table[h, 0] + table[h, 1],
}


@dataclass(frozen=True)
class Case:
    """What a call is made with besides its mask."""

    grouped: bool
    sinks: bool
    dropout_p: float
    score: str | None
    deterministic: bool


cases = st.builds(Case, st.booleans(), st.booleans(), st.sampled_from([0.0, 0.3]), st.sampled_from([None, *SCORES]), st.booleans())


def leaves(predicate: Any, case: Case) -> dict[str, torch.Tensor]:
    """Whatever gradients are asked for, float32."""
    batch, heads, q_len, kv_len = astuple(predicate.sizes)
    torch.manual_seed(0)
    kv = (batch, 1 if case.grouped else heads, kv_len, 16)
    found = {"q": torch.randn(batch, heads, q_len, 16), "k": torch.randn(kv), "v": torch.randn(kv)}
    found |= {"sinks": torch.linspace(-1, 2, heads)} if case.sinks else {}
    found |= {"table": torch.randn(heads, 9)} if case.score else {}
    return {name: x.requires_grad_() for name, x in found.items()}


def results(attention: Any, given: dict[str, torch.Tensor], mask: Any, case: Case, **options: Any) -> list[torch.Tensor]:
    """out, and the gradients of a number that weighs out and the lse of rows that keep something."""
    score = SCORES[case.score](given["table"]) if case.score else None
    extras = {"sinks": given.get("sinks"), "dropout_p": case.dropout_p, "seed": 5}
    out, lse = attention(*(given[n] for n in "qkv"), mask=mask, score=score, enable_gqa=True, return_lse=True, **extras, **options)
    weight = torch.linspace(0.5, 2.0, out.shape[-1], dtype=out.dtype)
    total = (out * weight).sum() + lse.masked_fill(lse == -torch.inf, 0).cos().sum()
    found = torch.autograd.grad(total, list(given.values()), allow_unused=True)
    return [out, *(torch.zeros_like(x) if g is None else g for x, g in zip(given.values(), found, strict=True))]


def check(predicate: Any, case: Case) -> None:
    given, mask = leaves(predicate, case), predicate.mask()
    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    ours = results(flexmask.attention, given, mask, case, backend="triton", deterministic=case.deterministic)
    for found, want in zip(ours, results(reference.attention, wide, mask, case), strict=True):
        torch.testing.assert_close(found.double(), want, atol=2e-4, rtol=2e-4)


def main(count: int) -> None:
    passed = 0

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(predicates(), cases)
    def run(predicate: Any, case: Case) -> None:
        nonlocal passed
        check(predicate, case)
        passed += 1

    run()
    print(passed)


if __name__ == "__main__":
    main(int(sys.argv[1]))
