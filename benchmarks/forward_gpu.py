"""The generated forward kernels on a GPU: correct against dense float64 attention, and timed beside FlexAttention and SDPA.

    python benchmarks/forward_gpu.py             # both parts
    python benchmarks/forward_gpu.py check       # correctness only
    python benchmarks/forward_gpu.py time        # timing only; lengths as further arguments (default 8192)

Figures are TFLOP/s of useful work, 4 * B * H * D * kept pairs, medians over interleaved rounds. Every step is guarded: a failure is
printed and the rest goes on.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "templates")]

import kernel_cases as cases  # noqa: E402

from flexmask.ir import parse  # noqa: E402
from flexmask.lowering import CaptureSpec, KernelPlan, TensorSpec, emit_function, plan_forward  # noqa: E402
from flexmask.runtime.launch import launch_forward, load  # noqa: E402
from flexmask.templates.assemble import assemble  # noqa: E402

BATCH, HEADS, HEAD_DIM, ROUNDS = 2, 32, 128, 3
FOLDER = Path(tempfile.mkdtemp(prefix="flexmask_bench_"))


def guarded(title: str, step: Callable[[], Any]) -> Any:
    """The step's result, or None with the reason printed."""
    try:
        return step()
    except Exception as error:
        print(f"FAILED {title}: {type(error).__name__}: {str(error).strip()[:600]}", flush=True)
        if "-v" in sys.argv:
            traceback.print_exc()
        return None


# ---- correctness


def on_gpu() -> None:
    """Let kernel_cases make its tensors on the CPU (their generators live there) and work on the GPU."""
    inputs, captures = cases.inputs, cases.captures

    def moved_inputs(case: cases.Case) -> Any:
        with torch.device("cpu"):
            made = inputs(case)
        return tuple(torch.empty_strided(x.shape, x.stride(), device="cuda", dtype=x.dtype).copy_(x) for x in made)

    def moved_captures(case: cases.Case) -> Any:
        with torch.device("cpu"):
            tensors, scalars = captures(case)
        return [t.cuda() for t in tensors], scalars

    cases.inputs, cases.captures = moved_inputs, moved_captures
    cases.TOLERANCE["float32"] = 3e-5
    torch.set_default_device("cuda")


def more_cases() -> dict[str, cases.Case]:
    """The plans' own block sizes, all head dims and dtypes, odd lengths."""
    made = {}
    forms: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"mask": cases.CAUSAL, "form": "range", "pieces": 1},
        "causal evaluated": {"mask": cases.CAUSAL, "form": "range", "evaluated": True},
        "document softcap": {"mask": cases.DOCUMENT, "score": cases.SOFTCAP, "form": "list", "evaluated": True, "pieces": 1},
        "two intervals bias": {"mask": cases.TWO, "score": cases.BIAS, "form": "list", "pieces": 2},
    }
    for dtype in ("bfloat16", "float16", "float32"):
        for dims in ((16, 16), (40, 40), (64, 64), (80, 96), (128, 128), (192, 128), (256, 256)):
            for loads in ("pointer", "tma") if dtype != "float32" else ("pointer",):
                for name, form in forms.items():
                    shape = (2, 4, 2, 333, 389)
                    made[f"{dtype} D{dims} {loads} {name}"] = cases.Case(
                        **form, shape=shape, dims=dims, dtype=dtype, loads=loads, blocks=None
                    )
    return made


def check_all() -> None:
    on_gpu()
    arch = torch.cuda.get_device_capability()
    good, bad = 0, 0
    for name, case in {**cases.CASES, **more_cases()}.items():
        if case.loads == "tma" and arch < (9, 0):
            continue
        try:
            cases.check(case, FOLDER)
            torch.cuda.synchronize()
            good += 1
        except Exception as error:
            bad += 1
            print(f"BAD {name}: {type(error).__name__}: {str(error).strip()[:400]}", flush=True)
            if "illegal" in str(error) or "CUDA error" in str(error):
                print("the device is lost; stopping the checks")
                break
    print(f"correctness: {good} good, {bad} bad", flush=True)
    torch.set_default_device(None)


# ---- timing


@dataclass(frozen=True)
class Mask:
    """A mask as an expression, as FlexAttention's function, and the kept interval of each row; `table` holds document numbers."""

    name: str
    text: str
    function: Callable[..., Any] | None
    starts: torch.Tensor
    stops: torch.Tensor
    table: torch.Tensor | None = None
    form: str = "range"

    @property
    def kept(self) -> int:
        return int((self.stops - self.starts).clamp(min=0).sum())


