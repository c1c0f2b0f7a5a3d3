"""kernel_options: what torch's keys mean here. docs/compat.md has the table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import BackendError

# torch's tiles and pipelines, and promises and hints that save its kernels work: none changes what is computed, and flexmask
# chooses its own from the plan and proves the promises itself
WITHOUT_EFFECT = {
    "num_warps", "num_stages", "BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "PRESCALE_QK",
    "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "WRITE_DQ", "FORCE_USE_FLEX_ATTENTION", "USE_TMA", "kpack", "matrix_instr_nonkdim",
    "waves_per_eu",
}  # fmt: skip
BACKENDS = {"AUTO": None, "TRITON": "triton"}
REFUSED_BACKENDS = {
    "FLASH": "flexmask has no FlashAttention kernels.",
    "TRITON_DECODE": "flexmask has no separate kernel for short queries; its one kernel takes any length.",
}
REFUSED = {
    "OUTPUT_LOGSUMEXP": "Write `return_aux=AuxRequest(lse=True)`.",
    "OUTPUT_MAX": "Write `return_aux=AuxRequest(max_scores=True)`.",
    "FLOAT32_PRECISION": "float32 inputs are always multiplied to about float32's precision; cast them to bfloat16 or float16 for speed.",
}


def read_kernel_options(options: Mapping[str, Any] | None) -> str | None:
    """The flexmask backend that torch's `kernel_options` ask for, None for the device's own.

    A prefix `fwd_` or `bwd_` is allowed wherever torch allows it. Raises BackendError for a key or value that cannot be followed.
    """
    if not options:
        return None
    for key in options:
        _check(key, str(key).removeprefix("fwd_").removeprefix("bwd_"))
    if "BACKEND" in options and options.get("FORCE_USE_FLEX_ATTENTION"):
        raise BackendError('kernel_options have both "BACKEND" and "FORCE_USE_FLEX_ATTENTION", which exclude each other. Drop the latter.')
    wanted = options.get("BACKEND", "AUTO")
    if wanted not in BACKENDS:
        reason = REFUSED_BACKENDS.get(wanted, "There is no backend of this name.")
        raise BackendError(f'kernel_options ask for "BACKEND": {wanted!r}. {reason} Write "AUTO" or "TRITON", or leave the key out.')
    return BACKENDS[wanted]


def _check(key: str, name: str) -> None:
    if name in WITHOUT_EFFECT or key == "BACKEND":
        return
    near = difflib.get_close_matches(name, [*WITHOUT_EFFECT, "BACKEND"], 1)
    remedy = REFUSED.get(name) or (f"Did you mean {near[0]!r}?" if near else "Leave it out.")
    raise BackendError(f"kernel_options have the key {key!r}, which flexmask does not follow. {remedy}")
