"""Captures of known shape for expressions in tests, random expressions over them, and what brute force says of a mask.

Tensors: t0 ascending ids [N], t1 any ids [N], t2 ascending ids per batch entry [B, N], t3 bools [B, N], t4 positions [N],
t5 bools [N, N], t6 offsets per head [H], t7 floats [N], t8 ids per batch entry [B, N] in any order.
Scalars: s0 > 0, s1 of any sign, s2 >= 0 with unknown sign, s3 == 0, s4 < 0.
"""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass
from functools import cached_property

import torch
from hypothesis import strategies as st

from flexmask.analysis import MOST_PIECES, MOST_RUNS, Facts, Form, NotInterval
from flexmask.ir import Env, Expr, evaluate, parse

TENSORS = ("int", "int", "int", "bool", "int", "bool", "int", "float", "int")
SCALARS = ("int", "int", "int", "int", "int")
BATCH, HEADS = 2, 2


class _Flip(ast.NodeTransformer):
    """x > y as y < x, the only way expressions are written."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        flipped = {ast.Gt: ast.Lt, ast.GtE: ast.LtE}.get(type(node.ops[0]))
        return ast.Compare(node.comparators[0], [flipped()], [node.left]) if flipped else node


def read(text: str) -> Expr:
    return parse(ast.unparse(_Flip().visit(ast.parse(text, mode="eval"))), TENSORS, SCALARS)


@dataclass(frozen=True)
class Instance:
    """Lengths and captured values."""

    q_len: int
    kv_len: int
    seed: int = 0
    all_ascend: bool = True

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(self.seed)
        n = max(self.q_len, self.kv_len, 3) + self.seed % 2  # a table may be longer than what is indexed

        def ints(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=draw)

        order = (lambda t: t.sort(-1).values) if self.all_ascend else (lambda t: t)
        return [
            order(ints(0, 5, n)).int(),
            ints(0, 4, n),
            order(ints(-2, 3, BATCH, n)),
            torch.rand(BATCH, n, generator=draw) < 0.7,
            ints(-2, n + 2, n).int(),
            torch.rand(n, n, generator=draw) < 0.8,
            ints(-3, 6, HEADS),
            torch.randn(n, generator=draw),
            ints(0, 3, BATCH, n),
        ]

    @cached_property
    def scalars(self) -> list[int]:
        pick = random.Random(self.seed)
        return [pick.randint(1, 6), pick.randint(-5, 9), pick.randint(0, 7), 0, -pick.randint(1, 5)]

    @cached_property
    def signs(self) -> tuple[int, ...]:
        return (1, (self.scalars[1] > 0) - (self.scalars[1] < 0), (self.scalars[2] > 0), 0, -1)

    def env(self, rank: int, **shapes: tuple[int, ...]) -> Env:
        """Indices along the given axes of a rank-`rank` result."""
        sizes = {"b": BATCH, "h": HEADS, "q_idx": self.q_len, "kv_idx": self.kv_len}
        indices = {name: torch.arange(sizes[name]).view(shape) for name, shape in shapes.items()}
        return Env({**indices, "q_len": self.q_len, "kv_len": self.kv_len}, self.tensors, self.scalars)

    def keep(self, predicate: Expr) -> torch.Tensor:
        """bool [B, H, Q, KV] by brute force."""
        env = self.env(4, b=(-1, 1, 1, 1), h=(-1, 1, 1), q_idx=(-1, 1), kv_idx=(-1,))
        return torch.as_tensor(evaluate(predicate, env)).expand(BATCH, HEADS, self.q_len, self.kv_len)

    def kept_by(self, form: Form) -> torch.Tensor:
        """bool [B, H, Q, KV] that a form says is kept."""
        along = "q_idx" if form.axis == "row" else "kv_idx"
        env = self.env(3, b=(-1, 1, 1), h=(-1, 1), **{along: (-1,)})
        n, length = (self.q_len, self.kv_len) if form.axis == "row" else (self.kv_len, self.q_len)
        position = torch.arange(length)
        found = torch.zeros(BATCH, HEADS, n, length, dtype=torch.bool)
        for piece in form.pieces:
            start, stop = (self._bound(x, env, n).clamp(0, length)[..., None] for x in (piece.start, piece.stop))
            found |= (start <= position) & (position < stop)
        found = found if form.axis == "row" else found.transpose(2, 3)
        return found if form.residue is None else found & self.keep(form.residue)

    def _bound(self, bound: Expr, env: Env, n: int) -> torch.Tensor:
        return torch.as_tensor(evaluate(bound, env)).expand(BATCH, HEADS, n)

    def ascends(self, number: int) -> bool:
        table = self.tensors[number]
        return bool((table[..., 1:] >= table[..., :-1]).all())


def check_forms(facts: Facts, instance: Instance) -> None:
    """Forms keep what the predicate keeps and bounds at least that, where their tables ascend; proofs are true."""
    keep = instance.keep(facts.predicate)
    for form, bounds, contiguous, seen in (
        (facts.rows, facts.row_bounds, facts.rows_contiguous, keep),
        (facts.columns, facts.column_bounds, facts.columns_contiguous, keep.transpose(2, 3)),
    ):
        _check_form(form, contiguous, seen, instance)
        for bound in bounds:
            assert bound.residue is None and 1 <= len(bound.pieces) <= MOST_RUNS
            if all(map(instance.ascends, bound.sorted_tables)):
                assert not (keep & ~instance.kept_by(bound)).any(), f"cuts too much: {bound}\n{instance}"
    for said, condition, seen in (
        (facts.rows_nonempty, "if q_len <= kv_len", keep),
        (facts.columns_nonempty, "if kv_len <= q_len", keep.transpose(2, 3)),
    ):
        assert said in ("always", "not proved", condition)
        if said == "always" or (said == condition and seen.shape[2] <= seen.shape[3]):
            assert seen.any(-1).all(), f"empty: {said}\n{instance}"


def _check_form(form: Form | NotInterval, contiguous: bool, seen: torch.Tensor, instance: Instance) -> None:
    if isinstance(form, NotInterval):
        assert form.reason and not contiguous
        return
    assert 1 <= len(form.pieces) <= MOST_RUNS
    if not all(map(instance.ascends, form.sorted_tables)):
        return
    kept = instance.kept_by(form) if form.axis == "row" else instance.kept_by(form).transpose(2, 3)
    told = torch.zeros_like(seen[..., 0]) if form.certain else (runs(seen) > MOST_PIECES) & (runs(kept) > MOST_PIECES)
    assert torch.equal(kept | told[..., None], seen | told[..., None]), f"{form}\n{instance}"
    assert not contiguous or touching(seen), f"not contiguous: {form}\n{instance}"


def true_states(keep: torch.Tensor, block_q: int, block_kv: int) -> torch.Tensor:
    """0 EMPTY, 1 PARTIAL, 2 FULL for each tile of bool [.., rows, columns]."""
    pad = (0, -keep.shape[-1] % block_kv, 0, -keep.shape[-2] % block_q)

    def tiles(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, block_kv)).unflatten(-3, (-1, block_q)).transpose(-3, -2).flatten(-2)

    some = tiles(torch.nn.functional.pad(keep, pad, value=False)).any(-1)
    every = tiles(torch.nn.functional.pad(keep, pad, value=True)).all(-1)
    return torch.where(every, 2, torch.where(some, 1, 0)).to(torch.int8)


def touching(keep: torch.Tensor) -> bool:
    """Whether the union of any consecutive rows of bool [.., rows, columns] is one interval."""
    for rows in keep.flatten(0, -3):
        last: tuple[int, int] | None = None
        for row in rows:
            kept = row.nonzero().flatten().tolist()
            if not kept:
                continue
            start, stop = kept[0], kept[-1] + 1
            if stop - start != len(kept) or (last is not None and (start > last[1] or last[0] > stop)):
                return False
            last = (start, stop)
    return True


def runs(keep: torch.Tensor) -> torch.Tensor:
    """How many runs of kept columns each row of bool [.., rows, columns] has."""
    before = torch.cat([torch.zeros_like(keep[..., :1]), keep[..., :-1]], -1)
    return (keep & ~before).sum(-1)


def most_runs(keep: torch.Tensor) -> int:
    return int(runs(keep).max())


_RELATIONS = ["<", "<=", ">", ">=", "<", "<=", ">", ">=", "==", "!="]
_BOUNDS = ["0", "3", "7", "-2", "s0", "s1", "s2", "s4", "t6[h]", "q_len - 4", "kv_len - 3"]


def _leaf(draw: random.Random) -> str:
    def one(*choices: str) -> str:
        return draw.choice(choices)

    r, n, m, d = draw.choice(_RELATIONS), draw.choice(_BOUNDS), draw.choice(_BOUNDS), one("2", "3", "5", "8", "-2", "-3", "s0")
    c, e = one("1", "2", "3", "-1", "-2"), one("1", "2", "3", "-1", "-2")
    return draw.choice([
        f"q_idx - kv_idx {r} {n}", f"q_idx + kv_idx {r} {n}", f"{c} * q_idx {r} {e} * kv_idx + {n}", f"kv_idx {r} {n}", f"q_idx {r} {n}",
        f"abs(q_idx - kv_idx) {r} {n}", f"(0 <= q_idx - kv_idx) & (q_idx - kv_idx < {n})", f"max(q_idx - {n}, {m}) {r} kv_idx",
        f"min(kv_idx + {n}, q_idx) {r} {m}", f"where(kv_idx < {n}, q_idx, kv_idx + {m}) {r} {one('3', 'q_idx - 1')}",
        f"where(q_idx < {n}, {m}, q_idx) {r} kv_idx",
        f"q_idx // {d} == kv_idx // {d}", f"q_idx // {d} {r} kv_idx // {d}", f"(q_idx + {n}) // {d} {r} kv_idx // {d}",
        f"(q_idx - kv_idx) // {d} {r} {n}", f"kv_idx // {d} {r} {n}", f"{c} * (kv_idx // {d}) + q_idx {r} {n}",
        "t0[q_idx] == t0[kv_idx]", f"t0[q_idx] {r} t0[kv_idx]", "t2[b, q_idx] == t2[b, kv_idx]", f"t2[b, q_idx] {r} t0[kv_idx]",
        f"t0[kv_idx] {r} 2", f"2 * t0[kv_idx] + 1 {r} 3", f"3 - t0[q_idx] {r} t2[0, kv_idx]",
        f"kv_idx {r} t4[q_idx]", f"q_idx {r} t4[kv_idx]", f"q_idx + t6[h] {r} kv_idx", "t3[b, q_idx]", "t3[b, kv_idx]",
    ])  # fmt: skip


def _scattered(draw: random.Random) -> str:
    r, n = draw.choice(_RELATIONS), draw.choice(_BOUNDS)
    return draw.choice([
        f"(q_idx - kv_idx) % 3 {r} 1", f"kv_idx % 4 {r} q_idx % -3", f"t1[q_idx] {r} t1[kv_idx]", "t5[q_idx, kv_idx]", "t5[kv_idx, q_idx]",
        f"t7[q_idx] {r} 0.25", f"t7[kv_idx] {r} t7[q_idx]", f"t8[b, kv_idx] {r} 1", f"t4[(q_idx + kv_idx) % 3] {r} kv_idx",
        f"q_idx * kv_idx {r} 4 * {n}", f"(kv_idx - q_idx) % s0 {r} 0", "isnan(t7[kv_idx])", f"kv_idx - t1[kv_idx] {r} q_idx",
        f"float32(q_idx) / 3.0 {r} float32(kv_idx)", f"(kv_idx + {n}) % -5 {r} -2", f"(kv_idx & 3) {r} 2", f"tanh(t7[q_idx]) * 2.0 {r} 1.0",
    ])  # fmt: skip


def random_text(draw: random.Random, depth: int, scattered: float = 0.0) -> str:
    """The text of a random mask. `scattered` is the share of atoms that have no interval form (unless by luck)."""
    if depth == 0 or draw.random() < 0.15:
        return "(" + (_scattered(draw) if draw.random() < scattered else _leaf(draw)) + ")"
    x, y, z = (random_text(draw, depth - 1, scattered) for _ in range(3))
    return draw.choice([f"({x} & {y})", f"({x} & {y})", f"({x} | {y})", f"({x} | {y})", f"({x} ^ {y})", f"~{x}", f"where({x}, {y}, {z})"])


@st.composite
def random_masks(draw: st.DrawFn, scattered: float = 0.0, depth: int = 3) -> str:
    return random_text(draw(st.randoms(use_true_random=False)), draw(st.integers(0, depth)), scattered)


lengths = st.one_of(st.sampled_from([1, 2, 7, 8, 9, 13, 16, 17]), st.integers(1, 24))
instances = st.builds(Instance, q_len=lengths, kv_len=lengths, seed=st.integers(0, 999), all_ascend=st.booleans())