def masks(n: int) -> list[Mask]:
    """full, causal, causal within documents, sliding window of n / 16, document."""
    q = torch.arange(n, device="cuda")
    g = torch.Generator().manual_seed(0)
    cuts = torch.sort(torch.randperm(n - 1, generator=g)[:11] + 1).values.cuda()
    doc = torch.bucketize(q, cuts, right=True).int()
    edges = torch.cat([torch.zeros(1, device="cuda", dtype=torch.long), cuts, torch.full((1,), n, device="cuda")])
    first, last, window = edges[doc.long()], edges[doc.long() + 1], n // 16
    return [
        Mask("full", "", None, q * 0, q * 0 + n, form="none"),
        Mask("causal", "kv_idx <= q_idx", lambda b, h, i, j: j <= i, q * 0, q + 1),
        Mask(
            "causal document", "(t0[q_idx] == t0[kv_idx]) & (kv_idx <= q_idx)", lambda b, h, i, j: (doc[i] == doc[j]) & (j <= i),
            first, q + 1, doc,
        ),
        Mask(
            "sliding window", f"(kv_idx <= q_idx) & (q_idx - kv_idx < {window})", lambda b, h, i, j: (j <= i) & (i - j < window),
            (q - window + 1).clamp(min=0), q + 1,
        ),
        Mask("document", "t0[q_idx] == t0[kv_idx]", lambda b, h, i, j: doc[i] == doc[j], first, last, doc),
    ]  # fmt: skip


