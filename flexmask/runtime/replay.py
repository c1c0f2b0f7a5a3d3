"""The host work of a call done once: which memory it took and which kernels it started, for other tensors of the same layout to repeat.

Preparing a launch (sizes, strides, descriptors, Triton's look at some fifty arguments) costs several times the launch itself, and in a
steady state comes out the same at every call but for addresses. A `Recording` watches one call through; where that did nothing but take
memory and start kernels, the `Replay` it leaves does just that again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .driver import DirectLaunch, direct, is_watched

_aten = torch.ops.aten
_UNFILLED = {_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default}
_ZEROED = {_aten.zeros.default, _aten.zeros_like.default}
# addresses are multiples of this: what Triton compiles kernels of their own for
_ALIGNED = 16

_current: ContextVar[Recording | None] = ContextVar("recording", default=None)


class Watched:
    """A Triton function of a generated module, called as such; what is recorded just now learns of its launches."""

    def __init__(self, function: Any):
        self.function = function
        self._constants = [p.name for p in getattr(function, "params", ()) if p.is_constexpr]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._start, (*grid, 1, 1)[:3])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def _start(self, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        compiled = self.function[grid](*args, **options)
        recording = _current.get()
        if recording is not None:
            recording.started.append((compiled, grid, (*args, *[options[name] for name in self._constants])))
        return compiled


@dataclass(frozen=True)
class _Memory:
    """A tensor that the call takes memory for."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    zeroed: bool

    def take(self) -> torch.Tensor:
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.zero_() if self.zeroed else x


@dataclass(frozen=True)
class _Launch:
    """A kernel that is compiled and loaded, with its arguments but for those that change: (place, number of the tensor, and the fields of
    the TMA descriptor to make of it, or None for its address); and how the driver starts it without Triton, where it can."""

    start: Callable[..., Any]
    arguments: tuple[Any, ...]
    changing: tuple[tuple[int, int, tuple[type, dict[str, Any]] | None], ...]
    direct: DirectLaunch | None = None

    def run(self, tensors: Sequence[torch.Tensor], addresses: Sequence[int], stream: int | None = None) -> None:
        """By the driver on `stream`, or else by Triton on the current one."""
        if self.direct is not None and stream is not None:
            self.direct.run(addresses, stream)
            return
        arguments = list(self.arguments)
        for place, number, described in self.changing:
            arguments[place] = addresses[number] if described is None else _describe(*described, tensors[number])
        self.start(*arguments)


def _describe(kind: type, fields: dict[str, Any], base: torch.Tensor) -> Any:
    """A descriptor with another base. Its own constructor would check again what has not changed."""
    made: Any = object.__new__(kind)
    made.__dict__.update(fields, base=base)
    return made


@dataclass(frozen=True)
class Replay:
    """What a recorded call did, to be done again for inputs of the same shapes, strides and dtypes."""

    _memory: tuple[_Memory, ...]
    _launches: tuple[_Launch, ...]
    _results: tuple[int | None, ...]
    _kept: tuple[torch.Tensor, ...] = field(repr=False)  # tensors that launches name by address

    def run(self, *inputs: torch.Tensor) -> tuple[Any, ...] | None:
        """The results; None where an input's address is not the multiple of 16 bytes that the kernels were compiled for."""
        tensors = [*inputs, *[memory.take() for memory in self._memory]]
        addresses = [x.data_ptr() for x in tensors]
        if any(address % _ALIGNED for address in addresses):
            return None
        device = tensors[0].device
        # whoever watches Triton's launches (a profiler) is to see all of them
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" and not is_watched() else None
        for launch in self._launches:
            launch.run(tensors, addresses, stream)
        return tuple(None if number is None else tensors[number] for number in self._results)


# layouts that one entry keeps replays for
MOST_REPLAYS = 16
Run = Callable[..., tuple[torch.Tensor | None, ...]]


