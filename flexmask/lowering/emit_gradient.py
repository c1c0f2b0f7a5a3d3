"""What the backward of a score mod needs of it, as the text of small Triton device functions.

`score_slope` gives the score's derivative, by which gradients reach queries and keys; `score_scatter` adds what reaches the captured float
tables by atomic additions. Entries that many pairs of a tile read are summed first: over the axes of the tile that a load does not depend
on, and along diagonals where it depends on the distance of query and key. Both functions read the same `row` as the score mod of
`emit_function`, which must be written for the same expression.

Atomic additions of floats come in any order, and round differently in each. Sums that are the same from run to run take two launches:
one that finds the greatest magnitude each entry receives (a maximum knows no order), and one that adds integers (whose sums are exact),
each a contribution in units of a small power of two that depends on that magnitude alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from ..ir import SCORE, B, Expr, H, K, Q, const, derivative, float_loads, uses, walk
from .body import Body, Row, write_call, write_function, write_result
from .captures import CaptureSpec
from .rules import number_value, wide_value

_INDICES = ("b", "h", "q_idx", "kv_idx", "score")
_SLOPE = "How the changed score grows with the score, float32."
_SCATTER = {
    "float": "Adds to `grads` what the captured tables receive from a tile",
    "peak": "Raises the peaks in `grads` to what the captured tables receive from a tile",
    "fixed": "Adds to `grads`, in units that the peaks there set, what the captured tables receive from a tile",
}
_DS = ": ds, float32 [BLOCK_Q, BLOCK_KV], the gradient of the changed score, counts where `valid`."
_DIAGONALS = {
    "float": "Adds ds [1, BLOCK_KV], sums along diagonals, at one place of each diagonal; or a tile's sum.",
    "peak": "Raises peaks to ds [1, BLOCK_KV], sums along diagonals, at one place of each diagonal; or to a tile's sum.",
    "fixed": "Adds ds [1, BLOCK_KV], sums along diagonals, at one place of each diagonal; or a tile's sum.",
}
_ALIKE = "Whether all of these queries and keys read one entry."


@lru_cache(maxsize=1024)
def gradient_tables(expr: Expr) -> tuple[int, ...]:
    """The numbers of the captured tensors that carry gradient through `expr`, ascending.

    >>> from flexmask.ir import parse
    >>> gradient_tables(parse("score * t2[h] + t0[t1[q_idx]]", ["float", "int", "float"]))
    (0, 2)
    """
    return tuple(sorted({load.value for load in float_loads(expr)}))


def most_additions(expr: Expr, table: int, sizes: tuple[int, int, int, int], blocks: tuple[int, int]) -> int:
    """How many numbers `score_scatter` adds at most to one entry of a captured table of `expr`, for `sizes` (batch, heads, queries, keys)
    in tiles of `blocks` (queries, keys).

    >>> from flexmask.ir import parse
    >>> most_additions(parse("score + t0[h]", ["float"]), 0, (2, 8, 100, 1000), (64, 64))  # one a tile, from each batch entry
    64
    """
    total = 0
    for load in float_loads(expr):
        if load.value == table:
            counts = [1 if index in load.args else size for index, size in zip((B, H), sizes, strict=False)]
            for index, size, block in zip((Q, K), sizes[2:], blocks, strict=True):
                tiles = -(-size // block)
                counts.append(1 if index in load.args else tiles * block if uses(load, index, SCORE) else tiles)
            total += math.prod(counts)
    return total


def emit_gradient(
    expr: Expr, captures: CaptureSpec, kind: str = "score", tables: Sequence[int] | None = None, scatter: str = "float"
) -> str:
    """The text of two device functions (and those that they call), for kernels that have recomputed a tile's scores:

    * `{kind}_slope(tables, numbers, row, score, b, h, q_idx, kv_idx)`: d expr / d score, float32, broadcastable to [BLOCK_Q, BLOCK_KV].
    * `{kind}_scatter(grads, tables, numbers, row, score, b, h, q_idx, kv_idx, ds, valid)`: adds ds * d expr / d load at the entry of each
      load of `tables` (by default all of `gradient_tables(expr)`); returns nothing. `grads` is a tuple of pointers to float32 buffers, one
      for each of `tables` in their order, contiguous in the table's shape (whatever the table's own strides).

    With `scatter` "peak" or "fixed", for two launches whose sums are the same in any order, `grads` holds for each of `tables` an int64
    buffer, then for each an int32 buffer, then for each a float, its limit. "peak" raises the int32 buffer to the bits of the greatest
    magnitude that is to be added; "fixed" adds integers to the int64 one: the limit stands for the least power of two above the peak.

    b and h are numbers, q_idx [BLOCK_Q, 1] and kv_idx [1, BLOCK_KV] count up by one, ds is float32 [BLOCK_Q, BLOCK_KV]. Pairs that are
    not `valid`, and those where ds is 0, add nothing whatever their slope is; nor do places outside of the table.
    Raises BackendError for the lengths, which the functions are not given.

    >>> from flexmask.ir import parse
    >>> print(emit_gradient(parse("score * 2.0"), CaptureSpec()).split("\\n\\n\\n")[0])
    @triton.jit
    def score_slope(tables, numbers, row, score, b, h, q_idx, kv_idx):
        \"\"\"How the changed score grows with the score, float32.\"\"\"
        return tl.full((1, 1), 2.0, tl.float32)
    """
    row = Row.of(expr, captures)
    parameters = "tables, numbers, row, score, b, h, q_idx, kv_idx"
    body = Body(captures, _INDICES, frozenset(), row.given)
    slope = derivative(expr, SCORE)
    lines = row.unpacked + body.lines([slope])
    slope_text = write_function(f"{kind}_slope({parameters})", _SLOPE, lines, write_result(body.done[slope], kind))
    written = _Scatter(expr, captures, kind, gradient_tables(expr) if tables is None else tables, row, scatter)
    head = f"{kind}_scatter(grads, {parameters}, ds, valid)"
    scatter_text = write_function(head, _SCATTER[scatter] + _DS, row.unpacked + written.lines())
    return "\n\n\n".join([slope_text, *written.functions, scatter_text])


class _Scatter:
    """The statements that add to the tables' gradients, and the functions that they call."""

    def __init__(self, expr: Expr, captures: CaptureSpec, kind: str, tables: Sequence[int], row: Row, scatter: str):
        self.body = Body(captures, _INDICES, frozenset(), row.given)
        self.kind, self.tables, self.scatter = kind, tuple(tables), scatter
        self.slopes = {load: derivative(expr, load) for load in float_loads(expr) if load.value in self.tables}
        self.sums: dict[tuple[int, ...], str] = {}
        self.functions: list[str] = []

    def lines(self) -> list[str]:
        slanted = [load for load in self.slopes if _is_slanted(load)]
        indices = [index for load in self.slopes if load not in slanted for index in load.args]
        self.body.lines([*self.slopes.values(), *indices])
        for load, slope in self.slopes.items():
            sent = self._sent(load, slope)
            if load in slanted:
                self._add_diagonals(load, sent)
            else:
                self._add(self.body, load, sent)
        return self.body.written()

    def _sent(self, load: Expr, slope: Expr) -> str:
        """The variable that holds what the entries receive: the tile's ds times the slope, summed over what the load does not see."""
        axes = tuple(axis for axis, index in ((0, Q), (1, K)) if not uses(load, index, SCORE))
        factor = self.body.done[slope]
        if not axes or any(uses(slope, (Q, K)[axis], SCORE) for axis in axes):
            return self._variable(_sum(_product("ds", "valid", factor.operand, slope), axes))
        if axes not in self.sums:
            self.sums[axes] = self._variable(_sum("tl.where(valid, ds, 0.0)", axes))
        total = self.sums[axes]
        return total if slope == const(1.0) else self._variable(_product(total, "", factor.operand, slope))

    def _variable(self, text: str) -> str:
        name = self.body.scope.take("sent", "sent")
        self.body.statements.append(f"{name} = {text}")
        return name

    def _add_diagonals(self, load: Expr, sent: str) -> None:
        """A function that adds sums along diagonals, and its calls, one for each of a diagonal's turns around the tile."""
        name = f"{self.kind}_diagonals" + (f"_{len(self.functions) + 1}" if self.functions else "")
        body = Body(self.body.captures, _INDICES[:-1], frozenset(), {})
        body.lines(list(load.args))
        self._add(body, load, "ds")
        head = f"{name}(grads, tables, numbers, b, h, q_idx, kv_idx, ds)"
        self.functions.append(write_function(head, _DIAGONALS[self.scatter], body.written()))
        self.functions.append(self._alike(f"{name}_alike", load))
        skewed, given = self.body.scope.take("skewed", "skewed"), "tables, numbers, b, h"
        self.body.statements += [
            # along the tile's edges every diagonal begins
            f"if {name}_alike({given}, q_idx, tl.min(kv_idx)) & {name}_alike({given}, tl.min(q_idx), kv_idx):",
            f"    {name}(grads, {given}, tl.min(q_idx), tl.min(kv_idx), tl.sum({sent}))",
            "else:",
            f"    {skewed} = skew({sent})",
            "    for turn in tl.static_range((ds.shape[0] - 1) // ds.shape[1] + 2):",
            f"        q_first, kv_there = diagonal_ends(q_idx, kv_idx, {skewed}, turn)",
            f"        {name}(grads, {given}, q_first, kv_there, diagonal_sums({skewed}, turn))",
        ]

    def _alike(self, name: str, load: Expr) -> str:
        """The text of a function that says whether all of these queries and keys read one entry."""
        body = Body(self.body.captures, _INDICES[:-1], frozenset(), {})
        body.lines([index for index in load.args if uses(index, Q) or uses(index, K)])
        places = [number_value(body.done[index]).text for index in load.args if uses(index, Q) or uses(index, K)]
        same = " & ".join(f"(tl.min({place}) == tl.max({place}))" for place in places)
        return write_function(f"{name}(tables, numbers, b, h, q_idx, kv_idx)", _ALIKE, body.written(), same)

    def _add(self, body: Body, load: Expr, sent: str) -> None:
        """The statements that add `sent` where the load's entry stands in a contiguous table, if it is inside."""
        place, sends, checks = "0", f"({sent} != 0.0)", []
        for axis, index in enumerate(load.args):
            size = body.part(load.value, "size", axis)
            here, check = body.place(index, number_value(body.done[index]), size)
            place = wide_value(here) if axis == 0 else f"({place} * {size} + {here.operand})"
            checks.append(check)
        sums, count = self.tables.index(load.value), len(self.tables)
        if self.scatter == "float":
            body.statements.append(_atomic("add", f"grads[{sums}] + {place}", sent, [sends, *checks]))
        elif self.scatter == "peak":
            body.statements.append(_atomic("max", f"grads[{count + sums}] + {place}", f"magnitude({sent})", [sends, *checks]))
        else:
            entry, peak = (body.scope.take(name, name) for name in ("entry", "peak"))
            # whether anything is sent is not asked here: Triton may read ahead, and would have to compute scores ahead to know
            read = [f"grads[{count + sums}] + {entry}", *([f"mask={' & '.join(checks)}", "other=0"] if checks else [])]
            bare = place[1:-1] if len(load.args) > 1 else place
            body.statements += [f"{entry} = {bare}", f"{peak} = {write_call('tl.load', read)}"]
            value = f"fixed_point({sent}, {peak}, grads[{2 * count + sums}])"
            body.statements.append(_atomic("add", f"grads[{sums}] + {entry}", value, [sends, *checks]))


