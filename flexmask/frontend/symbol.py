"""Symbol: what a mask or score function is called with; every operation on it is written down as an expression."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..errors import TraceError
from ..ir import BOOL, FLOAT, Expr
from . import refuse

if TYPE_CHECKING:
    from .recorder import Recorder

_DTYPE_OF = {BOOL: torch.bool, FLOAT: torch.float32}


class AnyDevice:
    """The `.device` of a symbol: compares and prints like a device, and moving a tensor to it leaves the tensor where it is."""

    type, index = "cpu", None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TraceError("the device of an index is not known while tracing. Leave `device=` away.")

    def __str__(self) -> str:
        return "cpu"


ANY_DEVICE = AnyDevice()


def _binary(op: str, swapped: bool) -> Callable[[Any, Any], Any]:
    def method(self: Symbol, other: Any) -> Any:
        return self.recorder.operator(op, self, other, swapped)

    return method


def _unary(op: str) -> Callable[[Any], Any]:
    def method(self: Symbol) -> Any:
        return self.recorder.apply(op, self)

    return method


class Symbol:
    """A value that is known only when the kernel runs. `known` if it depends on captured numbers alone, and so has a value now."""

    __slots__ = ("expr", "known", "recorder")

    def __init__(self, expr: Expr, recorder: Recorder, known: bool):
        self.expr, self.recorder, self.known = expr, recorder, known

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        symbol = next(x for x in flat((args, kwargs or {})) if isinstance(x, Symbol))
        return symbol.recorder.torch_call(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.recorder.method(self, name)

    def __repr__(self) -> str:
        return f"<symbol {self.recorder.show(self.expr)}>"

    __str__ = __repr__

    # a symbol is a tensor without dimensions
    shape = torch.Size(())
    ndim = 0
    device = ANY_DEVICE
    requires_grad = False
    is_cuda = False

    @property
    def dtype(self) -> torch.dtype:
        if self.expr.op == "cast":
            found: torch.dtype = getattr(torch, self.expr.value)
            return found
        return _DTYPE_OF.get(self.expr.kind, torch.int64)

    # Python's operators; `x > y` is written `y < x`
    __add__, __radd__ = _binary("add", False), _binary("add", True)
    __sub__, __rsub__ = _binary("sub", False), _binary("sub", True)
    __mul__, __rmul__ = _binary("mul", False), _binary("mul", True)
    __truediv__, __rtruediv__ = _binary("truediv", False), _binary("truediv", True)
    __floordiv__, __rfloordiv__ = _binary("floordiv", False), _binary("floordiv", True)
    __mod__, __rmod__ = _binary("mod", False), _binary("mod", True)
    __pow__, __rpow__ = _binary("pow", False), _binary("pow", True)
    __and__, __rand__ = _binary("&", False), _binary("&", True)
    __or__, __ror__ = _binary("|", False), _binary("|", True)
    __xor__, __rxor__ = _binary("^", False), _binary("^", True)
    __lshift__, __rlshift__ = _binary("lshift", False), _binary("lshift", True)
    __rshift__, __rrshift__ = _binary("rshift", False), _binary("rshift", True)
    __lt__, __le__ = _binary("lt", False), _binary("le", False)
    __gt__, __ge__ = _binary("lt", True), _binary("le", True)
    __eq__ = _binary("eq", False)
    __ne__ = _binary("ne", False)
    __neg__, __pos__, __abs__, __invert__ = _unary("neg"), _unary("pos"), _unary("abs"), _unary("~")

    # what needs a value now: given for captured numbers, refused for everything else
    def __bool__(self) -> bool:
        return bool(self._value_for("bool"))

    def __int__(self) -> int:
        return int(self._value_for("int"))

    def __float__(self) -> float:
        return float(self._value_for("float"))

    def __index__(self) -> int:
        value = self._value_for("index")
        if not isinstance(value, int):
            raise TypeError(f"{type(value).__name__!r} object cannot be interpreted as an integer")
        return value

    def __hash__(self) -> int:
        return hash(self._value_for("hash"))

    def __format__(self, spec: str) -> str:
        return format(self._value_for("format"), spec) if self.known else repr(self)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._value_for("round"), digits)

    def __iter__(self) -> Iterator[Any]:
        self._refuse("iter")

    def __len__(self) -> int:
        self._refuse("len")

    def __contains__(self, item: Any) -> bool:
        self._refuse("contains")

    def __getitem__(self, index: Any) -> Any:
        self._refuse("getitem")

    def __setitem__(self, index: Any, value: Any) -> None:
        self._refuse("setitem")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        operation = _NUMPY_OPERATORS.get(ufunc.__name__)
        if operation is None or method != "__call__" or kwargs:
            raise TraceError(refuse.numpy_call(ufunc.__name__))
        return operation(self.recorder, *inputs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
        raise TraceError(refuse.numpy_call(func.__name__))

    def _value_for(self, purpose: str) -> Any:
        if not self.known:
            self._refuse(purpose)
        return self.recorder.concrete(self)

    def _refuse(self, purpose: str) -> NoReturn:
        raise TraceError(refuse.needs_value(purpose, self.recorder.show(self.expr)))


def flat(value: Any) -> Iterator[Any]:
    """Everything in nested tuples, lists, dicts and slices."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from flat(item)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    elif isinstance(value, slice):
        yield from flat((value.start, value.stop, value.step))
    else:
        yield value


# numpy's name -> the operation of the arithmetic table, and whether its operands change places
_NUMPY_NAMES = {
    "add": ("add", False), "subtract": ("sub", False), "multiply": ("mul", False), "divide": ("truediv", False),
    "floor_divide": ("floordiv", False), "remainder": ("mod", False), "power": ("pow", False), "less": ("lt", False),
    "less_equal": ("le", False), "greater": ("lt", True), "greater_equal": ("le", True), "equal": ("eq", False), "not_equal": ("ne", False),
    "bitwise_and": ("&", False), "bitwise_or": ("|", False), "bitwise_xor": ("^", False),
}  # fmt: skip


def _numpy_operator(op: str, swapped: bool) -> Callable[..., Any]:
    def operation(recorder: Recorder, left: Any, right: Any) -> Any:
        return recorder.apply(op, right, left) if swapped else recorder.apply(op, left, right)

    return operation


_NUMPY_OPERATORS = {name: _numpy_operator(op, swapped) for name, (op, swapped) in _NUMPY_NAMES.items()}
