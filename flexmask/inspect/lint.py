"""Advice: what would make a mask cheaper, and what is probably not meant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from ..analysis import Facts, Form, NotInterval
from ..analysis.prove import Prover, negation
from ..frontend import Traced
from ..ir import BOOL, FALSE, TRUE, Env, Expr, const, evaluate, show, simplify, walk
from ..runtime.maps import Extent, find_intervals
from .whereabouts import whereabouts

SHOWN = 5  # rows that keep nothing, by number
_MOST_PAIRS = 1 << 26  # pairs that are evaluated to find them
_CHUNK = 1 << 22


def lint(traced: Traced, facts: Facts) -> list[str]:
    """Advice from the mask alone; no tensor is read."""
    return [
        *_wide_tables(traced),
        *_unpromised(traced, facts),
        *_settled(traced, facts),
        *_fixed(traced),
    ]


def _wide_tables(traced: Traced) -> Iterator[str]:
    for tensor, name in zip(traced.tensors, traced.tensor_names, strict=True):
        if tensor.dtype == torch.int64 and tensor.dim():
            yield f"`{name}` is int64: as int32 it is half to read. Write `{name} = {name}.to(torch.int32)`."


def _unpromised(traced: Traced, facts: Facts) -> Iterator[str]:
    """Conditions that are ranges of keys or queries if a table ascends, which only the user knows."""
    forms = [f for f in (facts.rows, facts.columns, *facts.row_bounds, *facts.column_bounds) if isinstance(f, Form)]
    for number in dict.fromkeys(n for form in forms for n in form.sorted_tables):
        if number in traced.promised:
            continue
        name = traced.tensor_names[number]
        about = [a.expr for a in facts.atoms if any(n.op == "load" and n.value == number for n in walk(a.expr))]
        shown = " and ".join(f"`{show(a, traced.names())}`" for a in about[:2])
        yield (
            f"{shown} {'is a range' if len(about) == 1 else 'are ranges'} only where `{name}` ascends, so every new version of it is "
            f"looked through. If it always ascends, promise it: `{name} = flexmask.sorted({name})`."
        )


def _fixed(traced: Traced) -> Iterator[str]:
    if traced.volatile:
        yield "a captured tensor goes through a torch operation inside the function, so it is traced anew at every call. Do it outside."
    for name, value in traced.specialised:
        yield f"`{name}` = {value} shapes the code: another value builds another kernel."


# what is settled already


def _settled(traced: Traced, facts: Facts) -> Iterator[str]:
    """Conditions that hold everywhere or nowhere, as far as can be proved."""
    prover = Prover()
    for atom in _atoms(traced.expr):
        plain = simplify(atom)
        always, never = plain is TRUE or prover.holds(plain), plain is FALSE or prover.holds(negation(plain))
        if atom.op != "const" and (always or never):
            remedy = "Leave it out." if always else "What is joined to it by `&` keeps nothing."
            yield f"`{show(atom, traced.names())}` is always {'true' if always else 'false'}{_at(traced, atom)}. {remedy}"
    if _keeps_nothing(facts):
        yield "the mask keeps nothing at all."


def _atoms(p: Expr) -> list[Expr]:
    """The conditions that &, |, ^, ~ and where join, as written, each once."""
    if p.op in ("and", "or", "xor", "not") or (p.op == "where" and p.kind == BOOL):
        return list(dict.fromkeys(atom for a in p.args for atom in _atoms(a)))
    return [p]


def _keeps_nothing(facts: Facts) -> bool:
    zero = const(0)
    pieces = facts.rows.pieces if isinstance(facts.rows, Form) else ()
    return facts.predicate is FALSE or (bool(pieces) and all(p.start is zero and p.stop is zero for p in pieces))


def _at(traced: Traced, expr: Expr) -> str:
    at = whereabouts(traced, expr)
    return f" ({at})" if at else ""


# with lengths


def lint_values(traced: Traced, facts: Facts, extent: Extent) -> list[str]:
    """Advice from the values for one extent: tables that do not ascend, rows that keep nothing. Reads them, so on a GPU this waits."""
    return [*_descending(traced, facts), *_empty_rows(traced, facts, extent)]


def _descending(traced: Traced, facts: Facts) -> Iterator[str]:
    tables = {n for form in (facts.rows, facts.columns) if isinstance(form, Form) for n in form.sorted_tables}
    for number in range(len(traced.tensors)):
        tensor = traced.tensors[number]
        if number in tables and bool((tensor[..., 1:] < tensor[..., :-1]).any()):
            yield f"`{traced.tensor_names[number]}` does not ascend now, so its conditions are evaluated. Sort the tokens by it if you can."


def _empty_rows(traced: Traced, facts: Facts, extent: Extent) -> Iterator[str]:
    if _never_empty(traced, facts, extent):
        return
    kept = _kept_anything(traced, facts, extent)
    if kept is None:
        return
    places = (~kept).nonzero().tolist()
    if not places:
        return
    single = kept.shape[0] == kept.shape[1] == 1
    shown = ", ".join(str(row) if single else f"({b}, {h}, {row})" for b, h, row in places[:SHOWN])
    what = "q_idx" if single else "(b, h, q_idx)"
    rest = ", ..." if len(places) > SHOWN else ""
    yield f"{len(places)} of {kept.numel()} rows keep nothing, so their output is 0: {what} = {shown}{rest}"


def _never_empty(traced: Traced, facts: Facts, extent: Extent) -> bool:
    """Whether a proof spares looking; it may rest on tables that ascend."""
    relied_on = facts.rows.sorted_tables if isinstance(facts.rows, Form) else ()
    proved = facts.rows_nonempty == "always" or (facts.rows_nonempty == "if q_len <= kv_len" and extent.q_len <= extent.kv_len)
    return extent.q_len == 0 or (proved and not set(relied_on) - traced.promised)


def _kept_anything(traced: Traced, facts: Facts, extent: Extent) -> torch.Tensor | None:
    """bool [B|1, H|1, q_len]: whether the row keeps a key; None where finding out would evaluate too many pairs."""
    if isinstance(facts.rows, Form) and facts.rows.certain:
        with suppress(NotInterval):  # where it has a residue or its tables do not ascend
            rows = find_intervals(traced, facts.rows, extent)
            return (rows.ends > rows.starts).any(-1)
    batch, heads = extent.batch if facts.uses_b else 1, extent.heads if facts.uses_h else 1
    if batch * heads * extent.q_len * extent.kv_len > _MOST_PAIRS:
        return None
    step = max(1, _CHUNK // max(1, batch * heads * extent.kv_len))
    parts = [_evaluated(traced, facts, extent, (batch, heads), first, step) for first in range(0, extent.q_len, step)]
    return torch.cat(parts, -1)


def _evaluated(traced: Traced, facts: Facts, extent: Extent, lead: tuple[int, int], first: int, step: int) -> torch.Tensor:
    """The same for the rows [first, first + step), by computing the predicate."""
    rows = torch.arange(first, min(first + step, extent.q_len), device=extent.device)
    b, h = (torch.arange(n, device=extent.device) for n in lead)
    indices: dict[str, Any] = {"b": b.view(-1, 1, 1, 1), "h": h.view(-1, 1, 1), "q_idx": rows.view(-1, 1)}
    indices |= {"kv_idx": torch.arange(extent.kv_len, device=extent.device)}
    indices |= {"q_len": extent.q_len, "kv_len": extent.kv_len}
    keep = evaluate(facts.predicate, Env(indices, traced.tensors, traced.scalars))
    return torch.as_tensor(keep, device=extent.device).expand(*lead, len(rows), extent.kv_len).any(-1)
