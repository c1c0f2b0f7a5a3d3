"""What training costs beside its kernels, on a GPU: the host's time a call, and what dropout, sinks and learned biases add.

    python -m benchmarks.training [--host] [--extras] [--json FILE]         both tables unless one is asked for

`--host`: microseconds that a steady call costs the host at N=128 (forward; forward and backward), as the GPU is left behind; flexmask,
FlexAttention, SDPA, and an autograd function that does nothing. `--extras`: milliseconds under causal with dropout, sinks, and a bias by
distance, deterministic or not, and what FlexAttention takes for the bias. `python -m benchmarks.kernels` times the kernels themselves.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flexmask
from benchmarks.checks import Tensors
from benchmarks.contest import Settings, inputs
from benchmarks.figures import FLEX, HEADS, OURS, Case
from benchmarks.rivals import CONTESTANTS
from benchmarks.timing import bench
from benchmarks.versions import versions

HOST_MASKS = ("full", "causal", "sliding_window")
HOST_CONTESTANTS = (OURS, FLEX, "SDPA cuDNN")


def host_us(run: Callable[[], object], rounds: int = 5, calls: int = 200) -> float:
    """Microseconds of host time a call, best of some rounds, with the GPU's own time measured off."""
    for _ in range(20):
        run()
    best = math.inf
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)  # before the synchronise: what the host took
        torch.cuda.synchronize()
    return best


def gradients(run: Callable[..., torch.Tensor], given: Tensors, dout: torch.Tensor) -> Tensors:
    return torch.autograd.grad(run(*given), given, dout)


class Nothing(torch.autograd.Function):
    """What autograd itself takes for a function of three tensors that is written in Python and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Tensors:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def host_contestants(case: Case) -> dict[str, Callable[[], Callable[..., torch.Tensor]]]:
    """How to make what is called, by name."""
    found = {label: CONTESTANTS[label] for label in HOST_CONTESTANTS}
    made = {label: lambda each=each: each.make(case, "cuda") for label, each in found.items() if each.takes(case)}
    return {**made, "autograd alone": lambda: Nothing.apply}


def host_table() -> list[dict[str, Any]]:
    """Host time of forward, and of forward and backward, at N=128."""
    rows = []
    for case in (Case(mask, 128, 1, 8, 8, 64) for mask in HOST_MASKS):
        given, dout = inputs(case, Settings())
        still = tuple(x.detach() for x in given)
        for label, make in host_contestants(case).items():
            try:
                run = make()
                found = {
                    "forward": host_us(lambda run=run, still=still: run(*still)),
                    "forward and backward": host_us(lambda run=run, given=given, dout=dout: gradients(run, given, dout)),
                }
            except Exception as error:
                print(f"{case.mask:20s} {label:14s} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            rows.append({"mask": case.mask, "contestant": label, **found})
            print(f"{case.mask:20s} {label:14s} " + ", ".join(f"{part} {us:.1f} us" for part, us in found.items()), flush=True)
    return rows


Extra = tuple[Callable[..., torch.Tensor], list[torch.Tensor]]


def extras(heads: int, length: int) -> dict[str, Extra]:
    """Causal attention with this and that besides, and the tensors that have gradients too."""
    sinks = torch.randn(heads, device="cuda", requires_grad=True)
    bias = torch.randn(heads, 256, device="cuda", requires_grad=True)
    learned, fixed = by_distance(bias), by_distance(bias.detach())
    causal = flexmask.masks.causal
    plain, rival = flexmask.compile(causal), rival_with_score(length)
    return {
        "causal": (plain, []),
        "causal, deterministic": (flexmask.compile(causal, deterministic=True), []),
        "causal, dropout": (lambda *x: plain(*x, dropout_p=0.1, seed=1), []),
        "causal, sinks": (lambda *x: plain(*x, sinks=sinks), [sinks]),
        "causal, bias": (flexmask.compile(causal, flexmask.score(fixed)), []),
        "causal, learned bias": (flexmask.compile(causal, flexmask.score(learned)), [bias]),
        "causal, learned bias, deterministic": (flexmask.compile(causal, flexmask.score(learned), deterministic=True), [bias]),
        "FlexAttention, causal, bias": (lambda *x: rival(*x, fixed), []),
        "FlexAttention, causal, learned bias": (lambda *x: rival(*x, learned), [bias]),
    }


def by_distance(bias: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A score mod that adds bias[head, distance], [H, 256], distances clipped."""
    return lambda score, b, h, q_idx, kv_idx: score + bias[h, (q_idx - kv_idx).clamp(0, 255)]


def rival_with_score(length: int) -> Callable[..., torch.Tensor]:
    """Causal FlexAttention, compiled, of q, k, v and a score mod."""
    block_mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v, score: compiled(q, k, v, score_mod=score, block_mask=block_mask)


def extras_table(length: int = 8192, head_dim: int = 128) -> list[dict[str, Any]]:
    """Milliseconds of forward and backward with each of `extras`."""
    given, dout = inputs(Case("causal", length, 2, HEADS[length], HEADS[length], head_dim), Settings())
    rows = []
    for name, extra in extras(HEADS[length], length).items():
        row: dict[str, Any] = {"case": name}
        try:
            time_extra(row, extra, given, dout)
        except Exception as error:
            print(f"{name:36s} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
        rows.append(row)
        print(f"{name:36s} " + ", ".join(f"{part} {ms:.3f} ms" for part, ms in row.items() if part != "case"), flush=True)
    return rows


def time_extra(row: dict[str, Any], extra: Extra, given: Tensors, dout: torch.Tensor) -> None:
    """The times of both passes into the row, that of the first also where the second fails."""
    run, more = extra
    still = tuple(x.detach() for x in given)
    with torch.no_grad():
        row["forward"] = bench(lambda: run(*still))
    out = run(*given)
    row["backward"] = bench(lambda: torch.autograd.grad(out, [*given, *more], dout, retain_graph=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--extras", action="store_true")
    parser.add_argument("--json")
    given = parser.parse_args()
    both = given.host == given.extras
    found = {"versions": versions(), "host": host_table() if given.host or both else []}
    found["extras"] = extras_table() if given.extras or both else []
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
