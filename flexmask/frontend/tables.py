"""Captured tensors as lookup tables: indexing by symbols, one dimension after the other or all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from ..errors import TraceError
from ..ir import BOOL, FLOAT, Expr
from .symbol import Symbol

if TYPE_CHECKING:
    from .recorder import Recorder

_ALL = slice(None)


class TableView:
    """A captured tensor with some dimensions bound to an index: `bias[b]`. `bound` has one entry per dimension, None while free."""

    __slots__ = ("bound", "recorder", "tensor")

    def __init__(self, recorder: Recorder, tensor: torch.Tensor, bound: tuple[Expr | None, ...]):
        self.recorder, self.tensor, self.bound = recorder, tensor, bound

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = next(a for a in args if isinstance(a, TableView))
        return view.recorder.torch_call(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        return _select(self.recorder, self.tensor, self.bound, index)

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TraceError("assigning to an element of a tensor is not possible in a mask or score. Choose with `torch.where`.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.recorder.size(self.tensor, axis) for axis, e in enumerate(self.bound) if e is None)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def ndim(self) -> int:
        return self.bound.count(None)

    def dim(self) -> int:
        return self.ndim

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def __len__(self) -> int:
        return int(self.shape[0])

    def __repr__(self) -> str:
        return f"<table {self._text()}>"

    def __hash__(self) -> int:
        return id(self)

    @property
    def is_constant(self) -> bool:
        """Whether only numbers were bound, so that torch could take the view now."""
        return all(e is None or e.op == "const" for e in self.bound)

    def whole(self) -> torch.Tensor:
        """The view as a tensor, for torch operations on it; refused once an index is symbolic."""
        if not self.is_constant:
            self.refuse()
        return self.recorder.whole(self.tensor, tuple(_ALL if e is None else e.value for e in self.bound))

    def refuse(self) -> NoReturn:
        shape = tuple(n for n, e in zip(lengths(self.tensor), self.bound, strict=True) if e is None)
        name = self.recorder.name_of(self.tensor)
        raise TraceError(
            f"`{self._text()}` still has {_dimensions(self.ndim)}, of shape {shape}, where one number is needed. "
            f"Index {'it' if self.ndim == 1 else 'them'} too: `{name}[{', '.join(['...'] * len(self.bound))}]` "
            f"takes {len(self.bound)} indices."
        )

    def _text(self) -> str:
        parts = ", ".join(":" if e is None else self.recorder.show(e) for e in self.bound)
        return f"{self.recorder.name_of(self.tensor)}[{parts}]"


def _dimensions(count: int) -> str:
    return f"{count} dimension{'s' if count != 1 else ''}"


def _operator(name: str) -> Callable[..., Any]:
    def method(self: TableView, *others: Any) -> Any:
        return getattr(self.whole(), name)(*others)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(TableView, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(TableView, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert", "bool", "int", "float", "index", "iter"):
    setattr(TableView, f"__{_name}__", _operator(f"__{_name}__"))


def lengths(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's shape as plain numbers, also while calls into torch are being recorded."""
    with torch._C.DisableTorchFunction():
        return tuple(tensor.shape)


def select(recorder: Recorder, tensor: Any, index: Any) -> Any:
    """`tensor[index]` while tracing: a number where every dimension is bound, a TableView where some are left."""
    if isinstance(tensor, TableView):
        return tensor[index]
    return _select(recorder, tensor, (None,) * tensor.dim(), index)


def _select(recorder: Recorder, tensor: torch.Tensor, bound: tuple[Expr | None, ...], index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(_binds(p) for p in parts):
        return _taken_by_torch(recorder, tensor, bound, parts)
    free = [axis for axis, e in enumerate(bound) if e is None]
    filled = list(bound)
    for axis, part in zip(free, _expanded(recorder, tensor, parts, len(free)), strict=True):
        if not isinstance(part, slice):
            filled[axis] = _index(recorder, tensor, axis, part)
    if None in filled:
        return TableView(recorder, tensor, tuple(filled))
    return recorder.load(tensor, tuple(e for e in filled if e is not None))


def _binds(part: Any) -> bool:
    """Whether an index is one number, or leaves its dimension whole; a condition or float counts, to be refused by name."""
    if isinstance(part, slice):
        return part.start is None and part.stop is None and part.step is None
    if isinstance(part, torch.Tensor):
        return part.dim() == 0
    return part is Ellipsis or isinstance(part, (int, float, np.generic, TableView, Symbol))


def _taken_by_torch(recorder: Recorder, tensor: torch.Tensor, bound: tuple[Expr | None, ...], parts: tuple[Any, ...]) -> Any:
    """Slices, None and index tensors: torch takes them if no index is symbolic, giving a derived tensor."""
    if any(isinstance(p, Symbol) and not p.known for p in parts):
        odd = next(p for p in parts if not _binds(p))
        raise TraceError(
            f"`{recorder.name_of(tensor)}` is indexed by {_shown(odd)} beside a symbolic index. "
            "One index a dimension: numbers, `:` or expressions of the indices. Slice or reshape the tensor outside."
        )
    whole = TableView(recorder, tensor, bound).whole() if any(e is not None for e in bound) else tensor
    return recorder.whole(whole, tuple(_plain(recorder, p) for p in parts))


def _plain(recorder: Recorder, part: Any) -> Any:
    if isinstance(part, slice):
        return slice(_plain(recorder, part.start), _plain(recorder, part.stop), _plain(recorder, part.step))
    if isinstance(part, Symbol):
        if not part.known:
            raise TraceError(
                f"a slice to `{recorder.show(part.expr)}` has a symbolic length. Index single elements, or slice the tensor outside."
            )
        return recorder.concrete(part)
    return part.whole() if isinstance(part, TableView) else part


def _shown(part: Any) -> str:
    if isinstance(part, slice):
        return "a slice"
    return f"a tensor of shape {tuple(part.shape)}" if isinstance(part, torch.Tensor) else f"`{part!r}`"


def _expanded(recorder: Recorder, tensor: torch.Tensor, parts: tuple[Any, ...], free: int) -> list[Any]:
    """One index for each free dimension: `...` written out and missing ones filled with `:`."""
    given = [p for p in parts if p is not Ellipsis]
    if len(given) > free:
        name = recorder.name_of(tensor)
        raise TraceError(f"too many indices: `{name}` has shape {lengths(tensor)}, {len(given)} given for {free} left.")
    at = next((i for i, p in enumerate(parts) if p is Ellipsis), len(given))
    return given[:at] + [_ALL] * (free - len(given)) + given[at:]


def _index(recorder: Recorder, tensor: torch.Tensor, axis: int, part: Any) -> Expr:
    expr, name = recorder.operand(part).expr, recorder.name_of(tensor)
    if expr.kind == FLOAT:
        raise TraceError(f"`{name}` is indexed by the float `{recorder.show(expr)}`. Convert with `.long()` (rounds towards zero).")
    if expr.kind == BOOL:
        raise TraceError(f"`{name}` is indexed by the condition `{recorder.show(expr)}`. Choose with `torch.where`, or use `.long()`.")
    length = lengths(tensor)[axis]
    if expr.op == "const" and not -length <= expr.value < length:
        raise TraceError(f"index {expr.value} is out of range: `{name}` has {length} entries along dimension {axis}.")
    return expr
