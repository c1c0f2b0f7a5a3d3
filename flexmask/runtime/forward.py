"""One forward pass: the map and the kernel for a call's structure and shapes, found or made, and run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..analysis import Facts, Form
from ..frontend import Traced
from ..ir import KV_LEN, const, show, simplify
from ..lowering import KernelPlan, emit_function, emit_row_bounds, plan_forward
from ..templates.assemble import assemble
from . import cpu, launch
from .checks import Shapes
from .extras import NO_EXTRAS, Extras
from .maps import Extent, find_device_maps, find_map, host_variant, interpreting
from .recipes import captures_of
from .replay import Ready
from .store import Store, code_fingerprint
from .tile_map import TileMap
from .variants import Variant, is_costly, reads_by_score, variants


class Result(NamedTuple):
    """out [B, Hq, Q, Dv] in q's dtype, lse [B, Hq, Q], natural; where asked for, the greatest score of each row, [B, Hq, Q]."""

    out: torch.Tensor
    lse: torch.Tensor
    peaks: torch.Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What one call asks for: the traced mods and the sizes."""

    mask: Traced | None
    score: Traced | None
    shapes: Shapes

    @property
    def score_tensors(self) -> tuple[torch.Tensor, ...]:
        return () if self.score is None else self.score.tensors

    def extent(self, device: torch.device) -> Extent:
        s = self.shapes
        return Extent(s.q_len, s.kv_len, s.batch, s.heads, device)


def run_cpu(
    store: Store, request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, extras: Extras = NO_EXTRAS
) -> Result:
    """The result on CPU tensors."""
    mask = None if request.mask is None else (store.facts(request.mask)[1].predicate, request.mask.tensors, request.mask.scalars)
    score = None if request.score is None else (simplify(request.score.expr), request.score.tensors, request.score.scalars)
    return Result(*cpu.forward(q, k, v, scale=scale, tile_map=_cpu_map(store, request), mask=mask, score=score, extras=extras))


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel, the plan it was made from, and the variant of the mask that it is for."""

    plan: KernelPlan
    variant: Variant
    module: Any


def run_triton(
    store: Store, request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, extras: Extras = NO_EXTRAS
) -> Result:
    """The result on the tensors' GPU (or in Triton's interpreter) by a generated kernel, or by two of which a flag there chooses."""
    if launch.is_elsewhere(q.device):
        with torch.cuda.device(q.device):
            return run_triton(store, request, q, k, v, scale, extras)
    tma = not interpreting() and launch.fits_tma(q, k, v)

    def make() -> Ready:
        kernels = find_kernels(store, request, q.dtype, q.device, tma)
        maps = _maps(store, request, kernels, q.device)
        return Ready([(kernel.module, launch.map_arguments(kernel.module, made)) for kernel, made in zip(kernels, maps, strict=True)])

    ready: Ready = store.launches(("forward", request.shapes, q.dtype, q.device, tma), (request.mask, request.score), make)
    mask, score = _captures(request.mask), _captures(request.score)

    def run() -> tuple[torch.Tensor | None, ...]:
        found: launch.Found | None = None
        for module, given in ready.kernels:
            found = launch.launch_forward(module, q, k, v, scale, given, mask, score, into=found, extras=extras)
        assert found is not None
        return found

    return Result(*ready.replayed((scale, extras.kind, *score[0]), (q, k, v, *extras.tensors), run))


def _maps(store: Store, request: Request, kernels: Sequence[Kernel], device: torch.device) -> Sequence[TileMap | None]:
    """The tile map of each kernel."""
    if request.mask is None or kernels[0].plan.map_form == "none":
        return (None,)
    extent, first = request.extent(device), kernels[0].plan
    if device.type == "cpu":
        return (find_map(store, request.mask, extent, first.block_q, first.block_kv)[1],)
    wanted = tuple([(kernel.variant, kernel.plan.block_q, kernel.plan.block_kv) for kernel in kernels])
    return find_device_maps(store, request.mask, extent, wanted).maps


def find_kernels(store: Store, request: Request, dtype: torch.dtype, device: torch.device, tma: bool) -> Sequence[Kernel]:
    """The kernels for the request's structure and head dims, planned, written and loaded at most once."""
    s, arch = request.shapes, arch_of(device)
    structure = tuple(None if t is None else store.key_of(t) for t in (request.mask, request.score))
    # on a GPU the structure alone decides; looking at values, as on the CPU, may change the choice from call to call
    looked_at = find_variants(store, request, device) if device.type == "cpu" else ()

    def make() -> Sequence[Kernel]:
        chosen = looked_at or find_variants(store, request, device)
        plans = [plan_kernel(store, request, variant, dtype, arch, tma) for variant in chosen]
        paths = [_file(store, request, plan) for plan in plans]
        return [Kernel(plan, variant, launch.load(path)) for plan, variant, path in zip(plans, chosen, paths, strict=True)]

    found: Sequence[Kernel] = store.kernel((*structure, s.head_dim, s.v_head_dim, dtype, arch, tma, looked_at), make)
    return found


