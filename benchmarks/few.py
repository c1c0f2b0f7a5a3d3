"""Attention of few queries over many keys, as in decoding, on a GPU: microseconds a call within a CUDA graph, and how fast keys and values
are read.

    python -m benchmarks.few [--queries 1 16] [--keys 8192] [--heads 32/8] [--batch 1] [--mask causal] [--json FILE]

Contestants: flexmask, flexmask without the kernel for few queries, FlexAttention, FA3 if it is installed, and for "full" SDPA. Queries
are the last ones of the keys. Errors are the greatest difference from the float64 reference on a few rows.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

import flexmask
from benchmarks.checks import check
from benchmarks.versions import versions
from flexmask.runtime import few

HEAD_DIM, WINDOW = 128, 4096
Run = Callable[[], torch.Tensor]


def mask_of(name: str, queries: int, keys: int) -> flexmask.Mask | None:
    offset = keys - queries
    if name == "full":
        return None
    if name == "causal":
        return flexmask.mask(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset)
    return flexmask.mask(lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx + offset) & (kv_idx > q_idx + offset - WINDOW))


@contextmanager
def without_few() -> Iterator[None]:
    with mock.patch.object(few, "processors_of", lambda device: 0):
        yield


def contestants(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Run]]:
    """Each with what its calls do, after its first call."""
    queries, keys = q.shape[2], k.shape[2]
    mask, grouped = mask_of(name, queries, keys), q.shape[1] != k.shape[1]
    attend = flexmask.compile(mask, enable_gqa=grouped)
    yield "flexmask", lambda: attend(q, k, v)
    with without_few():
        other = flexmask.compile(mask, enable_gqa=grouped)
        yield "flexmask, as for many", lambda: other(q, k, v)
    torch._dynamo.reset()  # each size is compiled for itself, and there are more than torch compiles of one function
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    # without a mask it is faster with a block mask that keeps all
    tiles = create_block_mask(noop_mask if mask is None else mask.function, None, None, queries, keys, device=q.device)
    yield "FlexAttention", lambda: compiled(q, k, v, block_mask=tiles, enable_gqa=grouped)
    if importlib.util.find_spec("fa3_fwd_interface"):
        yield "FA3", flash_attention(name, q, k, v)
    if mask is None:
        yield "SDPA", lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def flash_attention(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    """FlashAttention-3, which itself chooses whether to split keys and to share tiles; its layout is [batch, length, heads, head_dim]."""
    attend: Any = importlib.import_module("fa3_fwd_interface").flash_attn_func
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    options = {"causal": name == "causal", "num_splits": 0, "window_size": (WINDOW - 1, 0) if name == "window" else (-1, -1)}

    def run() -> torch.Tensor:
        found = attend(*turned, **options)
        out: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return run


def microseconds(run: Run) -> float:
    """Of a call in a CUDA graph, so that the host's time does not count."""
    import triton

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        return 1e3 * float(triton.testing.do_bench_cudagraph(run, rep=40, return_mode="median"))


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, batch, heads, keys, queries in product(given.mask, given.batch, given.heads, given.keys, given.queries):
        q_heads, kv_heads = map(int, heads.split("/"))
        torch.manual_seed(0)
        shapes = (batch, q_heads, queries, HEAD_DIM), (batch, kv_heads, keys, HEAD_DIM), (batch, kv_heads, keys, HEAD_DIM)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        row: dict[str, Any] = {"mask": name, "batch": batch, "heads": heads, "keys": keys, "queries": queries}
        mask = mask_of(name, queries, keys)
        wanted = flexmask.masks.noop if mask is None else mask
        for label, run in contestants(name, q, k, v):
            try:
                row[label] = {"error": check(run(), q, k, v, wanted), "us": microseconds(run)}
            except Exception as error:
                row[label] = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        row["bytes"] = 2 * (k.numel() + v.numel()) * (min(1.0, WINDOW / keys) if name == "window" else 1.0)
        yield row


def shown(row: dict[str, Any]) -> str:
    told = [
        f"{label} {x['us']:.1f} us ({row['bytes'] / x['us'] / 1e3:.0f} GB/s, error {x['error']:.0e})"
        if "us" in x
        else f"{label}: {x['failure']}"
        for label, x in row.items()
        if isinstance(x, dict)
    ]
    return f"{row['mask']:8s} B{row['batch']} {row['heads']} heads, {row['queries']:4d} of {row['keys']:6d}: " + "  ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--queries", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--keys", nargs="+", type=int, default=[8192, 65536])
    parser.add_argument("--heads", nargs="+", default=["32/8", "32/32"], metavar="QUERY/KEY")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--mask", nargs="+", default=["full", "causal", "window"], choices=("full", "causal", "window"))
    parser.add_argument("--json", type=Path)
    given, found = parser.parse_args(), []
    for row in rows(given):
        found.append(row)
        print(shown(row), flush=True)
        if given.json:
            given.json.write_text(json.dumps({"versions": versions(), "rows": found}))


if __name__ == "__main__":
    main()
