"""torch passes indices by position, flexmask by name where all names are known: where the two would differ, an error says so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..errors import TraceError
from ..frontend.signature import ORDER, bind


def check_order(function: Callable[..., Any], kind: str) -> None:
    """Raise TraceError for a function of torch's arity whose parameters have flexmask's names in another order than torch's."""
    bound = bind(function, kind)
    if len(bound) == len(ORDER[kind]) and tuple(role for role, _ in bound) != ORDER[kind]:
        raise TraceError(
            f"the parameters of `{getattr(function, '__name__', type(function).__name__)}` are named ({', '.join(r for r, _ in bound)}), "
            f"but torch passes ({', '.join(ORDER[kind])}) in this order. Name them in the order in which they come."
        )


def takes_score(function: Callable[..., Any]) -> bool:
    """Whether a function has the five parameters of a score mod (defaults not counted), rather than the four of a mask mod."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 5