def tile_map(mask: Mask, plan: KernelPlan, n: int) -> Any:
    """Ranges or lists from the row intervals, by brute force on the tiles."""
    if plan.map_form == "none":
        return None
    rows, columns = -(-n // plan.block_q), -(-n // plan.block_kv)
    edges = torch.arange(columns + 1, device="cuda") * plan.block_kv
    low, high = edges[:-1], edges[1:].clamp(max=n)
    any_kept = (mask.starts[:, None] < high) & (mask.stops[:, None] > low)
    all_kept = (mask.starts[:, None] <= low) & (mask.stops[:, None] >= high)
    pad = rows * plan.block_q - n
    any_kept = torch.nn.functional.pad(any_kept, (0, 0, 0, pad), value=False).view(rows, plan.block_q, columns).any(1)
    all_kept = torch.nn.functional.pad(all_kept, (0, 0, 0, pad), value=True).view(rows, plan.block_q, columns).all(1)
    made = SimpleNamespace(ranges=None, counts=None, offsets=None, index=None, intervals=None)
    if plan.pieces:
        made.intervals = SimpleNamespace(starts=mask.starts.int()[None, None, :, None], ends=mask.stops.int()[None, None, :, None])
    ranges, counts, offsets, index = [], [], [], []
    for some, full in zip(any_kept.cpu(), all_kept.cpu(), strict=True):
        kept, whole = some.nonzero().flatten().tolist(), full.nonzero().flatten().tolist()
        partial = [t for t in kept if t not in set(whole)]
        ranges.append([kept[0], whole[0], whole[-1] + 1, kept[-1] + 1] if whole else [kept[0], kept[0], kept[0], kept[-1] + 1])
        counts.append([len(whole), len(partial) if plan.pieces else 0, 0 if plan.pieces else len(partial)])
        offsets.append(len(index))
        index += whole + partial
    tensor = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")[None, None]
    if plan.map_form == "range":
        made.ranges = tensor(ranges)
    else:
        made.counts, made.offsets, made.index = tensor(counts), tensor(offsets), tensor(index)[0, 0]
    return made


def runner(mask: Mask, plan: KernelPlan, q: Any, k: Any, v: Any, resident_mib: int | None = None) -> Callable[[], Any]:
    """A call of the kernel for `plan`, checked once on sampled rows."""
    spec = CaptureSpec((TensorSpec("doc", 1, "int32"),) if mask.table is not None else ())
    text = emit_function(mask.name, parse(mask.text, ["int"]), spec, "mask") if plan.evaluated else None
    path = FOLDER / f"kernel_{abs(hash((mask.name, plan, resident_mib)))}.py"
    path.write_text(assemble(plan, text, header=[f"mask {mask.name}"]))
    module = load(path)
    if resident_mib is not None:
        module.RESIDENT_BYTES = resident_mib << 20
    found, captured = tile_map(mask, plan, q.shape[2]), ((mask.table,) if mask.table is not None and plan.evaluated else (), ())
    call = lambda: launch_forward(module, q, k, v, HEAD_DIM**-0.5, found, captured)
    out, _ = call()
    error = sampled_error(mask, q, k, v, out)
    if not error < 2e-2:
        raise AssertionError(f"wrong result: error {error}")
    return call


def sampled_error(mask: Mask, q: Any, k: Any, v: Any, out: Any) -> float:
    """Greatest difference from dense float64 attention on 64 rows of the first and last head."""
    rows = torch.randint(0, q.shape[2], (64,), device="cuda")
    columns = torch.arange(k.shape[2], device="cuda")
    keep = (columns >= mask.starts[rows][:, None]) & (columns < mask.stops[rows][:, None])
    worst = 0.0
    for b, h in ((0, 0), (-1, -1)):
        s = (q[b, h, rows].double() @ k[b, h].double().T * HEAD_DIM**-0.5).masked_fill(~keep, float("-inf"))
        worst = max(worst, float((out[b, h, rows].double() - s.softmax(-1) @ v[b, h].double()).abs().max()))
    return worst


def plans(mask: Mask) -> dict[str, tuple[KernelPlan, int | None]]:
    """The default plan and its rivals."""
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    loads = "tma" if arch >= 90 else "pointer"
    wanted: dict[str, Any] = {"head_dim": HEAD_DIM, "arch": arch, "loads": loads, "map_form": mask.form}
    base = plan_forward(**wanted, pieces=0 if mask.form == "none" else 1)
    made: dict[str, tuple[KernelPlan, int | None]] = {"default": (base, None)}
    for block_q, block_kv, warps, stages in (
        (128, 128, 8, 3),
        (128, 128, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 64, 4, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 3),
    ):
        made[f"{block_q}x{block_kv}w{warps}s{stages}"] = (
            replace(base, block_q=block_q, block_kv=block_kv, num_warps=warps, num_stages=stages),
            None,
        )
    for mib in (1, 8, 64, 4096):
        made[f"default, {mib} MiB resident"] = base, mib
    made["pointer"] = plan_forward(**{**wanted, "loads": "pointer"}, pieces=base.pieces), None
    if mask.form != "none":
        made["list"] = replace(base, map_form="list"), None
        made["list, evaluated"] = plan_forward(**{**wanted, "map_form": "list"}, evaluated=True), None
        made["range, evaluated, same tiles"] = replace(base, pieces=0, evaluated=True), None
    return made


def rivals(mask: Mask, q: Any, k: Any, v: Any) -> dict[str, Callable[[], Callable[[], Any]]]:
    """FlexAttention, and SDPA where it knows the mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def flex() -> Callable[[], Any]:
        block_mask = None
        if mask.function is not None:
            block_mask = torch.compile(create_block_mask)(mask.function, None, None, q.shape[2], k.shape[2], device="cuda")
        compiled = torch.compile(flex_attention, fullgraph=True)
        return lambda: compiled(q, k, v, block_mask=block_mask)

    def dense(backend: SDPBackend) -> Callable[[], Any]:
        def call() -> Any:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=mask.name == "causal")

        return call

    made: dict[str, Callable[[], Callable[[], Any]]] = {"FlexAttention": flex}
    if mask.name in ("full", "causal"):
        made["SDPA cuDNN"] = lambda: dense(SDPBackend.CUDNN_ATTENTION)
        made["SDPA flash"] = lambda: dense(SDPBackend.FLASH_ATTENTION)
    return made


def time_all(n: int) -> None:
    from triton.testing import do_bench

    batch, heads = (BATCH, HEADS) if n <= 8192 else (1, 8)
    print(f"\nB{batch} H{heads} N{n} D{HEAD_DIM} bfloat16, TFLOP/s", flush=True)
    q, k, v = (torch.randn(batch, heads, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for mask in masks(n):
        torch._dynamo.reset()
        calls = {name: guarded(f"{mask.name}, {name}", make) for name, make in rivals(mask, q, k, v).items()}
        for name, (plan, mib) in plans(mask).items():
            calls[name] = guarded(f"{mask.name}, {name}", partial(runner, mask, plan, q, k, v, mib))
        times: dict[str, list[float]] = {name: [] for name, call in calls.items() if call is not None}
        for _ in range(ROUNDS):
            for name in list(times):
                found = guarded(f"{mask.name}, {name}", partial(do_bench, calls[name], warmup=10, rep=60, return_mode="median"))
                if found is None:
                    del times[name]
                else:
                    times[name].append(found)
        work = 4 * batch * heads * HEAD_DIM * mask.kept
        speed = {name: work / statistics.median(t) * 1e-9 for name, t in times.items()}
        print(f"{mask.name} ({100 * mask.kept / n / n:.1f} % kept)")
        for name, figure in sorted(speed.items(), key=lambda item: -item[1]):
            print(f"  {figure:7.1f}  {name}", flush=True)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    import triton

    print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), flush=True)
    words = [w for w in sys.argv[1:] if not w.startswith("-")]
    if not words or "check" in words:
        guarded("checks", check_all)
    if words != ["check"]:
        for n in [int(w) for w in words if w.isdigit()] or [8192]:
            guarded(f"timing at {n}", lambda n=n: time_all(n))


if __name__ == "__main__":
    main()
