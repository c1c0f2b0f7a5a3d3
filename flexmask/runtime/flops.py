"""Floating-point operations of attention for torch's FLOP counter: of the pairs that the mask keeps, not of all."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from ..errors import NotInterval
from ..frontend import Traced
from .checks import check_inputs
from .maps import find_intervals, find_map
from .ops import Captures, request_of
from .request import Request
from .store import default_store

BLOCK = 128


def kept_pairs(request: Request, device: torch.device) -> int:
    """How many (query, key) pairs of all batch entries and heads the mask keeps; where it is no union of intervals, how many there are in
    the 128 x 128 tiles that it does not leave out. Reads the map, so on a GPU this waits."""
    s = request.shapes
    if request.mask is None:
        return s.batch * s.heads * s.q_len * s.kv_len
    try:
        rows = default_store().facts(request.mask)[1].rows
        found = find_intervals(request.mask, rows, request.extent(device))
        counts = (found.ends.long() - found.starts).sum((-1, -2))
    except NotInterval:
        counts = _in_tiles(request.mask, request, device)
    return int(counts.sum()) * (s.batch // counts.shape[0]) * (s.heads // counts.shape[1])


def _in_tiles(mask: Traced, request: Request, device: torch.device) -> torch.Tensor:
    """Pairs in the tiles that are kept, [B|1, H|1]."""
    s = request.shapes
    kept = find_map(default_store(), mask, request.extent(device), BLOCK, BLOCK)[1].states() != 0
    heights, widths = (_sizes(length, device) for length in (s.q_len, s.kv_len))
    return (kept * heights[:, None] * widths).sum((-1, -2))


def _sizes(length: int, device: torch.device) -> torch.Tensor:
    """How many places each block of a length holds."""
    return (length - torch.arange(0, length, BLOCK, device=device)).clamp(max=BLOCK)


@register_flop_formula(torch.ops.flexmask.attention, get_raw=True)
def attention_flops(q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    """Two products of the kept pairs: 2 (D + Dv) each."""
    dims: int = q.shape[3] + v.shape[3]
    return 2 * dims * _pairs(q, k, v, rest[2:])


@register_flop_formula(torch.ops.flexmask.attention_backward, get_raw=True)
def attention_backward_flops(q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    """Five products of the kept pairs: scores, dQ and dK over D, dP and dV over Dv."""
    dims: int = 3 * q.shape[3] + 2 * v.shape[3]
    return 2 * dims * _pairs(q, k, v, rest[6:])


def _pairs(q: Any, k: Any, v: Any, given: tuple[Any, ...]) -> int:
    """`given` begins with tables, ints, floats, mask and score. Tensors without values count as if nothing were left out."""
    tables, ints, floats, mask, score = given[:5]
    request = request_of(check_inputs(q, k, v, True), Captures(tables, ints, floats), mask, score)
    if isinstance(q, FakeTensor) or q.device.type == "meta":
        return int(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
    return kept_pairs(request, q.device)


def join_counters() -> None:
    """Makes the formulas known to the counters that are at work: those made before this file was imported have a registry without them."""
    ours = {op: flop_registry[op] for op in (torch.ops.flexmask.attention, torch.ops.flexmask.attention_backward)}
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, FlopCounterMode):
            counter.flop_registry.update(ours)
