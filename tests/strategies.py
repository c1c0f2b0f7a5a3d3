"""Random masks, sizes and head layouts for property tests.

A `Predicate` is Python source over (b, h, q_idx, kv_idx) with captured tables and numbers; a failing example prints as a program.
Every table is as long as it is indexed, so each predicate is valid at every index of its `Sizes`.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from flexmask.mods import Mask

INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
_numbers = itertools.count()


@dataclass(frozen=True)
class Sizes:
    """Batch entries, heads, query rows and key columns."""

    B: int
    H: int
    Q: int
    KV: int

    @property
    def n(self) -> int:
        return max(self.Q, self.KV)


@dataclass(frozen=True)
class Layout:
    """Shapes of one attention call: q [B, Hq, Q, D], k [Bkv, Hkv, KV, D], v [Bkv, Hkv, KV, Dv]."""

    sizes: Sizes
    Hkv: int
    Bkv: int
    D: int
    Dv: int

    @property
    def enable_gqa(self) -> bool:
        return self.Hkv != self.sizes.H

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s, generator = self.sizes, torch.Generator().manual_seed(seed)
        shapes = (s.B, s.H, s.Q, self.D), (self.Bkv, self.Hkv, s.KV, self.D), (self.Bkv, self.Hkv, s.KV, self.Dv)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        return q, k, v


@dataclass(frozen=True, eq=False)
class Predicate:
    """A random mask: its source, what it captures, and the sizes that its tables were made for."""

    source: str
    captures: dict[str, Any]
    sizes: Sizes

    def __repr__(self) -> str:
        lines = [f"{name} = {_literal(value)}" for name, value in self.captures.items()]
        return "\n".join(["", f"# {self.sizes}", *lines, f"lambda b, h, q_idx, kv_idx: {self.source}"])

    def function(self) -> Callable[..., Any]:
        """A closure over the captures, with source lines that `inspect` finds; a new one at each call."""
        parameters = ", ".join(self.captures)
        text = f"def make({parameters}):\n    def predicate(b, h, q_idx, kv_idx):\n        return {self.source}\n    return predicate\n"
        file = f"<predicate {next(_numbers)}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        names: dict[str, Any] = {"torch": torch}
        exec(compile(text, file, "exec"), names)
        made: Callable[..., Any] = names["make"](**self.captures)
        return made

    def mask(self) -> Mask:
        return Mask(self.function())


def _literal(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"torch.tensor({value.tolist()}, dtype={value.dtype})"


def lengths(largest: int = 70) -> st.SearchStrategy[int]:
    """Sequence lengths from 1 on; edges of small powers of two come up often."""
    edges = [n for p in (1, 2, 8, 16, 32, 64) for n in (p - 1, p, p + 1) if 1 <= n <= largest]
    return st.one_of(st.sampled_from(edges), st.integers(1, largest))


@st.composite
def sizes(draw: st.DrawFn, largest: int = 70, batch: int = 2, heads: int = 3) -> Sizes:
    q_len = draw(lengths(largest))
    kv_len = draw(st.one_of(st.just(q_len), lengths(largest)))
    return Sizes(draw(st.integers(1, batch)), draw(st.integers(1, heads)), q_len, kv_len)


small_sizes = sizes(largest=40)


@st.composite
def layouts(draw: st.DrawFn, largest: int = 70, head_dims: tuple[int, ...] = (8, 16, 24, 40, 64)) -> Layout:
    """Equal and grouped heads, k and v for one batch entry or all, equal and unequal head dims."""
    group, kv_heads = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 2))
    drawn = draw(sizes(largest))
    whole = Sizes(drawn.B, group * kv_heads, drawn.Q, drawn.KV)
    dim = draw(st.sampled_from(head_dims))
    v_dim = draw(st.one_of(st.just(dim), st.sampled_from(head_dims)))
    return Layout(whole, kv_heads, draw(st.sampled_from(sorted({1, drawn.B}))), dim, v_dim)


class _Builder:
    """Draws expressions as text and collects their captures."""

    def __init__(self, draw: st.DrawFn, sizes: Sizes, tables: bool):
        self.draw, self.sizes, self.tables = draw, sizes, tables
        self.captures: dict[str, Any] = {}

    def pick(self, *choices: Callable[[], str]) -> str:
        return self.draw(st.sampled_from(choices))()

    def capture(self, value: Any) -> str:
        name = f"{'t' if isinstance(value, torch.Tensor) else 's'}{len(self.captures)}"
        self.captures[name] = value
        return name

    def number(self, low: int, high: int) -> str:
        """A literal, a captured int, or a captured 0-dimensional tensor."""
        value = self.draw(st.integers(low, high))
        how = self.draw(st.sampled_from(["literal", "literal", "int", "tensor"]))
        if how == "literal":
            return str(value) if value >= 0 else f"({value})"
        return self.capture(value if how == "int" else torch.tensor(value))

    def table(self, *shape: int, low: int = 0, high: int = 4, ascending: bool = False) -> str:
        seed = self.draw(st.integers(0, 99))
        values = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
        if ascending:
            values = values.sort(dim=-1).values
        dtypes = INT_DTYPES if low >= 0 else INT_DTYPES[:-1]
        return self.capture(values.to(self.draw(st.sampled_from(dtypes))))

    def bools(self, *shape: int) -> str:
        seed, share = self.draw(st.integers(0, 99)), self.draw(st.sampled_from([0.1, 0.5, 0.9]))
        return self.capture(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share)

    # conditions

    def condition(self, depth: int) -> str:
        if depth == 0:
            leaves = [self.affine, self.affine, self.window, self.bucket, self.periodic, self.comparison]
            if self.tables:
                leaves += [self.same_group, self.bound_table, self.bool_table, self.pair_table, self.block_table]
            return self.pick(*leaves)
        inner = depth - 1
        return self.pick(
            lambda: f"({self.condition(inner)} & {self.condition(inner)})",
            lambda: f"({self.condition(inner)} | {self.condition(inner)})",
            lambda: f"({self.condition(inner)} ^ {self.condition(inner)})",
            lambda: f"(~{self.condition(inner)})",
            lambda: f"torch.where({self.condition(inner)}, {self.condition(inner)}, {self.condition(inner)})",
            lambda: self.condition(0),
        )

    def relation(self) -> str:
        return self.draw(st.sampled_from(["<", "<=", ">", ">=", "<", "<=", ">", ">=", "==", "!="]))

    def affine(self) -> str:
        n = self.sizes.n
        return self.pick(
            lambda: f"(q_idx - kv_idx {self.relation()} {self.number(-n, n)})",
            lambda: f"(kv_idx {self.relation()} q_idx + {self.number(-n, n)})",
            lambda: f"({self.slope()} * q_idx {self.relation()} {self.slope()} * kv_idx + {self.number(-n, n)})",
            lambda: f"(kv_idx {self.relation()} {self.number(0, n)})",
            lambda: f"(q_idx {self.relation()} {self.number(0, n)})",
            lambda: f"(q_idx + kv_idx {self.relation()} {self.number(0, 2 * n)})",
        )

    def slope(self) -> str:
        return str(self.draw(st.sampled_from([1, 2, 3, -1, -2])))

    def window(self) -> str:
        size = self.number(0, max(1, self.sizes.n // 2))
        return self.pick(
            lambda: f"(abs(q_idx - kv_idx) <= {size})",
            lambda: f"(torch.abs(kv_idx - q_idx) > {size})",
            lambda: f"((q_idx >= kv_idx) & (q_idx - kv_idx < {size}))",
            lambda: f"(torch.maximum(q_idx - kv_idx, kv_idx - q_idx) < {size})",
        )

    def divisor(self) -> str:
        return self.draw(st.sampled_from(["2", "3", "5", "8", "(-2)", "(-3)"]))

    def bucket(self) -> str:
        d = self.divisor()
        return self.pick(
            lambda: f"(q_idx // {d} == kv_idx // {d})",
            lambda: f"(q_idx // {d} {self.relation()} kv_idx // {self.divisor()})",
            lambda: f"((q_idx - kv_idx) // {d} {self.relation()} {self.number(-4, 4)})",
        )

    def periodic(self) -> str:
        d = self.divisor()
        return self.pick(
            lambda: f"((q_idx - kv_idx) % {d} == 0)",
            lambda: f"(kv_idx % {d} {self.relation()} q_idx % {self.divisor()})",
            lambda: f"((kv_idx - q_idx) % {d} {self.relation()} {self.number(-2, 2)})",
        )

    def same_group(self) -> str:
        s = self.sizes
        ascending, high = self.draw(st.booleans()), self.draw(st.integers(1, 6))
        relation = self.draw(st.sampled_from(["==", "==", "==", "!=", "<="]))
        if self.draw(st.booleans()):
            doc = self.table(s.n, high=high, ascending=ascending)
            return f"({doc}[q_idx] {relation} {doc}[kv_idx])"
        doc = self.table(s.B, s.n, high=high, ascending=ascending)
        return f"({doc}[b, q_idx] {relation} {doc}[b, kv_idx])"

    def bound_table(self) -> str:
        s = self.sizes
        ascending = self.draw(st.booleans())
        return self.pick(
            lambda: f"(kv_idx {self.relation()} {self.table(s.Q, high=s.KV + 1, ascending=ascending)}[q_idx])",
            lambda: f"(q_idx {self.relation()} {self.table(s.KV, high=s.Q + 1, ascending=ascending)}[kv_idx])",
            lambda: f"(kv_idx < {self.table(s.B, high=s.KV + 1)}[b])",
            lambda: f"(q_idx - kv_idx <= {self.table(s.H, low=-3, high=9)}[h])",
            lambda: f"(q_idx + {self.table(s.B, low=-5, high=9)}[b] >= kv_idx)",
        )

    def bool_table(self) -> str:
        s = self.sizes
        return self.pick(
            lambda: f"{self.bools(s.KV)}[kv_idx]",
            lambda: f"{self.bools(s.B, s.KV)}[b, kv_idx]",
            lambda: f"{self.bools(s.Q)}[q_idx]",
            lambda: f"{self.bools(s.H)}[h]",
        )

    def pair_table(self) -> str:
        s = self.sizes
        return self.pick(
            lambda: f"{self.bools(s.Q, s.KV)}[q_idx, kv_idx]",
            lambda: f"{self.bools(s.B, s.H, s.Q, s.KV)}[b][h][q_idx, kv_idx]",
            lambda: f"({self.table(s.H, s.Q, s.KV, low=-2, high=3)}[h, q_idx, kv_idx] > 0)",
        )

    def block_table(self) -> str:
        s, d = self.sizes, self.draw(st.sampled_from([3, 8, 16]))
        return f"{self.bools((s.Q - 1) // d + 1, (s.KV - 1) // d + 1)}[q_idx // {d}, kv_idx // {d}]"

    def comparison(self) -> str:
        return f"({self.integer(2)} {self.relation()} {self.integer(1)} + kv_idx)"

    # integers

    def integer(self, depth: int) -> str:
        if depth == 0:
            leaves = [lambda: "q_idx", lambda: "kv_idx", lambda: "(q_idx - kv_idx)", lambda: self.number(-9, 9), lambda: "h"]
            if self.tables:
                leaves += [lambda: f"{self.table(self.sizes.n, low=-3, high=7)}[q_idx]", self.wrapped_table]
            return self.pick(*leaves)
        inner = depth - 1
        return self.pick(
            lambda: f"({self.integer(inner)} + {self.integer(inner)})",
            lambda: f"({self.integer(inner)} - {self.integer(inner)})",
            lambda: f"({self.slope()} * {self.integer(inner)})",
            lambda: f"({self.integer(inner)} // {self.divisor()})",
            lambda: f"({self.integer(inner)} % {self.divisor()})",
            lambda: f"abs({self.integer(inner)} - kv_idx)",
            lambda: f"torch.minimum(q_idx, {self.integer(inner)} + kv_idx)",
            lambda: f"torch.maximum(kv_idx, {self.integer(inner)} - q_idx)",
            lambda: f"torch.clamp({self.integer(inner)} + q_idx, -3, 5)",
            lambda: f"torch.where({self.condition(0)}, {self.integer(inner)}, {self.integer(inner)} - q_idx)",
        )

    def wrapped_table(self) -> str:
        """A table at a computed place, brought into range by a modulo, or at a negative one, counting from the end."""
        size = self.draw(st.integers(2, 9))
        return self.pick(
            lambda: f"{self.table(size, low=-3, high=7)}[(q_idx - 2 * kv_idx) % {size}]",
            lambda: f"{self.table(2 * self.sizes.n, low=-3, high=7)}[q_idx - kv_idx]",
        )


@st.composite
def predicates(draw: st.DrawFn, sizes: Sizes | st.SearchStrategy[Sizes] | None = None, depth: int = 2, tables: bool = True) -> Predicate:
    """Random masks: and, or, not, xor and where over affine bounds, windows, buckets, periods, groups and tables."""
    drawn = sizes if isinstance(sizes, Sizes) else draw(small_sizes if sizes is None else sizes)
    builder = _Builder(draw, drawn, tables)
    source = builder.condition(draw(st.integers(0, depth)))
    return Predicate(source, builder.captures, drawn)
