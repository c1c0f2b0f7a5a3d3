"""Which kernels serve a request: the mask's variants, and for each the template and its plan, with the reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..analysis import Form
from ..ir import KV_LEN, Expr, Q, const, uses
from ..lowering import HopperPlan, KernelPlan, plan_forward, plan_hopper
from .few import MANY, Served
from .maps import host_variant
from .request import Request
from .store import Store
from .tuning import UNTUNED, Found, sized
from .variants import Variant, hopper_variants, is_costly, only_gathers, reads_by_score, variants

# why a call keeps to plain Triton whatever its mask
Plain = str
FREE: Plain = ""
DROPOUT: Plain = "dropout's hashes do not fit its registers"
INTERPRETED: Plain = "Triton's interpreter runs no Gluon"


@dataclass(frozen=True)
class Choice:
    """A kernel for one variant of the mask. `passed_over` says why it is not one of the Hopper template, on GPUs that this is made for;
    `sizes` where its plan's sizes come from, unless they are the planner's."""

    variant: Variant
    plan: KernelPlan | HopperPlan
    passed_over: str = ""
    sizes: str = ""


@dataclass(frozen=True)
class Target:
    """What kernels are made for, besides a request: dtype, compute capability, whether TMA can read q, k and v, what keeps the call to
    plain Triton, if anything, whether gradients must come out the same at every run, and how few queries are served."""

    dtype: torch.dtype
    arch: int
    tma: bool
    plain: Plain = FREE
    deterministic: bool = False
    few: Served = MANY

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@lru_cache(maxsize=64)
def arch_of(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; machines without a GPU plan for 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def look_at(store: Store, request: Request, device: torch.device) -> tuple[Variant, ...]:
    """The one variant of a mask on CPU tensors (for Triton's interpreter), whose values may be looked at; none elsewhere."""
    if device.type != "cpu":
        return ()
    if request.mask is None:
        return variants(None)
    return (host_variant(request.mask, store.facts(request.mask)[1], request.extent(device)),)


def choose(store: Store, request: Request, target: Target, looked_at: Sequence[Variant] = (), tuned: Found = UNTUNED) -> tuple[Choice, ...]:
    """The kernels for a request: one, or some of which flags on the device choose. On a GPU the structure of the mask alone decides, as
    looking at values would wait, and might change the choice from call to call. Their sizes are those `tuned`, or those of a table, or
    the planner's."""
    narrow, found = is_narrow(store, request), []
    for number, choice in enumerate(_planned(store, request, target, looked_at)):
        plan, sizes = sized(choice.plan, narrow, tuned, "forward", number)
        found.append(replace(choice, plan=plan, sizes=sizes))
    return tuple(found)


def _planned(store: Store, request: Request, target: Target, looked_at: Sequence[Variant]) -> tuple[Choice, ...]:
    """The same with the planner's sizes."""
    facts = None if request.mask is None else store.facts(request.mask)[1]
    promised = frozenset[int]() if request.mask is None else request.mask.promised
    why = target.plain if target.arch == 90 else ""
    if not looked_at and target.arch == 90 and not target.plain:
        narrow = is_narrow(store, request)
        plans = [(variant, _hopper(request, target, variant, narrow)) for variant in hopper_variants(facts, promised)]
        why = next((plan for variant, plan in plans if isinstance(plan, str) and not variant.evaluated), "")
        if not why:
            return tuple(_with_fallback(store, request, target, *found) for found in plans)
    found = tuple(looked_at) or variants(facts, promised)
    return tuple(Choice(variant, _plain(store, request, target, variant), why) for variant in found)


def _with_fallback(store: Store, request: Request, target: Target, variant: Variant, plan: HopperPlan | str) -> Choice:
    """One of a mask's kernels, of which the last may be plain Triton's."""
    return Choice(variant, plan) if isinstance(plan, HopperPlan) else Choice(variant, _plain(store, request, target, variant), plan)


def _hopper(request: Request, target: Target, variant: Variant, narrow: bool) -> HopperPlan | str:
    """The plan of the Hopper template, or why that does not serve."""
    if not target.tma:
        return "rows of q, k and v are not multiples of 16 bytes apart"
    s, mods = request.shapes, [] if request.score is None else [request.score.expr]
    return plan_hopper(
        s.head_dim, s.v_head_dim, dtype=target.dtype_name, arch=target.arch, map_form=variant.map_form, crossed=variant.crossed,
        pieces=0 if variant.crossed else variant.pieces, starts=variant.starts, runs=variant.runs, score=request.score is not None,
        evaluated=variant.evaluated, bits=variant.bits, heavy=is_costly(*mods) or reads_by_score(*mods), narrow=narrow,
        pack=target.few.hopper.pack, split=target.few.hopper.split,
    )  # fmt: skip


def _plain(store: Store, request: Request, target: Target, variant: Variant) -> KernelPlan:
    """Sizes that suit the variant's kind and fit the GPU."""
    s, mods = request.shapes, _evaluated(store, request, variant)
    return plan_forward(
        s.head_dim, s.v_head_dim, dtype=target.dtype_name, arch=target.arch, map_form=variant.map_form, pieces=variant.pieces,
        bits=variant.bits, starts=variant.starts, runs=variant.runs, score=request.score is not None,
        loads="tma" if target.tma and target.arch >= 90 else "pointer", narrow=is_narrow(store, request),
        heavy=is_costly(*mods) or reads_by_score(*mods), pipelined=not reads_by_score(*mods),
        gathers=only_gathers(request.score) and not (variant.evaluated or variant.bits or target.plain == DROPOUT),
        pack=target.few.plain.pack, rows=target.few.plain.rows, split=target.few.plain.split,
    )  # fmt: skip


def _evaluated(store: Store, request: Request, variant: Variant) -> list[Expr]:
    """What the kernel evaluates at pairs of query and key."""
    mods = [store.facts(request.mask)[1].predicate] if variant.evaluated and request.mask is not None else []
    return mods + ([] if request.score is None else [request.score.expr])


def is_narrow(store: Store, request: Request) -> bool:
    """Whether rows keep stretches cut at both ends (a window, a document, some first keys) rather than everything before or after a key
    that depends on the row."""
    form = None if request.mask is None else store.facts(request.mask)[1].rows
    if not isinstance(form, Form):
        return False
    return not any(p.stop is KV_LEN or (p.start is const(0) and uses(p.stop, Q)) for p in form.pieces)
