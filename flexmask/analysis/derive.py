"""derive: from a mask's expression to its Facts."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import NotInterval
from ..ir import BOOL, FALSE, KV_LEN, Q_LEN, TRUE, B, Expr, H, show, simplify
from .along import Along
from .contiguity import contiguous
from .facts import AtomFact, Facts, Form
from .linear import leaves
from .nonempty import columns_nonempty, rows_nonempty
from .pieces import COLUMN, ROW, Axis
from .prove import Prover, negation

# steps of proof that a look for rows that keep nothing may take
_WITNESSED = 30


def derive(predicate: Expr, signs: tuple[int, ...] = (), unsorted: Iterable[int] = ()) -> Facts:
    """What can be proved about the mask `predicate`, a bool expression over b, h, q_idx, kv_idx, loads and scalars.

    `signs[i]` (-1, 0 or 1) is the sign of the run-time scalar number i, if it is an integer; proofs may use it. `unsorted` names
    captured tensors known not to ascend along their last axis: conditions that would need this become residue. Raises ValueError
    if `predicate` is not of kind bool. The forms are exact: brute force over all positions gives the same kept set.

    >>> from flexmask.ir import K, Q, scalar
    >>> print(derive((K <= Q) & (Q - K < scalar(0, "int")), signs=(1,)).rows)
    kept keys of row q_idx: [q_idx - s0 + 1, q_idx + 1)
    """
    if predicate.kind != BOOL:
        raise ValueError(f"a mask's predicate is bool, got {predicate.kind}: {show(predicate)}")
    predicate = _flattened(simplify(predicate))
    excluded = frozenset(unsorted)
    prover = Prover(signs)
    rows, columns = (Along(axis, prover.again(), excluded) for axis in (ROW, COLUMN))
    row_form, column_form = rows.form(predicate), columns.form(predicate)
    used = leaves(predicate)
    return Facts(
        predicate=predicate,
        rows=row_form,
        columns=column_form,
        uses_b=B in used,
        uses_h=H in used,
        rows_contiguous=_is_contiguous(row_form, predicate, ROW, prover.again()),
        columns_contiguous=_is_contiguous(column_form, predicate, COLUMN, prover.again()),
        atoms=tuple(AtomFact(atom, rows.said(atom), columns.said(atom)) for atom in _atoms(predicate)),
        row_bounds=rows.bounds(predicate),
        column_bounds=columns.bounds(predicate),
        rows_nonempty=rows_nonempty(predicate, prover.again(_WITNESSED)),
        columns_nonempty=columns_nonempty(predicate, prover.again(_WITNESSED)),
        uses_lengths=Q_LEN in used or KV_LEN in used,
    )


def _flattened(p: Expr) -> Expr:
    """`p` with a `not` over and/or pushed inwards, so that its conjuncts stand at the top."""
    while p.op == "not" and p.args[0].op in ("and", "or"):
        p = negation(p.args[0])
    return p


def _is_contiguous(form: Form | NotInterval, predicate: Expr, axis: Axis, prover: Prover) -> bool:
    return isinstance(form, Form) and contiguous(form, predicate, axis, prover)


def _atoms(p: Expr) -> list[Expr]:
    """The leaves of the bool structure, left to right, each once."""
    if p.op in ("and", "or", "xor", "not") or (p.op == "where" and p.kind == BOOL):
        return list(dict.fromkeys(atom for a in p.args for atom in _atoms(a)))
    return [] if p in (TRUE, FALSE) else [p]