class Replays:
    """How to repeat calls of the same kernels with the same maps, by the layout of what a call brings."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], Replay | None] = {}

    def run(self, given: Sequence[Any], inputs: Sequence[torch.Tensor], run: Run) -> tuple[Any, ...]:
        """`run()`, or its repetition for `inputs`. `given` is what else it depends on: tensors (by address) and what can be hashed."""
        known = tuple([x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given])
        key = (known, *[(x.shape, x.stride(), x.dtype) for x in inputs])
        replay = self.kept.get(key)
        found = None if replay is None else replay.run(*inputs)
        if found is not None:
            return found
        if key in self.kept or len(self.kept) >= MOST_REPLAYS or inputs[0].device.type != "cuda":
            return run()
        with Recording() as recording:
            results = run()
        self.kept[key] = recording.replay(inputs, results)
        return results


class Recording(TorchDispatchMode):
    """Watches a call from entry to exit. It can be repeated if, besides looking at tensors in other shapes, torch was asked for memory
    only, and all else was launches of `Watched` functions."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self._taken: list[tuple[torch.Tensor, bool]] = []
        self._spoiled = False

    def __enter__(self) -> Any:
        self._token = _current.set(self)
        return super().__enter__()

    def __exit__(self, *about: Any) -> None:
        _current.reset(self._token)
        super().__exit__(*about)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _UNFILLED or func in _ZEROED:
            self._taken.append((found, func in _ZEROED))
        elif not func.is_view:
            self._spoiled = True
        return found

    def replay(self, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor | None]) -> Replay | None:
        """How to repeat the call that gave `results` for `inputs`; None where that cannot be said for certain."""
        tensors = [*inputs, *[x for x, _ in self._taken]]
        numbers = {x.data_ptr(): i for i, x in enumerate(tensors)}
        usable = len(numbers) == len(tensors) and not any(address % _ALIGNED for address in numbers) and 0 not in numbers
        if self._spoiled or not usable or any(compiled is None for compiled, _, _ in self.started):
            return None
        if any(x is not None and numbers.get(x.data_ptr(), -1) < len(inputs) for x in results):
            return None
        # a part of a tensor that changes has no number of its own
        storages = {x.untyped_storage().data_ptr() for x in tensors}
        if any(_is_part(argument, numbers, storages) for _, _, given in self.started for argument in given):
            return None
        kept: list[torch.Tensor] = []
        return Replay(
            tuple(_Memory(tuple(x.shape), x.stride(), x.dtype, x.device, zeroed) for x, zeroed in self._taken),
            tuple(_launch(*started, numbers, kept) for started in self.started),
            tuple(None if x is None else numbers[x.data_ptr()] for x in results),
            tuple(kept),
        )


def _is_part(argument: Any, numbers: dict[int, int], storages: set[int]) -> bool:
    """Whether an argument is, or describes, a tensor within another one's memory."""
    if isinstance(argument, tuple):
        return any(_is_part(part, numbers, storages) for part in argument)
    known = argument if isinstance(argument, torch.Tensor) else getattr(argument, "base", None)
    return isinstance(known, torch.Tensor) and known.data_ptr() not in numbers and known.untyped_storage().data_ptr() in storages


def _launch(compiled: Any, grid: tuple[int, ...], given: tuple[Any, ...], numbers: dict[int, int], kept: list[torch.Tensor]) -> _Launch:
    arguments, changing = [], []
    for place, argument in enumerate(given):
        base = getattr(argument, "base", None) if hasattr(argument, "block_shape") else None
        known = argument if isinstance(argument, torch.Tensor) else base
        number = None if known is None else numbers.get(known.data_ptr())
        if number is not None:
            changing.append((place, number, None if base is None else (type(argument), _fields(argument))))
        arguments.append(None if number is not None else _constant(argument, kept))
    start = compiled[grid]  # loads it
    return _Launch(start, tuple(arguments), tuple(changing), direct(compiled, grid, given, {place: n for place, n, _ in changing}))


def _fields(described: Any) -> dict[str, Any]:
    """All of a descriptor but its tensor, which must not be kept."""
    return {name: value for name, value in vars(described).items() if name != "base"}


def _constant(argument: Any, kept: list[torch.Tensor]) -> Any:
    """An argument of every launch: tensors by their address, so that the launcher need not ask for it."""
    if isinstance(argument, torch.Tensor):
        kept.append(argument)
        return argument.data_ptr()
    if isinstance(argument, tuple):
        return tuple([_constant(part, kept) for part in argument])
    if hasattr(argument, "block_shape"):
        kept.append(argument.base)
    return argument
