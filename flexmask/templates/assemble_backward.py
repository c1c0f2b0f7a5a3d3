"""The source of a backward kernel: one readable, self-contained file, from a plan, the emitted mods, and the templates' own text."""

from __future__ import annotations

from collections.abc import Sequence

from ..lowering.plan_backward import BackwardPlan
from .assemble import IMPORTS, _comments, _fill, _functions, _helpers, _join, _sections

# what the templates import from the forward ones
_DEVICE = {"dq": ("load_rows", "store_rows", "load_bound", "load_bounds", "inside", "find_tile"),
           "dkdv": ("load_rows", "store_rows", "load_bound", "load_bounds", "inside")}  # fmt: skip
_HOST = ("pack", "addressable", "fits_tma", "describe", "resident_heads", "strides")


def assemble_backward(
    plan: BackwardPlan,
    mask: str | None = None,
    score: str | None = None,
    gradient: str | None = None,
    header: Sequence[str] = (),
) -> str:
    """The source of a kernel module for `plan`, with `row_terms`, `pack` and `backward_q` or `backward_kv` to call.

    `mask` and `score` are texts from `emit_function`, `gradient` the one from `emit_gradient` of the same score: `score_slope` and, for a
    plan that scatters, its `score_scatter`. All but the last work on single places, as tiles come with keys down as well as with queries
    down.
    `header` are lines about the mods, written as comments. Raises ValueError where the plan needs a text that is not given.

    >>> from flexmask.lowering.plan_backward import plan_backward
    >>> assemble_backward(plan_backward("dq", 64)).splitlines()[0]
    '# plan: backward dq D64 bfloat16 sm_90, no mask, tiles 64x64, 4 warps, 2 stages, pointer loads'
    """
    if plan.evaluated and mask is None:
        raise ValueError("the plan evaluates the mask in the kernel, so assemble_backward needs the mask's text")
    if plan.score != (score is not None) or plan.score != (gradient is not None):
        raise ValueError(f"the plan has{' a' if plan.score else ' no'} score mod: give the texts of both score and gradient, or neither")
    kernel, launcher = _sections("backward.py") | _sections("backward_columns.py"), _sections("backward_launcher.py")
    device, host = _functions(_sections("forward.py")["functions"]), _functions(_sections("launcher.py")["functions"])
    mods = _mods(plan, _functions(kernel["mods"]), mask, score, gradient)
    parts = [
        _comments([*header, f"plan: {plan}"]) + "\n" + IMPORTS,
        _constants(kernel["constants of the plan"] + kernel["kernel"], plan),
        *_helpers(mods),
        *mods,
        _sections("dropout.py")["functions"],
        *(device[name] for name in _DEVICE[plan.part]),
        *(kernel[name] for name in ("functions", plan.part, "row terms")),
        _sections("launcher.py")["constants"].rstrip("\n") + "\n" + launcher["constants"],
        *(host[name] for name in _HOST),
        *(launcher[name] for name in ("functions", plan.part)),
    ]
    return _join(parts)


def _mods(plan: BackwardPlan, defaults: dict[str, str], mask: str | None, score: str | None, gradient: str | None) -> list[str]:
    """The texts of the mods that the kernel calls, the template's own where it calls none."""
    given = _functions(gradient or "")
    if plan.scatter and "score_scatter" not in given:
        raise ValueError("the plan adds up gradients of captured tables, so the gradient's text needs a score_scatter")
    chosen = [mask if plan.evaluated and mask else "\n\n\n".join(defaults[n] for n in ("mask_row", "mask_mod"))]
    chosen += [score or "\n\n\n".join(defaults[n] for n in ("score_row", "score_mod"))]
    if plan.scatter:
        return chosen + list(given.values())  # the functions that score_scatter calls stand before it
    chosen += [(given or defaults)["score_slope"]]
    return chosen + [defaults["score_scatter"]] * (plan.part == "dq")


def _constants(text: str, plan: BackwardPlan) -> str:
    """The template's constants with the plan's values."""
    values = {
        "HEAD_DIM": plan.head_dim, "V_HEAD_DIM": plan.v_head_dim, "PADDED_DIM": plan.padded_dim, "PADDED_V_DIM": plan.padded_v_dim,
        "BLOCK_Q": plan.block_q, "BLOCK_KV": plan.block_kv, "NUM_WARPS": plan.num_warps, "NUM_STAGES": plan.num_stages,
        "TMA": plan.loads == "tma", "MAP_FORM": plan.map_form, "PIECES": plan.pieces, "STARTS": plan.starts,
        "RUNS": plan.runs, "SCORE": plan.score, "SCATTER": plan.scatter, "PRECISION": plan.precision,
    }  # fmt: skip
    return _fill(text, values)
