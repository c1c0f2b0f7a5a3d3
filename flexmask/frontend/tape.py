"""Tape: what a mask or score does, written down by torch.compile's own tracer, to be traced by flexmask's afterwards.

Dynamo runs the user's function as part of the model, so that captured tensors and sizes become inputs of its graph. The function is
called with stand-ins: meta tensors that nothing computes with, as a torch function mode sees each operation on them first and writes
it on the tape. Where Dynamo runs Python's `abs`, `-` and `+` past the mode, the stand-in's own shape and dtype say what happened to it.
Everything but `retrace` is run by Dynamo and keeps to what Dynamo knows; `retrace` is run once, on the finished tape, by Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.overrides import TorchFunctionMode

from ..errors import TraceError
from .portable import Captured, to_text
from .promise import Ascending
from .recorder import Recorder
from .signature import ORDER, ROLES
from .symbol import Symbol
from .trace import TorchCalls, result_of, settle, symbol_of
from .traced import Traced

# a value's kind and number: ("value", step), ("tensor", n), ("promised", n), ("int", n), ("float", n), ("tuple", items), ("constant", x)
Leaf = tuple[str, Any]
Step = tuple[Any, tuple[Leaf, ...], tuple[tuple[str, Leaf], ...]]

_STAND_IN = torch.complex128


def _is_stand_in(x: torch.Tensor) -> bool:
    """Whether `x` stands for an index, or for what was computed of it: nothing that a model captures looks like it."""
    return x.device.type == "meta" and x.dim() == 1 and x.dtype in (_STAND_IN, torch.float64)


class Tape:
    """The steps of one function, the tensors they read, and the numbers that are not known while Dynamo traces."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.tensors: list[torch.Tensor] = []
        self.ints: list[Any] = []
        self.floats: list[Any] = []
        self._stand_ins: list[torch.Tensor] = []
        self._numbers: dict[torch.Tensor, int] = {}

    def stand_in(self) -> torch.Tensor:
        """A tensor for the next value; its length is the value's number, and complex, so that `abs` changes its dtype."""
        made = torch.empty((len(self._stand_ins),), dtype=_STAND_IN, device="meta")
        self._numbers[made] = len(self._stand_ins)
        self._stand_ins.append(made)
        return made

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """One operation, as the stand-in of its result."""
        named = tuple([(name, self.leaf(value)) for name, value in kwargs.items()])
        self.steps.append((func, tuple([self.leaf(a) for a in args]), named))
        return self.stand_in()

    def leaf(self, x: Any) -> Leaf:
        """How a step refers to an operand."""
        if isinstance(x, Ascending):
            return ("promised", self._tensor(x.tensor))
        if isinstance(x, torch.Tensor):
            if not _is_stand_in(x):
                return ("tensor", self._tensor(x))
            return ("value", self._numbers[x] if x in self._numbers else self._numbers[self._overlooked(x)])
        if isinstance(x, (tuple, list)):
            return ("tuple", tuple([self.leaf(y) for y in x]))
        if isinstance(x, slice):
            return ("slice", (self.leaf(x.start), self.leaf(x.stop), self.leaf(x.step)))
        if isinstance(x, (int, float)) and not has_static_value(x):
            return self._number(x)
        return ("constant", x)

    def _overlooked(self, x: torch.Tensor) -> torch.Tensor:
        """The stand-in for what Python's `abs`, `-` or `+` made of another one, with that step written down now."""
        func = torch.neg if x.is_complex() else torch.abs
        return self.record(func, (self._stand_ins[x.shape[0]],), {})

    def _tensor(self, x: torch.Tensor) -> int:
        for number, known in enumerate(self.tensors):
            if known is x:
                return number
        self.tensors.append(x)
        return len(self.tensors) - 1

    def _number(self, x: Any) -> Leaf:
        kind, known = ("int", self.ints) if isinstance(x, int) else ("float", self.floats)
        known.append(x)
        return (kind, len(known) - 1)

    def sees(self, value: Any) -> bool:
        """Whether a stand-in is among nested arguments."""
        if isinstance(value, torch.Tensor):
            return _is_stand_in(value)
        if isinstance(value, (tuple, list)):
            for part in value:
                if self.sees(part):
                    return True
        return False


