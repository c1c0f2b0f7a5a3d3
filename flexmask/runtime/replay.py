"""The host work of a call done once: which memory it took and which kernels it started, for other tensors of the same layout to repeat.

Preparing a launch (sizes, strides, descriptors, Triton's look at some fifty arguments) costs several times the launch itself, and in a
steady state comes out the same at every call but for addresses. A `Recording` watches one call through; where that did nothing but take
memory and start kernels, the `Replay` it leaves does just that again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .driver import DirectLaunch, direct, is_watched
from .recent import Recent

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
class _Changing:
    """A tensor among a kernel's arguments by its number, and the fields of the TMA descriptor to make of it, or None for its address."""

    number: int
    described: tuple[type, dict[str, Any]] | None = None

    def now(self, tensors: Sequence[torch.Tensor | None], addresses: Sequence[int]) -> Any:
        return addresses[self.number] if self.described is None else _describe(*self.described, tensors[self.number])


@dataclass(frozen=True)
class _Launch:
    """A kernel that is compiled and loaded, with its arguments, and the places of those that change, or have parts that do; and how the
    driver starts it without Triton, where it can."""

    start: Callable[..., Any]
    arguments: tuple[Any, ...]
    changing: tuple[int, ...]
    direct: DirectLaunch | None = None

    def run(self, tensors: Sequence[torch.Tensor | None], addresses: Sequence[int], stream: int | None = None) -> None:
        """By the driver on `stream`, or else by Triton on the current one."""
        if self.direct is not None and stream is not None:
            self.direct.run(addresses, stream)
            return
        arguments = list(self.arguments)
        for place in self.changing:
            arguments[place] = _now(arguments[place], tensors, addresses)
        self.start(*arguments)


def _now(argument: Any, tensors: Sequence[torch.Tensor | None], addresses: Sequence[int]) -> Any:
    if isinstance(argument, tuple):
        return tuple([_now(part, tensors, addresses) for part in argument])
    return argument.now(tensors, addresses) if isinstance(argument, _Changing) else argument


def _describe(kind: type, fields: dict[str, Any], base: torch.Tensor | None) -> Any:
    """A descriptor with another base. Its own constructor would check again what has not changed."""
    made: Any = object.__new__(kind)
    made.__dict__.update(fields, base=base)
    return made


@dataclass(frozen=True)
class Standing:
    """Tensors that are the same at each call with one map: the map's, and the tables that mods capture. They may lie anywhere, like a
    call's own tensors, so that what was recorded with one map serves the next of the same `layout`."""

    tensors: tuple[torch.Tensor | None, ...] = field(repr=False)  # the map's; of tables addresses are enough, and the caller's to keep
    addresses: tuple[int, ...]
    storages: frozenset[int]
    layout: int


NO_STANDING = Standing((), (), frozenset(), -1)


@dataclass(frozen=True)
class Replay:
    """What a recorded call did, to be done again for tensors of the same shapes, strides and dtypes."""

    _memory: tuple[_Memory, ...]
    _launches: tuple[_Launch, ...]
    _results: tuple[int | None, ...]
    _kept: tuple[torch.Tensor, ...] = field(repr=False)  # tensors that launches name by address

    def run(self, inputs: Sequence[torch.Tensor], standing: Standing = NO_STANDING) -> tuple[Any, ...] | None:
        """The results; None where an input's address is not the multiple of 16 bytes that the kernels were compiled for."""
        taken = [memory.take() for memory in self._memory]
        own = [x.data_ptr() for x in (*inputs, *taken)]
        if any(address % _ALIGNED for address in own):
            return None
        tensors, addresses = (*inputs, *taken, *standing.tensors), (*own, *standing.addresses)
        device = (taken[0] if taken else inputs[0]).device
        # whoever watches Triton's launches (a profiler) is to see all of them
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" and not is_watched() else None
        for launch in self._launches:
            launch.run(tensors, addresses, stream)
        return tuple(None if number is None else tensors[number] for number in self._results)


# layouts that one set of kernels keeps replays for
MOST_REPLAYS = 256
Run = Callable[..., tuple[torch.Tensor | None, ...]]


