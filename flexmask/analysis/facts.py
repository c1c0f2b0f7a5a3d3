"""What was derived from a mask: its row form, its column form, and what else is proved about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import NotInterval
from ..ir import KV_LEN, Q_LEN, Expr, const, parse, show

# a form has at most so many symbolic pieces; of the disjoint ones that a row really keeps at most so many are kept at run time
MOST_RUNS = 8
MOST_PIECES = 3
# what may be known of empty rows
ALWAYS, ROWS_FIT, COLUMNS_FIT, NOT_PROVED = "always", "if q_len <= kv_len", "if kv_len <= q_len", "not proved"
_ZERO = const(0)


@dataclass(frozen=True)
class Piece:
    """The half-open interval [start, stop): integer expressions, to be clipped to [0, length); empty where stop <= start."""

    start: Expr
    stop: Expr

    def __str__(self) -> str:
        return f"[{show(self.start)}, {show(self.stop)})"


@dataclass(frozen=True)
class Form:
    """keep == (index in the union of `pieces`) & residue, along one axis.

    `axis` is "row" (the index is kv_idx and the bounds are free of it) or "column" (the index is q_idx). Bounds are expressions
    over b, h, the other index, q_len, kv_len, scalars, loads and `search`. There are 1 to MOST_RUNS pieces, which may overlap, touch
    or be empty; *settled* (sorted and merged) a row keeps few disjoint ones. A form that is not `certain` holds for the rows that
    settle to at most MOST_PIECES, and every other row settles to more than that, so that it can be told.
    The form holds where each table in `sorted_tables` ascends along its last axis; otherwise nothing may be concluded from it.
    """

    axis: str
    pieces: tuple[Piece, ...]
    residue: Expr | None = None
    sorted_tables: tuple[int, ...] = ()

    @property
    def certain(self) -> bool:
        """Whether each row is known to keep at most MOST_PIECES disjoint pieces; else that is found at run time.

        >>> from flexmask.analysis import derive
        >>> from flexmask.ir import K, Q
        >>> derive(K <= Q).rows.certain
        True
        """
        return len(self.pieces) <= MOST_PIECES

    @property
    def sides(self) -> str:
        """Which bounds can cut anything off: "both", "start", "stop" or "none"; always "both" for several pieces.

        >>> from flexmask.analysis import derive
        >>> from flexmask.ir import K, Q
        >>> derive(K <= Q).rows.sides
        'stop'
        """
        first = self.pieces[0]
        starts = first.start is not _ZERO
        stops = first.stop is not (KV_LEN if self.axis == "row" else Q_LEN)
        if len(self.pieces) > 1 or (starts and stops):
            return "both"
        return "start" if starts else "stop" if stops else "none"

    def __str__(self) -> str:
        subject = "kept keys of row q_idx" if self.axis == "row" else "kept queries of column kv_idx"
        text = f"{subject}: {' | '.join(map(str, self.pieces))}"
        if self.residue is not None:
            text += f" where {show(self.residue)}"
        if self.sorted_tables:
            text += f", given that {', '.join(f't{n}' for n in self.sorted_tables)} ascend{'s' * (len(self.sorted_tables) == 1)}"
        return text

    def to_json(self) -> dict[str, Any]:
        return {
            "axis": self.axis,
            "pieces": [[show(p.start), show(p.stop)] for p in self.pieces],
            "residue": None if self.residue is None else show(self.residue),
            "sorted_tables": list(self.sorted_tables),
        }


@dataclass(frozen=True)
class AtomFact:
    """One comparison or bool table of the mask, and in words what it is along a row and along a column."""

    expr: Expr
    rows: str
    columns: str

    def __str__(self) -> str:
        return f"{show(self.expr)}\n  row     {self.rows}\n  column  {self.columns}"


@dataclass(frozen=True)
class Facts:
    """Everything derived from a simplified mask predicate. See `flexmask.analysis.derive`.

    `rows_contiguous` (`columns_contiguous`) is a proof that for every run of consecutive rows (columns) the union of what they keep
    is one interval, given the form's sorted tables; False means "not proved".
    `row_bounds` (`column_bounds`) are necessary conditions, also of masks that have no form: what is kept lies in the union of each
    one's pieces where its own `sorted_tables` ascend. Those without tables always hold.
    `rows_nonempty` (`columns_nonempty`): whether every query row below q_len keeps a key (every key column below kv_len a query):
    ALWAYS, ROWS_FIT ("if q_len <= kv_len"), COLUMNS_FIT ("if kv_len <= q_len") or NOT_PROVED.
    `uses_lengths`: the predicate reads q_len or kv_len.
    """

    predicate: Expr
    rows: Form | NotInterval
    columns: Form | NotInterval
    uses_b: bool
    uses_h: bool
    rows_contiguous: bool
    columns_contiguous: bool
    atoms: tuple[AtomFact, ...]
    row_bounds: tuple[Form, ...] = ()
    column_bounds: tuple[Form, ...] = ()
    rows_nonempty: str = NOT_PROVED
    columns_nonempty: str = NOT_PROVED
    uses_lengths: bool = False

    def __str__(self) -> str:
        lines = [f"keep {show(self.predicate)}"]
        for form, contiguous in ((self.rows, self.rows_contiguous), (self.columns, self.columns_contiguous)):
            lines.append(f"{form}{' (contiguous)' if contiguous else ''}")
        varies = [name for name, used in (("batch entry", self.uses_b), ("head", self.uses_h)) if used]
        lines.append(f"depends on the {' and the '.join(varies)}" if varies else "the same for all batch entries and heads")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Text, numbers and bools only; `from_json` reads it back."""
        return {
            "predicate": show(self.predicate),
            "rows": _form_to_json(self.rows),
            "columns": _form_to_json(self.columns),
            "uses_b": self.uses_b,
            "uses_h": self.uses_h,
            "rows_contiguous": self.rows_contiguous,
            "columns_contiguous": self.columns_contiguous,
            "atoms": [[show(a.expr), a.rows, a.columns] for a in self.atoms],
            "row_bounds": [form.to_json() for form in self.row_bounds],
            "column_bounds": [form.to_json() for form in self.column_bounds],
            "rows_nonempty": self.rows_nonempty,
            "columns_nonempty": self.columns_nonempty,
            "uses_lengths": self.uses_lengths,
        }

    @staticmethod
    def from_json(data: dict[str, Any], tensors: Sequence[str] = (), scalars: Sequence[str] = ()) -> Facts:
        """The facts `to_json` wrote. `tensors` and `scalars` give the kinds ("bool", "int", "float") of t0, t1, ... and s0, s1, ...

        Raises ValueError or KeyError for anything else.

        >>> from flexmask.analysis import Facts, derive
        >>> from flexmask.ir import K, Q
        >>> facts = derive(K <= Q)
        >>> Facts.from_json(facts.to_json()) == facts
        True
        """
        return Facts(
            predicate=parse(data["predicate"], tensors, scalars),
            rows=_form_from_json(data["rows"], tensors, scalars),
            columns=_form_from_json(data["columns"], tensors, scalars),
            uses_b=bool(data["uses_b"]),
            uses_h=bool(data["uses_h"]),
            rows_contiguous=bool(data["rows_contiguous"]),
            columns_contiguous=bool(data["columns_contiguous"]),
            atoms=tuple(AtomFact(parse(text, tensors, scalars), rows, columns) for text, rows, columns in data["atoms"]),
            row_bounds=tuple(_form_of(form, tensors, scalars) for form in data["row_bounds"]),
            column_bounds=tuple(_form_of(form, tensors, scalars) for form in data["column_bounds"]),
            rows_nonempty=str(data["rows_nonempty"]),
            columns_nonempty=str(data["columns_nonempty"]),
            uses_lengths=bool(data["uses_lengths"]),
        )


def _form_to_json(form: Form | NotInterval) -> dict[str, Any]:
    return form.to_json() if isinstance(form, Form) else {"reason": form.reason, "culprit": form.culprit}


def _form_from_json(data: dict[str, Any], tensors: Sequence[str], scalars: Sequence[str]) -> Form | NotInterval:
    return NotInterval(data["reason"], data["culprit"]) if "reason" in data else _form_of(data, tensors, scalars)


def _form_of(data: dict[str, Any], tensors: Sequence[str], scalars: Sequence[str]) -> Form:
    return Form(
        axis=data["axis"],
        pieces=tuple(Piece(parse(start, tensors, scalars), parse(stop, tensors, scalars)) for start, stop in data["pieces"]),
        residue=None if data["residue"] is None else parse(data["residue"], tensors, scalars),
        sorted_tables=tuple(data["sorted_tables"]),
    )
