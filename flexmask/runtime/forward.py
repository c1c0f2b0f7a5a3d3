"""One forward pass: the map and the kernel for a call's structure and shapes, found or made, and run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..analysis import Form
from ..frontend import Traced
from ..ir import show, simplify
from ..lowering import HopperPlan, KernelPlan, emit_function, emit_row_bounds
from ..templates.assemble import assemble
from ..templates.assemble_hopper import assemble_hopper
from . import cpu, launch, tuning
from .choice import DROPOUT, Choice, Target, arch_of, choose, look_at
from .extras import NO_EXTRAS, Extras
from .few import served
from .maps import find_device_maps, find_map
from .recipes import captures_of
from .replay import Replays, Standing
from .request import Request, Result
from .steady import Steady
from .store import Store, code_fingerprint
from .tile_map import TileMap
from .tuning import UNTUNED, Found, Subject, Trial

Plan = KernelPlan | HopperPlan


def run_cpu(
    store: Store, request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, extras: Extras = NO_EXTRAS
) -> Result:
    """The result on CPU tensors."""
    mask = None if request.mask is None else (store.facts(request.mask)[1].predicate, request.mask.tensors, request.mask.scalars)
    score = None if request.score is None else (simplify(request.score.expr), request.score.tensors, request.score.scalars)
    return Result(*cpu.forward(q, k, v, scale=scale, tile_map=_cpu_map(store, request), mask=mask, score=score, extras=extras))


@dataclass(frozen=True)
class Kernel:
    """A kernel that was chosen, loaded."""

    choice: Choice
    module: Any


Started = Sequence[tuple[Any, launch.MapArguments]]


@dataclass(frozen=True)
class _Ready:
    """Loaded kernels with their maps, what of those stays from call to call, and how calls of these kernels are repeated."""

    kernels: Started
    replays: Replays
    standing: Standing


def run_triton(
    store: Store, request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, extras: Extras = NO_EXTRAS,
    steady: Steady | None = None,
) -> Result:  # fmt: skip
    """The result on the tensors' GPU (or in Triton's interpreter) by a generated kernel, or by two of which a flag there chooses; or as
    `steady` repeats it, where the last call was one of this request, scale, and extras without tensors."""
    repeated = None if steady is None else steady.run(store, request, (q, k, v))
    if repeated is not None:
        return Result(*repeated)
    if launch.is_elsewhere(q.device):
        with torch.cuda.device(q.device):
            return run_triton(store, request, q, k, v, scale, extras)
    tma = q.is_cuda and launch.fits_tma(q, k, v)
    arch = arch_of(q.device)
    few = served(store, request, q.dtype, arch, q.device)
    target = Target(q.dtype, arch, tma, DROPOUT if extras.dropout_p else few.why, few=few)

    mask, score, queue = _captures(request.mask), _captures(request.score), launch.queue_of(q.device)

    def start(kernels: Started) -> launch.Found:
        found: launch.Found | None = None
        for module, given in kernels:
            found = launch.launch_forward(module, q, k, v, scale, given, mask, score, into=found, extras=extras, queue=queue)
        assert found is not None
        return found

    def make() -> _Ready:
        tuned = tuning.find(store, request, q.device, subject(store, request, target, q.device, start))
        kernels = _prepared(store, request, target, q.device, tuned)
        replays: Replays = store.kernel(("replays", q.device, *[module.__name__ for module, _ in kernels]), Replays)
        return _Ready(kernels, replays, replays.standing([maps for _, maps in kernels], request.tables))

    key = ("forward", request.shapes, request.autotune, target, q.device)
    ready: _Ready = store.launches(key, request.mask, request.score, make)
    given, inputs = (scale, extras.kind, queue, *mask[1], *score[1]), (q, k, v, *extras.tensors)
    results, replay = ready.replays.run(given, inputs, lambda: start(ready.kernels), ready.standing)
    if steady is not None:
        steady.keep(store, request, inputs, replay, ready.standing)
    return Result(*results)


Start = Callable[[Started], launch.Found]


def subject(store: Store, request: Request, target: Target, device: torch.device, start: Start | None = None) -> Subject:
    """The forward pass as something that may be tuned; `start` runs kernels for the tensors of a call."""

    def plans() -> dict[str, list[Plan]]:
        return {"forward": [choice.plan for choice in choose(store, request, target, look_at(store, request, device))]}

    def attempt(aside: Store, tuned: Found) -> Trial:
        assert start is not None
        kernels = _prepared(aside, request, target, device, tuned)
        return Trial({"forward": tuning.turn_of(kernels)}, lambda: start(kernels))

    return Subject(("forward", target), plans, attempt if start else None)


def _prepared(store: Store, request: Request, target: Target, device: torch.device, tuned: Found) -> Started:
    """The kernels with their maps."""
    kernels = find_kernels(store, request, target, device, tuned)
    maps = _maps(store, request, [kernel.choice for kernel in kernels], device)
    return [(kernel.module, launch.map_arguments(kernel.module, made)) for kernel, made in zip(kernels, maps, strict=True)]


def _maps(store: Store, request: Request, chosen: Sequence[Choice], device: torch.device) -> Sequence[TileMap | None]:
    """The tile map of each kernel."""
    if request.mask is None or chosen[0].plan.map_form == "none":
        return (None,)
    extent, first = request.extent(device), chosen[0].plan
    if device.type == "cpu":
        return (find_map(store, request.mask, extent, first.queries, first.block_kv)[1],)
    wanted = tuple([(choice.variant, choice.plan.queries, choice.plan.block_kv) for choice in chosen])
    return find_device_maps(store, request.mask, extent, wanted).maps


def find_kernels(store: Store, request: Request, target: Target, device: torch.device, tuned: Found = UNTUNED) -> Sequence[Kernel]:
    """The kernels for the request's structure and head dims, planned, written and loaded at most once."""
    s = request.shapes
    structure = tuple(None if t is None else store.key_of(t) for t in (request.mask, request.score))
    looked_at = look_at(store, request, device)

    def make() -> Sequence[Kernel]:
        chosen = choose(store, request, target, looked_at, tuned)
        return [Kernel(choice, launch.load(_file(store, request, choice.plan))) for choice in chosen]

    found: Sequence[Kernel] = store.kernel((*structure, s.head_dim, s.v_head_dim, target, looked_at, tuned), make)
    return found


