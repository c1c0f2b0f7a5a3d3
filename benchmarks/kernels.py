"""Forward attention on a GPU beside its rivals, in one process, interleaved; outputs checked in the same run.

    python -m benchmarks.kernels [--lengths 8192 32768] [--masks full causal ...] [--json FILE]

For each mask and length: median milliseconds (triton.testing.do_bench), exact-area TFLOP/s (4 * B * H * D * kept pairs), block
TFLOP/s (non-empty 128 x 128 blocks instead of kept pairs), and the largest error on sampled rows against the float64 reference.
Rivals: FlexAttention (torch.compile), and for full and causal SDPA with cuDNN and with flash, and FlashAttention-3. A rival that is
missing or fails is printed as such. Maps are measured by `benchmarks.maps`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flexmask
from benchmarks import masks as zoo
from benchmarks.rows import compile_first, measured, options
from flexmask import reference
from flexmask.ir import Env, evaluate

HEADS = {8192: 32, 32768: 8, 131072: 4}


@dataclass
class Row:
    """One case: milliseconds by contestant, and what they are measured against."""

    mask: str
    length: int
    batch: int
    heads: int
    head_dim: int
    kept_pairs: int
    block_pairs: int
    error: float = float("nan")
    ms: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def tflops(self, name: str, pairs: int) -> float:
        return 4e-9 * self.batch * self.heads * self.head_dim * pairs / self.ms[name] if name in self.ms else float("nan")


def kept_pairs(mask: flexmask.Mask, length: int, chunk: int = 1024) -> tuple[int, int]:
    """Kept pairs of batch entry 0, head 0, and the pairs of its non-empty 128 x 128 blocks, by evaluation in row chunks."""
    traced = mask.traced()
    k_idx = torch.arange(length, device="cuda")
    kept = blocks = 0
    for start in range(0, length, chunk):
        q_idx = torch.arange(start, start + chunk, device="cuda")[:, None]
        env = Env({"b": 0, "h": 0, "q_idx": q_idx, "kv_idx": k_idx}, traced.tensors, traced.scalars)
        keep = torch.as_tensor(evaluate(traced.expr, env), device="cuda").expand(chunk, length)
        kept += int(keep.sum())
        blocks += int(keep.view(chunk // 128, 128, length // 128, 128).any(3).any(1).sum())
    return kept, blocks * 128 * 128


def check(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: flexmask.Mask) -> float:
    """Largest error on sampled rows of two heads against the float64 reference."""
    rows = torch.linspace(0, q.shape[2] - 1, 24, device=q.device).long()
    want = reference.attention(q[:1, :2], k[:1, :2], v[:1, :2], mask, rows=rows)
    return float((out[:1, :2, rows].double() - want.double()).abs().max())


def plain(mask: flexmask.Mask) -> Callable[..., Any]:
    """The mask as the bare function that torch.compile traces: the user's functions and their operators, without the Mask objects."""
    inner: Any = mask.function
    if hasattr(inner, "left"):
        left, right = plain(inner.left), plain(inner.right)
        join = {"&": torch.logical_and, "|": torch.logical_or, "^": torch.logical_xor}[inner.symbol]
        return lambda b, h, q_idx, kv_idx: join(left(b, h, q_idx, kv_idx), right(b, h, q_idx, kv_idx))
    if hasattr(inner, "inner"):
        negated = plain(inner.inner)
        return lambda b, h, q_idx, kv_idx: torch.logical_not(negated(b, h, q_idx, kv_idx))
    roles = tuple(role for role, _ in mask._binding)
    order = ("b", "h", "q_idx", "kv_idx")
    places = tuple(order.index(role) for role in roles)
    return lambda b, h, q_idx, kv_idx: inner(*((b, h, q_idx, kv_idx)[i] for i in places))


def contestants(
    name: str, mask: flexmask.Mask, row: Row, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    attn = flexmask.compile(mask)
    compiled = torch.compile(flex_attention, dynamic=False)
    runs: dict[str, Callable[[], Any]] = {"flexmask": lambda: attn(q, k, v)}
    try:
        make = torch.compile(create_block_mask)
        block_mask = make(plain(mask), None, None, row.length, row.length, device="cuda")
        runs["FlexAttention"] = lambda: compiled(q, k, v, block_mask=block_mask)
    except Exception as error:
        row.failures["FlexAttention"] = f"{type(error).__name__}: {str(error)[:200]}"
    if name in ("full", "causal"):
        runs |= flash_attention_3(q, k, v, name == "causal")
        for backend, label in ((SDPBackend.CUDNN_ATTENTION, "SDPA cuDNN"), (SDPBackend.FLASH_ATTENTION, "SDPA flash")):
            runs[label] = lambda backend=backend: sdpa(backend, q, k, v, name == "causal")
    return runs


def flash_attention_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, Callable[[], Any]]:
    """FlashAttention-3 where it is installed (fa3-fwd), in the layout [batch, length, heads, head_dim] that it is made for."""
    try:
        from fa3_fwd_interface import flash_attn_func  # type: ignore[import-not-found]
    except ImportError:
        return {}
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return {"FA3": lambda: flash_attn_func(*turned, causal=causal)}


def sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """torch's own attention by one of its backends."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def bench(run: Callable[[], Any]) -> float:
    import triton

    return float(triton.testing.do_bench(run, warmup=25, rep=120, return_mode="median"))


def inputs(length: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shape = (max(1, 16384 // length), HEADS[length] * 128 // head_dim, length, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return q, k, v


def measure(name: str, length: int, head_dim: int, once: bool = False) -> Row:
    """A case; with `once` it is only run."""
    q, k, v = inputs(length, head_dim)
    mask = zoo.build(name, length, "cuda")
    row = Row(name, length, q.shape[0], q.shape[1], head_dim, *((0, 0) if once else kept_pairs(mask, length)))
    runs = contestants(name, mask, row, q, k, v)
    if once:
        for run in runs.values():
            run()
        return row
    for _ in range(2):  # twice round, interleaved; the better of two medians
        for label, run in runs.items():
            try:
                row.ms[label] = min(row.ms.get(label, float("inf")), bench(run))
            except Exception as error:
                row.failures[label] = f"{type(error).__name__}: {str(error)[:300]}"
    if "flexmask" in row.ms:
        row.error = check(runs["flexmask"](), q, k, v, mask)
    return row


def show(row: Row) -> str:
    cells = [f"{label} {row.ms[label]:.3f} ms {row.tflops(label, row.kept_pairs):.0f}" for label in row.ms]
    ratio = row.ms.get("FlexAttention", float("nan")) / row.ms.get("flexmask", float("nan"))
    density = row.block_pairs / row.length**2
    text = f"{row.mask:20s} {row.length:6d} density {density:.4f} | " + " | ".join(cells)
    text += f" | block {row.tflops('flexmask', row.block_pairs):.0f} | x{ratio:.2f} | err {row.error:.1e}"
    return text + "".join(f"\n    {label} failed: {why}" for label, why in row.failures.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, default=128)
    given = options(parser, [8192, 32768], zoo.NAMES)
    cases = [(name, length) for length in given.lengths for name in given.masks]
    if given.jobs:
        compile_first("benchmarks.kernels", cases, given.jobs, "--head-dim", str(given.head_dim))
    if given.compile_only:
        for name, length in cases:
            measure(name, length, given.head_dim, once=True)
        return
    measured(cases, lambda name, length: measure(name, length, given.head_dim), show, given.json)


if __name__ == "__main__":
    main()
