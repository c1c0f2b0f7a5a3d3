"""Where the user wrote an expression that the analysis speaks of."""

from __future__ import annotations

import os

from ..frontend import Traced
from ..ir import Expr, simplify, walk

# parts of a mask that are simplified one by one in the search for a changed one
_MOST_PARTS = 200


def whereabouts(traced: Traced, expr: Expr) -> str:
    """`file:line` of the part of the mask that is `expr`, or that became it by simplification, else of the mask; "" if unknown.

    Files under the working directory are named from there.
    """
    origin = expr if expr in traced.places else _origin(traced, expr)
    at = traced.locate(origin) or traced.locate(traced.expr)
    if at is None:
        return ""
    below = os.path.relpath(at.file) if os.path.isabs(at.file) else at.file
    return f"{at.file if below.startswith(os.pardir) else below}:{at.line}"


def _origin(traced: Traced, expr: Expr) -> Expr:
    """The smallest part as written in which `expr` occurs once it is simplified; `expr` itself if there is none."""
    parts = [node for node in walk(traced.expr) if node.args]
    if len(parts) > _MOST_PARTS:
        return expr
    return next((node for node in parts if expr in set(walk(simplify(node)))), expr)