class _TapeCalls(TorchFunctionMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tape.sees(args) or self.tape.sees(list(kwargs.values())):
            return self.tape.record(func, args, kwargs)
        return func(*args, **kwargs)


def tape_of(mod: Callable[..., Any], kind: str) -> tuple[Tape, Leaf]:
    """The tape of a Mask or Score, which is called with (score,) b, h, q_idx and kv_idx, and its result."""
    tape = Tape()
    values = [tape.stand_in() for _ in ORDER[kind]]
    with _TapeCalls(tape):
        result = mod(*values)
    return tape, tape.leaf(result)


def bind_traced(function: Callable[..., Any], kind: str) -> tuple[tuple[str, str | None], ...]:
    """What `bind` says, of what Dynamo knows of a function made inside the model: its names, but not its defaults."""
    order = ORDER[kind]
    by_position: list[tuple[str, str | None]] = [(role, None) for role in order]
    code = getattr(function, "__code__", None)
    if code is None:
        return tuple(by_position)
    first = 1 if isinstance(function, MethodType) else 0
    names = code.co_varnames[first : code.co_argcount + code.co_kwonlyargcount]
    by_name: list[tuple[str, str | None]] = [(role, name) for name in names for role in order if name in ROLES[role]]
    strangers = [name for name in names[: len(order)] if name not in [known for _, known in by_name]]
    return tuple(by_position if len(names) >= len(order) and strangers else by_name)


@dataclass(frozen=True)
class Retraced:
    """What a tape says, and which of its tensors and numbers became which captures of it."""

    traced: Traced
    tensors: tuple[int, ...]
    scalars: tuple[tuple[str, int], ...]  # ("int" | "float", number on the tape)
    # numbers that shape the code (divisors, factors of indices): those must be constants on the tape
    specialised: tuple[tuple[str, int], ...]


class _Function:
    """Stands for the user's function, which the tape no longer has, in messages."""

    name = "the function compiled by torch.compile"


def retrace(
    kind: str,
    steps: Sequence[Step],
    result: Leaf,
    tensors: Sequence[tuple[int, torch.dtype]],
    ints: Sequence[int | None],
    floats: int,
) -> Retraced:
    """The tape traced by flexmask. `tensors` gives the rank and dtype of each tensor on it, `ints` the integers that are known already,
    `floats` how many there are.

    Raises TraceError for what cannot be compiled; it cannot point at a line, as Dynamo keeps none.
    """
    recorder, mod = Recorder(), _Function()
    given: dict[str, list[Any]] = {
        "value": [symbol_of(recorder, role) for role in ORDER[kind]],
        "tensor": [_table(*spec) for spec in tensors],
    }
    # 7: any number that is not special
    given["int"] = [recorder.scalar(7, f"int{n}") if known is None else known for n, known in enumerate(ints)]
    given["float"] = [recorder.scalar(7.0, f"float{n}") for n in range(floats)]
    for number, tensor in enumerate(given["tensor"]):
        recorder.names[id(tensor)] = f"tensor{number}"
    with TorchCalls(recorder):
        for func, args, kwargs in steps:
            named = {name: _operand(recorder, given, leaf) for name, leaf in kwargs}
            operands = tuple([_operand(recorder, given, a) for a in args])
            given["value"].append(_applied(recorder, func, operands, named))
    value = _operand(recorder, given, result)
    traced = settle(recorder, mod, kind, result_of(recorder, mod, kind, value))
    places = {id(tensor): number for number, tensor in enumerate(given["tensor"])}
    numbers = {f"int{n}": ("int", n) for n in range(len(ints))} | {f"float{n}": ("float", n) for n in range(floats)}
    specialised = tuple([numbers[name] for name, _ in traced.specialised if name in numbers])
    if any(name not in numbers for name in traced.scalar_names):
        raise TraceError("the size of a table that is indexed in part is not known under torch.compile. Take it outside of the function.")
    return Retraced(traced, tuple([places[id(t)] for t in traced.tensors]), tuple([numbers[n] for n in traced.scalar_names]), specialised)


def captured_by_dynamo(mod: Callable[..., Any], kind: str) -> Captured:
    """What a Mask or Score that Dynamo is running is made of: `captured`, with the numbers that Dynamo holds open as they are."""
    tape, result = tape_of(mod, kind)
    specs = tuple([(t.dim(), t.dtype) for t in tape.tensors])
    ints: list[Any] = [None for _ in tape.ints]
    found = _structure(kind, tuple(tape.steps), result, specs, tuple(ints), len(tape.floats))
    if found[3]:
        for number in found[3]:  # Dynamo guards on their values from here on
            ints[number] = operator.index(tape.ints[number])
        found = _structure(kind, tuple(tape.steps), result, specs, tuple(ints), len(tape.floats))
    text, tensors, (int_numbers, float_numbers), _ = found
    return text, [tape.tensors[n] for n in tensors], [tape.ints[n] for n in int_numbers], [tape.floats[n] for n in float_numbers]


@torch.compiler.assume_constant_result
def _structure(
    kind: str, steps: Any, result: Leaf, tensors: Any, ints: Any, floats: int
) -> tuple[str, tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]:
    """(text, numbers of the tensors, numbers of ints and floats, in the text's order, numbers of ints that must be known)."""
    found = retrace(kind, steps, result, tensors, ints, floats)
    shaping = [number for word, number in found.specialised if word == "float"]
    if shaping:
        raise TraceError("a float that changes from call to call shapes the code (as an exponent, say). Make it a constant.")
    numbers = tuple([tuple([n for w, n in found.scalars if w == word]) for word in ("int", "float")])
    return to_text(found.traced), found.tensors, (numbers[0], numbers[1]), tuple([n for _, n in found.specialised])


def _applied(recorder: Recorder, func: Any, operands: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A step done on symbols. Python's operators come as functions of `operator`, or as methods of tensors, `__rfloordiv__` say."""
    if getattr(func, "__module__", "") == "_operator":
        return func(*operands)
    if isinstance(operands[0], Symbol) and func.__name__.startswith("__r") and hasattr(Symbol, func.__name__):
        return getattr(operands[0], func.__name__)(*operands[1:])
    return recorder.torch_call(func, operands, named)


def _table(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of that rank, long enough for any index that is written out, without the memory."""
    return torch.empty((), dtype=dtype).expand((1 << 60 // max(rank, 2),) * rank)


def _operand(recorder: Recorder, given: dict[str, list[Any]], leaf: Leaf) -> Any:
    word, what = leaf
    if word == "constant":
        return what
    if word in ("tuple", "slice"):
        parts = [_operand(recorder, given, part) for part in what]
        return slice(*parts) if word == "slice" else tuple(parts)
    if word == "promised":
        recorder.promise(given["tensor"][what])
        return given["tensor"][what]
    return given[word][what]
