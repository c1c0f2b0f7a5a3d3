"""Median milliseconds of a call: on a GPU by Triton's benchmark (which empties the L2 cache before each run), on the CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARMUP_MS, RUN_MS = 25, 120
LEAST_RUNS = 13  # in one round; contestants have two


def bench(run: Callable[[], Any], device: str = "cuda", run_ms: int = RUN_MS, least: int = LEAST_RUNS) -> float:
    """The median of as many runs as `run_ms` has room for, and of `least` at least."""
    run()  # compiles, the first time
    if device == "cpu":
        return _on_cpu(run, least)
    import triton

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    rep = max(run_ms, int(least * start.elapsed_time(end)))
    return float(triton.testing.do_bench(run, warmup=WARMUP_MS, rep=rep, return_mode="median"))


def _on_cpu(run: Callable[[], Any], least: int) -> float:
    times = []
    for _ in range(least):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
