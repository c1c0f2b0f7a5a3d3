"""Training on packed text: a small transformer over bytes, its attention under causal & document, on the CPU in some seconds.

    python -m examples.train_bytes        (part of `make demo`)

Every step has other documents, so every step builds its mask anew; no new code is generated for it. The same steps are then taken
with dense masked attention (torch's SDPA and a boolean mask), from the same weights on the same batches: the losses are the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import flexmask
from flexmask import masks

from .byte_model import Attend, ByteModel, next_byte_loss
from .progress import Bar
from .text import Batch, batches

LIMIT = 1e-4  # nats by which the two losses may differ: float32 rounding, grown over the steps


def compiled(batch: Batch) -> Attend:
    """flexmask, with the mask of this batch's documents."""
    return partial(flexmask.attention, mask=masks.causal & masks.document(batch.documents))


def dense(batch: Batch) -> Attend:
    """torch's SDPA, with the same mask written out, bool [batch, 1, length, length]."""
    documents, places = batch.documents, torch.arange(batch.documents.shape[1])
    keep = (documents[:, None, :, None] == documents[:, None, None, :]) & (places[:, None] >= places)
    return partial(F.scaled_dot_product_attention, attn_mask=keep)


def train(name: str, choose: Callable[[Batch], Attend], options: argparse.Namespace, console: Console) -> tuple[list[float], float]:
    """(loss of each step, seconds), always from the same weights and over the same batches."""
    model = ByteModel(options.width, options.heads, options.layers)
    # a large eps and a warm-up keep Adam from growing differences of rounding, so that the two runs stay comparable
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), eps=1e-6)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=20)
    losses: list[float] = []
    start = time.perf_counter()
    with Bar(name, options.steps, console) as bar:
        for batch in bar.over(batches(options.steps, options.batch, options.length, longest=options.longest)):
            loss = next_byte_loss(model(batch.tokens, batch.positions, choose(batch)), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warmup.step()
            losses.append(loss.item())
            bar.note(f"loss {losses[-1]:.3f}")
    return losses, time.perf_counter() - start


def compare(ours: list[float], theirs: list[float]) -> Table:
    """Both losses at some ten steps."""
    table = Table("step", "flexmask", "dense SDPA", "difference", title="loss, nats a byte")
    for step in sorted({*range(0, len(ours), max(1, len(ours) // 8)), len(ours) - 1}):
        a, b = ours[step], theirs[step]
        table.add_row(str(step + 1), f"{a:.5f}", f"{b:.5f}", f"{abs(a - b):.1e}")
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"steps": 50, "batch": 1, "length": 2048, "width": 128, "heads": 4, "layers": 2, "longest": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options, console = parse(arguments), Console(highlight=False)
    first = next(batches(1, options.batch, options.length, longest=options.longest))
    console.print(f"{options.batch} x {options.length} bytes of text a step. The first step's documents:")
    console.print(str(masks.causal & masks.document(first.documents)), markup=False)

    before = flexmask.cache_info()
    ours, seconds = train("flexmask", compiled, options, console)
    made = {name: count - before[name] for name, count in flexmask.cache_info().items()}
    console.print(f"{options.steps} steps, each with other documents: {made['maps']} maps, {made['builds']} masks analysed anew")
    theirs, dense_seconds = train("dense SDPA", dense, options, console)

    console.print(compare(ours, theirs))
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    console.print(f"largest difference {largest:.1e} (limit {LIMIT:.0e}); {seconds:.1f} s and {dense_seconds:.1f} s")
    if not largest < LIMIT:
        raise SystemExit("flexmask and dense attention trained apart")
    if options.steps >= 10 and not ours[-1] < ours[0]:
        raise SystemExit("the loss did not fall")


if __name__ == "__main__":
    main()
