"""Mask and Score: a user's function as an object that composes, and the decorators that make them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .errors import TraceError
from .frontend.signature import bind


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else str(name)


class _Mod:
    """What masks and scores share: the user's function, its name, and how its parameters are matched."""

    kind = ""

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        if not callable(function):
            raise TraceError(f"a {self.kind} is a function of (b, h, q_idx, kv_idx); got {type(function).__name__}.")
        self.function = function
        self.name = name or _name_of(function)
        self._binding = bind(function, self.kind)
        self.__doc__ = getattr(function, "__doc__", None)

    def _call(self, values: dict[str, Any]) -> Any:
        positional = [values[role] for role, keyword in self._binding if keyword is None]
        named = {keyword: values[role] for role, keyword in self._binding if keyword is not None}
        return self.function(*positional, **named)

    def __repr__(self) -> str:
        return f"<flexmask.{self.kind} {self.name}>"

    def __bool__(self) -> bool:
        raise TraceError(f"`{self.name}` has no truth value. Combine masks with `&`, `|` and `~`, not with `and`, `or` and `not`.")


class Mask(_Mod):
    """A keep condition over (b, h, q_idx, kv_idx): true where the query may attend to the key. Made by `flexmask.mask`.

    Masks compose with `&`, `|`, `^` and `~`. Called with indices (numbers, tensors or symbols) a mask gives its condition there.
    """

    kind = "mask"

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self._call({"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx})

    def __and__(self, other: Mask) -> Mask:
        return _combine("&", self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combine("|", self, other)

    def __xor__(self, other: Mask) -> Mask:
        return _combine("^", self, other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __invert__(self) -> Mask:
        return Mask(_Not(self), f"~{_bracketed(self.name)}")


class Score(_Mod):
    """A change of the scaled score at (b, h, q_idx, kv_idx): takes the score first and returns the new one. Made by `flexmask.score`."""

    kind = "score"

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self._call({"score": score, "b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx})


class _Both:
    """Two masks joined by an operator, as a function of the indices."""

    def __init__(self, symbol: str, left: Mask, right: Mask):
        self.symbol, self.left, self.right = symbol, left, right

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        left, right = self.left(b, h, q_idx, kv_idx), self.right(b, h, q_idx, kv_idx)
        return left & right if self.symbol == "&" else left | right if self.symbol == "|" else left ^ right


class _Not:
    def __init__(self, inner: Mask):
        self.inner = inner

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        keep = self.inner(b, h, q_idx, kv_idx)
        return not keep if isinstance(keep, bool) else ~keep


def _combine(symbol: str, left: Mask, right: Any) -> Mask:
    if not isinstance(right, Mask):
        if not callable(right):
            raise TraceError(f"`{left.name} {symbol} ...` needs another mask, got {type(right).__name__}.")
        right = Mask(right)
    return Mask(_Both(symbol, left, right), f"{_bracketed(left.name)} {symbol} {_bracketed(right.name)}")


def _bracketed(name: str) -> str:
    return f"({name})" if " " in name else name


def mask(function: Callable[..., Any]) -> Mask:
    """Make a mask of a Python function of (b, h, q_idx, kv_idx) that returns true where attention is allowed.

    Parameters are matched by name where all names are known (`b`/`batch`, `h`/`head`/`head_idx`, `q`/`q_idx`, `k`/`kv`/`kv_idx`),
    so unused ones may be left out; otherwise by position. Further parameters with defaults are run-time scalars. The function
    may close over tensors and numbers and may call other masks. Raises TraceError for a signature that fits neither way.

    >>> import flexmask
    >>> @flexmask.mask
    ... def window(q_idx, kv_idx, size=3):
    ...     return (q_idx >= kv_idx) & (q_idx - kv_idx < size)
    >>> window(0, 0, 5, 3), window(0, 0, 5, 2)
    (True, False)
    """
    return function if isinstance(function, Mask) else Mask(function)


def score(function: Callable[..., Any]) -> Score:
    """Make a score mod of a Python function of (score, b, h, q_idx, kv_idx) that returns the new score; matching as for `mask`.

    The score it receives is q @ k * scale as float32; its result replaces the score before the softmax.

    >>> import flexmask
    >>> @flexmask.score
    ... def doubled(score):
    ...     return 2 * score
    >>> doubled(1.5, 0, 0, 0, 0)
    3.0
    """
    return function if isinstance(function, Score) else Score(function)
