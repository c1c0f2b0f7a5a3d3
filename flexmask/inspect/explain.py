"""explain(): what was derived from a mask, what was chosen, and why, as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..analysis import Facts, Form, NotInterval
from ..frontend import Traced
from ..ir import INT, Expr, kind_of_dtype, parse, show, simplify
from ..runtime.maps import Extent
from ..runtime.tile_map import TileMap
from .lint import lint, lint_values
from .whereabouts import whereabouts

if TYPE_CHECKING:
    from ..analysis import AtomFact

LABEL = 16  # columns of a line's label
WIDE = 100  # formulas longer than this are set one piece a line
_FORMS = {"row": "kept keys of row q_idx", "column": "kept queries of column kv_idx"}


def explain_mask(traced: Traced, facts: Facts) -> list[str]:
    """The predicate, its two interval forms or the reasons there are none, how each condition was solved, and what was proved."""
    lines = [f"mask {traced.name}{_place(traced, traced.expr)}", line("keep", show(facts.predicate, traced.names()))]
    lines += _form("row", facts, traced) + _form("column", facts, traced)
    lines += _legend(lines)
    for atom in facts.atoms:
        lines += _atom(atom, traced)
    return lines + _proofs(facts) + _captures(traced) + [line("note", text) for text in lint(traced, facts)]


def explain_score(traced: Traced) -> list[str]:
    """The score as an expression, and its captures."""
    lines = [f"score {traced.name}{_place(traced, traced.expr)}", line("score", show(simplify(traced.expr), traced.names()))]
    return lines + _captures(traced)


def explain_map(tile_map: TileMap) -> list[str]:
    """Size, form and density of a tile map. Reads the map, so on a GPU this waits for it."""
    s = tile_map.statistics()
    form = "range form (four numbers a block row)" if tile_map.ranges is not None else "list form"
    total = max(1, s["tiles"])
    return [
        f"map {tile_map.q_len} x {tile_map.kv_len}, tiles {tile_map.block_q} x {tile_map.block_kv}, {form}",
        line("tiles", f"{s['tiles']}: {s['full']} full, {s['partial']} partial, {s['empty']} skipped ({s['empty'] / total:.1%})"),
    ]


def explain_values(traced: Traced, facts: Facts, extent: Extent) -> list[str]:
    """Advice from the values of the captures for one extent. Reads them, so on a GPU this waits."""
    return [line("note", text) for text in lint_values(traced, facts, extent)]


def line(label: str, text: str) -> str:
    """One line of the report; without a label it goes on with the line above."""
    return f"  {label:<{LABEL}}{text}"


# forms


def _form(axis: str, facts: Facts, traced: Traced) -> list[str]:
    form, bounds = (facts.rows, facts.row_bounds) if axis == "row" else (facts.columns, facts.column_bounds)
    if isinstance(form, NotInterval):
        reason = _named(form.reason, traced)
        lines = [f"  {_FORMS[axis]}: no interval form: {reason}{_culprit(form.culprit, traced)}"]
        return lines + [line("", f"bounds only: {_within(bound, traced)}; the mask is evaluated") for bound in bounds]
    pieces = _pieces(form, traced)
    if len(_joined(pieces)) <= WIDE:
        lines = [f"  {_FORMS[axis]}: {_joined(pieces)}"]
    else:
        lines = [f"  {_FORMS[axis]}: {pieces[0]}", *(line("", f"and {piece}") for piece in pieces[1:])]
    lines.append(line("", _exactness(form, facts, traced)))
    # what is left where the tables do not ascend
    left = [b for b in bounds if not b.sorted_tables] if set(form.sorted_tables) - traced.promised else []
    return lines + [line("", f"else bounds only: {_within(bound, traced)}; the mask is evaluated") for bound in left]


def _within(bound: Form, traced: Traced) -> str:
    given = f" if {_ascending(bound, traced)}" if bound.sorted_tables else ""
    return f"all of them in {' or '.join(_pieces(bound, traced))}{given}"


def _pieces(form: Form, traced: Traced) -> list[str]:
    return [f"[{show(p.start, traced.names())}, {show(p.stop, traced.names())})" for p in form.pieces]


def _joined(pieces: list[str]) -> str:
    return " and ".join(pieces)


def _exactness(form: Form, facts: Facts, traced: Traced) -> str:
    """Whether the form is the mask, and on what that depends."""
    conditions = [_ascending(form, traced)] if form.sorted_tables else []
    if not form.certain and form.residue is None:
        conditions.append("no row keeps more than 3 runs" if form.axis == "row" else "no column keeps more than 3 runs")
    given = f" if {' and '.join(conditions)}" if conditions else ""
    if form.residue is None:
        return f"exact{given}"
    if form.residue is facts.predicate:
        return f"bounds only{given}: the mask is evaluated"
    return f"bounds only{given}: `{show(form.residue, traced.names())}` is evaluated{_place(traced, form.residue)}"


def _ascending(form: Form, traced: Traced) -> str:
    """`doc ascends`: the tables that the form relies on, and which of them are promised."""
    promised = set(form.sorted_tables) & traced.promised
    if promised == set(form.sorted_tables):
        names, ending = [traced.tensor_names[n] for n in form.sorted_tables], " (promised)"
    else:
        names, ending = [f"{traced.tensor_names[n]}{' (promised)' * (n in promised)}" for n in form.sorted_tables], ""
    return f"{join(names)} {'ascends' if len(names) == 1 else 'ascend'}{ending}"


def _legend(lines: Iterable[str]) -> list[str]:
    """What the binary searches in the formulas mean, where there are any."""
    searched = any(re.search(r"\b(left|right)\(", text) for text in lines)
    return [line("where", "left(t, x) and right(t, x) count the entries of t that are < x and <= x")] if searched else []


# conditions


def _atom(atom: AtomFact, traced: Traced) -> list[str]:
    lines = [line("condition", f"{show(atom.expr, traced.names())}{_place(traced, atom.expr)}")]
    lines.append(line("  along a row", _solved(atom.rows, traced)))
    return [*lines, line("  down a column", _solved(atom.columns, traced))]


def _solved(text: str, traced: Traced) -> str:
    """What the analysis wrote of a condition, with the user's names; with a "don't know" comes the line of what is to blame."""
    refused = re.fullmatch(r"(no interval form: .*?) \(in `(.*)`\)", text)
    return f"{_named(refused[1], traced)}{_culprit(refused[2], traced)}" if refused else _named(text, traced)


