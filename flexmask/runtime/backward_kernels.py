"""Which kernels compute gradients for a call's structure and shapes, with their maps, by rows and by columns; found or made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..analysis import Facts
from ..ir import show, simplify
from ..lowering import (
    BackwardPlan,
    HopperBackwardPlan,
    crowds_registers,
    emit_column,
    emit_function,
    emit_gradient,
    plan_backward,
    plan_hopper_backward,
)
from ..templates.assemble_backward import assemble_backward
from ..templates.assemble_hopper_backward import assemble_hopper_backward
from ..templates.backward_passes import Pass
from . import launch, tuning
from .choice import DROPOUT, FREE, INTERPRETED, Target, arch_of, is_narrow
from .maps import find_device_maps, find_map, host_variant
from .recipes import captures_of
from .replay import Replays, Standing
from .request import Request
from .store import Store, code_fingerprint
from .tile_map import TileMap
from .tuning import UNTUNED, Found, Subject, Trial, sized
from .variants import NO_MASK, Variant, by_predicate, hopper_variants, is_costly, only_gathers, reads_by_score, variants

PARTS = {"dq": "row", "dkdv": "column"}


@dataclass(frozen=True)
class Work:
    """The kernels of a backward pass with their maps. Those of `fused` compute all three gradients; `rows` (dq) and `columns` (dk and dv)
    are for where flags say that none of them does, or for all where there is none; `peaks` go before `rows` that add in fixed point."""

    fused: Sequence[Pass]
    rows: Sequence[Pass]
    columns: Sequence[Pass]
    peaks: Sequence[Pass]

    @property
    def passes(self) -> tuple[Sequence[Pass], ...]:
        return self.fused, self.rows, self.columns, self.peaks


@dataclass(frozen=True)
class Ready:
    """The work, how calls of its kernels are repeated, and what of its maps stays from call to call."""

    work: Work
    replays: Replays
    standing: Standing


# starts the kernels for the tensors of a call
Start = Callable[[Work], Sequence[torch.Tensor | None]]


def find_work(
    store: Store, request: Request, q: torch.Tensor, target: Target, scatter: str, heavy: bool, start: Start | None = None
) -> Ready:
    """What a call's structure and shapes need. `scatter` says how gradients of captured tables are added up, if they are wanted; `heavy`
    kernels for dk and dv hold more than their mods need. `start` is what measuring would need."""

    def make() -> Ready:
        tuned = tuning.find(store, request, q.device, subject(store, request, q, target, scatter, heavy, start))
        work = _prepared(store, request, q, _kernels(store, request, q.device, target, scatter, heavy, tuned))
        names = tuple([tuple([module.__name__ for module, _ in chain]) for chain in work.passes])
        replays: Replays = store.kernel(("replays", q.device, names), Replays)
        return Ready(work, replays, replays.standing([maps for chain in work.passes for _, maps in chain], request.tables))

    key = ("backward", request.shapes, request.autotune, target, q.device, scatter, heavy)
    found: Ready = store.launches(key, request.mask, request.score, make)
    return found


@dataclass(frozen=True)
class Planned:
    """A kernel to be: the variant of the mask that it serves, its plan, and where its sizes come from, unless they are the planner's."""

    variant: Variant
    plan: BackwardPlan | HopperBackwardPlan
    sizes: str = ""


def plan_work(
    store: Store, request: Request, device: torch.device, target: Target, scatter: str = "", heavy: bool = False, tuned: Found = UNTUNED
) -> dict[str, list[Planned]]:
    """The kernels of each chain: "fused", or "dq" and "dkdv", or all three where the latter stand by for the first; and "peak"."""
    facts = None if request.mask is None else store.facts(request.mask)[1]
    narrow = is_narrow(store, request)

    def chain(name: str, chosen: Sequence[tuple[Variant, BackwardPlan | HopperBackwardPlan]]) -> list[Planned]:
        return [Planned(variant, *sized(plan, narrow, tuned, name, number)) for number, (variant, plan) in enumerate(chosen)]

    def plain(part: str, scatter: str = "", heavy: bool = False) -> list[tuple[Variant, BackwardPlan | HopperBackwardPlan]]:
        variants = _variants(request, facts, device, PARTS[part])
        return [(variant, _plan(store, request, variant, part, target, scatter, heavy)) for variant in variants]

    fused = "" if scatter else choose_fused(store, request, target)
    if isinstance(fused, str):
        found = {"dq": chain("dq", plain("dq", scatter)), "dkdv": chain("dkdv", plain("dkdv", heavy=heavy))}
        return found | ({"peak": chain("peak", plain("dq", "peak"))} if scatter == "fixed" else {})
    if fused[0][0].runs != "hold":
        return {"fused": chain("fused", fused)}
    instead = by_predicate("fail")
    standing_by = chain("dkdv", [(instead, _plan(store, request, instead, "dkdv", target))])
    return {"fused": chain("fused", fused), "dq": chain("dq", plain("dq")), "dkdv": standing_by}


