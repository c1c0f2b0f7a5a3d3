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
from .extras import NO_EXTRAS, Extras
from .request import Request, Result
from .steady import Steady
from .store import Store


@dataclass(frozen=True)
class Call:
    """One call of attention: what it asks for, and on which backend ("cpu" or "triton")."""

    store: Store
    request: Request
    scale: float
    backend: str
    extras: Extras = NO_EXTRAS
    deterministic: bool = False
    steady: tuple[Steady, Steady] | None = None  # forward and backward, of calls like this one that were made before it

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
        if torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):  # it would shorten the backends' own float32
                return self.forward(q, k, v)
        if self.backend == "cpu":
            return forward.run_cpu(self.store, self.request, q, k, v, self.scale, self.extras)
        return forward.run_triton(self.store, self.request, q, k, v, self.scale, self.extras, self.steady and self.steady[0])

    def backward(self, saved: backward.Saved, dout: torch.Tensor, dlse: torch.Tensor | None, wanted: list[int]) -> backward.Gradients:
        if torch.is_autocast_enabled(dout.device.type):
            with torch.autocast(dout.device.type, enabled=False):
                return self.backward(saved, dout, dlse, wanted)
        given = (self.store, self.request, saved, dout, dlse, self.scale, wanted, self.extras, self.deterministic)
        return backward.run_cpu(*given) if self.backend == "cpu" else backward.run_triton(*given, self.steady and self.steady[1])


def attend(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Result:
    """The result, with gradients in q, k, v, the sinks and the float tensors that the score mod captures, where any requires some."""
    sinks, tables = call.extras.sinks, call.request.score_tensors
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (q, k, v, sinks, *tables)):
        return call.forward(q, k, v)
    apply: Callable[..., Any] = _Attend.apply
    return Result(*apply(call, q, k, v, sinks, *tables))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any, *tables: torch.Tensor) -> Any:
        found = call.forward(q, k, v)
        # the captured tensors too: autograd then says so if one was changed in place before the backward pass
        masks = () if call.request.mask is None else call.request.mask.tensors
        ctx.save_for_backward(q, k, v, found.out, found.lse, sinks, call.extras.seed, *masks, *tables)
        ctx.call = call
        ctx.set_materialize_grads(False)
        if found.peaks is not None:
            ctx.mark_non_differentiable(found.peaks)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, _: torch.Tensor | None) -> Any:
        call, saved = ctx.call, backward.Saved(*ctx.saved_tensors[:5])
        dout = torch.zeros_like(saved.out) if dout is None else dout
        needed = ctx.needs_input_grad[5:]
        score = call.request.score
        carry = () if score is None else gradient_tables(simplify(score.expr))
        wanted = [n for n in carry if needed[n]]
        found = call.backward(saved, dout, dlse, wanted)
        dtables = [found.tables[n].to(t.dtype) if n in found.tables else None for n, t in enumerate(call.request.score_tensors)]
        dsinks = None if found.sinks is None else found.sinks.to(call.extras.sinks.dtype)
        return None, found.dq, found.dk, found.dv, dsinks, *dtables