def find_variants(store: Store, request: Request, device: torch.device) -> tuple[Variant, ...]:
    """The variants of the mask that its kernels are for: one where values may be looked at."""
    if request.mask is None:
        return variants(None)
    facts = store.facts(request.mask)[1]
    if device.type == "cpu":
        return (host_variant(request.mask, facts, request.extent(device)),)
    return variants(facts, request.mask.promised)


def _file(store: Store, request: Request, plan: KernelPlan) -> Path:
    return store.kernel_file(kernel_key(store, request, plan), lambda: write_kernel(store, request, plan))


@lru_cache(maxsize=64)
def arch_of(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; machines without a GPU plan for 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def plan_kernel(store: Store, request: Request, variant: Variant, dtype: torch.dtype, arch: int, tma: bool) -> KernelPlan:
    """The plan for a variant of the request's mask: sizes that suit its kind and fit the GPU.

    `tma` says whether the tensors allow TMA loads, which are used where the GPU has them.
    """
    facts = None if request.mask is None else store.facts(request.mask)[1]
    s, evaluated = request.shapes, variant.map_form == "list" and not variant.pieces and not variant.bits
    mods = [facts.predicate] * evaluated if facts is not None else []
    mods += [] if request.score is None else [request.score.expr]
    return plan_forward(
        s.head_dim, s.v_head_dim, dtype=str(dtype).removeprefix("torch."), arch=arch, map_form=variant.map_form, pieces=variant.pieces,
        bits=variant.bits, starts=variant.starts, runs=variant.runs, score=request.score is not None,
        loads="tma" if tma and arch >= 90 else "pointer", narrow=facts is not None and is_narrow(facts),
        heavy=is_costly(*mods) or reads_by_score(*mods), pipelined=not reads_by_score(*mods),
    )  # fmt: skip


def is_narrow(facts: Facts) -> bool:
    """Whether rows keep stretches cut at both ends (a window, a document) rather than everything before or after some key."""
    if not isinstance(facts.rows, Form):
        return False
    return not any(p.start is const(0) or p.stop is KV_LEN for p in facts.rows.pieces) or len(facts.rows.pieces) > 1


def kernel_key(store: Store, request: Request, plan: KernelPlan) -> str:
    """sha256 of the plan, the mods' structures and names (both are in the text), and the code that writes it."""
    parts = [plan.to_json(), code_fingerprint()]
    for traced in (request.mask, request.score):
        if traced is not None:
            parts += [store.key_of(traced), traced.name, str(traced.names()), str(traced.locate(traced.expr))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def write_kernel(store: Store, request: Request, plan: KernelPlan) -> str:
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
    return assemble(plan, mask, score, header, bounds)


def _header(traced: Traced, text: str) -> list[str]:
    at = traced.locate(traced.expr)
    return [f"{traced.kind} {traced.name}{f' @ {at}' if at else ''}", f"    {text}"]


def _captures(traced: Traced | None) -> launch.Captures:
    return launch.NO_CAPTURES if traced is None else (traced.tensors, traced.scalars)


def kernel_paths(store: Store, request: Request, dtype: torch.dtype) -> list[Path]:
    """The files of the kernels for these shapes on this machine's GPU, or on an sm_90 one where there is none; written if need be."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == torch.float64:  # the CPU's own type: a kernel would take the next smaller one
        dtype = torch.float32
    facts = None if request.mask is None else store.facts(request.mask)[1]
    chosen = variants(facts, frozenset() if request.mask is None else request.mask.promised)
    return [_file(store, request, plan_kernel(store, request, variant, dtype, arch_of(device), True)) for variant in chosen]


def describe(store: Store, request: Request, tensors: tuple[torch.Tensor, ...], backend: str) -> tuple[TileMap | None, list[str]]:
    """The map that a call would use, and the choices made, with reasons. Looks at the map's values."""
    if backend == "cpu":
        return _cpu_map(store, request), ["kernel          torch matrix products over the kept tiles"]
    q, k, v = tensors
    lines, tile_map = [], None
    for variant in find_variants(store, request, q.device):
        plan = plan_kernel(store, request, variant, q.dtype, arch_of(q.device), launch.fits_tma(q, k, v))
        lines += [f"kernel          {plan}", f"masking         {_named(variant.why, request.mask)}"]
        if request.mask is not None and plan.map_form != "none" and tile_map is None:
            tile_map = find_map(store, request.mask, request.extent(q.device), plan.block_q, plan.block_kv)[1]
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
