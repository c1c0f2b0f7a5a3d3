"""explain(): what was derived from a mask, what was chosen, and why, as text."""

from __future__ import annotations

import re

import torch

from ..analysis import Facts, Form, NotInterval
from ..frontend import Traced
from ..ir import show, simplify
from ..runtime.tile_map import TileMap


def explain_mask(traced: Traced, facts: Facts) -> list[str]:
    """The predicate, its two interval forms or the reasons there are none, and what was proved."""
    names = traced.names()
    lines = [f"mask {traced.name}{_origin(traced)}", f"  keep            {show(facts.predicate, names)}"]
    lines += _form("kept keys of row q_idx", facts.rows, traced)
    lines += _form("kept queries of column kv_idx", facts.columns, traced)
    lines.append(f"  depends on      {_join(['batch'] * facts.uses_b + ['head'] * facts.uses_h) or 'neither batch nor head'}")
    proof = "proved" if facts.rows_contiguous else "not proved"
    lines.append(f"  contiguous      the kept blocks of a block row are one run: {proof}")
    for atom in facts.atoms:
        row, column = _named(atom.rows, names), _named(atom.columns, names)
        lines.append(f"  atom            {show(atom.expr, names)}: row {row}; column {column}")
    lines += _captures(traced)
    return lines + lint(traced, facts)


def explain_score(traced: Traced) -> list[str]:
    """The score as an expression, and its captures."""
    names = traced.names()
    return [f"score {traced.name}{_origin(traced)}", f"  score           {show(simplify(traced.expr), names)}", *_captures(traced)]


def explain_map(tile_map: TileMap) -> list[str]:
    """Size, form and density of a tile map. Reads the map, so on a GPU this waits for it."""
    s = tile_map.statistics()
    form = "range form (four numbers a block row)" if tile_map.ranges is not None else "list form"
    total = max(1, s["tiles"])
    return [
        f"map {tile_map.q_len} x {tile_map.kv_len}, tiles {tile_map.block_q} x {tile_map.block_kv}, {form}",
        f"  tiles           {s['tiles']}: {s['full']} full, {s['partial']} partial, {s['empty']} skipped ({s['empty'] / total:.1%})",
    ]


def lint(traced: Traced, facts: Facts) -> list[str]:
    """Advice on what would make the mask cheaper."""
    names = traced.names()
    advice = []
    for i, (tensor, name) in enumerate(zip(traced.tensors, traced.tensor_names, strict=True)):
        if tensor.dtype == torch.int64 and tensor.dim():
            advice.append(f"`{name}` is int64: int32 halves its traffic in a kernel")
        if isinstance(facts.rows, Form) and i in facts.rows.sorted_tables:
            advice.append(f"`{name}` ascending makes the row form hold; it is checked for each version of the tensor")
    if traced.volatile:
        advice.append("a captured tensor goes through a torch operation inside the function, so it is traced anew at every call")
    for name, value in traced.specialised:
        advice.append(f"`{name}` = {value} shapes the code: another value builds another kernel")
    if isinstance(facts.rows, Form) and facts.rows.residue is not None:
        advice.append(f"`{show(facts.rows.residue, names)}` is no interval and is evaluated in the partial tiles")
    return [f"  note            {line}" for line in advice]


def _form(title: str, form: Form | NotInterval, traced: Traced) -> list[str]:
    names = traced.names()
    if isinstance(form, NotInterval):
        culprit = _named(form.culprit, names)
        return [f"  {title}: no interval form: {form.reason}" + (f" (`{culprit}`)" if culprit else "")]
    pieces = " and ".join(f"[{show(p.start, names)}, {show(p.stop, names)})" for p in form.pieces) or "none"
    text = f"  {title}: {pieces}"
    if form.residue is not None:
        text += f", of these where {show(form.residue, names)}"
    if form.sorted_tables:
        text += f", if {_join([names[f't{i}'] for i in form.sorted_tables])} ascends"
    return [text]


def _captures(traced: Traced) -> list[str]:
    lines = []
    for tensor, name in zip(traced.tensors, traced.tensor_names, strict=True):
        lines.append(f"  captures        {name}: {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}")
    for value, name in zip(traced.scalars, traced.scalar_names, strict=True):
        lines.append(f"  captures        {name} = {value} (run-time scalar)")
    return lines


def _origin(traced: Traced) -> str:
    at = traced.locate(traced.expr)
    return f"  ({at})" if at else ""


def _named(text: str, names: dict[str, str]) -> str:
    """Text that the analysis wrote with t0, s0, ..., with the user's names."""
    return re.sub(r"\b[ts]\d+\b", lambda m: names.get(m.group(), m.group()), text)


def _join(words: list[str]) -> str:
    return " and ".join(words)
