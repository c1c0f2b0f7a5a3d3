"""One backward pass for a call's structure and shapes, run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from ..ir import simplify
from ..lowering import gradient_tables, most_additions
from ..templates.backward_passes import Pass
from ..templates.backward_passes import backward as run_passes
from . import cpu, cpu_backward, launch
from .backward_kernels import Work, find_work
from .choice import DROPOUT, FREE, INTERPRETED, Target, arch_of
from .extras import NO_EXTRAS, Extras
from .maps import find_map
from .request import Request
from .steady import Steady
from .store import Store
from .table_buffers import FixedBuffers, FloatBuffers


class Gradients(NamedTuple):
    """dq, dk, dv, gradients of captured tensors of the score by their numbers, and that of the sinks, float32, where there are any."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    tables: dict[int, torch.Tensor]
    sinks: torch.Tensor | None = None


class Saved(NamedTuple):
    """What the forward pass leaves: its inputs [B, Hq, Q, D], [B | 1, Hkv, KV, D], [B | 1, Hkv, KV, Dv], out and lse."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


def run_cpu(
    store: Store, request: Request, saved: Saved, dout: torch.Tensor, dlse: torch.Tensor | None, scale: float, wanted: Collection[int],
    extras: Extras = NO_EXTRAS, deterministic: bool = False,
) -> Gradients:  # fmt: skip
    """Gradients on CPU tensors; of the score's captured tensors those that are `wanted`."""
    mask = None if request.mask is None else (store.facts(request.mask)[1].predicate, request.mask.tensors, request.mask.scalars)
    score = None if request.score is None else (simplify(request.score.expr), request.score.tensors, request.score.scalars)
    block_q, block_kv = cpu.blocks(request.shapes.q_len, request.shapes.kv_len)
    tile_map = None if request.mask is None else find_map(store, request.mask, request.extent(saved.q.device), block_q, block_kv)[1]
    found = cpu_backward.backward(
        saved.q, saved.k, saved.v, saved.out, saved.lse, dout, dlse, scale=scale, tile_map=tile_map, mask=mask, score=score, tables=wanted,
        extras=extras,
    )  # fmt: skip
    return Gradients(found.q, found.k, found.v, found.tables, found.sinks)


def run_triton(
    store: Store, request: Request, saved: Saved, dout: torch.Tensor, dlse: torch.Tensor | None, scale: float, wanted: Collection[int],
    extras: Extras = NO_EXTRAS, deterministic: bool = False, steady: Steady | None = None,
) -> Gradients:  # fmt: skip
    """The same by generated kernels, on the tensors' GPU (or in Triton's interpreter); or as `steady` repeats it, where the last call was
    one of this request, scale and determinism, with neither extras nor tables' gradients."""
    inputs = (*saved, dout, *([] if dlse is None else [dlse]), *extras.tensors)
    repeated = None if steady is None or wanted else steady.run(store, request, inputs)
    if repeated is not None:
        dq, dk, dv, _ = repeated
        return Gradients(dq, dk, dv, {}, None)
    if launch.is_elsewhere(saved.q.device):
        with torch.cuda.device(saved.q.device):
            return run_triton(store, request, saved, dout, dlse, scale, wanted, extras, deterministic)
    tma = dout.is_cuda and launch.fits_tma(saved.q, saved.k, saved.v, dout)
    target = Target(saved.q.dtype, arch_of(saved.q.device), tma, _plain(extras, dout.is_cuda), deterministic)
    scatter = "" if not wanted else "fixed" if deterministic else "float"
    captures = [launch.NO_CAPTURES if t is None else (t.tensors, t.scalars) for t in (request.mask, request.score)]

    def start(work: Work, buffers: FloatBuffers | FixedBuffers) -> tuple[torch.Tensor | None, ...]:
        return run_passes(
            work.rows, work.columns, *saved, dout, dlse, scale=scale, mask=captures[0], score=captures[1], grads=buffers.grads,
            peaks=work.peaks, sinks=extras.sinks, dropout=extras.dropout, fused=work.fused,
        )  # fmt: skip

    ready = find_work(
        store, request, saved.q, target, scatter, start=lambda work: start(work, _buffers(request, saved.q, scatter, work.rows)),
        heavy=bool(extras.dropout_p) and target.arch >= 90,  # hashes beside two accumulators: larger tiles would spill registers
    )  # fmt: skip
    work, buffers = ready.work, _buffers(request, saved.q, scatter, ready.work.rows)
    given = (scale, dlse is None, extras.kind, *captures[0][1], *captures[1][1])
    if scatter:  # what the gradients of tables are added to is not made within a replay
        dq, dk, dv, sinks = start(work, buffers)
    else:
        (dq, dk, dv, sinks), replay = ready.replays.run(given, inputs, lambda: start(work, buffers), ready.standing)
        if steady is not None:
            steady.keep(store, request, inputs, replay, ready.standing)
    assert dq is not None and dk is not None and dv is not None
    return Gradients(dq, dk, dv, buffers.result(wanted), sinks)


def _plain(extras: Extras, on_gpu: bool) -> str:
    """What keeps a call from the kernel that computes all gradients at once, if anything."""
    return DROPOUT if extras.dropout_p else FREE if on_gpu else INTERPRETED


def _buffers(request: Request, q: torch.Tensor, scatter: str, rows: Sequence[Pass]) -> FloatBuffers | FixedBuffers:
    """What the kernels of dq add the gradients of captured tables to: all of those tables, as one kernel serves whichever are wanted."""
    if request.score is None or not scatter:
        return FloatBuffers({})
    expr, s = simplify(request.score.expr), request.shapes
    tables = {n: request.score.tensors[n] for n in gradient_tables(expr)}
    if scatter == "float":
        return FloatBuffers.zeros(tables, q.device)
    sizes = (q.shape[0], q.shape[1], s.q_len, s.kv_len)
    blocks = [(module.BLOCK_Q.value, module.BLOCK_KV.value) for module, _ in rows]
    return FixedBuffers.zeros(tables, q.device, {n: max(most_additions(expr, n, sizes, b) for b in blocks) for n in tables})
