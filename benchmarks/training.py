"""Training on a GPU beside FlexAttention, in one process, interleaved: forward and backward time, peak memory, and host time.

    python -m benchmarks.training [--lengths 8192 32768] [--masks full causal ...] [--host] [--extras] [--json FILE]

For each mask and length: median milliseconds and exact-area TFLOP/s (4 * B * H * D * kept pairs, for the backward pass 2.5 times that) of
the forward pass as training runs it and of the backward pass alone, the ratios to FlexAttention, the largest error of the output on
sampled rows against the float64 reference and the largest relative difference of dq, dk and dv between the two, and the peak memory of
forward and backward over what q, k, v and their gradients take. For full and causal also SDPA with cuDNN, and FlashAttention-3 (forward)
where it is installed. The geometric means of the ratios close the table. `--host`: microseconds that a steady call costs the host at
N=128 (forward; forward and backward), as the GPU is left behind. `--extras`: what dropout, sinks and deterministic table gradients add.
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
from benchmarks.kernels import HEADS, bench, check, flash_attention_3, kept_pairs, plain, sdpa
from benchmarks.rows import compile_first, measured, options, write

functorch_config.donated_buffer = False  # the rival's backward is timed again and again over one forward
MIB = 1 << 20
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Row:
    """One mask at one length: milliseconds and MiB by contestant, and how far the gradients are apart."""

    mask: str
    length: int
    teraflop: float = float("nan")  # floating-point operations of the forward pass, in 1e12
    forward_ms: dict[str, float] = field(default_factory=dict)
    backward_ms: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    error: float = float("nan")
    difference: float = float("nan")
    failures: dict[str, str] = field(default_factory=dict)

    def ratio(self, ms: dict[str, float]) -> float:
        return ms.get("FlexAttention", float("nan")) / ms.get("flexmask", float("nan"))


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
    runs = contestants(name, length, row)
    if once:
        for run in runs.values():
            gradients(run, given, dout)
        return row
    mask = zoo.build(name, length, "cuda")
    row.teraflop = 4e-12 * given[0].shape[0] * given[0].shape[1] * head_dim * kept_pairs(mask, length)[0]
    times: dict[str, tuple[dict[str, float], Callable[[], object]]] = {}
    found = {}
    for label, run in runs.items():
        try:
            row.peak_mib[label] = peak(run, given, dout)
            found[label] = gradients(run, given, dout)
            out = run(*given)
            times[f"{label} forward"] = (row.forward_ms, lambda run=run: run(*given))
            times[f"{label} backward"] = (row.backward_ms, lambda out=out: torch.autograd.grad(out, given, dout, retain_graph=True))
        except Exception as error:
            row.failures[label] = f"{type(error).__name__}: {str(error)[:300]}"
    q, k, v = (x.detach() for x in given)
    if name in ("full", "causal"):
        times |= {f"{label} forward": (row.forward_ms, run) for label, run in flash_attention_3(q, k, v, name == "causal").items()}
    for _ in range(2):  # twice round, interleaved; the better of two medians
        for which, (ms, again) in times.items():
            label = which.rsplit(" ", 1)[0]
            ms[label] = min(ms.get(label, float("inf")), bench(again))
    row.error = check(runs["flexmask"](*given).detach(), q, k, v, mask)
    if {"flexmask", "FlexAttention"} <= found.keys():
        pairs = zip(found["flexmask"], found["FlexAttention"], strict=True)
        row.difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return row


def show(row: Row) -> str:
    text = f"{row.mask:20s} {row.length:6d}"
    for part, ms, work in (("forward", row.forward_ms, row.teraflop), ("backward", row.backward_ms, 2.5 * row.teraflop)):
        cells = [f"{label} {ms[label]:.3f} ms {1e3 * work / ms[label]:.0f}" for label in ms]
        text += f" | {part} " + ", ".join(cells) + f", x{row.ratio(ms):.2f}"
    text += " | peak " + ", ".join(f"{label} {mib:.0f} MiB" for label, mib in row.peak_mib.items())
    text += f" | error {row.error:.1e}, difference {row.difference:.1e}"
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
    for name in ("full", "causal", "sliding_window"):
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


def mean(ratios: list[float]) -> float:
    """The geometric mean of those that were measured."""
    known = [math.log(ratio) for ratio in ratios if math.isfinite(ratio)]
    return math.exp(sum(known) / len(known)) if known else float("nan")


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
    means = {part: mean([row.ratio(getattr(row, f"{part}_ms")) for row in rows]) for part in ("forward", "backward")}
    print("geometric means over FlexAttention: " + ", ".join(f"{part} {value:.2f}" for part, value in means.items()))
    more = {"host": host_table() if given.host else [], "extras": extras_table() if given.extras else []}
    write(given.json, rows, geometric_means=means, **more)


if __name__ == "__main__":
    main()
