"""One backward pass: kernels and maps for a call's structure and shapes, by rows and by columns, found or made, and run."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ..analysis import Facts
from ..ir import show, simplify
from ..lowering import BackwardPlan, emit_function, emit_gradient, gradient_tables, most_additions, plan_backward
from ..templates.assemble_backward import assemble_backward
from ..templates.backward_passes import Pass
from ..templates.backward_passes import backward as run_passes
from . import cpu, cpu_backward, launch
from .extras import NO_EXTRAS, Extras
from .forward import Request, arch_of
from .maps import find_device_maps, find_map, host_variant, interpreting
from .recipes import captures_of
from .replay import Ready
from .store import Store, code_fingerprint
from .table_buffers import FixedBuffers, FloatBuffers
from .tile_map import TileMap
from .variants import NO_MASK, Variant, by_predicate, is_costly, reads_by_score, variants

PARTS = {"dq": "row", "dkdv": "column"}


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
    extras: Extras = NO_EXTRAS, deterministic: bool = False,
) -> Gradients:  # fmt: skip
    """The same by generated kernels, on the tensors' GPU (or in Triton's interpreter)."""
    if launch.is_elsewhere(saved.q.device):
        with torch.cuda.device(saved.q.device):
            return run_triton(store, request, saved, dout, dlse, scale, wanted, extras, deterministic)
    tma = not interpreting() and launch.fits_tma(saved.q, saved.k, saved.v, dout)
    scatter = "" if not wanted else "fixed" if deterministic else "float"
    rows = _passes(store, request, saved.q, "dq", tma, scatter)
    # hashes beside two accumulators: tiles as large as without dropout would spill registers
    columns = _passes(store, request, saved.q, "dkdv", tma, heavy=extras.dropout is not None and arch_of(saved.q.device) >= 90)
    peaks = _passes(store, request, saved.q, "dq", tma, "peak") if scatter == "fixed" else Ready(())
    captures = [launch.NO_CAPTURES if t is None else (t.tensors, t.scalars) for t in (request.mask, request.score)]
    buffers = _buffers(request, saved.q, scatter, rows.kernels)

    def run() -> tuple[torch.Tensor | None, ...]:
        return run_passes(
            rows.kernels, columns.kernels, *saved, dout, dlse, scale=scale, mask=captures[0], score=captures[1],
            grads=buffers.grads, peaks=peaks.kernels, sinks=extras.sinks, dropout=extras.dropout,
        )  # fmt: skip

    inputs = (*saved, dout, *([] if dlse is None else [dlse]), *extras.tensors)
    # what the gradients of tables are added to is not made within `run`
    found: Any = run() if scatter else columns.replayed((rows, scale, dlse is None, extras.kind, *captures[1][0]), inputs, run)
    dq, dk, dv, sinks = found
    return Gradients(dq, dk, dv, buffers.result(wanted), sinks)


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


def _passes(
    store: Store, request: Request, q: torch.Tensor, part: str, tma: bool, scatter: str = "", heavy: bool = False
) -> Ready:
    """The kernels of a part with their maps; `heavy` ones hold more than their mods need."""
    key = ("backward", part, request.shapes, q.dtype, q.device, tma, scatter, heavy)
    make = partial(_find_passes, store, request, q, part, tma, scatter, heavy)
    found: Ready = store.launches(key, (request.mask, request.score), make)
    return found


def _find_passes(store: Store, request: Request, q: torch.Tensor, part: str, tma: bool, scatter: str, heavy: bool) -> Ready:
    s, axis = request.shapes, PARTS[part]
    facts = None if request.mask is None else store.facts(request.mask)[1]
    chosen = _variants(request, facts, q, axis)
    structure = tuple(None if t is None else store.key_of(t) for t in (request.mask, request.score))

    def make() -> list[tuple[BackwardPlan, Any]]:
        plans = [_plan(request, facts, variant, part, q, tma, scatter, heavy) for variant in chosen]
        return [(plan, launch.load(_file(store, request, plan))) for plan in plans]

    key = (*structure, "backward", part, s.head_dim, s.v_head_dim, q.dtype, arch_of(q.device), tma, scatter, heavy, chosen)
    kernels = store.kernel(key, make)
    wanted = tuple([(variant, plan.block_q, plan.block_kv) for variant, (plan, _) in zip(chosen, kernels, strict=True)])
    if request.mask is None or chosen[0].map_form == "none":
        maps: Sequence[TileMap | None] = [None]
    elif q.device.type == "cpu":
        maps = [find_map(store, request.mask, request.extent(q.device), *wanted[0][1:], axis)[1]]
    else:
        maps = find_device_maps(store, request.mask, request.extent(q.device), wanted, axis).maps
    return Ready([(module, _given(tile_map)) for (_, module), tile_map in zip(kernels, maps, strict=True)])


def _variants(request: Request, facts: Facts | None, q: torch.Tensor, axis: str) -> tuple[Variant, ...]:
    """The variants of the mask along an axis. Bits of tiles are not read by the backward kernels, which evaluate the predicate then."""
    if request.mask is None or facts is None:
        return (NO_MASK,)
    if q.device.type == "cpu":
        return (host_variant(request.mask, facts, request.extent(q.device), axis),)
    found = variants(facts, request.mask.promised, axis)
    return (by_predicate(),) if found[0].bits else found


def _plan(
    request: Request, facts: Facts | None, variant: Variant, part: str, q: torch.Tensor, tma: bool, scatter: str, heavy: bool
) -> BackwardPlan:
    s, arch = request.shapes, arch_of(q.device)
    evaluated = variant.map_form == "list" and not variant.pieces
    mods = [facts.predicate] * evaluated if facts is not None else []
    mods += [] if request.score is None else [request.score.expr]
    return plan_backward(
        part, s.head_dim, s.v_head_dim, dtype=str(q.dtype).removeprefix("torch."), arch=arch, map_form=variant.map_form,
        pieces=variant.pieces, starts=variant.starts, runs=variant.runs, score=request.score is not None, scatter=scatter,
        loads="tma" if tma and arch >= 90 else "pointer",
        heavy=is_costly(*mods) or reads_by_score(*mods) or bool(scatter) or heavy, pipelined=not reads_by_score(*mods),
    )  # fmt: skip


def _file(store: Store, request: Request, plan: BackwardPlan) -> Any:
    parts = [plan.to_json(), code_fingerprint()]
    for traced in (request.mask, request.score):
        if traced is not None:
            parts += [store.key_of(traced), traced.name, str(traced.names())]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return store.kernel_file(key, lambda: _write(store, request, plan))


def _write(store: Store, request: Request, plan: BackwardPlan) -> str:
    """The kernel's source: one readable file that runs without flexmask."""
    header, mask, score, gradient = [], None, None, None
    if request.mask is not None:
        predicate = store.facts(request.mask)[1].predicate
        header += [f"mask {request.mask.name}", f"    {show(predicate, request.mask.names())}"]
        if plan.evaluated:
            mask = emit_function("mask_mod", predicate, captures_of(request.mask), "mask")
    if request.score is not None:
        expr, spec = simplify(request.score.expr), captures_of(request.score)
        header += [f"score {request.score.name}", f"    {show(expr, request.score.names())}"]
        score = emit_function("score_mod", expr, spec, "score")
        gradient = emit_gradient(expr, spec, "score", scatter=plan.scatter or "float")
    return assemble_backward(plan, mask, score, gradient, header)


def _given(tile_map: TileMap | None) -> dict[str, Any]:
    """A map as the backward kernels take it."""
    if tile_map is None:
        return {}
    names = ("ranges", "counts", "offsets", "index", "broken")
    given = {name: getattr(tile_map, name) for name in names if getattr(tile_map, name) is not None}
    if tile_map.intervals is not None:
        given |= {"starts": tile_map.intervals.starts.contiguous(), "stops": tile_map.intervals.ends.contiguous()}
    return given
