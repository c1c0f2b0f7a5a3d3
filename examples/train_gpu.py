"""Training at size on a GPU: tokens a second and peak memory under flexmask, torch's FlexAttention and dense SDPA.

    python -m examples.train_gpu --length 32768 --layers 8 [--compile]

The same transformer over bytes takes the same steps on the same packed text (causal & document, other documents in every step), in
bfloat16 by autocast, once for each way to compute attention. What a way prepares for each batch (a mask, a block mask) is timed too.
`--compile` compiles the whole model, for flexmask with its mask built inside. `--device cpu` runs a tiny version, to try the script.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import flexmask
from flexmask import masks

from .byte_model import Attend, ByteModel, next_byte_loss
from .progress import Bar
from .text import Batch, batches

GPU = {"length": 16384, "batch": 1, "layers": 8, "width": 1024, "heads": 8, "steps": 30, "warmup": 5, "longest": 4096}
CPU = {"length": 512, "batch": 1, "layers": 1, "width": 32, "heads": 2, "steps": 4, "warmup": 1, "longest": 256}


class Skipped(Exception):
    """A way that cannot run here, with the reason."""


@dataclass(frozen=True)
class Way:
    """A way to compute attention: what it makes of a batch beforehand, and the attention it makes of that inside the model's step."""

    name: str
    prepare: Callable[[Batch], Any]
    attend: Callable[[Any], Attend]


@dataclass(frozen=True)
class Run:
    """What a way came to; `peak` in bytes, NaN on the CPU."""

    losses: list[float]
    tokens_per_second: float
    peak: float


def by_flexmask(documents: torch.Tensor) -> Attend:
    return partial(flexmask.attention, mask=masks.causal & masks.document(flexmask.sorted(documents)))


def torch_block_mask(make: Callable[..., BlockMask], batch: Batch) -> BlockMask:
    documents = batch.documents
    size, length = documents.shape

    def keep(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        return (q_idx >= kv_idx) & (documents[b, q_idx] == documents[b, kv_idx])

    return make(keep, size, None, length, length, device=documents.device)


def dense_mask(layers: int, batch: Batch) -> torch.Tensor:
    """bool [batch, 1, length, length]. SDPA also keeps it as bfloat16 in each layer, for the pass back."""
    documents = batch.documents
    size, length = documents.shape
    if documents.is_cuda:
        need, room = size * length**2 * (1 + 2 * layers), torch.cuda.mem_get_info()[1]
        if need > room:
            raise Skipped(f"its masks would take {need / 2**30:.0f} GiB of the GPU's {room / 2**30:.0f}")
    places = torch.arange(length, device=documents.device)
    return (documents[:, None, :, None] == documents[:, None, None, :]) & (places[:, None] >= places)


def ways(options: argparse.Namespace) -> list[Way]:
    on_gpu = options.device.startswith("cuda")
    make, kernel = (torch.compile(create_block_mask), torch.compile(flex_attention)) if on_gpu else (create_block_mask, flex_attention)
    return [
        Way("flexmask", lambda batch: batch.documents, by_flexmask),
        Way("FlexAttention", partial(torch_block_mask, make), lambda block_mask: partial(kernel, block_mask=block_mask)),
        Way("dense SDPA", partial(dense_mask, options.layers), lambda keep: partial(F.scaled_dot_product_attention, attn_mask=keep)),
    ]


def loss_of(model: ByteModel, attend: Callable[[Any], Attend], batch: tuple[torch.Tensor, ...], prepared: Any) -> torch.Tensor:
    tokens, targets, positions = batch
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return next_byte_loss(model(tokens, positions, attend(prepared)), targets)


def train(way: Way, options: argparse.Namespace, console: Console) -> Run:
    """Takes the steps; the first `warmup` ones, which compile, are not timed."""
    model = ByteModel(options.width, options.heads, options.layers).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), fused=True)
    data = [batch.to(options.device) for batch in batches(options.steps, options.batch, options.length, longest=options.longest)]
    step = torch.compile(loss_of) if options.compile else loss_of
    reset_peak(options.device)
    losses: list[float] = []
    start = time.perf_counter()
    with Bar(way.name, options.steps, console) as bar:
        for batch in bar.over(data):
            loss = step(model, way.attend, (batch.tokens, batch.targets, batch.positions), way.prepare(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())  # waits for the GPU, so the clock is right
            if len(losses) == options.warmup:
                start = time.perf_counter()
            bar.note(f"loss {losses[-1]:.3f}")
    timed = options.steps - options.warmup
    rate = timed * options.batch * options.length / (time.perf_counter() - start)
    return Run(losses, rate, float(torch.cuda.max_memory_allocated()) if options.device.startswith("cuda") else float("nan"))


def reset_peak(device: str) -> None:
    """What the run before left is freed, so that the peak is this run's own."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tried(way: Way, options: argparse.Namespace, console: Console) -> Run | str:
    """The run, or why there is none."""
    torch.compiler.reset()
    try:
        return train(way, options, console)
    except (Skipped, NotImplementedError) as error:
        return str(error)
    except torch.OutOfMemoryError:
        return "out of memory"


def report(found: dict[str, Run | str], console: Console) -> None:
    table = Table("attention", "tokens/s", "peak GiB", "first loss", "last loss", "flexmask is")
    ours = found.get("flexmask")
    for name, run in found.items():
        if isinstance(run, str):
            console.print(f"{name} was skipped: {run}", markup=False)
            continue
        ratio = f"{ours.tokens_per_second / run.tokens_per_second:.2f} x as fast" if isinstance(ours, Run) and run is not ours else ""
        peak = "" if math.isnan(run.peak) else f"{run.peak / 2**30:.2f}"
        table.add_row(name, f"{run.tokens_per_second:,.0f}", peak, f"{run.losses[0]:.4f}", f"{run.losses[-1]:.4f}", ratio)
    console.print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in GPU.items():
        parser.add_argument(f"--{name}", type=int, help=f"{value} on a GPU, {CPU[name]} on the CPU")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--compile", action="store_true", help="torch.compile the whole model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=("flexmask", "FlexAttention", "dense SDPA"), help="the ways to run")
    options = parser.parse_args(arguments)
    for name, value in (CPU if options.device == "cpu" else GPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.steps <= options.warmup:
        parser.error(f"{options.steps} steps leave none to time after {options.warmup} of warm-up: give more --steps or less --warmup.")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Run | str]:
    options, console = parse(arguments), Console(highlight=False)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("This trains on a CUDA GPU, and there is none here. `--device cpu` runs a tiny version of it.")
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "the CPU"
    size = sum(weight.numel() for weight in ByteModel(options.width, options.heads, options.layers).parameters())
    console.print(f"{size / 1e6:.1f}M parameters, {options.batch} x {options.length} tokens a step, bfloat16, {where}")
    chosen = [way for way in ways(options) if not options.only or way.name in options.only]
    found = {way.name: tried(way, options, console) for way in chosen}
    report(found, console)
    return found


if __name__ == "__main__":
    main()
