"""The source of a Hopper backward kernel: one readable, self-contained file, from a plan and the templates' own text."""

from __future__ import annotations

from collections.abc import Sequence

from ..lowering.plan_hopper_backward import HopperBackwardPlan
from .assemble import _comments, _fill, _functions, _helpers, _join, _sections
from .assemble_hopper import in_gluon

IMPORTS = """import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
"""
# what is taken from other templates
_HOST = ("pack", "addressable", "fits_tma", "resident_heads", "strides")


def assemble_hopper_backward(plan: HopperBackwardPlan, score: str | None = None, header: Sequence[str] = ()) -> str:
    """The source of a kernel module for `plan`, with `row_terms`, `pack` and `backward` to call; `header` are lines about the mods,
    written as comments.

    >>> from flexmask.lowering.plan_hopper_backward import plan_hopper_backward
    >>> assemble_hopper_backward(plan_hopper_backward(64)).splitlines()[0]
    '# plan: hopper backward D64 bfloat16 sm_90, no mask, tiles 128x128, 2 stages'
    """
    if plan.score != (score is not None):
        raise ValueError(f"the plan has{' a' if plan.score else ' no'} score mod, but {'none' if score is None else 'one'} was given")
    kernel, given, shared = _sections("hopper_backward.py"), _sections("hopper_backward_plan.py"), _sections("hopper.py")
    turns = _sections("hopper_backward_turns.py")
    plain, terms = _sections("backward.py"), _functions(_sections("backward_launcher.py")["functions"])
    helpers = (_functions(_sections("forward.py")["functions"])["load_rows"], _functions(plain["functions"])["is_idle"])
    host = _functions(_sections("launcher.py")["functions"])
    parts = [
        _comments([*header, f"plan: {plan}"]) + "\n" + IMPORTS,
        _constants(given["constants of the plan"], plan) + given["kernel"].rstrip("\n") + "\n" + shared["names"],
        *([shared["numbers"]] if score else []),
        *(in_gluon(text) for text in _helpers([score] if score else [])),
        in_gluon(score) if score else given["mods"],
        *(shared[name] for name in ("barriers", "turns", "halves", "bits", "cuts")),
        *helpers,
        _sections("hopper_backward_load.py")["the warp that fetches"],
        _sections("hopper_backward_weigh.py")["probabilities"],
        _sections("hopper_backward_add.py")["additions to dq"],
        kernel["the warpgroups that multiply"],
        turns["the warps that keep order"] if plan.deterministic else kernel["start of warps"],
        *(kernel[name] for name in ("start", "dq")),
        plain["row terms"],
        _sections("launcher.py")["constants"].rstrip("\n") + "\n" + _sections("backward_launcher.py")["constants"],
        *(host[name] for name in _HOST),
        _sections("hopper_turns.py")["functions"],
        terms["row_terms"],
        _sections("hopper_backward_launcher.py")["functions"],
    ]
    return _join(parts)


def _constants(text: str, plan: HopperBackwardPlan) -> str:
    """The template's constants with the plan's values."""
    values = {
        "HEAD_DIM": plan.head_dim, "V_HEAD_DIM": plan.v_head_dim, "PADDED_DIM": plan.padded_dim, "PADDED_V_DIM": plan.padded_v_dim,
        "BLOCK_Q": plan.block_q, "BLOCK_KV": plan.block_kv, "STAGES": plan.stages, "CONSUMER_REGISTERS": plan.consumer_registers,
        "PRODUCER_REGISTERS": plan.producer_registers, "MAP_FORM": plan.map_form, "PIECES": plan.pieces, "CROSSED": plan.crossed,
        "BITS": plan.bits, "STARTS": plan.starts, "RUNS": plan.runs, "SCORE": plan.score,
        "DETERMINISTIC": plan.deterministic,
    }  # fmt: skip
    return _fill(text, values)
