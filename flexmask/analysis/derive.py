"""derive: from a mask's expression to its Facts."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import NotInterval
from ..ir import BOOL, FALSE, TRUE, B, Expr, H, make, show, simplify, uses
from .atoms import Solved, Solver
from .contiguity import contiguous
from .facts import MOST_PIECES, AtomFact, Facts, Form, Piece
from .linear import ZERO
from .pieces import COLUMN, ROW, Algebra, Axis, Run
from .prove import Prover, conjuncts, negation


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
    rows, columns = (Solver(Algebra(axis, Prover(signs)), excluded) for axis in (ROW, COLUMN))
    row_form, column_form = _form(predicate, rows), _form(predicate, columns)
    return Facts(
        predicate=predicate,
        rows=row_form,
        columns=column_form,
        uses_b=uses(predicate, B),
        uses_h=uses(predicate, H),
        rows_contiguous=_is_contiguous(row_form, predicate, ROW, Prover(signs)),
        columns_contiguous=_is_contiguous(column_form, predicate, COLUMN, Prover(signs)),
        atoms=tuple(AtomFact(atom, _said(atom, rows), _said(atom, columns)) for atom in _atoms(predicate)),
    )


def _flattened(p: Expr) -> Expr:
    """`p` with a `not` over and/or pushed inwards, so that its conjuncts stand at the top."""
    while p.op == "not" and p.args[0].op in ("and", "or"):
        p = negation(p.args[0])
    return p


def _is_contiguous(form: Form | NotInterval, predicate: Expr, axis: Axis, prover: Prover) -> bool:
    return isinstance(form, Form) and contiguous(form, predicate, axis, prover)


def _form(predicate: Expr, solver: Solver) -> Form | NotInterval:
    """The form along the solver's axis: the conjuncts that have one intersected, the others left as residue."""
    solved: list[tuple[Solved, Expr]] = []
    refused: list[tuple[NotInterval, Expr]] = []
    for part in conjuncts(predicate) or [TRUE]:
        try:
            solved.append((solver.solve(part), part))
        except NotInterval as reason:
            refused.append((reason, part))
    best, tables = None, frozenset[int]()
    for found, part in sorted(solved, key=lambda s: len(s[0].runs)):
        runs = found.runs if best is None else solver.algebra.intersect(best, found.runs)
        if len(runs) > MOST_PIECES:
            refused.append((NotInterval(f"needs {len(runs)} pieces, and at most {MOST_PIECES} are kept", show(part)), part))
        else:
            best, tables = runs, tables | found.tables
    if best is None:
        return refused[0][0]
    ordered = sorted(best, key=lambda run: run.start is not ZERO)  # a run from the very beginning reads best first
    pieces = tuple(map(solver.algebra.piece, ordered)) or (Piece(ZERO, ZERO),)
    left_over = {part for _, part in refused}
    return Form(solver.axis.name, pieces, _residue(predicate, left_over), tuple(sorted(tables)))


def _residue(predicate: Expr, left_over: set[Expr]) -> Expr | None:
    """The left-over conjuncts, in the order they were written."""
    residue = None
    for part in conjuncts(predicate):
        if part in left_over:
            residue = part if residue is None else make("and", (residue, part))
    return residue


def _atoms(p: Expr) -> list[Expr]:
    """The leaves of the bool structure, left to right, each once."""
    if p.op in ("and", "or", "xor", "not") or (p.op == "where" and p.kind == BOOL):
        return list(dict.fromkeys(atom for a in p.args for atom in _atoms(a)))
    return [] if p in (TRUE, FALSE) else [p]


def _said(atom: Expr, solver: Solver) -> str:
    """In words, what the atom keeps along the axis."""
    try:
        found = solver.solve(atom)
    except NotInterval as reason:
        return str(reason)
    text = " | ".join(_run_text(r, solver) for r in found.runs) or "nothing"
    given = ", ".join(f"t{n}" for n in sorted(found.tables))
    return f"{text}, given that {given} ascends" if given else text


def _run_text(run: Run, solver: Solver) -> str:
    whole = run.start is ZERO and run.stop is solver.algebra.end
    if whole and run.guards:
        return f"all where {' & '.join(map(show, run.guards))}"
    return "all" if whole else str(solver.algebra.piece(run))
