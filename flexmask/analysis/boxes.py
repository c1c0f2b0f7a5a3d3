"""The three-valued tile test: does a mask keep nothing, everything, or something unknown of a box of positions?

The mask's expression is evaluated once on ranges instead of numbers, for all boxes together. EMPTY and FULL are proofs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..ir import BOOL, FLOAT, INT, Expr, K, Q, walk
from .linear import Linear, linear
from .spans import (
    ARITHMETIC,
    CONNECTIVES,
    MOST_TERMS,
    PRECISION,
    Span,
    Truth,
    anything,
    as_span,
    as_truth,
    cast_float,
    choose,
    compare,
    float_operation,
    integers,
    rounded,
    times,
    unbounded,
)  # fmt: skip
from .tables import reduced, span_of, whole

EMPTY, FULL, UNKNOWN = 0, 2, 3
# boxes evaluated at a time: bounds the memory of the ranges of one expression node to a few MB
_CELLS = 1 << 18
# of points these make points
_POINT_OPS = ("const", "scalar", "add", "sub", "mul", "floordiv", "mod", "neg", "min", "max")


@dataclass(frozen=True)
class Boxes:
    """Boxes of positions: every batch entry and head, and every pair of a query range and a key range.

    `q_lo`, `q_hi` int64 [nQ] and `kv_lo`, `kv_hi` int64 [nK], inclusive; `b` [B] and `h` [H] int64 points. `side_q` (`side_kv`)
    is the most queries (keys) in a box; `q_len` and `kv_len` are the mask's lengths. All tensors on one device.
    """

    q_lo: torch.Tensor
    q_hi: torch.Tensor
    kv_lo: torch.Tensor
    kv_hi: torch.Tensor
    b: torch.Tensor
    h: torch.Tensor
    side_q: int
    side_kv: int
    q_len: int
    kv_len: int

    @staticmethod
    def grid(
        q_len: int, kv_len: int, block_q: int, block_kv: int, batch: int = 1, heads: int = 1, device: torch.device | str = "cpu"
    ) -> Boxes:
        """The tiles of a TileMap: ceil(q_len / block_q) by ceil(kv_len / block_kv) boxes, the last ones cut off at the lengths.

        >>> Boxes.grid(5, 7, 2, 4).q_hi, Boxes.grid(5, 7, 2, 4).kv_hi
        (tensor([1, 3, 4]), tensor([3, 6]))
        """
        q_lo, kv_lo = torch.arange(0, q_len, block_q, device=device), torch.arange(0, kv_len, block_kv, device=device)
        return Boxes(
            q_lo, (q_lo + block_q - 1).clamp(max=q_len - 1), kv_lo, (kv_lo + block_kv - 1).clamp(max=kv_len - 1),
            torch.arange(batch, device=device), torch.arange(heads, device=device), block_q, block_kv, q_len, kv_len,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.b), len(self.h), len(self.q_lo), len(self.kv_lo))


def classify(predicate: Expr, boxes: Boxes, tensors: Sequence[torch.Tensor] = (), scalars: Sequence[int | float] = ()) -> torch.Tensor:
    """int8 [B|1, H|1, nQ, nK]: EMPTY (0) where the box keeps nothing, FULL (2) where it keeps all, UNKNOWN (3) where neither is proved.

    B and H are 1 where the predicate does not depend on the batch entry or head. Every index into a table must be in range.
    Works on the boxes' device, without waiting for it; memory besides the result does not grow with the number of boxes.

    >>> from flexmask.ir import K, Q
    >>> classify(K <= Q, Boxes.grid(6, 6, 2, 2))[0, 0].tolist()
    [[3, 0, 0], [2, 3, 0], [2, 2, 3]]
    """
    used = {node.value for node in walk(predicate) if node.op == "index"}
    boxes = replace(boxes, b=boxes.b if "b" in used else boxes.b[:1], h=boxes.h if "h" in used else boxes.h[:1])
    batch, heads, rows, columns = boxes.shape
    if 0 in boxes.shape:
        return torch.empty(boxes.shape, dtype=torch.int8, device=boxes.q_lo.device)
    test = _Test(predicate, boxes, tensors, scalars)
    states = torch.empty(boxes.shape, dtype=torch.int8, device=boxes.q_lo.device)
    step = max(1, _CELLS // max(1, batch * heads * columns))
    for first in range(0, rows, step):
        states[:, :, first : first + step] = test.rows(first, min(first + step, rows))
    return states


class _Test:
    """One predicate over one set of boxes. Reductions of tables are made once, ranges once for each group of rows."""

    def __init__(self, predicate: Expr, boxes: Boxes, tensors: Sequence[torch.Tensor], scalars: Sequence[int | float]):
        self.predicate, self.boxes, self.tensors, self.scalars = predicate, boxes, tensors, scalars
        self.device = boxes.q_lo.device
        self._reductions: dict[Expr, tuple[torch.Tensor, torch.Tensor]] = {}
        self._values: dict[Expr, Span | Truth] = {}
        self._first, self._stop = 0, 0

    def rows(self, first: int, stop: int) -> torch.Tensor:
        """The states of the rows of boxes [first, stop)."""
        self._first, self._stop, self._values = first, stop, {}
        truth = as_truth(self.value(self.predicate))
        return torch.where(truth.true, torch.where(truth.false, UNKNOWN, FULL), EMPTY).to(torch.int8)

    def value(self, e: Expr) -> Span | Truth:
        if e not in self._values:
            self._values[e] = self._truth(e) if e.kind == BOOL else self._integer(linear(e)) if e.kind == INT else self._float(e)
        return self._values[e]

    def span(self, e: Expr) -> Span:
        return as_span(self.value(e))

    def truth(self, e: Expr) -> Truth:
        return as_truth(self.value(e))

    def _truth(self, e: Expr) -> Span | Truth:
        if e.op == "const":
            yes = torch.full((), e.value, device=self.device)
            return Truth(yes, ~yes)
        if e.op in CONNECTIVES:
            return CONNECTIVES[e.op](*map(self.truth, e.args))
        if e.op == "where":
            return choose(self.truth(e.args[0]), self.truth(e.args[1]), self.truth(e.args[2]))
        if e.op in ("lt", "le", "eq", "ne"):
            return self._comparison(e)
        if e.op == "cast":
            return as_truth(self.value(e.args[0]))
        if e.op == "load":
            return as_truth(self._load(e))
        doubtful = unbounded(self.span(e.args[0]))  # isnan, isinf
        return Truth(doubtful, torch.ones_like(doubtful))

    def _comparison(self, e: Expr) -> Truth:
        x, y = e.args
        if FLOAT in (x.kind, y.kind):
            spans = [self.span(a) if a.kind == FLOAT else rounded(self.span(a)) for a in e.args]
            return compare(e.op, spans[0], spans[1], finite_only=True)
        # as one sum, so that q_idx - kv_idx and what both sides share are not counted twice
        difference = self._integer(linear(x) - linear(y))
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return compare(e.op, difference, Span(zero, zero), finite_only=False)

    def _integer(self, x: Linear) -> Span:
        """The range of a sum whose monomials vary independently."""
        if len(x.terms) > MOST_TERMS:
            return anything(self.boxes.q_lo)
        lo = hi = torch.full((), x.constant, dtype=torch.float64, device=self.device)
        for m, c in x.terms.items():
            if m not in self._values:
                self._values[m] = self._monomial(m)
            part = times(as_span(self._values[m]), c)
            lo, hi = lo + part.lo, hi + part.hi
        return integers(lo, hi)

    def _monomial(self, m: Expr) -> Span:
        if m.op in ("index", "scalar"):
            return self._leaf(m)
        if m.op == "load":
            return as_span(self._load(m))
        if m.op == "where":
            return as_span(choose(self.truth(m.args[0]), self.span(m.args[1]), self.span(m.args[2])))
        if m.op == "cast" or m.op in ("floor", "ceil", "trunc", "round"):
            x = self.span(m.args[0])
            return integers(x.lo.trunc(), x.hi.trunc())
        if m.op in ARITHMETIC:
            return integers(*ARITHMETIC[m.op](*map(self.span, m.args)))
        return anything(self.boxes.q_lo)

    def _leaf(self, m: Expr) -> Span:
        boxes = self.boxes
        if m.op == "scalar":
            return self._number(self.scalars[m.value])
        if m.value in ("q_len", "kv_len"):
            return self._number(boxes.q_len if m.value == "q_len" else boxes.kv_len)
        if m.value == "score":
            return anything(boxes.q_lo)
        lo, hi = {
            "q_idx": (boxes.q_lo[self._first : self._stop, None], boxes.q_hi[self._first : self._stop, None]),
            "kv_idx": (boxes.kv_lo, boxes.kv_hi),
            "b": (boxes.b[:, None, None, None],) * 2,
            "h": (boxes.h[None, :, None, None],) * 2,
        }[m.value]
        return Span(lo.double(), hi.double())

    def _number(self, x: int | float) -> Span:
        """A number as itself and as float32 rounds it, which is what mods compute with."""
        value = torch.full((), x, dtype=torch.float64, device=self.device)
        if isinstance(x, int):
            return integers(value, value)
        single = value.float().double()
        relative, largest, _ = PRECISION["float32"]
        found = Span(torch.minimum(value, single), torch.maximum(value, single))
        return cast_float(found, "float64") if abs(x) <= largest * (1 - relative) else anything(value)

    def _float(self, e: Expr) -> Span | Truth:
        if e.op == "const":
            return self._number(e.value)
        if e.op in ("index", "scalar"):
            return self._leaf(e)
        if e.op == "load":
            return self._load(e)
        if e.op == "cast":
            return cast_float(self.span(e.args[0]), e.value)
        if e.op == "where":
            spans = [self.span(a) if a.kind == FLOAT else rounded(self.span(a)) for a in e.args[1:]]
            return choose(self.truth(e.args[0]), spans[0], spans[1])
        return float_operation(e.op, [self.span(a) if a.kind == FLOAT else rounded(self.span(a)) for a in e.args])

    def _load(self, e: Expr) -> Span | Truth:
        """The range of the entries a box may read: exact where each index is q_idx, kv_idx or a point, else over whole axes."""
        if e not in self._reductions:
            self._reductions[e] = self._reduce(e)
        lo, hi = self._reductions[e]
        where = tuple(self._position(i) for i in e.args)
        found = span_of(lo[where], hi[where])
        return Truth(found.hi > 0, found.lo <= 0) if e.kind == BOOL else found

    def _reduce(self, e: Expr) -> tuple[torch.Tensor, torch.Tensor]:
        """Minimum and maximum of the table: per box along axes indexed by q_idx or kv_idx, over the axis where the index may vary."""
        table = self.tensors[e.value]
        if not e.args:
            return whole(table, ())
        along = [_along(i) for i in e.args]
        varying = tuple(axis for axis, i in enumerate(e.args) if along[axis] is None and not self._is_point(i))
        lo, hi = whole(table, varying) if varying else (table, table)
        for axis, place in enumerate(along):
            if place is not None:
                first, last, side = self._windows(*place)
                lo, hi = reduced(lo, axis, first, last, side)[0], reduced(hi, axis, first, last, side)[1]
        return lo, hi

    def _windows(self, index: Expr, d: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The values of `index // d` in each box: the first, the last, and at most how many."""
        boxes = self.boxes
        lo, hi, side = (boxes.q_lo, boxes.q_hi, boxes.side_q) if index is Q else (boxes.kv_lo, boxes.kv_hi, boxes.side_kv)
        return lo // d, hi // d, side if d == 1 else (side - 1) // d + 2

    def _is_point(self, i: Expr) -> bool:
        """Whether the index has one known value in each box."""
        return i.kind == INT and all(n.op in _POINT_OPS or (n.op == "index" and n not in (Q, K)) for n in walk(i))

    def _position(self, i: Expr) -> torch.Tensor:
        """Where along a reduced axis each box finds its range."""
        place = _along(i)
        if place is not None:
            rows = torch.arange(self._first, self._stop, device=self.device)[:, None]
            return rows if place[0] is Q else torch.arange(len(self.boxes.kv_lo), device=self.device)
        if self._is_point(i):
            return self.span(i).lo.long()
        return torch.zeros((), dtype=torch.int64, device=self.device)


def _along(i: Expr) -> tuple[Expr, int] | None:
    """(q_idx or kv_idx, d) where the index is q_idx // d or kv_idx // d, d = 1 included."""
    x = linear(i)
    if len(x.terms) != 1 or x.constant:
        return None
    ((m, c),) = x.terms.items()
    if c == 1 and m in (Q, K):
        return m, 1
    if c == 1 and m.op == "floordiv" and m.args[0] in (Q, K) and m.args[1].op == "const":
        return m.args[0], m.args[1].value
    return None
