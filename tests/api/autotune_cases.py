"""Attention with `autotune=True` through the plain kernels, in Triton's interpreter, with a clock that says of every second run that it is
twice as fast. Prints JSON: what `explain` said before and after, how often something was timed, and how far results are apart."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import flexmask
from flexmask import masks
from flexmask.lowering.tuned import candidates
from flexmask.runtime import tuning
from flexmask.runtime.store import default_store

torch.manual_seed(0)
Q, K, V = (torch.randn(1, 1, 50, 16, requires_grad=True) for _ in range(3))
BIAS = torch.randn(1, 9, requires_grad=True)


class Clock:
    """Of a planned kernel and one candidate for it, the second takes half as long."""

    runs = 0

    def name(self, device: torch.device) -> str:
        return "an interpreter"

    def is_free(self) -> bool:
        return True

    def milliseconds(self, run: Any) -> float:
        run()
        self.runs += 1
        return 10.0 if self.runs % 2 else 5.0


def biased(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + BIAS[h, (q_idx - kv_idx).clamp(0, 8)]


ATTENTIONS: dict[str, dict[str, Any]] = {
    "window": {"mask": masks.sliding_window(20)},
    "bias": {"mask": masks.causal, "score": biased},
    "deterministic": {"mask": masks.causal, "score": biased, "deterministic": True},
}


def everything(attn: Any) -> list[torch.Tensor]:
    out = attn(Q, K, V)
    return [out, *torch.autograd.grad(out.square().sum(), [Q, K, V, *[BIAS] * (attn.score is not None)])]


def about(attn: Any) -> list[str]:
    """The lines of a report on tiles."""
    lines = [" ".join(line.split()) for line in attn.explain(Q, K, V).splitlines()]
    return [line for line in lines if line.startswith(("tiles", "kernel", "gradients"))]


def main() -> None:
    found: dict[str, Any] = {}
    for name, options in ATTENTIONS.items():
        clock = tuning.TIMER = Clock()
        plain, attn = (flexmask.compile(**options, backend="triton", autotune=tuned) for tuned in (False, True))
        usual, case = everything(plain), {"before": about(attn), "plain": about(plain)}
        tuned = everything(attn)
        case |= {"after": about(attn), "still plain": about(plain), "timed": clock.runs}
        attn(Q, K, V)
        default_store().clear()  # as in another process
        again = everything(attn)
        case |= {"timed again": clock.runs - case["timed"], "same": all(map(torch.equal, again[:1], tuned[:1])), "read": about(attn)}
        case["apart"] = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(tuned, usual, strict=True))
        found[name] = case
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    tuning.candidates = lambda plan: candidates(plan)[:1]
    main()
