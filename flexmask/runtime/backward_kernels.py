"""Which kernels compute gradients for a call's structure and shapes, with their maps, by rows and by columns; found or made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..analysis import Facts
from ..ir import show, simplify
from ..lowering import BackwardPlan, HopperBackwardPlan, emit_function, emit_gradient, plan_backward, plan_hopper_backward
from ..templates.assemble_backward import assemble_backward
from ..templates.assemble_hopper_backward import assemble_hopper_backward
from ..templates.backward_passes import Pass
from . import launch
from .choice import DETERMINISTIC, FREE, INTERPRETED, Target, arch_of
from .maps import find_device_maps, find_map, host_variant
from .recipes import captures_of
from .replay import Replays
from .request import Request
from .store import Store, code_fingerprint
from .tile_map import TileMap
from .variants import NO_MASK, Variant, by_predicate, hopper_variants, is_costly, reads_by_score, variants

PARTS = {"dq": "row", "dkdv": "column"}


@dataclass(frozen=True)
class Work:
    """The kernels of a backward pass with their maps. Those of `fused` compute all three gradients; `rows` (dq) and `columns` (dk and dv)
    are for where flags say that none of them does, or for all where there is none; `peaks` go before `rows` that add in fixed point."""

    fused: Sequence[Pass]
    rows: Sequence[Pass]
    columns: Sequence[Pass]
    peaks: Sequence[Pass]
    replays: Replays = field(default_factory=Replays)


def find_work(store: Store, request: Request, q: torch.Tensor, target: Target, scatter: str, heavy: bool) -> Work:
    """What a call's structure and shapes need. `scatter` says how gradients of captured tables are added up, if they are wanted; `heavy`
    kernels for dk and dv hold more than their mods need."""

    def make() -> Work:
        fused, columns = ((), ()) if scatter else _fused(store, request, q, target)
        if fused and not columns:
            return Work(fused, (), (), ())
        rows = _passes(store, request, q, "dq", target, scatter)
        columns = columns or _passes(store, request, q, "dkdv", target, heavy=heavy)
        return Work(fused, rows, columns, _passes(store, request, q, "dq", target, "peak") if scatter == "fixed" else ())

    key = ("backward", request.shapes, target, q.device, scatter, heavy)
    found: Work = store.launches(key, (request.mask, request.score), make)
    return found


def _passes(
    store: Store, request: Request, q: torch.Tensor, part: str, target: Target, scatter: str = "", heavy: bool = False
) -> Sequence[Pass]:
    """The plain kernels of a part with their maps."""
    axis = PARTS[part]
    facts = None if request.mask is None else store.facts(request.mask)[1]
    chosen = _variants(request, facts, q, axis)
    plans = [_plan(store, request, variant, part, target, scatter, heavy) for variant in chosen]
    modules = [_load(store, request, plan) for plan in plans]
    wanted = tuple([(variant, plan.block_q, plan.block_kv) for variant, plan in zip(chosen, plans, strict=True)])
    if request.mask is None or chosen[0].map_form == "none":
        maps: Sequence[TileMap | None] = [None]
    elif q.device.type == "cpu":
        maps = [find_map(store, request.mask, request.extent(q.device), *wanted[0][1:], axis)[1]]
    else:
        maps = find_device_maps(store, request.mask, request.extent(q.device), wanted, axis).maps
    return [(module, _given(tile_map)) for module, tile_map in zip(modules, maps, strict=True)]


def _fused(store: Store, request: Request, q: torch.Tensor, target: Target) -> tuple[Sequence[Pass], Sequence[Pass]]:
    """The Hopper kernels that compute all three gradients, with their maps, and the plain one for dk and dv that takes their place where
    flags say so; nothing where that template does not serve."""
    chosen = choose_fused(store, request, target)
    if isinstance(chosen, str):
        return (), ()
    plans: list[tuple[Variant, HopperBackwardPlan | BackwardPlan]] = list(chosen)
    if chosen[0][0].runs == "hold":
        plans.append((by_predicate("fail"), _plan(store, request, by_predicate("fail"), "dkdv", target)))
    modules = [_load(store, request, plan) for _, plan in plans]
    maps: Sequence[TileMap | None] = [None]
    if request.mask is not None and plans[0][0].map_form != "none":
        wanted = tuple([(variant, plan.block_q, plan.block_kv) for variant, plan in plans])
        maps = find_device_maps(store, request.mask, request.extent(q.device), wanted, "column").maps
    passes = [(module, _given(tile_map, i < len(chosen))) for i, (module, tile_map) in enumerate(zip(modules, maps, strict=True))]
    return passes[: len(chosen)], passes[len(chosen) :]


def _load(store: Store, request: Request, plan: BackwardPlan | HopperBackwardPlan) -> Any:
    """The kernel's module, written and loaded at most once."""
    key = _key(store, request, plan)
    return store.kernel((key,), lambda: launch.load(store.kernel_file(key, lambda: _write(store, request, plan))))


