"""What is called again and again: the repetition of the last call, found by a few comparisons."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..frontend import Traced
from .checks import check_request
from .replay import Replay, Standing, layout_of
from .request import Request
from .store import Store


@dataclass(frozen=True)
class _Known:
    """A call's repetition, and all that it depends on besides what its owner knows to be the same."""

    layout: list[tuple[Any, ...]]
    tables: list[tuple[weakref.ref[torch.Tensor], int, int]]
    place: tuple[int, int]
    generation: int
    replay: Replay
    standing: weakref.ref[Standing]  # as long as the store keeps it: a map that nobody can ask for is not to be held here


class Steady:
    """The last call with mods of one structure and the same numbers, one scale and no extras, which its owner sees to: `run` repeats it for
    tensors of the same layout.

    It looks at their shapes, strides and dtypes, at whether the captured tables are the same, lie where they did, and have their version
    if the mask reads them, at the device and the stream that launches go to, and at whether the store has let go of maps since.
    """

    def __init__(self) -> None:
        self._known: _Known | None = None

    def run(self, store: Store, request: Request, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...] | None:
        """What the last call would give for `inputs`, or None where it says nothing about them."""
        known = self._known
        if known is None or known.generation != store.generation or known.layout != layout_of(inputs):
            return None
        if known.place != _place(inputs[0].device) or not _are_those(known.tables, request):
            return None
        standing = known.standing()
        return None if standing is None else known.replay.run(inputs, standing)

    def keep(self, store: Store, request: Request, inputs: Sequence[torch.Tensor], replay: Replay | None, standing: Standing) -> None:
        """Remember a call that `replay` repeats, where anything can be said of its tables and its stream."""
        place = None if replay is None or any(t.is_inference() for t in request.tables) else _place(inputs[0].device)
        self._known = None
        if replay is not None and place is not None:
            tables = [(weakref.ref(t), t.data_ptr(), t._version) for t in request.tables]
            self._known = _Known(layout_of(inputs), tables, place, store.generation, replay, weakref.ref(standing))


def find_steady(store: Store, request: Request, q: torch.Tensor, *more: Hashable) -> tuple[Steady, Steady]:
    """For the forward and the backward pass of calls of such requests, on q's device and in its dtype; `more` is what else they depend on.
    Raises ShapeError where the mods' captures do not fit the call; what has been found good once is not looked at again."""
    tables = tuple(map(id, request.tables))  # so that masks alike take no turns in one place; it is the calls that tell them apart
    layout = (request.shapes, request.autotune, q.dtype, q.device, *more, *_structure(request.mask), *_structure(request.score), tables)
    found: tuple[Steady, Steady] | None = store.checked.get(layout)
    if found is None:
        check_request((request.mask, request.score), request.shapes, q.device)
        found = Steady(), Steady()
        store.checked.put(layout, found)
    return found


def _structure(traced: Traced | None) -> tuple[Hashable, ...]:
    """All of a mod that checks look at, and its numbers, among which 0.0 is not -0.0."""
    if traced is None:
        return (None,)
    numbers = [x.hex() if isinstance(x, float) else x for x in traced.scalars]
    return traced.expr, traced.promised, *numbers, *[(t.shape, t.dtype, t.device) for t in traced.tensors]


def _are_those(known: Sequence[tuple[weakref.ref[torch.Tensor], int, int]], request: Request) -> bool:
    """Whether the request captures these tables, and the mask's are of this version: its maps were made of their values."""
    masked = 0 if request.mask is None else len(request.mask.tensors)
    for number, (table, (ref, address, version)) in enumerate(zip(request.tables, known, strict=True)):
        if ref() is not table or table.data_ptr() != address or (number < masked and table._version != version):
            return False
    return True


def _place(device: torch.device) -> tuple[int, int] | None:
    """The device and stream of launches for tensors on `device`; None on another one, and while a graph is captured, which must not share
    the queue of its stream."""
    if device.type != "cuda" or device.index != torch.cuda.current_device() or torch.cuda.is_current_stream_capturing():
        return None
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)
