"""Which parameter of a user's function is which index: by name where all names are known, else by position."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..errors import TraceError
from .places import definition

ROLES = {
    "score": ("score",),
    "b": ("b", "batch", "batch_idx"),
    "h": ("h", "head", "head_idx"),
    "q_idx": ("q", "q_idx"),
    "kv_idx": ("k", "kv", "kv_idx", "k_idx"),
}
ORDER = {"mask": ("b", "h", "q_idx", "kv_idx"), "score": ("score", "b", "h", "q_idx", "kv_idx")}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


def bind(function: Callable[..., Any], kind: str) -> tuple[tuple[str, str | None], ...]:
    """How to call `function` as a mask or score: (role, keyword or None for "next positional") for each argument.

    Names decide where every parameter without a default has a known one; further parameters with defaults keep them.
    Otherwise the parameters are taken in torch's order, (score,) b, h, q_idx, kv_idx. Raises TraceError if neither fits.
    """
    order = ORDER[kind]
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return tuple((role, None) for role in order)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return tuple((role, None) for role in order)
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    return _by_name(named, order) or _by_position(function, named, order, kind)


def _by_name(parameters: list[inspect.Parameter], order: tuple[str, ...]) -> tuple[tuple[str, str | None], ...] | None:
    known = [p for p in parameters if _ROLE_OF.get(p.name) in order]
    roles = [_ROLE_OF[p.name] for p in known]
    if any(p.default is p.empty and p not in known for p in parameters) or len(set(roles)) < len(roles) or not known:
        return None
    # positional-only parameters come first in any signature, so passing them in order is enough
    return tuple((role, None if p.kind is p.POSITIONAL_ONLY else p.name) for role, p in zip(roles, known, strict=True))


def _by_position(
    function: Callable[..., Any], parameters: list[inspect.Parameter], order: tuple[str, ...], kind: str
) -> tuple[tuple[str, str | None], ...]:
    required = [p for p in parameters if p.default is p.empty]
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if len(positional) < len(order) or len(required) > len(order) or any(p.kind is p.KEYWORD_ONLY for p in required):
        name = getattr(function, "__name__", type(function).__name__)
        raise TraceError(
            f"a {kind} takes ({', '.join(order)}), by these names or in this order, and further parameters need defaults; "
            f"{name} takes ({', '.join(p.name for p in parameters)}).",
            definition(function),
        )
    return tuple((role, None) for role in order)