def _atomic(operation: str, address: str, value: str, checks: list[str]) -> str:
    return write_call(f"tl.atomic_{operation}", [address, value, f"mask={' & '.join(checks)}", 'sem="relaxed"'])


def _is_slanted(load: Expr) -> bool:
    """Whether pairs on one diagonal, and few others, read the same entry."""
    return uses(load, Q) and uses(load, K) and all(growth == 0 for growth in _growths(load))


def _growths(load: Expr) -> list[int | None]:
    """By how much each index of a load grows from (q_idx, kv_idx) to (q_idx + 1, kv_idx + 1); None where that is not known."""
    growth: dict[Expr, int | None] = {}
    for node in walk(load):
        growth[node] = _growth(node, [growth[a] for a in node.args])
    return [growth[index] for index in load.args]


def _growth(node: Expr, args: list[int | None]) -> int | None:
    if node in (Q, K):
        return 1
    if node is SCORE:
        return None
    known = [a for a in args if a is not None]
    if not any(args) and len(known) == len(args):
        return 0
    if len(known) == 2 and node.op in ("add", "sub"):
        return known[0] + known[1] if node.op == "add" else known[0] - known[1]
    if len(known) == 2 and known[0] == known[1] and node.op in ("lt", "le", "eq", "ne", "min", "max"):
        return known[0] if node.op in ("min", "max") else 0
    return -known[0] if node.op == "neg" and known else None


def _product(ds: str, valid: str, factor: str, slope: Expr) -> str:
    """ds * slope; 0 where nothing is to be sent, though the slope be infinite."""
    if slope.op == "const":
        product = ds if slope.value == 1.0 else f"{ds} * {factor}"
        return f"tl.where({valid}, {product}, 0.0)" if valid else product
    sends = f"{valid} & ({ds} != 0.0)" if valid else f"{ds} != 0.0"
    return f"tl.where({sends}, {ds} * {factor}, 0.0)"


def _sum(text: str, axes: tuple[int, ...]) -> str:
    if not axes:
        return text
    return f"tl.sum({text})" if len(axes) == 2 else f"tl.sum({text}, {axes[0]}, keep_dims=True)"
