"""Attention that stays compiled between calls, without keeping alive the score mods it was compiled for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any, cast

from ..api import Attention, compile
from ..errors import TraceError
from ..frontend import Traced, trace
from ..mods import Mask, Score
from ..runtime.store import default_store
from .positional import check_order

MOST = 64


class Kept:
    """The attentions of one mask, by score mod (the object itself) and options. An entry goes with its score mod, the oldest beyond MOST.

    A function that is made anew at each call is traced at each call, as nothing tells that it is the same.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[tuple[weakref.ref[Any], ...], Attention]] = {}

    def find(self, mask: Mask | None, score_mod: Callable[..., Any] | None, **options: Any) -> Attention:
        """The attention of this score mod and these options of `flexmask.compile`; compiled now where there is none yet."""
        parts = _parts(score_mod)
        key = (*map(id, parts), *options.values())
        found = self._found.get(key)
        if found is not None and all(ref() is part for ref, part in zip(found[0], parts, strict=True)):
            return found[1]
        try:
            refs = tuple(weakref.ref(part, lambda _: self._found.pop(key, None)) for part in parts)
        except TypeError:  # objects that cannot be held weakly are not held
            return compile(mask, as_score(score_mod), **options)
        made = compile(mask, None if score_mod is None else _Weak(score_mod), **options)
        self._found.pop(key, None)
        self._found[key] = (refs, made)
        if len(self._found) > MOST:
            del self._found[next(iter(self._found))]
        return made


def as_score(score_mod: Callable[..., Any] | None) -> Score | None:
    """A score mod of torch's kind as a score; a score is itself."""
    if score_mod is None or isinstance(score_mod, Score):
        return score_mod
    made = Score(score_mod)
    check_order(score_mod, "score")
    return made


def _parts(score_mod: Any) -> tuple[Any, ...]:
    """What stays the same of a score mod: of a bound method, which is made anew whenever it is looked up, its object and its function."""
    if score_mod is None:
        return ()
    return (score_mod.__self__, score_mod.__func__) if isinstance(score_mod, MethodType) else (score_mod,)


class _Weak(Score):
    """A score that does not keep its function alive. The attention that holds it goes when the function does."""

    def __init__(self, score_mod: Callable[..., Any]) -> None:
        if isinstance(score_mod, Mask):
            raise TraceError(f"`{score_mod.name}` is a mask, but passed as score_mod. Pass it as block_mask.")
        super().__init__(score_mod, score_mod.name if isinstance(score_mod, Score) else None)
        check_order(score_mod, "score")

    @property
    def function(self) -> Callable[..., Any]:
        found = self._refer()
        assert found is not None, "the caller holds it"
        return cast(Callable[..., Any], found)

    @function.setter
    def function(self, function: Callable[..., Any]) -> None:
        self._refer: Callable[[], Any] = weakref.WeakMethod(function) if isinstance(function, MethodType) else weakref.ref(function)

    def traced(self) -> Traced:
        """As ever, but traced from the function itself, without what would keep it alive."""
        function = self.function
        if isinstance(function, Score):
            return function.traced()
        if self._traced is None or self._traced.volatile or not self._is_as_traced(function):
            default_store().counters.traces += 1
            found = trace(function, self.kind)
            self._own = tuple((name, value) for owner, name, value in found.guards.attributes if owner is function)
            others = tuple(entry for entry in found.guards.attributes if entry[0] is not function)
            self._traced = replace(found, guards=replace(found.guards, attributes=others))
        return self._traced

    def _is_as_traced(self, function: Callable[..., Any]) -> bool:
        """`is_fresh`, with what the guards would say of the function itself."""
        assert self._traced is not None
        return all(getattr(function, name, None) is value for name, value in self._own) and self._traced.is_fresh()