class Replays:
    """How to repeat calls of the same kernels, by the layout of what a call brings. A layout that comes for the second time is recorded."""

    def __init__(self) -> None:
        self.kept: Recent[Replay | None] = Recent(MOST_REPLAYS)
        self._seen: Recent[bool] = Recent(MOST_REPLAYS)
        self._layouts: Recent[int] = Recent(MOST_REPLAYS)
        self._numbers = count()

    def standing(self, maps: Sequence[Mapping[str, torch.Tensor]], tables: Sequence[torch.Tensor]) -> Standing:
        """What stays of calls with the maps of these kernels, and with mods that capture these tables."""
        known = [(name, x) for given in maps for name, x in sorted(given.items())]
        found: dict[int, torch.Tensor | None] = {x.data_ptr(): x for _, x in known} | {x.data_ptr(): None for x in tables}
        found.pop(0, None)  # tensors without elements
        numbers = {address: number for number, address in enumerate(found)}
        layout = tuple(
            (name, numbers.get(x.data_ptr()), x.data_ptr() % _ALIGNED == 0, x.shape, x.stride(), x.dtype)
            for name, x in (*known, *[("", table) for table in tables])
        )
        storages = frozenset(x.untyped_storage().data_ptr() for x in (*[x for _, x in known], *tables))
        return Standing(tuple(found.values()), tuple(found), storages, self._number((len(maps), layout)))

    def _number(self, layout: tuple[Any, ...]) -> int:
        """A number for a layout, as short as a key can be. One that comes again after long may get another."""
        number = self._layouts.get(layout)
        if number is None:
            number = next(self._numbers)
            self._layouts.put(layout, number)
        return number

    def run(
        self, given: Sequence[Any], inputs: Sequence[torch.Tensor], run: Run, standing: Standing = NO_STANDING
    ) -> tuple[tuple[Any, ...], Replay | None]:
        """`run()`, or its repetition for `inputs`, and what repeated it. `given` is what else it depends on: tensors (by address) and what
        can be hashed."""
        key = (tuple([_known(x) for x in given]), standing.layout, *layout_of(inputs))
        replay = self.kept.get(key)
        found = None if replay is None else replay.run(inputs, standing)
        if found is not None:
            return found, replay
        if key in self.kept or not self._starts_kernels(inputs) or not self._is_known(key):
            return run(), None
        with Recording() as recording:
            results = run()
        self.kept.put(key, recording.replay(inputs, results, standing))
        return results, None

    @staticmethod
    def _starts_kernels(inputs: Sequence[torch.Tensor]) -> bool:
        """Whether there is anything to start: Triton's interpreter runs on the CPU."""
        return inputs[0].device.type == "cuda"

    def _is_known(self, key: tuple[Any, ...]) -> bool:
        """Whether there was such a call before. Recording takes longer than a call, and many layouts come but once."""
        if self._seen.pop(key):
            return True
        self._seen.put(key, True)
        return False


def layout_of(tensors: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    """All that a repetition depends on of the tensors that a call brings, but for their device."""
    return [(x.shape, x.stride(), x.dtype) for x in tensors]


def _known(given: Any) -> Any:
    """What a call depends on as part of a key, in which 0.0 is not -0.0."""
    if isinstance(given, float):
        return given.hex()
    return given.data_ptr() if isinstance(given, torch.Tensor) else given


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

    def replay(
        self, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor | None], standing: Standing = NO_STANDING
    ) -> Replay | None:
        """How to repeat the call that gave `results` for `inputs`; None where that cannot be said for certain."""
        tensors = [*inputs, *[x for x, _ in self._taken]]
        own = {x.data_ptr(): i for i, x in enumerate(tensors)}
        numbers = own | {address: len(tensors) + i for i, address in enumerate(standing.addresses)}
        usable = len(numbers) == len(tensors) + len(standing.addresses) and not any(address % _ALIGNED for address in own) and 0 not in own
        if self._spoiled or not usable or any(compiled is None for compiled, _, _ in self.started):
            return None
        taken = range(len(inputs), len(tensors))
        if any(x is not None and numbers.get(x.data_ptr(), -1) not in taken for x in results):
            return None
        # a part of a tensor that changes has no number of its own
        storages = standing.storages | {x.untyped_storage().data_ptr() for x in tensors}
        if any(_is_part(argument, numbers, storages) for _, _, given in self.started for argument in given):
            return None
        kept: list[torch.Tensor] = []
        return Replay(
            tuple(_Memory(tuple(x.shape), x.stride(), x.dtype, x.device, zeroed) for x, zeroed in self._taken),
            tuple(_launch(*started, numbers, kept) for started in self.started),
            tuple(None if x is None else numbers[x.data_ptr()] for x in results),
            tuple(kept),
        )


def _is_part(argument: Any, numbers: Mapping[int, int], storages: Set[int]) -> bool:
    """Whether an argument is, or describes, a tensor within another one's memory."""
    if isinstance(argument, tuple):
        return any(_is_part(part, numbers, storages) for part in argument)
    known = argument if isinstance(argument, torch.Tensor) else getattr(argument, "base", None)
    return isinstance(known, torch.Tensor) and known.data_ptr() not in numbers and known.untyped_storage().data_ptr() in storages


def _launch(compiled: Any, grid: tuple[int, ...], given: tuple[Any, ...], numbers: Mapping[int, int], kept: list[torch.Tensor]) -> _Launch:
    arguments = tuple([_argument(argument, numbers, kept) for argument in given])
    changing = {path: number for place, argument in enumerate(arguments) for path, number in _paths(argument, (place,))}
    start = compiled[grid]  # loads it
    return _Launch(start, arguments, tuple({path[0]: None for path in changing}), direct(compiled, grid, given, changing))


def _argument(argument: Any, numbers: Mapping[int, int], kept: list[torch.Tensor]) -> Any:
    """An argument as it is at every launch: what changes by its number, other tensors by their address, so that the launcher need not
    ask for it."""
    if isinstance(argument, tuple):
        return tuple([_argument(part, numbers, kept) for part in argument])
    described = hasattr(argument, "block_shape")
    known = argument.base if described else argument
    if not isinstance(known, torch.Tensor):
        return argument
    if known.data_ptr() in numbers:
        return _Changing(numbers[known.data_ptr()], (type(argument), _fields(argument)) if described else None)
    kept.append(known)
    return argument if described else known.data_ptr()


def _paths(argument: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Where in an argument what changes is, and its number."""
    if isinstance(argument, _Changing):
        yield path, argument.number
    for place, part in enumerate(argument if isinstance(argument, tuple) else ()):
        yield from _paths(part, (*path, place))


def _fields(described: Any) -> dict[str, Any]:
    """All of a descriptor but its tensor, which must not be kept."""
    return {name: value for name, value in vars(described).items() if name != "base"}
