"""What a laptop can measure: import time, compile cost of every zoo mask, and the CPU backend beside SDPA.

python -m benchmarks.host            prints the tables of docs/benchmarks.md
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import flexmask
from flexmask import masks
from flexmask.analysis import Facts, derive
from flexmask.frontend import Traced, trace
from flexmask.ir import simplify
from flexmask.runtime.checks import Shapes
from flexmask.runtime.choice import Target, choose
from flexmask.runtime.forward import write_kernel
from flexmask.runtime.request import Request
from flexmask.runtime.store import default_store, signs

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def median_ms(run: Callable[[], object], repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def import_cost() -> None:
    """`import flexmask` after `import torch`, in fresh processes."""
    code = "import torch, time; t = time.perf_counter(); import flexmask; print((time.perf_counter() - t) * 1e3)"
    runs = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    print(f"import flexmask adds {statistics.median(runs):.0f} ms to import torch\n")


def compile_cost() -> None:
    """Trace + analyse + emit for each zoo mask, warm process, memory caches bypassed, no Triton compilation."""
    import zoo

    rows = []
    for name, make in zoo.MASKS.items():
        mod = make(2, 4, 256, 256)
        traced = trace(mod, "mask")
        parts = [
            median_ms(lambda mod=mod: trace(mod, "mask")),
            median_ms(lambda t=traced: _derive_afresh(t)),
            median_ms(lambda t=traced: _write(t)),
        ]
        rows.append((sum(parts), name, parts))
    print("compile cost, ms: trace + analyse + emit (slowest five of", len(rows), "zoo masks, and the median)")
    rows.sort(reverse=True)
    for total, name, parts in [*rows[:5], rows[len(rows) // 2]]:
        print(f"  {name:28s} {total:6.2f} = " + " + ".join(f"{p:.2f}" for p in parts))
    print()


def _write(traced: Traced) -> str:
    store, request = default_store(), Request(traced, None, Shapes(2, 4, 4, 256, 256, 128, 128))
    return "\n".join(write_kernel(store, request, choice.plan) for choice in choose(store, request, Target(torch.bfloat16, 90, True)))


def _derive_afresh(traced: Traced) -> Facts:
    simplify.cache_clear()
    return derive(traced.expr, signs(traced))


def cpu_speed() -> None:
    """The CPU backend beside SDPA, float32, B1 H4 D64."""
    print(f"CPU, float32, B1 H4 D64, {torch.get_num_threads()} threads, ms")
    for name, mask, length, kwargs in [
        ("window 256", masks.sliding_window(256), 8192, None),
        ("causal", masks.causal, 2048, {"is_causal": True}),
        ("causal", masks.causal, 8192, {"is_causal": True}),
    ]:
        q, k, v = (torch.randn(1, 4, length, 64) for _ in range(3))
        attn = flexmask.compile(mask)
        dense: dict[str, Any] = kwargs or {"attn_mask": mask.to_dense(length, length).contiguous()}
        ours = median_ms(lambda: attn(q, k, v))
        rival = median_ms(lambda: F.scaled_dot_product_attention(q, k, v, **dense))
        against = "is_causal" if kwargs else "dense mask"
        print(f"  {name:12s} {length:6d}  flexmask {ours:8.1f}   SDPA {against} {rival:8.1f}   {rival / ours:5.2f}x")


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}\n")
    import_cost()
    compile_cost()
    cpu_speed()


if __name__ == "__main__":
    main()
