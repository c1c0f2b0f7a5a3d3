"""A traced function's structure as text, which an operator of torch can carry, and back with the captures that belong to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..ir import Expr, parse, show, walk
from .traced import Traced

# structure as text, captured tensors, captured ints, captured floats
Captured = tuple[str, list[torch.Tensor], list[int], list[float]]


def captured(traced: Traced) -> Captured:
    """What `traced` is made of, as an operator of torch takes it."""
    ints = [s for s in traced.scalars if not isinstance(s, (float, torch.SymFloat))]
    floats = [s for s in traced.scalars if isinstance(s, (float, torch.SymFloat))]
    return to_text(traced), list(traced.tensors), ints, floats


def to_text(traced: Traced) -> str:
    """Everything of `traced` but its captures' values and the user's lines, as JSON.

    >>> from flexmask.frontend import from_text, to_text, trace
    >>> def window(size):
    ...     return lambda b, h, q_idx, kv_idx: q_idx - kv_idx < size
    >>> window = from_text(to_text(trace(window(3), "mask")))
    >>> window.expr, window.over([], [5]).scalars
    (q_idx - kv_idx < s0, (5,))
    """
    kinds = {(node.op, node.value): node.kind for node in walk(traced.expr)}
    return json.dumps({
        "kind": traced.kind, "name": traced.name, "expr": show(traced.expr), "promised": sorted(traced.promised),
        "tensors": [(name, kinds["load", n]) for n, name in enumerate(traced.tensor_names)],
        "scalars": [(name, kinds["scalar", n]) for n, name in enumerate(traced.scalar_names)],
    })  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """A mask or score without its captures: their names and kinds ("bool", "int", "float"), and which tensors are promised to ascend."""

    kind: str
    name: str
    expr: Expr
    tensor_names: tuple[str, ...]
    scalar_names: tuple[str, ...]
    scalar_kinds: tuple[str, ...]
    promised: frozenset[int]

    def over(self, tensors: Sequence[torch.Tensor], scalars: Sequence[int | float]) -> Traced:
        """The traced function over these captures. Raises ValueError for another number of them."""
        if len(self.tensor_names) != len(tensors) or len(self.scalar_names) != len(scalars):
            raise ValueError(f"`{self.name}` captures {len(self.tensor_names)} tensors and {len(self.scalar_names)} numbers.")
        return Traced(self.kind, self.name, self.expr, tuple(tensors), self.tensor_names, self.promised, tuple(scalars), self.scalar_names)


@lru_cache(maxsize=256)
def from_text(text: str) -> Structure:
    """The structure that `to_text` wrote. Raises ValueError for what it has not written."""
    try:
        found = json.loads(text)
        names, kinds = ({word: tuple([pair[at] for pair in found[word]]) for word in ("tensors", "scalars")} for at in (0, 1))
        expr = parse(found["expr"], kinds["tensors"], kinds["scalars"])
        return Structure(
            found["kind"], found["name"], expr, names["tensors"], names["scalars"], kinds["scalars"], frozenset(found["promised"])
        )
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"not a structure that flexmask wrote: {error!r}") from error
