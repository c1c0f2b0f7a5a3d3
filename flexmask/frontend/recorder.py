"""Recorder: what one trace collects. Symbols report every operation here; it never outlives the trace."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from .. import ir
from ..errors import TraceError
from . import refuse
from .arithmetic import Misfit, combine
from .places import Place, user_frame
from .symbol import ANY_DEVICE, AnyDevice, Symbol, flat
from .tables import TableView, lengths, select
from .torch_table import IMPURE, ROWS

# torch's name -> the purpose in refuse's table
_VALUE_READS = {
    "item": "item", "tolist": "tolist", "numpy": "numpy", "__bool__": "bool", "__int__": "int", "__float__": "float", "__index__": "index",
    "__array__": "numpy", "__contains__": "contains", "__complex__": "float", "is_nonzero": "bool",
}  # fmt: skip
_METADATA = {
    "get", "__len__", "dim", "ndimension", "numel", "nelement", "size", "stride", "storage_offset", "element_size", "is_floating_point",
    "is_complex", "is_contiguous", "is_signed", "get_device", "is_tensor", "data_ptr",
}  # fmt: skip


class Recorder:
    """The captures, places and specialised numbers of one trace. Numbers of captures are provisional until the end."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.scalars: list[int | float] = []
        self.scalar_names: list[str] = []
        self.names: dict[int, str] = {}
        self.places: dict[ir.Expr, Place] = {}
        self.specialised: set[int] = set()
        self.promised: dict[int, torch.Tensor] = {}  # kept, so that their ids stay theirs
        self.volatile = False
        self._numbers: dict[int, int] = {}
        self._sizes: dict[tuple[int, int], Symbol] = {}
        # tensors made by torch operations inside the mod; kept, so that their ids stay theirs
        self._derived: dict[int, torch.Tensor] = {}

    # symbols

    def symbol(self, expr: ir.Expr, known: bool = False) -> Symbol:
        if expr not in self.places and expr.op != "const":
            frame = user_frame()
            if frame is not None:
                self.places[expr] = (frame.f_code, frame.f_lasti)
        return Symbol(expr, self, known)

    def scalar(self, value: int | float, name: str) -> Symbol:
        """A captured number, as a run-time scalar."""
        _check_range(value)
        self.scalars.append(value)
        self.scalar_names.append(name)
        return Symbol(ir.scalar(len(self.scalars) - 1, ir.INT if isinstance(value, int) else ir.FLOAT), self, True)

    def operand(self, value: Any) -> Symbol:
        """Anything that may stand in an expression, as a symbol of this trace."""
        if isinstance(value, Symbol):
            if value.recorder is not self:
                raise TraceError(
                    f"`{value.recorder.show(value.expr)}` comes from another trace. "
                    "Masks and scores must not keep indices in variables outside themselves."
                )
            return value
        if isinstance(value, torch.Tensor):
            return self._scalar_tensor(value)
        if isinstance(value, TableView):
            value.refuse()
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, (bool, int, float)):
            _check_range(value)
            if not isinstance(value, bool):
                value = int(value) if isinstance(value, int) else float(value)  # an enum's member is its number
            return Symbol(ir.const(value), self, True)
        raise TraceError(f"expected a number or an expression of the indices, found {_described(value)}.")

    def _scalar_tensor(self, tensor: torch.Tensor) -> Symbol:
        if tensor.dim():
            raise TraceError(
                f"`{self.name_of(tensor)}` is a tensor of shape {lengths(tensor)} where one number is needed. "
                f"Index it: `{self.name_of(tensor)}[{', '.join(['q_idx', 'kv_idx', '...'][: min(tensor.dim(), 3)])}]`."
            )
        number = self.capture(tensor)
        return self.symbol(ir.load(number, ir.kind_of_dtype(tensor.dtype)))

    def apply(self, op: str, *values: Any) -> Symbol:
        """One operation of the arithmetic table on operands."""
        operands = [self.operand(v) for v in values]
        self._specialise_shape(op, operands)
        try:
            expr = combine(op, *(o.expr for o in operands))
        except Misfit as misfit:
            raise TraceError(misfit.message.format(*(self.show(part) for part in misfit.parts))) from None
        return self.symbol(expr, all(o.known for o in operands))

    def operator(self, op: str, left: Any, right: Any, swapped: bool) -> Any:
        """Python's binary operator; operands that no expression can hold are left to Python."""
        if isinstance(right, torch.Tensor) and right.dim() and left.known:
            value = self.concrete(left)
            return _python_operator(op)(right, value) if swapped else _python_operator(op)(value, right)
        if not isinstance(right, (Symbol, bool, int, float, np.generic, torch.Tensor, TableView)) and right is not None:
            return NotImplemented
        return self.apply(op, right, left) if swapped else self.apply(op, left, right)

    def _specialise_shape(self, op: str, operands: list[Symbol]) -> None:
        """Captured integers that shape the code become constants: divisors, shift amounts, exponents, factors of indices."""
        if op in ("floordiv", "mod", "truediv", "lshift", "rshift", "pow"):
            right = operands[1]
            if op in ("floordiv", "mod", "truediv") and right.known and self._value(right) == 0:
                raise TraceError(f"division by zero: `{self.show(right.expr)}` is 0.")
            if right.known and right.expr.kind == ir.INT and op != "truediv":
                operands[1] = self.operand(self.concrete(right))
        elif op == "mul" and all(o.expr.kind == ir.INT for o in operands) and operands[0].known != operands[1].known:
            at = 0 if operands[0].known else 1
            operands[at] = self.operand(self.concrete(operands[at]))

    def _value(self, symbol: Symbol) -> Any:
        with torch._C.DisableTorchFunction():
            return ir.evaluate(symbol.expr, ir.Env(scalars=self.scalars))

    def concrete(self, symbol: Symbol) -> Any:
        """The value of a symbol made of captured numbers; those numbers are constants of the code from now on."""
        self.specialised.update(node.value for node in ir.walk(symbol.expr) if node.op == "scalar")
        return self._value(symbol)

    def show(self, expr: ir.Expr) -> str:
        """The expression's text with the user's names."""
        tensors = {f"t{i}": self.name_of(tensor) for i, tensor in enumerate(self.tensors)}
        return ir.show(expr, tensors | {f"s{i}": name for i, name in enumerate(self.scalar_names)})

    # captured tensors

    def name_of(self, tensor: torch.Tensor) -> str:
        return self.names.get(id(tensor), "tensor")

    def capture(self, tensor: torch.Tensor) -> int:
        """The number of a captured tensor; the same object is one capture."""
        if id(tensor) not in self._numbers:
            if tensor.layout is not torch.strided or tensor.is_quantized:
                raise TraceError(f"`{self.name_of(tensor)}` is {tensor.layout}; captured tensors are dense. Convert with `.to_dense()`.")
            try:
                ir.kind_of_dtype(tensor.dtype)
            except TypeError as error:
                raise TraceError(f"`{self.name_of(tensor)}`: {error}.") from None
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        self.volatile = self.volatile or id(tensor) in self._derived
        return self._numbers[id(tensor)]

    def promise(self, tensor: torch.Tensor) -> None:
        """Takes note that the user vouches for `tensor` ascending along its last axis, wherever it is captured."""
        self.promised[id(tensor)] = tensor

    def load(self, tensor: torch.Tensor, indices: tuple[ir.Expr, ...]) -> Symbol:
        number = self.capture(tensor)
        return self.symbol(ir.load(number, ir.kind_of_dtype(tensor.dtype), *indices))

    def size(self, tensor: torch.Tensor, axis: int) -> Any:
        """A length of a captured tensor is a captured number, so other lengths give the same code."""
        length = lengths(tensor)[axis]
        if id(tensor) in self._derived:
            return length
        key = (id(tensor), axis)
        if key not in self._sizes:
            self._sizes[key] = self.scalar(length, f"{self.name_of(tensor)}_size_{axis}")
        return self._sizes[key]

    # torch's functions

    def method(self, symbol: Symbol, name: str) -> Any:
        """`symbol.name`: a row of the table, bound; anything else a tensor has is refused."""
        if name in ROWS and hasattr(torch.Tensor, name):
            return partial(self._row, _key(name, True), symbol)
        if name in refuse.REMEDIES:
            raise TraceError(refuse.needs_value(name, self.show(symbol.expr)))
        if _is_in_place(name):
            _refuse_impure(name, (), {})
        if not hasattr(torch.Tensor, name):
            raise AttributeError(f"a symbolic number has no attribute {name!r}")
        raise TraceError(_unsupported(f"Tensor.{name}", name))

    def _row(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("out", None) is not None:
            raise TraceError(f"`out=` writes into a tensor while tracing. Use the value that `{name}` returns.")
        return ROWS[name](self, *args, **kwargs)

    def torch_call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any call into torch during the trace: an index, a row of the table, a run on real tensors, or a refusal."""
        name = _name(func)
        if name == "getitem":
            return select(self, args[0], args[1])
        _refuse_impure(name, args, kwargs)
        symbols = [x for x in flat((args, kwargs)) if isinstance(x, (Symbol, TableView))]
        if not symbols:
            return self._run(func, name, args, kwargs)
        shaped = any(isinstance(x, torch.Tensor) and x.dim() for x in flat((args, kwargs)))
        real = all(s.is_constant if isinstance(s, TableView) else s.known for s in symbols)
        if real and (shaped or name not in ROWS or any(isinstance(s, TableView) for s in symbols)):
            return self._run(func, name, *_concrete(self, (args, kwargs)))
        if name not in ROWS:
            raise TraceError(_unsupported(f"{_prefix(func)}{name}", name))
        return self._row(_key(name, _prefix(func) == "Tensor."), *args, **kwargs)

    def _run(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on real tensors only: it runs, and a tensor it makes is a derived one."""
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None and (func == _SHAPE or (name == "size" and len(args) == 1 and not kwargs)):
            return tuple(self.size(tensor, axis) for axis in range(tensor.dim()))
        if tensor is not None and name == "size" and len(args) == 2 and not kwargs:
            return self.size(tensor, args[1] % tensor.dim())
        if any(isinstance(x, AnyDevice) for x in flat((args, kwargs))):
            args, kwargs = _drop_device(args, kwargs)
            if name == "to" and len(args) == 1 and not kwargs:
                return tensor
        if name in _VALUE_READS and tensor is not None:
            raise TraceError(refuse.needs_value(_VALUE_READS[name], self.name_of(tensor)))
        result = func(*args, **kwargs)
        result = list(result) if name == "__iter__" else result
        if name in _CONSTANTS and isinstance(result, torch.Tensor) and not result.dim() and not _reads_tensor(name, args):
            return self.operand(result.item())
        self._mark_derived(result, args)
        if isinstance(result, (bool, int, float)) and name not in _METADATA:
            self.volatile = True  # a number read off a tensor's values is true of this moment only
        return iter(result) if name == "__iter__" else result

    def _mark_derived(self, result: Any, args: tuple[Any, ...]) -> None:
        given = {id(a) for a in flat(args)}
        for tensor in flat(result):
            if isinstance(tensor, torch.Tensor) and (id(tensor) not in given):
                self._derived[id(tensor)] = tensor

    def whole(self, tensor: torch.Tensor, index: tuple[Any, ...]) -> torch.Tensor:
        """A view of a captured tensor as a tensor of its own, for torch to work on."""
        with torch._C.DisableTorchFunction():
            result = tensor[index]
        self._mark_derived(result, (tensor,))
        return result


_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_CONSTANTS = {"tensor", "scalar_tensor", "as_tensor", "asarray", "ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "new_tensor"}


def _reads_tensor(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a factory's value comes from a tensor; `t.new_ones` and its like take only a dtype from `t`."""
    return any(isinstance(a, torch.Tensor) for a in (args[1:] if name.startswith("new_") else args))


def fits(value: int) -> bool:
    """Whether an integer is one of int64."""
    return -(2**63) <= value < 2**63


def _check_range(value: int | float) -> None:
    if isinstance(value, int) and not fits(value):
        raise TraceError(f"{value} does not fit into 64 bits. Numbers in masks and scores are int64 or float32.")


def _described(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r}"


def _name(func: Any) -> str:
    """The function's plain name: `__and__` is "and"; `__get__` of an attribute keeps its underscores apart from methods."""
    name: str = getattr(func, "__name__", str(func))
    return name[2:-2] if name.startswith("__") and name not in _KEPT else name


_KEPT = {*_VALUE_READS, "__len__", "__iter__"}


def _key(name: str, method: bool) -> str:
    return f"Tensor.{name}" if method and f"Tensor.{name}" in ROWS else name


def _prefix(func: Any) -> str:
    return "Tensor." if type(func).__name__ in ("method_descriptor", "wrapper_descriptor", "slot wrapper") else "torch."


def _is_in_place(name: str) -> bool:
    return name in ("setitem", "set", "delitem") or (name.endswith("_") and not name.startswith("_")) or name in _IN_PLACE_OPERATORS


_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift"}


def _refuse_impure(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name in IMPURE:
        raise TraceError(f"`{name}` draws random numbers, but a mask or score is traced once. Draw them outside and capture the tensor.")
    if _is_in_place(name):
        what = "assigning to an element of a tensor" if name == "setitem" else f"`{name}`, which changes a tensor in place,"
        raise TraceError(f"{what} is not possible in a mask or score. Build the tensor outside; choose with `torch.where` inside.")
    if kwargs.get("out") is not None:
        raise TraceError(f"`out=` writes into a tensor while tracing. Use the value that `torch.{name}` returns.")


def _unsupported(shown: str, name: str) -> str:
    close = difflib.get_close_matches(name, ROWS, n=2, cutoff=0.75)
    hint = f" Similar and supported: {', '.join(f'`{c}`' for c in close)}." if close else ""
    return f"{shown} is not supported in a mask or score.{hint} Compute it outside and capture the tensor, or compose it of supported ones."


def _concrete(recorder: Recorder, value: Any) -> Any:
    """Nested arguments with known symbols replaced by their values and views by tensors."""
    if isinstance(value, (tuple, list)):
        return type(value)(_concrete(recorder, v) for v in value)
    if isinstance(value, dict):
        return {k: _concrete(recorder, v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*_concrete(recorder, (value.start, value.stop, value.step)))
    if isinstance(value, TableView):
        return value.whole()
    return recorder.concrete(value) if isinstance(value, Symbol) else value


def _drop_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(a for a in args if a is not ANY_DEVICE), {k: v for k, v in kwargs.items() if v is not ANY_DEVICE}


def _python_operator(op: str) -> Callable[[Any, Any], Any]:
    name = {"&": "and_", "|": "or_", "^": "xor"}.get(op, op)
    found: Callable[[Any, Any], Any] = getattr(operator, name)
    return found
