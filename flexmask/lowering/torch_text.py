"""The bounds of a row form as torch code, for generated files that run without flexmask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..ir import FLOAT, OPS, Expr, walk
from .captures import CaptureSpec, Scope


class Piece(Protocol):
    @property
    def start(self) -> Expr: ...
    @property
    def stop(self) -> Expr: ...


class RowForm(Protocol):
    """As analysis.Form: pieces of half-open key intervals, and the tables that must ascend for them to hold."""

    @property
    def pieces(self) -> Sequence[Piece]: ...
    @property
    def sorted_tables(self) -> tuple[int, ...]: ...


SETTLE = '''

def settle(starts, stops, kv_len):
    """The same kept keys as at most 3 intervals a row: sorted, those that touch joined, empty ones last."""
    empty = starts >= stops
    starts, order = starts.masked_fill(empty, kv_len + 1).sort(-1)
    stops = stops.masked_fill(empty, kv_len + 1).gather(-1, order)
    reach = stops.cummax(-1).values
    joined = torch.zeros_like(starts, dtype=torch.bool)
    joined[..., 1:] = (starts[..., 1:] <= reach[..., :-1]) & (starts[..., 1:] <= kv_len)
    place = (~joined).cumsum(-1) - 1
    starts = torch.full_like(starts, kv_len + 1).scatter_reduce(-1, place, starts, "amin")
    stops = torch.zeros_like(stops).scatter_reduce(-1, place, stops, "amax")
    starts, stops = (x.masked_fill(starts > kv_len, 0) for x in (starts, stops))
    if bool((stops[..., 3:] > 0).any()):
        raise ValueError("some row keeps more than 3 intervals, which this kernel does not hold")
    return starts[..., :3], stops[..., :3]'''
SEARCH = '''

def search(rows, target, right):
    """How many entries of each ascending row [.., 1, n] are below `target` [.., m] (at or below it: right)."""
    rows = rows.squeeze(-2)
    shape = torch.broadcast_shapes(rows.shape[:-1], target.shape[:-1])
    rows, target = (x.expand(*shape, x.shape[-1]).contiguous() for x in (rows, target))
    return torch.searchsorted(rows, target, right=right)'''


def emit_row_bounds(form: RowForm, captures: CaptureSpec) -> str:
    """Text of `row_bounds(tensors, scalars, q_len, kv_len, batch, heads, device)`: int32 starts and stops [batch, heads, q_len, pieces].

    Of more than 3 pieces the text keeps the 3 intervals that they come to, or raises ValueError where a row has more.
    """
    names = captures.identifiers
    bounds = [e for piece in form.pieces for e in (piece.start, piece.stop)]
    used = {n for e in bounds for n in walk(e)}
    lines = ['"""Kept keys of each query: half-open intervals, int32 [batch, heads, q_len, pieces], starts and stops."""']
    lines += [f"{name} = torch.arange({size}, device=device){view}" for name, size, view in _INDICES if any(n.value == name for n in used)]
    tables = {n.value if n.op == "load" else n.value[0] for n in used if n.op in ("load", "search")} | set(form.sorted_tables)
    lines += [f"{names[f't{i}']} = tensors[{i}]" for i in sorted(tables)]
    numbers = {n.value: n.kind for n in used if n.op == "scalar"}
    lines += [f"{names[f's{i}']} = torch.tensor(scalars[{i}], device=device)" for i in sorted(numbers)]
    for i in form.sorted_tables:
        table = names[f"t{i}"]
        lines.append(f"if bool(({table}[..., 1:] < {table}[..., :-1]).any()):")
        lines.append(f'    raise ValueError("{table} must ascend along its last dimension for these bounds to hold")')
    writer = _Writer(captures)
    texts = [writer.variable(e) for e in bounds]
    lines += writer.statements
    lines.append("shape = (batch, heads, q_len)")
    for side, parts in (("starts", texts[::2]), ("stops", texts[1::2])):
        lines.append(f"{side} = [torch.as_tensor(x, device=device).expand(shape) for x in ({', '.join(parts)},)]")
    many = len(form.pieces) > 3
    result = "tuple(torch.stack(x, -1).clamp(0, kv_len).int() for x in (starts, stops))"
    lines.append(f"return settle(*{result}, kv_len)" if many else f"return {result}")
    head = "def row_bounds(tensors, scalars, q_len, kv_len, batch, heads, device):\n    "
    helpers = [SETTLE] * many + [SEARCH] * any(n.op == "search" and len(n.args) > 1 for n in used)
    return head + "\n    ".join(lines) + "".join("\n" + text for text in helpers)


_INDICES = [("b", "batch", "[:, None, None]"), ("h", "heads", "[None, :, None]"), ("q_idx", "q_len", "[None, None, :]")]


class _Writer:
    """Statements that compute expressions on tensors, one for each distinct operation that is not a leaf."""

    def __init__(self, captures: CaptureSpec):
        self.captures = captures
        self.statements: list[str] = []
        self.text: dict[Expr, str] = {}
        self.scope = Scope([*captures.identifiers.values(), "shape"])

    def variable(self, expr: Expr) -> str:
        for node in walk(expr):
            if node not in self.text:
                self.text[node] = self._leaf(node) or self._assign(self._operation(node, [self.text[a] for a in node.args]))
        return self.text[expr]

    def _assign(self, text: str) -> str:
        name = self.scope.take("x", "x")
        self.statements.append(f"{name} = {text}")
        return name

    def _leaf(self, node: Expr) -> str | None:
        if node.op == "const":
            return repr(node.value) if node.kind != FLOAT else f'float("{node.value!r}")'
        if node.op == "index":
            return str(node.value)
        return self.captures.identifiers[f"s{node.value}"] if node.op == "scalar" else None

    def _operation(self, node: Expr, args: list[str]) -> str:
        if node.op == "load":
            return self._load(node, args)
        if node.op == "search":
            return self._search(node, args)
        tensors = [self._tensor(a, text) for a, text in zip(node.args, args, strict=True)]
        if node.op == "cast":
            return f"{tensors[0]}.to(torch.{node.value}){'.long()' if node.kind == 'int' else ''}"
        row = OPS[node.op]
        if len(args) == 2 and row.symbol and node.kind != FLOAT and row.symbol not in ("&", "|", "^"):
            return f"{args[0]} {row.symbol} {args[1]}"
        return f"torch.{getattr(row.torch, '__name__', node.op)}({', '.join(tensors)})"

    def _tensor(self, node: Expr, text: str) -> str:
        plain = node.op == "const" or node.value in ("q_len", "kv_len")
        return f"torch.tensor({text}, device=device)" if plain else text

    def _load(self, node: Expr, args: list[str]) -> str:
        spec = self.captures.tensors[node.value]
        widen = "" if spec.dtype in ("bool", "int64", "float32", "float64") else ".float()" if spec.kind == FLOAT else ".long()"
        places = [self._tensor(a, text) for a, text in zip(node.args, args, strict=True)]
        return f"{self.captures.identifiers[f't{node.value}']}[{', '.join(places) or '()'}]{widen}"

    def _search(self, node: Expr, args: list[str]) -> str:
        number, side = node.value
        table = self.captures.identifiers[f"t{number}"]
        target = self._tensor(node.args[-1], args[-1])
        widen = ".float()" if self.captures.tensors[number].kind == FLOAT else ".long()"
        if len(args) == 1:
            return f"torch.searchsorted({table}{widen}.contiguous(), {target}.contiguous(), right={side == 'right'})"
        lead = ", ".join(self._tensor(a, text) for a, text in zip(node.args[:-1], args[:-1], strict=True))
        return f"search({table}[{lead}]{widen}, {target}, {side == 'right'})"
