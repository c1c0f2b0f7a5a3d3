"""Mask and Score: a user's function as an object that composes, and the decorators that make them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from .errors import FlexmaskError, TraceError
from .frontend import Ascending as Ascending
from .frontend import Traced, bind, trace
from .frontend import sorted as sorted
from .inspect.explain import explain_map, explain_mask, explain_score, explain_values
from .inspect.picture import draw
from .ir import INDICES, Env, evaluate, walk
from .runtime.intervals import Intervals
from .runtime.maps import check_given, extent_of, find_intervals, find_map
from .runtime.store import default_store
from .runtime.tile_map import TileMap

PICTURE = 24  # rows and columns of a picture, at most


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
        self._traced: Traced | None = None
        if torch.compiler.is_dynamo_compiling():
            from .frontend.tape import bind_traced  # brings Dynamo, which is there

            self.name, self._binding = name or "traced by torch.compile", bind_traced(function, self.kind)
            return
        self.name = name or _name_of(function)
        self._binding = bind(function, self.kind)
        self.__doc__ = getattr(function, "__doc__", None)

    def _call(self, values: dict[str, Any]) -> Any:
        positional = [values[role] for role, keyword in self._binding if keyword is None]
        named = {keyword: values[role] for role, keyword in self._binding if keyword is not None}
        return self.function(*positional, **named)

    def traced(self) -> Traced:
        """The function as an expression; traced again only when something it closes over has been rebound."""
        if self._traced is None or self._traced.volatile or not self._traced.is_fresh():
            default_store().counters.traces += 1
            self._traced = trace(cast(Callable[..., Any], self), self.kind)  # Mask and Score are callable
        return self._traced

    def __repr__(self) -> str:
        return f"<flexmask.{self.kind} {self.name}>"

    def __bool__(self) -> bool:
        if not torch.compiler.is_dynamo_compiling() and torch._guards.TracingContext.try_get() is not None:
            return True  # while it traces, some versions of Dynamo ask whether there is something to call
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

    def block_mask(
        self,
        q_len: int,
        kv_len: int,
        batch: int | None = None,
        heads: int | None = None,
        block_size: tuple[int, int] | int = (128, 128),
        device: torch.device | str | None = None,
    ) -> TileMap:
        """Which blocks of [q_len, kv_len] are empty, partial or full; exact, in memory proportional to what is kept.

        `block_size` is (queries, keys) or one number for both. `batch` and `heads` are needed where the mask depends on them.
        Raises ShapeError where a captured tensor does not fit the lengths.

        >>> from flexmask import masks
        >>> masks.causal.block_mask(256, 256).states()[0, 0].tolist()
        [[1, 0], [2, 1]]
        """
        block_q, block_kv = (block_size, block_size) if isinstance(block_size, int) else block_size
        traced = self.traced()
        extent = extent_of(traced, q_len, kv_len, batch, heads, device)
        facts, tile_map = find_map(default_store(), traced, extent, block_q, block_kv)
        check_given(facts, batch, heads)
        return tile_map

    def intervals(
        self,
        q_len: int,
        kv_len: int,
        axis: str = "column",
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> Intervals:
        """For each key column the kept half-open query intervals (`axis="column"`), or for each query row the kept keys ("row").

        `starts` and `ends` are int32 [B|1, H|1, N, pieces]. Raises NotInterval, with the reason and the user's line, where the
        analysis knows no such form.

        >>> from flexmask import masks
        >>> masks.causal.intervals(4, 4, axis="row").ends.flatten().tolist()
        [1, 2, 3, 4]
        """
        if axis not in ("row", "column"):
            raise FlexmaskError(f'axis is "row" or "column", got {axis!r}.')
        traced = self.traced()
        _, facts = default_store().facts(traced)
        check_given(facts, batch, heads)
        extent = extent_of(traced, q_len, kv_len, batch, heads, device)
        return find_intervals(traced, facts.rows if axis == "row" else facts.columns, extent)

    def to_dense(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The mask written out, bool [batch|1, heads|1, q_len, kv_len]: for tests and small pictures; costs O(q_len * kv_len).

        >>> from flexmask import masks
        >>> masks.causal.to_dense(2, 3).int().tolist()
        [[[[1, 0, 0], [1, 1, 0]]]]
        """
        traced = self.traced()
        extent = extent_of(traced, q_len, kv_len, batch, heads, device)
        sizes = (extent.batch, extent.heads, q_len, kv_len)
        indices = {}
        for axis, (name, size) in enumerate(zip(("b", "h", "q_idx", "kv_idx"), sizes, strict=True)):
            shape = [size if i == axis else 1 for i in range(4)]
            indices[name] = torch.arange(size, device=extent.device).view(shape)
        value = evaluate(traced.expr, Env(indices, traced.tensors, traced.scalars))
        return torch.as_tensor(value, dtype=torch.bool, device=extent.device).expand(sizes)

    def explain(self, q_len: int | None = None, kv_len: int | None = None, **extent: Any) -> str:
        """What was derived from the mask: predicate, row and column form or the reason there is none, proofs, and advice.

        With lengths also its map, and advice from the captured values, such as rows that keep nothing. `extent` takes batch, heads,
        block_size and device, as `block_mask` does.

        >>> from flexmask import masks
        >>> print(masks.causal.explain(256, 256))  # doctest: +ELLIPSIS
        mask causal...
          keep            kv_idx <= q_idx
          kept keys of row q_idx: [0, q_idx + 1)
        ...
        """
        traced = self.traced()
        _, facts = default_store().facts(traced)
        lines = explain_mask(traced, facts)
        if q_len is not None:
            lengths = (q_len, q_len if kv_len is None else kv_len)
            lines += explain_map(self.block_mask(*lengths, **extent))
            lines += explain_values(traced, facts, extent_of(traced, *lengths, *(extent.get(k) for k in ("batch", "heads", "device"))))
        return "\n".join(lines)

    def __str__(self) -> str:
        """Name, predicate and a small picture of batch entry 0, head 0 (`#` kept; for long tables a picture of blocks)."""
        traced = self.traced()
        q_len, kv_len = _picture_lengths(traced)
        block_q, block_kv = -(-q_len // PICTURE) or 1, -(-kv_len // PICTURE) or 1
        grid = self.block_mask(q_len, kv_len, 1, 1, (block_q, block_kv)).states()[0, 0]
        return "\n".join([*explain_mask(traced, default_store().facts(traced)[1])[:2], f"  {q_len} x {kv_len}", draw(grid)])


class Score(_Mod):
    """A change of the scaled score at (b, h, q_idx, kv_idx): takes the score first and returns the new one. Made by `flexmask.score`."""

    kind = "score"

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self._call({"score": score, "b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx})

    def explain(self) -> str:
        """The score as the expression that kernels compute, and its captures."""
        return "\n".join(explain_score(self.traced()))


def _picture_lengths(traced: Traced) -> tuple[int, int]:
    """Lengths for a picture: those that tables indexed by q_idx or kv_idx, or by blocks of them, reach to, else PICTURE."""
    found: dict[str, list[int]] = {"q_idx": [], "kv_idx": []}
    for node in walk(traced.expr):
        for place, index in enumerate(node.args if node.op == "load" else ()):
            block = index.args[1].value if index.op == "floordiv" and index.args[1].op == "const" else 1
            index = index.args[0] if index.op == "floordiv" else index
            if index in (INDICES["q_idx"], INDICES["kv_idx"]) and block > 0:
                found[index.value].append(traced.tensors[node.value].shape[place] * block)
    return min(found["q_idx"], default=PICTURE), min(found["kv_idx"], default=PICTURE)


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
