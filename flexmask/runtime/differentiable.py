"""Attention as an operation that autograd knows: it saves inputs, out and lse, and computes scores anew in its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..ir import simplify
from ..lowering import gradient_tables
from . import backward, forward
from .forward import Request, Result
from .store import Store


@dataclass(frozen=True)
class Call:
    """One call of attention: what it asks for, and on which backend ("cpu" or "triton")."""

    store: Store
    request: Request
    scale: float
    backend: str

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        run = forward.run_cpu if self.backend == "cpu" else forward.run_triton
        return run(self.store, self.request, q, k, v, self.scale)

    def backward(self, saved: backward.Saved, dout: torch.Tensor, dlse: torch.Tensor | None, wanted: list[int]) -> backward.Gradients:
        run = backward.run_cpu if self.backend == "cpu" else backward.run_triton
        return run(self.store, self.request, saved, dout, dlse, self.scale, wanted)


def attend(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
    """(out, lse), with gradients in q, k, v and the float tensors that the score mod captures where any of them requires some."""
    tables = call.request.score_tensors
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (q, k, v, *tables)):
        return call.forward(q, k, v)
    apply: Callable[..., Result] = _Attend.apply
    return apply(call, q, k, v, *tables)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor) -> Result:
        out, lse = call.forward(q, k, v)
        # the captured tensors too: autograd then says so if one was changed in place before the backward pass
        masks = () if call.request.mask is None else call.request.mask.tensors
        ctx.save_for_backward(q, k, v, out, lse, *masks, *tables)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        call, saved = ctx.call, backward.Saved(*ctx.saved_tensors[:5])
        dout = torch.zeros_like(saved.out) if dout is None else dout
        needed = ctx.needs_input_grad[4:]
        score = call.request.score
        carry = () if score is None else gradient_tables(simplify(score.expr))
        wanted = [n for n in carry if needed[n]]
        dq, dk, dv, tables = call.backward(saved, dout, dlse, wanted)
        found = [tables[n].to(t.dtype) if n in tables else None for n, t in enumerate(call.request.score_tensors)]
        return None, dq, dk, dv, *found
