"""Generated kernels as modules, and their launch for a call's tensors, captures and tile map."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import BackendError
from .extras import NO_EXTRAS, Extras
from .prepared import Prepared
from .replay import Watched

Captures = tuple[Sequence[torch.Tensor], Sequence[int | float]]
NO_CAPTURES: Captures = ((), ())
# the tensors of a tile map by the names of a kernel's parameters
MapArguments = Mapping[str, torch.Tensor]
NO_MAP: MapArguments = {}
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
# the functions that attention is started by, as the templates name them
KERNELS = {"attention_forward", "attention_backward", "attention_backward_q", "attention_backward_kv", "row_terms_kernel", "gather_queries",
           "join_portions"}  # fmt: skip


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
    for kernel in KERNELS & vars(module).keys():
        setattr(module, kernel, Watched(getattr(module, kernel)))
    return module


def is_elsewhere(device: torch.device) -> bool:
    """Whether `device` is a GPU other than the one that launches go to."""
    return device.type == "cuda" and device.index != torch.cuda.current_device()


def fits_tma(*tensors: torch.Tensor) -> bool:
    """Whether a plan with "tma" loads can take these tensors: base addresses and strides are multiples of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and _describable(x.shape, x.stride(), x.element_size()) for x in tensors)


@lru_cache(maxsize=1024)
def _describable(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    apart = [stride for stride, length in zip(strides[:3], shape[:3], strict=True) if length > 1]
    return 0 not in shape and strides[3] == 1 and all(s > 0 and s * size % 16 == 0 for s in apart)


def queue_of(device: torch.device) -> torch.Tensor | None:
    """int32 [1], 0 between launches, for kernels that take tiles from a queue. Launches that may overlap must not share one, so each stream
    has its own; while a graph is captured there is none, as that may be replayed on any stream: the launch then brings one."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return _queue(device, torch._C._cuda_getCurrentRawStream(device.index))


@lru_cache(maxsize=256)
def _queue(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def launch_forward(
    module: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    tile_map: MapArguments = NO_MAP,
    mask: Captures = NO_CAPTURES,
    score: Captures = NO_CAPTURES,
    into: Found | None = None,
    extras: Extras = NO_EXTRAS,
    queue: torch.Tensor | None = None,
) -> Found:
    """Run a loaded kernel: (out [B, Hq, Q, Dv] in q's dtype, lse float32 [B, Hq, Q], natural logarithm, and if `extras` wants them the
    greatest scores of the rows, like lse, else None).

    `tile_map` is what `map_arguments` says of a TileMap for the plan's block sizes on q's device. `mask` and `score` are the
    captured (tensors, scalars) in the order of the expressions the kernel was emitted from. Of two kernels that take turns the
    second is given the first one's results as `into`. `queue` is what `queue_of` says. Raises BackendError where the kernel does not
    fit the GPU: `lowering.shrink` gives a smaller plan.
    """
    peaks = into[2] if into else torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if extras.peaks else None
    more = {"into": into and into[:2], "sinks": extras.sinks, "dropout": extras.dropout, "peaks": peaks}
    if queue is not None and hasattr(module, "SCHEDULE"):
        more["queue"] = queue
    try:
        out, lse = module.forward(q, k, v, scale, module.pack(*mask), module.pack(*score), **tile_map, **more)
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            raise BackendError(f"the kernel does not fit this GPU ({error}). Use a smaller plan (flexmask.lowering.shrink).") from error
        raise
    return out, lse, peaks


def map_arguments(module: Any, tile_map: Any) -> MapArguments:
    """A TileMap as the forward kernel of a module takes it; None for a plan without a map."""
    if tile_map is None:
        return NO_MAP
    names = ("ranges", "counts", "offsets", "index", "patterns", "words", "broken")
    given = {name: getattr(tile_map, name) for name in names if getattr(tile_map, name) is not None}
    if module.PIECES.value:
        given["row_starts"], given["row_stops"] = _bounds(tile_map, module.PIECES.value)
    if tile_map.crossing is not None:
        given["column_starts"], given["column_stops"] = tile_map.crossing.starts, tile_map.crossing.ends
    if hasattr(module, "SCHEDULE"):
        given["order"] = work_order(tile_map)
    return given


def work_order(tile_map: Any) -> torch.Tensor:
    """`TileMap.work_order`, on a GPU by one kernel."""
    table = tile_map.counts if tile_map.ranges is None else tile_map.ranges
    if table.device.type != "cuda":
        order: torch.Tensor = tile_map.work_order()
        return order
    lists = _lists()
    order = torch.empty(table.shape[2] + 2 * lists.ORDER_LEVELS.value, dtype=torch.int32, device=table.device)
    lists.order_lines(table, order, tile_map.ranges is not None)
    return order


def rank_lines(tile_map: Any) -> None:
    """The ranks of the map's lines into the memory that it has for them."""
    table = tile_map.counts if tile_map.ranges is None else tile_map.ranges
    tile_map.ranks.zero_()
    _ranks().rank_lines(table, tile_map.offsets, tile_map.index, tile_map.ranks)


def _bounds(tile_map: Any, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row intervals, as many pieces as the kernel reads."""
    starts, stops = tile_map.intervals.starts, tile_map.intervals.ends
    if starts.shape[-1] != pieces:
        raise BackendError(f"the kernel reads {pieces} intervals a row, the map has {starts.shape[-1]}.")
    return starts.contiguous(), stops.contiguous()


def packed(captures: Captures) -> Any:
    """Captures as the kernels that make maps take them."""
    from ..templates.launcher import pack

    return pack(*captures)


@lru_cache(maxsize=1)
def _lists() -> Any:
    """The kernels that make lists, which depend on no mask."""
    from ..templates import lists

    lists.states_kernel = Prepared(lists.states_kernel, watched=(4,))  # with or without a flag
    for name in ("intervals_kernel", "order_kernel", "turn_kernel"):
        setattr(lists, name, Prepared(getattr(lists, name)))
    return lists


@lru_cache(maxsize=1)
def _ranks() -> Any:
    """The kernels that rank lines, which depend on no mask either."""
    from ..templates import ranks

    for name in ("mark_kernel", "count_kernel"):
        setattr(ranks, name, Prepared(getattr(ranks, name)))
    return ranks


def list_states(made: Any, states: torch.Tensor, first: int, only_if: torch.Tensor | None) -> None:
    """Lists of the tiles of these lines into the map's memory; where `only_if` begins with 0, nothing."""
    _lists().list_states(states, made.counts, made.offsets, made.index, first, made.share, _numbers(made), evaluated_only_if=only_if)


def list_intervals(made: Any, lines: Any) -> None:
    """Lists of the tiles that the map's own intervals keep, into its memory. `lines` is the grid along the map's axis."""
    i, sizes = made.intervals, (lines.block_q, lines.block_kv, lines.kv_len)
    _lists().list_intervals(i.starts, i.ends, made.counts, made.offsets, made.index, made.share, _numbers(made), *sizes)


def pass_turn(flags: torch.Tensor, own: torch.Tensor) -> None:
    """The flags of a map from those of the one before it: 2 where that holds, and what is known of tables."""
    _lists().pass_turn(flags, own)


def find_bits(module: Any, made: Any, slots: torch.Tensor, captures: Any) -> None:
    """The bits of the PARTIAL tiles that the map lists, into its memory; its flag says where there are too many different ones."""
    module.bits(
        made.counts, made.offsets, made.index, made.patterns, made.words, slots, made.broken, captures, made.q_len, made.kv_len,
        _numbers(made),
    )  # fmt: skip


def _numbers(made: Any) -> int:
    """Where in the map's index the numbers 0, 1, 2, ... of all blocks begin, where there are any."""
    return int(made.counts.shape[0] * made.counts.shape[1] * made.counts.shape[2] * made.share)
