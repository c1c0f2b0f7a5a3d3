"""Seconds that a first call takes, flexmask's beside FlexAttention's: with empty caches, and with those that an earlier process left.

    python -m benchmarks.first_call [--masks causal causal_document] [--length 8192] [--head-dim 128] [--jobs 4] [--json FILE]

Each figure is of a process of its own, with caches of its own (flexmask's, Triton's and torch's), from the moment when it has a CUDA
context, its inputs, torch and flexmask imported, and some gradient taken, to the end of the forward pass, and from there to the end of the
backward pass. The rival's includes the compiled create_block_mask, flexmask's its map.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Settings, inputs
from benchmarks.figures import FLEX, OURS, Case, make_case
from benchmarks.rivals import Attend, flex, ours
from benchmarks.versions import versions

MASKS = ("causal", "causal_document", "share_question")
CACHES = ("FLEXMASK_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
LIMIT_S = 300
Seconds = dict[str, float]


def by_torch(case: Case, device: str) -> Attend:
    return flex(case, device, by_torch=True)


MAKE = {OURS: ours, FLEX: by_torch}


def first_call(label: str, case: Case, device: str) -> Seconds:
    """Seconds of the first forward and backward pass in this process."""
    given, dout = inputs(case, Settings(device=device))
    _take_a_gradient(device)
    _settle(device)
    start = time.perf_counter()
    out = MAKE[label](case, device)(*given)
    _settle(device)
    half = time.perf_counter()
    torch.autograd.grad(out, given, dout)
    _settle(device)
    return {"forward": half - start, "backward": time.perf_counter() - half}


def _take_a_gradient(device: str) -> None:
    """For its first one torch imports sympy, whoever asks."""
    x = torch.ones(1, device=device, requires_grad=True)
    torch.autograd.grad(x * x, x)


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def cold_and_warm(label: str, mask: str, length: int, head_dim: int, device: str) -> dict[str, Any]:
    """The row of one contestant and mask: seconds of two processes, one after the other over the same caches."""
    row: dict[str, Any] = {"mask": mask, "length": length, "head_dim": head_dim, "contestant": label}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **caches_in(Path(folder))}
        command = [sys.executable, "-m", "benchmarks.first_call", "--one", label, "--masks", mask, "--device", device]
        command += ["--length", str(length), "--head-dim", str(head_dim)]
        for kind in ("cold", "warm"):
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=True)
                row[kind] = json.loads(done.stdout.splitlines()[-1])
            except subprocess.TimeoutExpired:
                row["failure"] = f"{kind}: no end in {LIMIT_S} s"
                break
            except subprocess.CalledProcessError as error:
                row["failure"] = f"{kind}: {error.stderr[-300:]}"
                break
    return row


def caches_in(folder: Path) -> dict[str, str]:
    """The environment that has every cache in this folder."""
    return {name: str(folder / name.split("_")[0].lower()) for name in CACHES}


def table(masks: Iterable[str], length: int, head_dim: int, jobs: int = 1, device: str = "cuda") -> list[dict[str, Any]]:
    """The rows of masks and contestants, `jobs` at a time, printed."""
    pairs = [(label, mask) for mask in masks for label in MAKE]
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        rows = list(pool.map(lambda pair: cold_and_warm(pair[0], pair[1], length, head_dim, device), pairs))
    for row in rows:
        parts = [f"{kind} {row[kind]['forward']:.2f} + {row[kind]['backward']:.2f} s" for kind in ("cold", "warm") if kind in row]
        parts += [f"FAILED {row['failure']}"] if "failure" in row else []
        print(f"first call, {row['mask']:20s} {row['contestant']:14s} " + ", ".join(parts), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", nargs="+", default=list(MASKS))
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json")
    parser.add_argument("--one", choices=list(MAKE), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(first_call(given.one, make_case(given.masks[0], given.length, given.head_dim), given.device)))
        return
    rows = table(given.masks, given.length, given.head_dim, given.jobs, given.device)
    if given.json:
        Path(given.json).write_text(json.dumps({"versions": versions(), "first_call": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