def subject(
    store: Store, request: Request, q: torch.Tensor, target: Target, scatter: str = "", heavy: bool = False, start: Start | None = None
) -> Subject:
    """The backward pass as something that may be tuned."""

    def plans() -> dict[str, list[BackwardPlan | HopperBackwardPlan]]:
        found = plan_work(store, request, q.device, target, scatter, heavy)
        return {name: [each.plan for each in some] for name, some in found.items()}

    def attempt(aside: Store, tuned: Found) -> Trial:
        assert start is not None
        work = _prepared(aside, request, q, _kernels(aside, request, q.device, target, scatter, heavy, tuned))
        turns = {"fused": tuning.turn_of(work.fused)}
        if turns["fused"] is None:
            turns |= {"dq": tuning.turn_of(work.rows), "dkdv": tuning.turn_of(work.columns)}
        return Trial(turns, lambda: start(work))

    return Subject(("backward", target, scatter, heavy), plans, attempt if start else None)


# kernels to be, loaded
Chain = Sequence[tuple[Planned, Any]]


def _kernels(
    store: Store, request: Request, device: torch.device, target: Target, scatter: str, heavy: bool, tuned: Found
) -> dict[str, Chain]:
    """The chains of `plan_work`, planned and loaded once for each structure; on the CPU the mask's values have a say."""

    def make() -> dict[str, Chain]:
        planned = plan_work(store, request, device, target, scatter, heavy, tuned)
        return {name: [(each, _load(store, request, each.plan)) for each in chain] for name, chain in planned.items()}

    if device.type == "cpu":
        return make()
    structure, s = tuple([None if t is None else store.key_of(t) for t in (request.mask, request.score)]), request.shapes
    found: dict[str, Chain] = store.kernel(("backward", structure, s.head_dim, s.v_head_dim, target, scatter, heavy, tuned), make)
    return found


def _prepared(store: Store, request: Request, q: torch.Tensor, kernels: dict[str, Chain]) -> Work:
    """The kernels with their maps. Those for dk and dv that stand by for others belong to one chain with them."""
    fused = kernels.get("fused", ())
    columns = _passes(store, request, q, [*fused, *kernels.get("dkdv", ())], "column")
    rows, peaks = (_passes(store, request, q, kernels.get(name, ()), "row") for name in ("dq", "peak"))
    return Work(columns[: len(fused)], rows, columns[len(fused) :], peaks)


def _passes(store: Store, request: Request, q: torch.Tensor, kernels: Chain, axis: str) -> Sequence[Pass]:
    """The kernels of a chain with their maps; those whose programs take turns with the ranks of their lines."""
    chain, modules = [each for each, _ in kernels], [module for _, module in kernels]
    wanted = tuple([(each.variant, each.plan.block_q, each.plan.block_kv) for each in chain])
    if not chain or request.mask is None or chain[0].variant.map_form == "none":
        maps: Sequence[TileMap | None] = [None] * len(chain)
    elif q.device.type == "cpu":
        maps = [find_map(store, request.mask, request.extent(q.device), *wanted[0][1:], axis)[1]]
    else:
        ranked = sum(isinstance(each.plan, HopperBackwardPlan) and each.plan.deterministic for each in chain)
        maps = find_device_maps(store, request.mask, request.extent(q.device), wanted, axis, ranked=ranked).maps
    ordered = [isinstance(each.plan, HopperBackwardPlan) and not each.plan.deterministic for each in chain]
    return [(module, _given(made, order)) for module, made, order in zip(modules, maps, ordered, strict=True)]


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
    chosen, mods = [], [] if request.score is None else [request.score.expr]
    for variant in [v for v in hopper_variants(facts, promised, "column") if not v.evaluated]:
        plan = plan_hopper_backward(
            s.head_dim, s.v_head_dim, dtype=target.dtype_name, arch=target.arch, map_form=variant.map_form, crossed=variant.crossed,
            pieces=0 if variant.crossed else variant.pieces, starts=variant.starts, runs=variant.runs, score=request.score is not None,
            bits=variant.bits, deterministic=target.deterministic,
            heavy=is_costly(*mods) or reads_by_score(*mods) or any(map(crowds_registers, mods)),
        )  # fmt: skip
        if isinstance(plan, str):
            return plan
        chosen.append((variant, plan))
    return tuple(chosen)


