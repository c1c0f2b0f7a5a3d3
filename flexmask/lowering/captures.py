"""What generated code knows of captures: ranks, dtypes, and names that are safe to write into code."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..ir import kind_of_dtype

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}", re.ASCII)
# names that generated code uses itself; a capture called so gets its number as a name
RESERVED = frozenset({
    "tl", "triton", "torch", "tables", "numbers", "row", "column", "score", "b", "h", "q_idx", "kv_idx", "q_len", "kv_len",
    "tensors", "scalars", "batch", "heads", "device", "number", "starts", "stops", "search", "where", "index",
    "floor_div", "floor_mod", "float_floor_div", "float_floor_mod", "int_pow", "float_pow", "tanh", "sigmoid", "truncate", "round_even",
    "round_bfloat16", "sine", "cosine", "count_below", "broken", "check_ascending", "settle", "grads", "ds", "valid", "turn", "skew",
    "diagonal_sums", "diagonal_ends", "q_first", "kv_there",
    "float", "int", "bool", "range", "min", "max", "abs", "print", "len", "sum", "result",
})  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """A captured tensor: its user's name, rank, and dtype ("int64", "bool", "bfloat16", ...)."""

    name: str
    rank: int
    dtype: str

    @property
    def kind(self) -> str:
        return kind_of_dtype(getattr(torch, self.dtype))


@dataclass(frozen=True)
class CaptureSpec:
    """The captures of one mod, in the order of its expression's numbers. `scalars` are (name, "int" | "float")."""

    tensors: tuple[TensorSpec, ...] = ()
    scalars: tuple[tuple[str, str], ...] = ()
    # identifiers for generated code, computed once: t0, s0, t0_stride_1, t0_size_1, ... -> name
    identifiers: dict[str, str] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        scope = Scope()
        wanted = {f"t{i}": t.name for i, t in enumerate(self.tensors)} | {f"s{i}": name for i, (name, _) in enumerate(self.scalars)}
        for key, name in wanted.items():
            self.identifiers[key] = scope.take(name, fallback=key)
        for i, tensor in enumerate(self.tensors):
            for part in [f"{word}_{axis}" for axis in range(tensor.rank) for word in ("stride", "size")]:
                self.identifiers[f"t{i}_{part}"] = scope.take(f"{self.identifiers[f't{i}']}_{part}", fallback=f"t{i}_{part}")

    @classmethod
    def of(
        cls, tensors: Sequence[torch.Tensor], tensor_names: Iterable[str], scalars: Sequence[int | float], scalar_names: Iterable[str]
    ) -> CaptureSpec:
        """The specification of actual captures, as tracing found them.

        >>> import torch
        >>> CaptureSpec.of([torch.zeros(4, dtype=torch.int32)], ["doc"], [3], ["window"]).identifiers["s0"]
        'window'
        """
        kinds = ["float" if isinstance(s, float) else "int" for s in scalars]
        tables = (TensorSpec(name, t.dim(), str(t.dtype).removeprefix("torch.")) for t, name in zip(tensors, tensor_names, strict=True))
        return cls(tuple(tables), tuple(zip(scalar_names, kinds, strict=True)))


class Scope:
    """Identifiers in use. Anything that is no plain ASCII identifier never becomes code."""

    def __init__(self, taken: Iterable[str] = ()):
        self._taken = set(RESERVED) | set(taken)

    def take(self, wanted: str, fallback: str) -> str:
        """`wanted` if it is a harmless identifier, else `fallback`; numbered where taken."""
        usable = isinstance(wanted, str) and _IDENTIFIER.fullmatch(wanted) and not keyword.iskeyword(wanted)
        stem = wanted if usable and wanted not in RESERVED else fallback
        name, count = stem, 1
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name