def choose_fused(store: Store, request: Request, target: Target) -> tuple[tuple[Variant, HopperBackwardPlan], ...] | str:
    """The variants by columns and their plans for the Hopper template, of which each but the last has a flag that passes the turn on; or
    why that does not serve ("" where the GPU is another one)."""
    if target.arch != 90 or target.plain:
        return target.plain
    if not target.tma:
        return "rows of q, k, v and dout are not multiples of 16 bytes apart"
    s, facts = request.shapes, None if request.mask is None else store.facts(request.mask)[1]
    promised = frozenset[int]() if request.mask is None else request.mask.promised
    chosen = []
    for variant in [v for v in hopper_variants(facts, promised, "column") if not v.evaluated]:
        plan = plan_hopper_backward(
            s.head_dim, s.v_head_dim, dtype=target.dtype_name, arch=target.arch, map_form=variant.map_form, crossed=variant.crossed,
            pieces=0 if variant.crossed else variant.pieces, starts=variant.starts, runs=variant.runs, score=request.score is not None,
            bits=variant.bits,
        )  # fmt: skip
        if isinstance(plan, str):
            return plan
        chosen.append((variant, plan))
    return tuple(chosen)


def describe(store: Store, request: Request, tensors: tuple[torch.Tensor, ...], deterministic: bool) -> list[str]:
    """Which kernels compute gradients, and why. What table gradients need besides is not looked at."""
    q, k, v = tensors
    why = DETERMINISTIC if deterministic else FREE if q.is_cuda else INTERPRETED
    target = Target(q.dtype, arch_of(q.device), q.is_cuda and launch.fits_tma(q, k, v), why)
    chosen = choose_fused(store, request, target)
    if not isinstance(chosen, str):
        return [f"gradients       {plan}" for _, plan in chosen]
    lines = []
    for part, axis in PARTS.items():
        facts = None if request.mask is None else store.facts(request.mask)[1]
        lines += [f"gradients       {_plan(store, request, each, part, target)}" for each in _variants(request, facts, q, axis)]
    return lines + [f"template        plain Triton rather than Hopper's: {chosen}"] * bool(chosen)


def _variants(request: Request, facts: Facts | None, q: torch.Tensor, axis: str) -> tuple[Variant, ...]:
    """The variants of the mask along an axis. Bits of tiles are not read by the backward kernels, which evaluate the predicate then."""
    if request.mask is None or facts is None:
        return (NO_MASK,)
    if q.device.type == "cpu":
        return (host_variant(request.mask, facts, request.extent(q.device), axis),)
    found = variants(facts, request.mask.promised, axis)
    return (by_predicate(),) if found[0].bits else found


def _plan(
    store: Store, request: Request, variant: Variant, part: str, target: Target, scatter: str = "", heavy: bool = False
) -> BackwardPlan:
    s = request.shapes
    mods = [store.facts(request.mask)[1].predicate] if variant.evaluated and request.mask is not None else []
    mods += [] if request.score is None else [request.score.expr]
    return plan_backward(
        part, s.head_dim, s.v_head_dim, dtype=target.dtype_name, arch=target.arch, map_form=variant.map_form,
        pieces=variant.pieces, starts=variant.starts, runs=variant.runs, score=request.score is not None, scatter=scatter,
        loads="tma" if target.tma and target.arch >= 90 else "pointer",
        heavy=is_costly(*mods) or reads_by_score(*mods) or bool(scatter) or heavy, pipelined=not reads_by_score(*mods),
    )  # fmt: skip


def _key(store: Store, request: Request, plan: BackwardPlan | HopperBackwardPlan) -> str:
    """sha256 of the plan, the mods' structures and names (both are in the text), and the code that writes it."""
    parts = [plan.to_json(), code_fingerprint()]
    for traced in (request.mask, request.score):
        if traced is not None:
            parts += [store.key_of(traced), traced.name, str(traced.names())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write(store: Store, request: Request, plan: BackwardPlan | HopperBackwardPlan) -> str:
    """The kernel's source: one readable file that runs without flexmask."""
    header, mask, score, gradient = [], None, None, None
    if request.mask is not None:
        predicate = store.facts(request.mask)[1].predicate
        header += [f"mask {request.mask.name}", f"    {show(predicate, request.mask.names())}"]
        if plan.evaluated:
            mask = emit_function("mask_mod", predicate, captures_of(request.mask), "mask")
    if isinstance(plan, HopperBackwardPlan):
        return assemble_hopper_backward(plan, header)
    if request.score is not None:
        expr, spec = simplify(request.score.expr), captures_of(request.score)
        header += [f"score {request.score.name}", f"    {show(expr, request.score.names())}"]
        score = emit_function("score_mod", expr, spec, "score")
        gradient = emit_gradient(expr, spec, "score", scatter=plan.scatter or "float")
    return assemble_backward(plan, mask, score, gradient, header)


def _given(tile_map: TileMap | None, ordered: bool = False) -> dict[str, Any]:
    """A map as the backward kernels take it; `ordered` for one that is told in which order to begin lines."""
    if tile_map is None:
        return {}
    names = ("ranges", "counts", "offsets", "index", "patterns", "words", "broken")
    given = {name: getattr(tile_map, name) for name in names if getattr(tile_map, name) is not None}
    if tile_map.intervals is not None:
        given |= {"starts": tile_map.intervals.starts.contiguous(), "stops": tile_map.intervals.ends.contiguous()}
    if tile_map.crossing is not None:
        given |= {"row_starts": tile_map.crossing.starts, "row_stops": tile_map.crossing.ends}
    if ordered:
        given["order"] = tile_map.work_order()
    return given
