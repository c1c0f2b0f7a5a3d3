"""The source of a survey kernel: what one launch tells of the blocks of one axis of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..ir import FLOAT, Expr, const
from ..lowering import CaptureSpec, TensorSpec, emit_values
from .assemble import _comments, _fill, _functions, _helpers, _join, _sections

# a row keeps at most so many pieces
MOST_PIECES = 3
_NOTHING = (const(0), const(0))


class Piece(Protocol):
    @property
    def start(self) -> Expr: ...
    @property
    def stop(self) -> Expr: ...


class Form(Protocol):
    """As analysis.Form: what a place of one axis keeps of the other one, if some tables ascend."""

    @property
    def pieces(self) -> Sequence[Piece]: ...
    @property
    def sorted_tables(self) -> tuple[int, ...]: ...


class BoxTest(Protocol):
    """As analysis.BoxTest: terms over the queries and over the keys, whose extremes in each block are wanted."""

    @property
    def rows(self) -> tuple[Expr, ...]: ...
    @property
    def columns(self) -> tuple[Expr, ...]: ...


def assemble_survey(
    *,
    axis: str,
    block_q: int,
    block_kv: int,
    form: Form | None,
    ranges: bool,
    bounds: Sequence[Form],
    box: BoxTest | None,
    captures: CaptureSpec,
    tables: Sequence[int],
    header: Sequence[str] = (),
) -> str:
    """The source of a module with `survey` and `pack` to call; nothing in it depends on a length.

    `axis` says who owns the blocks: "row" the queries, "column" the keys; `form` and `bounds` are forms of that axis. `form` is what
    the mask keeps, settled to at most 3 pieces a row; `ranges` asks for range numbers too (of a form of one piece); `bounds` are
    necessary conditions, for hulls; `box` names terms to summarise; `tables` are the numbers of tables to look through, whether they
    ascend. Raises ValueError for another axis, and for ranges without a form of one piece.

    >>> from types import SimpleNamespace
    >>> from flexmask.ir import Q, const
    >>> causal = SimpleNamespace(pieces=[SimpleNamespace(start=const(0), stop=Q + 1)], sorted_tables=())
    >>> text = assemble_survey(axis="row", block_q=128, block_kv=128, form=causal, ranges=True, bounds=(), box=None,
    ...                        captures=CaptureSpec(), tables=())
    >>> "return (tl.full((), 0, tl.int32), q_idx + 1)" in text
    True
    """
    if axis not in ("row", "column"):
        raise ValueError(f"a map is by rows or by columns: axis is 'row' or 'column', not {axis!r}")
    if ranges and (form is None or len(form.pieces) != 1):
        raise ValueError("range numbers describe rows of one piece: give a form of one piece, or ranges=False")
    template, launcher = _sections("survey.py"), _functions(_sections("launcher.py")["functions"])
    runs = [form.pieces if form is not None else (), *(b.pieces for b in bounds)]
    terms = (box.rows, box.columns) if box is not None else ((), ())
    mods = [*_values(axis, runs, terms, captures), _check(form, tables, captures)]
    title = f"survey of blocks of {block_q} queries and {block_kv} keys, by {axis}"
    imports = _comments([*header, title]) + "\nimport triton\nimport triton.language as tl\n\n"
    sizes = {**_sizes(axis, block_q, block_kv, bool(terms[axis == "row"])), **_counts(axis, runs, terms), "RANGES": ranges}
    functions = template["functions"]
    return _join([imports + _fill(template["constants"], sizes), *_helpers([*mods, functions]), *mods, functions, launcher["pack"]])


def _sizes(axis: str, block_q: int, block_kv: int, both: bool) -> dict[str, object]:
    """Block lengths; a warp for 32 places, up to 16 of them."""
    owner, other = (block_q, block_kv) if axis == "row" else (block_kv, block_q)
    padded_owner, padded_other = (1 << (n - 1).bit_length() for n in (owner, other))
    longest = max(padded_owner, padded_other) if both else padded_owner
    return {
        "COLUMNS": axis == "column", "OWNER_BLOCK": owner, "OTHER_BLOCK": other, "PADDED_OWNER": padded_owner,
        "PADDED_OTHER": padded_other, "NUM_WARPS": min(max(longest // 32, 1), 16),
    }  # fmt: skip


def _counts(axis: str, runs: Sequence[Sequence[Piece]], terms: tuple[tuple[Expr, ...], tuple[Expr, ...]]) -> dict[str, object]:
    """How many of everything there are."""
    rows, columns = len(terms[0]), len(terms[1])
    return {
        "RUNS": len(runs[0]), "PIECES": min(len(runs[0]), MOST_PIECES), "HULLS": len(runs) - 1, "HULL_RUNS": _longest(runs[1:]),
        "OWNER_TERMS": rows if axis == "row" else columns, "OTHER_TERMS": columns if axis == "row" else rows,
        "FIRST_OWNER_TERM": 0 if axis == "row" else rows, "FIRST_OTHER_TERM": rows if axis == "row" else 0,
    }  # fmt: skip


def _longest(runs: Sequence[Sequence[Piece]]) -> int:
    return max((len(r) for r in runs), default=0)


def _values(
    axis: str, runs: Sequence[Sequence[Piece]], terms: tuple[tuple[Expr, ...], tuple[Expr, ...]], captures: CaptureSpec
) -> tuple[str, str]:
    """The texts of `owner_values` and `other_values`. Conditions of fewer runs than others get empty ones."""
    exprs = [e for piece in runs[0] for e in (piece.start, piece.stop)]
    for pieces in runs[1:]:
        exprs += [e for piece in pieces for e in (piece.start, piece.stop)]
        exprs += _NOTHING * (_longest(runs[1:]) - len(pieces))
    owner, other = ("q_idx", "kv_idx") if axis == "row" else ("kv_idx", "q_idx")
    own_terms, other_terms = terms if axis == "row" else terms[::-1]
    first = f"Of {owner}: starts and stops of the form's runs, of each condition's runs, and the terms."
    return (
        emit_values("owner_values", f"b, h, {owner}, q_len, kv_len", [*exprs, *own_terms], captures, first),
        emit_values("other_values", f"b, h, {other}, q_len, kv_len", other_terms, captures, f"Of {other}: the terms."),
    )


def _check(form: Form | None, tables: Sequence[int], captures: CaptureSpec) -> str:
    """The text of `check_tables`. A table without dimensions ascends."""
    known = [t for t in tables if captures.tensors[t].rank > 0]
    names = ", ".join(captures.identifiers[f"t{t}"] for t in known)
    lines = ["@triton.jit", "def check_tables(broken, tables, numbers):"]
    lines.append(f'    """Looks through the tables that must ascend: {names or "none"}."""')
    for t in known:
        spec, before = captures.tensors[t], captures.tensors[:t]
        at, size_at = sum(1 + x.rank for x in before), sum(x.rank for x in before)
        strides = ", ".join(f"tables[{at + 1 + axis}]" for axis in range(spec.rank))
        sizes = ", ".join(f"numbers[{size_at + axis}]" for axis in range(spec.rank))
        needed = form is not None and t in form.sorted_tables
        comma = "," if spec.rank == 1 else ""
        lines += [
            "    check_ascending(",
            *(f"        {x}," for x in ("broken", f"tables[{at}]", f"({strides}{comma})", f"({sizes}{comma})")),
            *(f"        {x}," for x in (1 + t, needed, spec.rank, f"tl.{_compared(spec)}")),
            "    )",
        ]
    return "\n".join(lines)


def _compared(spec: TensorSpec) -> str:
    """The type in which a table's entries are compared: one that holds them all."""
    if spec.kind == FLOAT:
        return "float64" if spec.dtype == "float64" else "float32"
    return "int64" if spec.dtype in ("int64", "uint64", "uint32") else "int32"
