"""Triton functions started at the price of a launch: Triton's own look at every argument costs several times that. Their arguments are
packed in one go, and handed to the CUDA driver."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .driver import PackedLaunch, is_watched, packed

_INT32 = 2**31 - 1


class Prepared:
    """A Triton function that looks only at `watched` arguments (by position) to know which of its compiled kernels to start.

    The others must be of one kind always: numbers that are not specialised on and fit 32 bits, tensors of one dtype whose memory
    begins at a multiple of 16 bytes, or always None. Parameters that are constants may have any values. Called as Triton functions are.
    """

    def __init__(self, function: Any, watched: tuple[int, ...] = ()):
        self.function, self.watched = function, watched
        self._constants = [p.name for p in getattr(function, "params", ()) if p.is_constexpr]
        self._compiled: dict[tuple[Any, ...], tuple[Any, PackedLaunch | None]] = {}
        self._device = torch.cuda.current_device if torch.cuda.is_available() else lambda: -1

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._start, (*grid, 1, 1)[:3])

    def _start(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        constants = tuple([options[name] for name in self._constants])
        key = (self._device(), constants, *[_kind(args[i]) for i in self.watched])
        known = self._compiled.get(key)
        if known is not None:
            compiled, direct = known
            if direct is None or is_watched():
                compiled[grid](*args, *constants)
            else:
                direct.run(grid, (*args, *constants), torch._C._cuda_getCurrentRawStream(key[0]))
            return
        compiled = self.function[grid](*args, **options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._compiled[key] = (compiled, packed(compiled, (*args, *constants)))


def _kind(argument: Any) -> Any:
    """What Triton would compile a kernel of its own for."""
    if isinstance(argument, tuple):
        return tuple([_kind(part) for part in argument])
    if isinstance(argument, int):
        return (argument == 1) + 2 * (argument % 16 == 0) + 4 * (abs(argument) > _INT32)
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return type(argument)