def _file(store: Store, request: Request, plan: Plan) -> Path:
    return store.kernel_file(kernel_key(store, request, plan), lambda: write_kernel(store, request, plan))


def kernel_key(store: Store, request: Request, plan: Plan) -> str:
    """sha256 of the plan, the mods' structures and names (both are in the text), and the code that writes it."""
    parts = [plan.to_json(), code_fingerprint()]
    for traced in (request.mask, request.score):
        if traced is not None:
            parts += [store.key_of(traced), traced.name, str(traced.names()), str(traced.locate(traced.expr))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_kernel(store: Store, request: Request, plan: Plan) -> str:
    """The kernel's source: one readable file that runs without flexmask."""
    header, mask, bounds, score = [], None, None, None
    if request.mask is not None:
        facts = store.facts(request.mask)[1]
        header += _header(request.mask, show(facts.predicate, request.mask.names()))
        if plan.evaluated:
            mask = emit_function("mask_mod", facts.predicate, captures_of(request.mask), "mask")
        if isinstance(facts.rows, Form) and plan.pieces:
            bounds = emit_row_bounds(facts.rows, captures_of(request.mask))
    if request.score is not None:
        expr = simplify(request.score.expr)
        header += _header(request.score, show(expr, request.score.names()))
        score = emit_function("score_mod", expr, captures_of(request.score), "score")
    if isinstance(plan, HopperPlan):
        return assemble_hopper(plan, score, header)
    return assemble(plan, mask, score, header, bounds)


def _header(traced: Traced, text: str) -> list[str]:
    at = traced.locate(traced.expr)
    return [f"{traced.kind} {traced.name}{f' @ {at}' if at else ''}", f"    {text}"]


def _captures(traced: Traced | None) -> launch.Captures:
    return launch.NO_CAPTURES if traced is None else (traced.tensors, traced.scalars)


def kernel_paths(store: Store, request: Request, dtype: torch.dtype) -> list[Path]:
    """The files of the kernels for these shapes on this machine's GPU, or on an sm_90 one where there is none; written if need be."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if dtype == torch.float64:  # the CPU's own type: a kernel would take the next smaller one
        dtype = torch.float32
    arch = arch_of(device)
    few = served(store, request, dtype, arch, device)
    target = Target(dtype, arch, True, few.why, few=few)
    tuned = tuning.find(store, request, device, subject(store, request, target, device))
    return [_file(store, request, choice.plan) for choice in choose(store, request, target, tuned=tuned)]


def describe(store: Store, request: Request, tensors: tuple[torch.Tensor, ...], backend: str) -> tuple[TileMap | None, list[str]]:
    """The map that a call would use, and the choices made, with reasons. Looks at the map's values."""
    if backend == "cpu":
        return _cpu_map(store, request), ["kernel          torch matrix products over the kept tiles"]
    q, k, v = tensors
    lines, tile_map = [], None
    arch = arch_of(q.device)
    few = served(store, request, q.dtype, arch, q.device)
    target = Target(q.dtype, arch, q.is_cuda and launch.fits_tma(q, k, v), few.why, few=few)
    tuned = tuning.find(store, request, q.device, subject(store, request, target, q.device))
    for choice in choose(store, request, target, look_at(store, request, q.device), tuned):
        lines += [f"kernel          {choice.plan}"]
        lines += [f"tiles           {choice.sizes}"] * bool(choice.sizes)
        lines += [f"template        plain Triton rather than Hopper's: {choice.passed_over}"] * bool(choice.passed_over)
        lines += [f"masking         {_named(choice.variant.why, request.mask)}"]
        if request.mask is not None and choice.plan.map_form != "none" and tile_map is None:
            tile_map = find_map(store, request.mask, request.extent(q.device), choice.plan.queries, choice.plan.block_kv)[1]
    lines += [f"tiles           {tuning.unknown(q.device)}"] * (request.autotune and not tuned)
    return tile_map, lines


def _named(why: str, mask: Traced | None) -> str:
    """Text with t0, t1, ... as the user calls them."""
    names = {} if mask is None else mask.names()
    return re.sub(r"\bt\d+\b", lambda m: names.get(m.group(), m.group()), why)


def _cpu_map(store: Store, request: Request) -> TileMap | None:
    if request.mask is None:
        return None
    block_q, block_kv = cpu.blocks(request.shapes.q_len, request.shapes.kv_len)
    return find_map(store, request.mask, request.extent(torch.device("cpu")), block_q, block_kv)[1]