def _culprit(text: str, traced: Traced) -> str:
    """The user's line of an expression that the analysis wrote as text; "" where there is none."""
    if not text:
        return ""
    tensors = [kind_of_dtype(t.dtype) for t in traced.tensors]
    scalars = [INT if isinstance(s, int) else "float" for s in traced.scalars]
    return _place(traced, parse(text, tensors, scalars))


def _place(traced: Traced, expr: Expr) -> str:
    at = whereabouts(traced, expr)
    return f"  ({at})" if at else ""


# proofs and captures


def _proofs(facts: Facts) -> list[str]:
    proof = {True: "proved", False: "not proved"}
    reads = ["batch"] * facts.uses_b + ["head"] * facts.uses_h + ["lengths"] * facts.uses_lengths
    return [
        line("contiguous", f"what a block of rows keeps is one run of keys: {proof[facts.rows_contiguous]}"),
        line("", f"what a block of columns keeps is one run of queries: {proof[facts.columns_contiguous]}"),
        line("never empty", f"rows: {_when(facts.rows_nonempty)}; columns: {_when(facts.columns_nonempty)}"),
        line("depends on", join(reads) or "neither batch, head nor lengths"),
    ]


def _when(proof: str) -> str:
    return f"proved {proof}" if proof.startswith("if") else "proved" if proof == "always" else proof


def _captures(traced: Traced) -> list[str]:
    lines = []
    for number, (tensor, name) in enumerate(zip(traced.tensors, traced.tensor_names, strict=True)):
        text = f"{name}: {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
        lines.append(line("captures", text + ", promised to ascend" * (number in traced.promised)))
    for value, name in zip(traced.scalars, traced.scalar_names, strict=True):
        lines.append(line("captures", f"{name} = {value} (run-time scalar)"))
    return lines


def _named(text: str, traced: Traced) -> str:
    """Text that the analysis wrote with t0, s0, ..., with the user's names."""
    names = traced.names()
    return re.sub(r"\b[ts]\d+\b", lambda m: names.get(m.group(), m.group()), text)


def join(words: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
