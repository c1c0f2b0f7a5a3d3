"""Traced: what tracing found, a frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..errors import Location
from ..ir import Expr, show
from .guards import Guards
from .places import Place, resolve


@dataclass(frozen=True, eq=False)
class Traced:
    """A mask or score as an expression, with its captures.

    `kind` is "mask" or "score", `name` the user's name for it, `expr` the expression as written (bool for a mask, float for a
    score). Load `t0[...]` reads `tensors[0]`, which the user calls `tensor_names[0]`; scalar `s0` is `scalars[0]` likewise.
    `promised` numbers the tensors that the user vouches to ascend along their last axis (`flexmask.sorted`).
    Captures are numbered by first appearance in `ir.walk(expr)`, so equal functions have the same expression.
    `specialised` names the captured numbers that shaped the code, with their values: they are constants of `expr`.
    `volatile`: a captured tensor went through a torch operation inside the mod, so it must be traced anew at each call.

    >>> from flexmask.frontend import trace
    >>> def window(size):
    ...     return lambda b, h, q_idx, kv_idx: q_idx - kv_idx < size
    >>> traced = trace(window(3), "mask")
    >>> print(traced)
    mask lambda: q_idx - kv_idx < size
    >>> traced.expr, traced.scalars
    (q_idx - kv_idx < s0, (3,))
    """

    kind: str
    name: str
    expr: Expr
    tensors: tuple[torch.Tensor, ...] = ()
    tensor_names: tuple[str, ...] = ()
    promised: frozenset[int] = frozenset()
    scalars: tuple[int | float, ...] = ()
    scalar_names: tuple[str, ...] = ()
    specialised: tuple[tuple[str, int | float], ...] = ()
    volatile: bool = False
    places: Mapping[Expr, Place] = field(default_factory=dict, repr=False)
    guards: Guards = field(default_factory=Guards, repr=False)

    def locate(self, expr: Expr) -> Location | None:
        """Where the user wrote `expr`, or else its nearest part that has a place; None if there is none."""
        level, seen = [expr], {expr}
        while level:
            for node in level:
                if node in self.places:
                    return resolve(*self.places[node])
            below = [a for node in level for a in node.args if a not in seen]
            seen.update(below)
            level = list(dict.fromkeys(below))
        return None

    def is_fresh(self) -> bool:
        """Whether no captured cell, global, default or attribute has been rebound since; about a microsecond.

        Changing a captured tensor's elements in place needs no new trace.
        """
        return self.guards.hold()

    def names(self) -> dict[str, str]:
        """The user's names of the captures, as `ir.show` takes them."""
        tensors = {f"t{i}": name for i, name in enumerate(self.tensor_names)}
        return tensors | {f"s{i}": name for i, name in enumerate(self.scalar_names)}

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {show(self.expr, self.names())}"