def describe(store: Store, request: Request, tensors: tuple[torch.Tensor, ...], deterministic: bool) -> list[str]:
    """Which kernels compute gradients, and why. What table gradients need besides is not looked at."""
    q, k, v = tensors
    why = FREE if q.is_cuda else INTERPRETED
    target = Target(q.dtype, arch_of(q.device), q.is_cuda and launch.fits_tma(q, k, v), why, deterministic)
    tuned = tuning.find(store, request, q.device, subject(store, request, q, target))
    chosen, planned = choose_fused(store, request, target), plan_work(store, request, q.device, target, tuned=tuned)
    lines = []
    for each in planned.get("fused") or [*planned["dq"], *planned["dkdv"]]:
        lines += [f"gradients       {each.plan}"] + [f"tiles           {each.sizes}"] * bool(each.sizes)
    return lines + [f"template        plain Triton rather than Hopper's: {chosen}"] * (isinstance(chosen, str) and chosen != "")


def _variants(request: Request, facts: Facts | None, device: torch.device, axis: str) -> tuple[Variant, ...]:
    """The variants of the mask along an axis. Bits of tiles are not read by the backward kernels, which evaluate the predicate then."""
    if request.mask is None or facts is None:
        return (NO_MASK,)
    if device.type == "cpu":
        return (host_variant(request.mask, facts, request.extent(device), axis),)
    found = variants(facts, request.mask.promised, axis)
    return (by_predicate(),) if found[0].bits else found


def _plan(
    store: Store, request: Request, variant: Variant, part: str, target: Target, scatter: str = "", heavy: bool = False
) -> BackwardPlan:
    s = request.shapes
    mods = [store.facts(request.mask)[1].predicate] if variant.evaluated and request.mask is not None else []
    mods += [] if request.score is None else [request.score.expr]
    costly = is_costly(*mods) or reads_by_score(*mods)
    return plan_backward(
        part, s.head_dim, s.v_head_dim, dtype=target.dtype_name, arch=target.arch, map_form=variant.map_form,
        pieces=variant.pieces, starts=variant.starts, runs=variant.runs, score=request.score is not None, scatter=scatter,
        loads="tma" if target.tma and target.arch >= 90 else "pointer",
        heavy=costly or bool(scatter) or heavy, pipelined=not reads_by_score(*mods),
        gathers=only_gathers(request.score) and not (scatter or heavy or variant.evaluated or target.plain == DROPOUT),
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
    if request.score is not None:
        expr, spec = simplify(request.score.expr), captures_of(request.score)
        header += [f"score {request.score.name}", f"    {show(expr, request.score.names())}"]
        if isinstance(plan, HopperBackwardPlan):
            score = emit_column("score_mod", expr, spec)
        else:
            score = emit_function("score_mod", expr, spec, "score")
            gradient = emit_gradient(expr, spec, "score", scatter=plan.scatter or "float")
    if isinstance(plan, HopperBackwardPlan):
        return assemble_hopper_backward(plan, score, header)
    return assemble_backward(plan, mask, score, gradient, header)


def _given(tile_map: TileMap | None, ordered: bool = False) -> dict[str, Any]:
    """A map as the backward kernels take it; `ordered` for one that is told in which order to begin lines."""
    if tile_map is None:
        return {}
    names = ("ranges", "counts", "offsets", "index", "patterns", "words", "broken", "ranks")
    given = {name: getattr(tile_map, name) for name in names if getattr(tile_map, name) is not None}
    if tile_map.intervals is not None:
        given |= {"starts": tile_map.intervals.starts.contiguous(), "stops": tile_map.intervals.ends.contiguous()}
    if tile_map.crossing is not None:
        given |= {"row_starts": tile_map.crossing.starts, "row_stops": tile_map.crossing.ends}
    if ordered:
        given["order"] = launch.work_order(tile_map)
    return given
