"""Kernels started through the CUDA driver itself, with arguments that are packed once and then only patched: Triton's launcher looks at
each of some fifty anew, and encodes each TMA descriptor again, at every launch."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import torch

# how Triton passes a kernel's parameters, by the type in its signature
_PACKED = {"i1": "b", "u1": "B", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"}
_PACKED |= {"fp32": "f", "f32": "f", "fp64": "d"}
# a CUtensorMap, and what it has to be aligned to
_MAP_BYTES, _ALIGNED = 128, 128
# numbers of element types in Triton's metadata that the driver numbers otherwise
_ELEMENT_TYPES = {8: 10, 9: 8, 10: 9}
_L2_PROMOTION_128B = 2
# what the driver answers in a thread that has no context yet
_NO_CONTEXT = 201
_Size = ctypes.c_size_t


class Cuda:
    """What is used of the CUDA driver's own interface. Raises OSError or AttributeError where the driver is missing or too old."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        number, pointer, size = ctypes.c_uint, ctypes.c_void_p, ctypes.POINTER(_Size)
        self._launch, self._replace = library.cuLaunchKernel, library.cuTensorMapReplaceAddress
        self._launch.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
        self._replace.argtypes = [pointer, pointer]
        self._encode = library.cuTensorMapEncodeTiled
        self._encode.argtypes = [pointer, ctypes.c_int, ctypes.c_uint32, pointer, *[pointer] * 4, *[ctypes.c_int] * 4]
        self._parameter = library.cuFuncGetParamInfo
        self._parameter.argtypes = [pointer, _Size, size, size]
        self._retain, self._set_context = library.cuDevicePrimaryCtxRetain, library.cuCtxSetCurrent
        self._retain.argtypes, self._set_context.argtypes = [pointer, ctypes.c_int], [pointer]
        self._error = library.cuGetErrorString
        self._error.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]

    def parameter_sizes(self, function: int) -> list[int]:
        """Bytes of each parameter of a kernel."""
        sizes: list[int] = []
        offset, size = _Size(), _Size()
        while self._parameter(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
            sizes.append(size.value)
        return sizes

    def encode(self, at: int, address: int, described: _Described) -> None:
        """A TMA descriptor, written to `at`; the driver counts axes from the last one."""
        rank = len(described.shape)
        shape = (ctypes.c_uint64 * rank)(*described.shape[::-1])
        strides = (ctypes.c_uint64 * (rank - 1))(*[stride * described.element_bytes for stride in described.strides[-2::-1]])
        box, ones = (ctypes.c_uint32 * rank)(*described.box[::-1]), (ctypes.c_uint32 * rank)(*[1] * rank)
        about = (described.element_type, rank, address, shape, strides, box, ones, 0, described.swizzle, _L2_PROMOTION_128B, 0)
        self._check(self._encode(at, *about))

    def replace_address(self, at: int, address: int) -> None:
        self._check(self._replace(at, address))

    def launch(self, function: int, grid: tuple[int, ...], threads: int, shared: int, stream: int, parameters: int) -> None:
        if 0 in grid:
            return
        status = self._launch(function, *grid, threads, 1, 1, shared, stream, parameters, None)
        if status == _NO_CONTEXT:
            context = ctypes.c_void_p()
            self._check(self._retain(ctypes.byref(context), torch.cuda.current_device()))
            self._check(self._set_context(context))
            status = self._launch(function, *grid, threads, 1, 1, shared, stream, parameters, None)
        self._check(status)

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._error(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA error {status}: {(text.value or b'unknown').decode()}")


@lru_cache(maxsize=1)
def cuda() -> Cuda | None:
    """The driver; None where there is none, or one from before CUDA 12.4, which does not say what parameters a kernel has."""
    try:
        return Cuda()
    except (OSError, AttributeError):
        return None


def is_watched() -> bool:
    """Whether anybody has hooked himself into Triton's launches, as profilers do."""
    knobs = sys.modules.get("triton.knobs")  # there wherever a kernel was ever started
    return knobs is not None and bool(_calls(knobs.runtime.launch_enter_hook) or _calls(knobs.runtime.launch_exit_hook))


def _calls(hook: Any) -> Any:
    return getattr(hook, "calls", hook)


@dataclass(frozen=True)
class _Described:
    """How a TMA descriptor cuts its tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_type: int
    element_bytes: int
    swizzle: int


# where among a kernel's arguments one is: its number, and within tuples the numbers there
Place = tuple[int, ...]


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a kernel: its bytes; and for one that may change, the place it comes from, and the descriptor it is, if it is one."""

    packed: bytes
    place: Place | None = None
    described: _Described | None = None


class _Launch:
    """A compiled kernel, and memory for its arguments."""

    def __init__(self, driver: Cuda, compiled: Any, parameters: Sequence[_Parameter]):
        self._driver, self._function = driver, compiled.function
        warps, _, self._shared = compiled.packed_metadata[:3]
        self._threads = 32 * warps
        self._lock = Lock()  # autograd starts kernels from threads of its own, and the driver is called without Python's lock
        offsets = _offsets(parameters)
        size = offsets[-1] + len(parameters[-1].packed)
        self._memory = ctypes.create_string_buffer(size + _ALIGNED)
        self._start = -ctypes.addressof(self._memory) % _ALIGNED
        self._places = [ctypes.addressof(self._memory) + self._start + offset for offset in offsets]
        for place, parameter in zip(self._places, parameters, strict=True):
            ctypes.memmove(place, parameter.packed, len(parameter.packed))
        self._table = (ctypes.c_void_p * len(parameters))(*self._places)
        self._parameters = ctypes.addressof(self._table)


class DirectLaunch(_Launch):
    """One whose grid and arguments stay, but for addresses."""

    def __init__(self, driver: Cuda, compiled: Any, grid: tuple[int, ...], parameters: Sequence[_Parameter], numbers: Mapping[Place, int]):
        super().__init__(driver, compiled, parameters)
        self._grid = grid
        self._pointers: list[tuple[ctypes.c_uint64, int]] = []
        self._maps: list[tuple[int, int]] = []
        for place, parameter in zip(self._places, parameters, strict=True):
            if parameter.described is not None:
                driver.encode(place, int.from_bytes(parameter.packed[:8], "little"), parameter.described)
            number = None if parameter.place is None else numbers.get(parameter.place)
            if number is not None and parameter.described is not None:
                self._maps.append((place, number))
            elif number is not None:
                self._pointers.append((ctypes.c_uint64.from_address(place), number))

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """Start it for tensors at `addresses`, by their numbers."""
        with self._lock:
            for pointer, number in self._pointers:
                pointer.value = addresses[number]
            for place, number in self._maps:
                self._driver.replace_address(place, addresses[number])
            self._driver.launch(self._function, self._grid, self._threads, self._shared, stream, self._parameters)


class PackedLaunch(_Launch):
    """One whose arguments are other ones at every call, of the same types."""

    def __init__(self, driver: Cuda, compiled: Any, parameters: Sequence[_Parameter], signature: Mapping[Any, Any]):
        super().__init__(driver, compiled, parameters)
        used = list(_used(signature))
        self._used = [(place, part) for place, part, _ in used]
        kinds = [*[kind for _, _, kind in used], "u64", "u64"]
        self._packer = struct.Struct("@" + "".join(["Q" if kind.startswith("*") else _PACKED[kind] for kind in kinds]))

    def run(self, grid: tuple[int, ...], given: Sequence[Any], stream: int) -> None:
        values = [_value(given[place] if part is None else given[place][part]) for place, part in self._used]
        with self._lock:
            self._packer.pack_into(self._memory, self._start, *values, 0, 0)
            self._driver.launch(self._function, grid, self._threads, self._shared, stream, self._parameters)


def _value(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def _used(signature: Mapping[Any, Any]) -> Iterator[tuple[int, int | None, str]]:
    """(place, place in the tuple there, type) of the arguments that become parameters. Raises TypeError for tuples within tuples."""
    for place, kind in enumerate(signature.values()):
        for part, each in enumerate(kind) if isinstance(kind, tuple) else [(None, kind)]:
            if not isinstance(each, str):
                raise TypeError("arguments of another form")
            if each != "constexpr":
                yield place, part, each


def direct(compiled: Any, grid: tuple[int, ...], given: Sequence[Any], numbers: Mapping[Place, int]) -> DirectLaunch | None:
    """How to start `compiled` again with the arguments `given`, of which those at the places `numbers` are, or describe, the tensors of
    those numbers. None where it cannot be said for certain how Triton would pass them."""
    driver, parameters = cuda(), _certain(compiled, given)
    return None if driver is None or parameters is None else DirectLaunch(driver, compiled, grid, parameters, numbers)


def packed(compiled: Any, given: Sequence[Any]) -> PackedLaunch | None:
    """How to start `compiled` with arguments of the same types as `given`; None likewise, and for descriptors."""
    driver, parameters = cuda(), _certain(compiled, given)
    if driver is None or parameters is None or any(parameter.described for parameter in parameters):
        return None
    try:
        return PackedLaunch(driver, compiled, parameters, compiled.src.signature)
    except TypeError:
        return None


def _certain(compiled: Any, given: Sequence[Any]) -> list[_Parameter] | None:
    """The parameters as Triton would pass them; None where that is not certain."""
    driver, metadata = cuda(), getattr(compiled, "metadata", None)
    if driver is None or metadata is None or _is_special(metadata):
        return None
    try:
        parameters = list(parameters_of(compiled.src.signature, metadata.tensordesc_meta, given))
    except (KeyError, TypeError, struct.error):
        return None
    sizes = [len(parameter.packed) for parameter in parameters]
    return parameters if sizes == driver.parameter_sizes(compiled.function) else None


def _is_special(metadata: Any) -> bool:
    """Whether a launch needs more than a grid: clusters, cooperation, memory of its own."""
    wanted = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    return metadata.num_ctas != 1 or any(getattr(metadata, name, 0) for name in wanted)


def parameters_of(
    signature: Mapping[Any, Any], described: Sequence[Mapping[str, Any]] | None, given: Sequence[Any]
) -> Iterator[_Parameter]:
    """The parameters of a kernel in the order in which Triton passes them. Raises KeyError, TypeError or struct.error for those that it
    would not pass so."""
    metadata = iter(described or ())
    for place, (kind, argument) in enumerate(zip(signature.values(), given, strict=True)):
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            yield from _described(next(metadata, {}), argument, (place,))
        else:
            yield from _plain(kind, argument, (place,))
    yield from (_Parameter(bytes(8)), _Parameter(bytes(8)))  # memory that it might have asked for


def _plain(kind: Any, argument: Any, place: Place) -> Iterator[_Parameter]:
    if isinstance(kind, tuple):
        for number, (part, each) in enumerate(zip(kind, argument, strict=True)):
            yield from _plain(part, each, (*place, number))
    elif kind.startswith("*"):
        address = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument or 0
        yield _Parameter(struct.pack("Q", address), place)
    elif kind != "constexpr":
        yield _Parameter(struct.pack(_PACKED[kind], argument))


def _described(metadata: Mapping[str, Any], argument: Any, place: Place) -> Iterator[_Parameter]:
    """A descriptor travels as what the hardware reads, then its tensor's shape and strides."""
    if metadata["fp4_padded"] or metadata.get("is_im2col") or argument.padding == "nan" or getattr(argument, "round_f32_to_tf32", False):
        raise KeyError("a descriptor of another kind")
    shape, strides, kind = tuple(argument.shape), tuple(argument.strides), metadata["elem_type"]
    about = (tuple(metadata["block_size"]), _ELEMENT_TYPES.get(kind, kind), metadata["elem_size"], metadata["swizzle"])
    address = struct.pack("Q", argument.base.data_ptr())
    yield _Parameter(address.ljust(_MAP_BYTES, b"\0"), place, _Described(shape, strides, *about))
    yield from (_Parameter(struct.pack("i", length)) for length in shape)
    yield from (_Parameter(struct.pack("q", stride)) for stride in strides)


def _offsets(parameters: Sequence[_Parameter]) -> list[int]:
    """Where each one begins, such that it is aligned."""
    offsets, end = [], 0
    for parameter in parameters:
        size = len(parameter.packed)
        offsets.append(-(-end // size) * size)
        end = offsets[-1] + size
    return offsets
