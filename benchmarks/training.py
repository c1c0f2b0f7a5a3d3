"""Training on a GPU beside FlexAttention, in one process, interleaved: backward time, peak memory, and host time.

    python -m benchmarks.training [--lengths 8192 32768] [--masks full causal ...] [--host] [--extras] [--json FILE]

For each mask and length: median milliseconds of the backward pass alone, their ratio, the largest relative difference of dq, dk and dv
between the two, and the peak memory of forward and backward over what q, k, v and their gradients take. SDPA with cuDNN for full and
causal. The geometric mean of the ratios closes the table. `--host`: microseconds that a steady call costs the host at N=128 (forward;
forward and backward), as the GPU is left behind. `--extras`: what dropout, sinks and deterministic table gradients add.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flexmask
from benchmarks import masks as zoo
from benchmarks.kernels import HEADS, bench, plain, sdpa
from benchmarks.rows import compile_first, measured, options, write

functorch_config.donated_buffer = False  # the rival's backward is timed again and again over one forward
MIB = 1 << 20
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Row:
    """One mask at one length: milliseconds and MiB by contestant, and how far the gradients are apart."""

    mask: str
    length: int
    ms: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    difference: float = float("nan")
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.ms.get("FlexAttention", float("nan")) / self.ms.get("flexmask", float("nan"))


def inputs(batch: int, heads: int, length: int, head_dim: int) -> Tensors:
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, length, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    return q, k, v


def contestants(name: str, length: int, row: Row) -> dict[str, Callable[..., torch.Tensor]]:
    """The forward pass of each, as functions of q, k and v."""
    mask = zoo.build(name, length, "cuda")
    runs: dict[str, Callable[..., torch.Tensor]] = {"flexmask": flexmask.compile(mask)}
    compiled = torch.compile(flex_attention, dynamic=False)
    try:
        block_mask = torch.compile(create_block_mask)(plain(mask), None, None, length, length, device="cuda")
        runs["FlexAttention"] = lambda q, k, v: compiled(q, k, v, block_mask=block_mask)
    except Exception as error:
        row.failures["FlexAttention"] = f"{type(error).__name__}: {str(error)[:200]}"
    if name in ("full", "causal"):
        runs["SDPA cuDNN"] = lambda q, k, v: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, name == "causal")
    return runs


def gradients(run: Callable[..., torch.Tensor], given: Tensors, dout: torch.Tensor) -> Tensors:
    q, k, v = torch.autograd.grad(run(*given), given, dout)
    return q, k, v


def peak(run: Callable[..., torch.Tensor], given: Tensors, dout: torch.Tensor) -> float:
    """MiB at the highest point of forward and backward, over the inputs and their gradients."""
    gradients(run, given, dout)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = gradients(run, given, dout)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in found)) / MIB


def measure(name: str, length: int, head_dim: int, once: bool = False) -> Row:
    """A case; with `once` it is only run."""
    row, batch = Row(name, length), max(1, 16384 // length)
    given = inputs(batch, HEADS[length] * 128 // head_dim, length, head_dim)
    dout = torch.randn_like(given[0])
    found, backward = {}, {}
    for label, run in contestants(name, length, row).items():
        if once:
            gradients(run, given, dout)
            continue
        try:
            row.peak_mib[label] = peak(run, given, dout)
            found[label] = gradients(run, given, dout)
            out = run(*given)
            backward[label] = lambda out=out: torch.autograd.grad(out, given, dout, retain_graph=True)
        except Exception as error:
            row.failures[label] = f"{type(error).__name__}: {str(error)[:300]}"
    for _ in range(2):  # twice round, interleaved; the better of two medians
        for label, again in backward.items():
            row.ms[label] = min(row.ms.get(label, float("inf")), bench(again))
    if {"flexmask", "FlexAttention"} <= found.keys():
        pairs = zip(found["flexmask"], found["FlexAttention"], strict=True)
        row.difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return row


def show(row: Row) -> str:
    cells = [f"{label} {row.ms[label]:.3f} ms {row.peak_mib[label]:.0f} MiB" for label in row.ms]
    text = f"{row.mask:20s} {row.length:6d} | " + " | ".join(cells) + f" | x{row.ratio:.2f} | difference {row.difference:.1e}"
    return text + "".join(f"\n    {label} failed: {why}" for label, why in row.failures.items())


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


def host_table() -> list[dict[str, Any]]:
    """Host time of forward, and of forward and backward, at N=128."""
    rows = []
    for name in ("full", "causal", "causal_document"):
        given = inputs(1, 8, 128, 64)
        still = tuple(x.detach() for x in given)
        dout = torch.randn_like(given[0])
        for label, run in contestants(name, 128, Row(name, 128)).items():
            found = {
                "forward": host_us(lambda run=run, still=still: run(*still)),
                "forward and backward": host_us(lambda run=run, given=given, dout=dout: gradients(run, given, dout)),
            }
            rows.append({"mask": name, "contestant": label, **found})
            print(f"{name:20s} {label:14s} " + ", ".join(f"{part} {us:.1f} us" for part, us in found.items()), flush=True)
    return rows


def extras_table(length: int = 8192, head_dim: int = 128) -> list[dict[str, Any]]:
    """Milliseconds of forward and backward under causal with dropout, sinks, and a bias by distance, deterministic or not."""
    given = inputs(2, HEADS[length], length, head_dim)
    dout = torch.randn_like(given[0])
    sinks = torch.randn(HEADS[length], device="cuda", requires_grad=True)
    bias = torch.randn(HEADS[length], 256, device="cuda", requires_grad=True)
    relative = flexmask.score(lambda score, b, h, q_idx, kv_idx: score + bias[h, (q_idx - kv_idx).clamp(0, 255)])
    causal = flexmask.masks.causal
    plain_run = flexmask.compile(causal)
    cases: dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = {
        "causal": (plain_run, []),
        "causal, dropout": (lambda *x: plain_run(*x, dropout_p=0.1, seed=1), []),
        "causal, sinks": (lambda *x: plain_run(*x, sinks=sinks), [sinks]),
        "causal, learned bias": (flexmask.compile(causal, relative), [bias]),
        "causal, learned bias, deterministic": (flexmask.compile(causal, relative, deterministic=True), [bias]),
    }
    rows = []
    for name, (run, more) in cases.items():
        out = run(*given)
        wanted = [*given, *more]
        ms = {
            "forward": bench(lambda run=run: run(*(x.detach() for x in given))),
            "backward": bench(lambda out=out, wanted=wanted: torch.autograd.grad(out, wanted, dout, retain_graph=True)),
        }
        rows.append({"case": name, **ms})
        print(f"{name:36s} forward {ms['forward']:.3f} ms, backward {ms['backward']:.3f} ms", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--extras", action="store_true")
    given = options(parser, [8192, 32768], zoo.NAMES)
    cases = [(name, length) for length in given.lengths for name in given.masks]
    if given.jobs:
        compile_first("benchmarks.training", cases, given.jobs, "--head-dim", str(given.head_dim))
    if given.compile_only:
        for name, length in cases:
            measure(name, length, given.head_dim, once=True)
        return
    rows = measured(cases, lambda name, length: measure(name, length, given.head_dim), show, given.json)
    ratios = [row.ratio for row in rows if math.isfinite(row.ratio)]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else float("nan")
    print(f"geometric mean over FlexAttention: {mean:.2f} of {len(ratios)} cases")
    more = {"host": host_table() if given.host else [], "extras": extras_table() if given.extras else []}
    write(given.json, rows, geometric_mean=mean, **more)


if __name__ == "__main__":
    main()
