"""Generated kernels as modules, and their launch for a call's tensors, captures and tile map."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import BackendError

Captures = tuple[Sequence[torch.Tensor], Sequence[int | float]]
NO_CAPTURES: Captures = ((), ())


def load(path: str | Path) -> ModuleType:
    """The kernel module in the file at `path` (Triton compiles functions from real files only).

    Raises BackendError where triton is not installed.
    """
    path = Path(path)
    name = f"flexmask_kernel_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BackendError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from ..templates.interpreter import repair_interpreter

            repair_interpreter()
        sys.modules[name] = module  # where Triton and inspect look a function's module up
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.modules.pop(name, None)
        raise BackendError(f"GPU kernels need triton ({error}). Install flexmask[gpu], or use backend='cpu'.") from error
    return module


def fits_tma(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a plan with "tma" loads can take these tensors: base addresses and strides are multiples of 16 bytes."""
    return all(x.numel() > 0 and _describable(x) for x in (q, k, v))


def _describable(x: torch.Tensor) -> bool:
    size = x.element_size()
    strides = [stride for stride, length in zip(x.stride()[:3], x.shape[:3], strict=True) if length > 1]
    return x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s * size % 16 == 0 for s in strides)


def launch_forward(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    tile_map: Any = None,
    mask: Captures = NO_CAPTURES,
    score: Captures = NO_CAPTURES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a loaded kernel: (out [B, Hq, Q, Dv] in q's dtype, lse float32 [B, Hq, Q], natural logarithm).

    `tile_map` is a TileMap for the plan's block sizes on q's device, or None for a plan without a map. `mask` and `score` are the
    captured (tensors, scalars) in the order of the expressions the kernel was emitted from. Raises BackendError where the kernel
    does not fit the GPU: `lowering.shrink` gives a smaller plan.
    """
    given: dict[str, torch.Tensor] = {}
    if tile_map is not None:
        given = {name: getattr(tile_map, name) for name in ("ranges", "counts", "offsets", "index") if getattr(tile_map, name) is not None}
        if module.PIECES.value:
            given["row_starts"], given["row_stops"] = _bounds(tile_map, module.PIECES.value)
    try:
        out, lse = module.forward(q, k, v, scale, module.pack(*mask), module.pack(*score), **given)
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            raise BackendError(f"the kernel does not fit this GPU ({error}). Use a smaller plan (flexmask.lowering.shrink).") from error
        raise
    return out, lse


def decide_tiles(module: Any, states: torch.Tensor, mask: Captures, q_len: int, kv_len: int) -> torch.Tensor:
    """Tile states int8 [B, H, nQ, nK] with the UNKNOWN ones decided by a loaded planning kernel; nothing is waited for."""
    from ..templates.launcher import pack

    decided: torch.Tensor = module.decide(states.clone(memory_format=torch.contiguous_format), pack(*mask), q_len, kv_len)
    return decided


def _bounds(tile_map: Any, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row intervals with as many pieces as the kernel reads; empty ones where the map has none (then no tile asks for them)."""
    if tile_map.intervals is None:
        nothing = torch.zeros(1, 1, tile_map.q_len, pieces, dtype=torch.int32, device=tile_map.counts.device)
        return nothing, nothing
    starts, stops = tile_map.intervals.starts, tile_map.intervals.ends
    if starts.shape[-1] != pieces:
        raise BackendError(f"the kernel reads {pieces} intervals a row, the map has {starts.shape[-1]}.")
    return starts.contiguous(), stops.contiguous()
