"""Results against the float64 reference on sampled rows, and gradients against a rival's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import flexmask
from flexmask import reference

ROWS = 24
Tensors = tuple[torch.Tensor, ...]


def check(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: flexmask.Mask) -> float:
    """Largest error on sampled rows of two heads against the float64 reference."""
    return Expected(q, k, v, None, mask).error(out)


class Expected:
    """What attention gives on sampled rows of the first key head or two of batch entry 0, in float64; and, for `dout`, the gradients that
    these rows alone bring about, of dq in these rows and of dk and dv everywhere. Costs O(rows * length)."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor | None, mask: flexmask.Mask):
        group = q.shape[1] // k.shape[1]
        self.kv_heads = min(k.shape[1], 2 if group == 1 else 1)
        self.heads = self.kv_heads * group
        self.rows = torch.linspace(0, q.shape[2] - 1, ROWS, device=q.device).long()
        part = [q[:1, : self.heads], k[:1, : self.kv_heads], v[:1, : self.kv_heads]]
        given = [x.detach().double().requires_grad_(dout is not None) for x in part]
        out = reference.attention(given[0], given[1], given[2], mask, enable_gqa=group > 1, rows=self.rows)
        self.out: torch.Tensor = out.detach()
        self.gradients: Tensors = ()
        if dout is not None:
            dq, dk, dv = torch.autograd.grad(out, given, dout[:1, : self.heads, self.rows].double())
            self.gradients = dq[:, :, self.rows], dk, dv

    def error(self, out: torch.Tensor) -> float:
        return float((out.detach()[:1, : self.heads, self.rows].double() - self.out).abs().max())

    def sampled(self, dout: torch.Tensor) -> torch.Tensor:
        """`dout` in the sampled rows, zeros elsewhere: what the gradients have to be found for."""
        return torch.zeros_like(dout).index_copy_(2, self.rows, dout[:, :, self.rows])

    def gradient_error(self, gradients: Tensors) -> float:
        """The largest error of dq, dk and dv, relative to the greatest entry of each."""
        dq, dk, dv = gradients
        found = dq[:1, : self.heads, self.rows], dk[:1, : self.kv_heads], dv[:1, : self.kv_heads]
        return difference(found, self.gradients)


def difference(found: Tensors, wanted: Tensors) -> float:
    """The largest difference between tensors, relative to the greatest entry of each wanted one; nan where something is nan."""
    apart = [((a.to(b.dtype) - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(found, wanted, strict=True)]
    return max(apart, key=lambda x: (x != x, x))


@dataclass(frozen=True)
class Memory:
    """MiB above what was taken at the start."""

    device: str
    before: int

    @staticmethod
    def start(device: str) -> Memory:
        if device == "cpu":
            return Memory(device, 0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return Memory(device, torch.cuda.memory_allocated())

    def peak_mib(self) -> float:
        """At the highest point since the start; nan on the CPU, where nothing counts it."""
        if self.device == "cpu":
            return float("nan")
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self.before) / 2**20
