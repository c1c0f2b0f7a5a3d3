"""One forward pass: the map and the kernel for a call's structure and shapes, found or made, and run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..analysis import Facts, Form
from ..frontend import Traced
from ..ir import KV_LEN, TRUE, K, Q, const, show, simplify, uses, walk
from ..lowering import KernelPlan, emit_function, emit_row_bounds, plan_forward
from ..templates.assemble import assemble
from . import cpu, launch
from .checks import Shapes
from .maps import Extent, capture_spec, find_map, interpreting
from .store import Store, code_fingerprint
from .tile_map import TileMap

Result = tuple[torch.Tensor, torch.Tensor]


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


def run_cpu(store: Store, request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Result:
    """(out, lse) on CPU tensors."""
    mask = None if request.mask is None else (store.facts(request.mask)[1].predicate, request.mask.tensors, request.mask.scalars)
    score = None if request.score is None else (simplify(request.score.expr), request.score.tensors, request.score.scalars)
    return cpu.forward(q, k, v, scale=scale, tile_map=_cpu_map(store, request), mask=mask, score=score)


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel and the plan it was made from."""

    plan: KernelPlan
    module: Any


def run_triton(store: Store, request: Request, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Result:
    """(out, lse) by a generated kernel, on the tensors' GPU (or in Triton's interpreter)."""
    tma = not interpreting() and launch.fits_tma(q, k, v)
    kernel = find_kernel(store, request, q.dtype, arch_of(q.device), tma)
    plan, tile_map = kernel.plan, None
    if request.mask is not None and plan.map_form != "none":
        tile_map = find_map(store, request.mask, request.extent(q.device), plan.block_q, plan.block_kv, plan.map_form == "list")[1]
    return launch.launch_forward(kernel.module, q, k, v, scale, tile_map, _captures(request.mask), _captures(request.score))


def find_kernel(store: Store, request: Request, dtype: torch.dtype, arch: int, tma: bool) -> Kernel:
    """The kernel for the request's structure and head dims, planned, written and loaded at most once."""
    s = request.shapes
    structure = tuple(None if t is None else store.key_of(t) for t in (request.mask, request.score))

    def make() -> Kernel:
        plan = plan_kernel(store, request, dtype, arch, tma)
        return Kernel(plan, launch.load(store.kernel_file(kernel_key(store, request, plan), lambda: write_kernel(store, request, plan))))

    found: Kernel = store.kernel((*structure, s.head_dim, s.v_head_dim, dtype, arch, tma), make)
    return found


def arch_of(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; machines without a GPU plan for 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def plan_kernel(store: Store, request: Request, dtype: torch.dtype, arch: int, tma: bool) -> KernelPlan:
    """The plan for a request: what the facts allow (tile lists or ranges, row intervals or the predicate), then sizes that fit.

    `tma` says whether the tensors allow TMA loads, which are used where the GPU has them.
    """
    facts = None if request.mask is None else store.facts(request.mask)[1]
    map_form, pieces, evaluated, _ = choose_tiles(facts)
    s = request.shapes
    return plan_forward(
        s.head_dim, s.v_head_dim, dtype=str(dtype).removeprefix("torch."), arch=arch, map_form=map_form, pieces=pieces,
        evaluated=evaluated, score=request.score is not None, loads="tma" if tma and arch >= 90 else "pointer",
        narrow=facts is not None and is_narrow(facts), heavy=is_heavy(request, facts if evaluated else None),
    )  # fmt: skip


def choose_tiles(facts: Facts | None) -> tuple[str, int, bool, str]:
    """(map form, row intervals a kernel reads, whether it evaluates the predicate, why) for what is known of a mask."""
    if facts is None or facts.predicate is TRUE:
        return "none", 0, False, "no mask: every tile is full"
    rows = facts.rows
    if not isinstance(rows, Form):
        return "list", 0, True, f"partial tiles evaluate the predicate: {rows.reason}"
    if rows.residue is not None:
        return "list", 0, True, "row intervals bound the work; partial tiles evaluate the predicate, a part of which is no interval"
    if rows.sorted_tables:
        why = "partial tiles compare with row intervals where the tables ascend, else evaluate the predicate"
        return "list", len(rows.pieces), True, why
    if facts.rows_contiguous and len(rows.pieces) == 1:
        return "range", 1, False, "each block row keeps one run of blocks; partial tiles compare with row intervals"
    return "list", len(rows.pieces), False, "partial tiles compare with row intervals"


def is_narrow(facts: Facts) -> bool:
    """Whether rows keep stretches cut at both ends (a window, a document) rather than everything before or after some key."""
    if not isinstance(facts.rows, Form):
        return False
    return not any(p.start is const(0) or p.stop is KV_LEN for p in facts.rows.pieces) or len(facts.rows.pieces) > 1


# operations on (query, key) pairs in a mod's text, beyond which its values crowd the registers
MANY_PAIR_OPERATIONS = 16


def is_heavy(request: Request, facts: Facts | None) -> bool:
    """Whether the predicate or the score reads a table at places that depend on both query and key, or computes very much for each."""
    exprs = [] if facts is None else [facts.predicate]
    exprs += [] if request.score is None else [request.score.expr]
    pairs = [node for expr in exprs for node in walk(expr) if uses(node, Q) and uses(node, K)]
    return len(pairs) > MANY_PAIR_OPERATIONS or any(node.op == "load" for node in pairs)


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
            mask = emit_function("mask_mod", facts.predicate, capture_spec(request.mask), "mask")
        if isinstance(facts.rows, Form) and plan.pieces:
            bounds = emit_row_bounds(facts.rows, capture_spec(request.mask))
    if request.score is not None:
        expr = simplify(request.score.expr)
        header += _header(request.score, show(expr, request.score.names()))
        score = emit_function("score_mod", expr, capture_spec(request.score), "score")
    return assemble(plan, mask, score, header, bounds)


def _header(traced: Traced, text: str) -> list[str]:
    at = traced.locate(traced.expr)
    return [f"{traced.kind} {traced.name}{f' @ {at}' if at else ''}", f"    {text}"]


def _captures(traced: Traced | None) -> launch.Captures:
    return launch.NO_CAPTURES if traced is None else (traced.tensors, traced.scalars)


def kernel_path(store: Store, request: Request, dtype: torch.dtype) -> Path:
    """The file of the kernel for these shapes on this machine's GPU, or on an sm_90 one where there is none; written if need be."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == torch.float64:  # the CPU's own type: a kernel would take the next smaller one
        dtype = torch.float32
    plan = plan_kernel(store, request, dtype, arch_of(device), True)
    return store.kernel_file(kernel_key(store, request, plan), lambda: write_kernel(store, request, plan))


def describe(store: Store, request: Request, tensors: tuple[torch.Tensor, ...], backend: str) -> tuple[TileMap | None, list[str]]:
    """The map that a call would use, and the choices made, with reasons."""
    if backend == "cpu":
        return _cpu_map(store, request), ["kernel          torch matrix products over the kept tiles"]
    q, k, v = tensors
    plan = plan_kernel(store, request, q.dtype, arch_of(q.device), launch.fits_tma(q, k, v))
    facts = None if request.mask is None else store.facts(request.mask)[1]
    lines = [f"kernel          {plan}", f"partial tiles   {choose_tiles(facts)[3]}"]
    if request.mask is None or plan.map_form == "none":
        return None, lines
    return find_map(store, request.mask, request.extent(q.device), plan.block_q, plan.block_kv, plan.map_form == "list")[1], lines


def _cpu_map(store: Store, request: Request) -> TileMap | None:
    if request.mask is None:
        return None
    block_q, block_kv = cpu.blocks(request.shapes.q_len, request.shapes.kv_len)
    return find_map(store, request.mask, request.extent(torch.device("cpu")), block_q, block_kv)[1]
