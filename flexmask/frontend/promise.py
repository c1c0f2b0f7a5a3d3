"""sorted: the user's promise that a captured tensor ascends, and the check of promises for debugging."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import PromiseError
from ..ir import walk
from .symbol import Symbol, flat
from .traced import Traced


class Ascending:
    """A tensor of integers that is promised to ascend along its last axis, whatever it will hold. Made by `flexmask.sorted`.

    It stands for `tensor` everywhere: indexing, attributes, methods, operators and torch's functions go to the tensor and give what
    the tensor gives. `to` alone keeps the promise. Tracing takes note of the promise and then works on the tensor itself.
    """

    __slots__ = ("tensor",)
    tensor: torch.Tensor

    def __init__(self, tensor: torch.Tensor):
        object.__setattr__(self, "tensor", tensor)

    def __setattr__(self, name: str, value: Any) -> None:
        raise PromiseError(f"a promise does not change: `{name}` cannot be set. Promise another tensor: `flexmask.sorted(tensor)`.")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_bare(args), **_bare(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name == "tensor" or name.startswith("__"):  # copying and pickling ask for these, and mean the promise
            raise AttributeError(name)
        return getattr(self.tensor, name)

    def __getitem__(self, index: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            # passes the promise itself to whatever follows torch's calls, as a tape does
            item: Callable[..., Any] = torch.Tensor.__getitem__
            return item(self, index)
        for part in flat(index):
            if isinstance(part, Symbol):  # met where tracing could not see it beforehand
                part.recorder.promise(self.tensor)
        return self.tensor[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tensor[index] = value

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tensor)

    def __reduce__(self) -> Any:
        return Ascending, (self.tensor,)

    def __hash__(self) -> int:
        return hash(self.tensor)

    def __repr__(self) -> str:
        return f"flexmask.sorted({self.tensor!r})"

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """`tensor.to(...)`, still promised where it is still of integers."""
        moved = self.tensor.to(*args, **kwargs)
        return moved if _fault(moved) else Ascending(moved)


def _bare(value: Any) -> Any:
    """Nested arguments with the tensors in place of the promises."""
    if isinstance(value, (tuple, list)):
        return type(value)(_bare(v) for v in value)
    if isinstance(value, dict):
        return {k: _bare(v) for k, v in value.items()}
    return value.tensor if isinstance(value, Ascending) else value


def _operator(name: str) -> Callable[..., Any]:
    def method(self: Ascending, *others: Any) -> Any:
        return getattr(self.tensor, name)(*_bare(others))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Ascending, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(Ascending, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "bool", "int", "index"):
    setattr(Ascending, f"__{_name}__", _operator(f"__{_name}__"))


def sorted(tensor: torch.Tensor | Ascending) -> Ascending:
    """The promise that `tensor` ascends along its last axis (equal neighbours are fine), now and after every later change of it.

    `tensor`: integers, at least one axis: ids of documents [N] or [B, N], say. Use the result in its place inside mask functions and
    as an argument of ready-made masks. With it, `doc[q_idx] == doc[kv_idx]` is a range of keys for good: nothing looks whether the
    ids ascend, and on a GPU no second kernel stands by for the case that they do not. It moves no data and reads none. A promise
    that is not kept gives wrong attention; with FLEXMASK_DEBUG=1 each new map checks it.

    Raises PromiseError for floats, bools, tensors without an axis, and what is no tensor.

    >>> import torch, flexmask
    >>> doc = flexmask.sorted(torch.tensor([0, 0, 1, 1, 1]))
    >>> @flexmask.mask
    ... def document(q_idx, kv_idx):
    ...     return doc[q_idx] == doc[kv_idx]
    >>> document.traced().promised
    frozenset({0})
    """
    if isinstance(tensor, Ascending):
        return tensor
    fault = _fault(tensor)
    if fault:
        raise PromiseError(fault)
    return Ascending(tensor)


def _fault(tensor: Any) -> str:
    """What keeps `tensor` from being promised, and what to do; "" where nothing does."""
    if not isinstance(tensor, torch.Tensor):
        return f"flexmask.sorted takes a tensor of integers, got {type(tensor).__name__}. Write `flexmask.sorted(torch.tensor(...))`."
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        return f"flexmask.sorted takes integers, and this tensor is {tensor.dtype}. Convert it: `flexmask.sorted(tensor.to(torch.int32))`."
    if not tensor.dim():
        return "flexmask.sorted takes a tensor with an axis to ascend along, [N] or [B, N], and this one is a single number."
    return ""


def check_promises(traced: Traced) -> None:
    """Raise PromiseError, at the user's line, where a promised tensor of `traced` descends. Reads the tensors, so on a GPU this waits."""
    for number, (tensor, name) in enumerate(zip(traced.tensors, traced.tensor_names, strict=True)):
        if number not in traced.promised:
            continue
        places = (tensor[..., 1:] < tensor[..., :-1]).nonzero()
        if len(places):
            *lead, last = places[0].tolist()
            before, after = (f"{name}[{', '.join(map(str, [*lead, i]))}] = {tensor[(*lead, i)].item()}" for i in (last, last + 1))
            node = next(n for n in walk(traced.expr) if n.op == "load" and n.value == number)
            raise PromiseError(
                f"`{name}`, captured by `{traced.name}`, was promised to ascend along its last axis, but {before} comes before {after}. "
                "Sort it, or capture it without `flexmask.sorted`.",
                traced.locate(node),
            )
