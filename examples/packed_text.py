"""The main job on real input: packed documents through one attention layer, checked, explained, timed.

    python -m examples.packed_text        (or `make demo`)

Text files that any machine has, the sources of Python's standard library, are packed as bytes into sequences of 8192 with
document boundaries. A small random transformer layer makes q, k and v of them; flexmask runs causal & document & window
attention with a soft-cap. Uses the GPU where there is one.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import flexmask
from flexmask import masks, reference, scores

HEADS, HEAD_DIM, WINDOW, CAP = 4, 64, 1024, 30.0


def pack(length: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and document numbers, both int32 [batch, length]: whole files one after another, cut where a sequence ends."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text, documents = bytearray(), []
    for number, file in enumerate(files):
        data = file.read_bytes()
        text += data
        documents += [number] * len(data)
        if len(text) >= length * batch:
            break
    else:
        raise SystemExit(f"the standard library here has only {len(text)} bytes of sources")
    size = (batch, length)
    tokens = torch.frombuffer(text[: length * batch], dtype=torch.uint8).int().view(size)
    return tokens, torch.tensor(documents[: length * batch], dtype=torch.int32).view(size)


def project(tokens: torch.Tensor, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v [batch, heads, length, head_dim] of a random layer: embedding, norm, one linear map."""
    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    embedding, qkv = torch.nn.Embedding(256, width), torch.nn.Linear(width, 3 * width)
    with torch.no_grad():
        x = qkv(F.layer_norm(embedding(tokens.long()), (width,)))
    x = x.view(*tokens.shape, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
    return tuple(part.to(device, dtype) for part in x)


def measure(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, float]:
    """Milliseconds (best of three after one warm-up) and peak extra memory in MiB (NaN where the system does not tell)."""
    run()
    times = []
    base = _reset_peak(device)
    for _ in range(3):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times), (_peak(device) - base) / 2**20


def _reset_peak(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew
    except OSError:
        return float("nan")
    return _peak(device, "VmRSS")


def _peak(device: torch.device, field: str = "VmHWM") -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
    except (OSError, StopIteration):
        return float("nan")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--length", type=int, default=8192)
    arguments.add_argument("--batch", type=int, default=2)
    options = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    tokens, documents = pack(options.length, options.batch)
    q, k, v = project(tokens, device, dtype)
    documents = documents.to(device)
    print(f"{options.batch} sequences of {options.length} bytes, {int(documents.max()) + 1} files")
    print(f"q {tuple(q.shape)} {dtype} on {device}\n")

    mask = masks.document(documents) & masks.sliding_window(WINDOW)
    attn = flexmask.compile(mask=mask, score=scores.softcap(CAP))
    start = time.perf_counter()
    out = attn(q, k, v)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"first call, tracing and analysis and map included: {(time.perf_counter() - start) * 1e3:.0f} ms\n")

    print(attn.explain(q, k, v))
    print(f"kernel source: {attn.source_path()}\n")
    print(f"{mask}\n")

    rows = torch.arange(0, options.length, max(1, options.length // 64))
    expected = reference.attention(q, k, v, mask, scores.softcap(CAP), rows=rows)
    error = (out[:, :, rows].double() - expected.double()).abs().max().item()
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    print(f"against the dense float64 reference, {len(rows)} rows of each head: largest error {error:.1e} (limit {limit:.0e})")
    if not error < limit:
        raise SystemExit("flexmask disagrees with dense attention")

    compare(attn, mask, q, k, v)


def compare(attn: flexmask.Attention, mask: flexmask.Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Time and memory beside SDPA with the dense mask (which has no soft-cap, so it does a little less)."""
    batch, _, length, _ = q.shape
    dense = mask.to_dense(length, length, batch, 1, q.device).contiguous()
    ours = measure(lambda: attn(q, k, v), q.device)
    sdpa = measure(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=dense), q.device)
    print(f"flexmask     {ours[0]:9.1f} ms   {ours[1]:8.1f} MiB")
    print(f"dense SDPA   {sdpa[0]:9.1f} ms   {sdpa[1]:8.1f} MiB, and {dense.numel() / 2**20:.0f} MiB for the mask")
    print(f"flexmask is {sdpa[0] / ours[0]:.1f} times as fast")


if __name__ == "__main__":
    main()
