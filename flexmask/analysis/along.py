"""What is found along one axis: the form of a mask, its necessary bounds, and what each atom keeps."""

from __future__ import annotations

from ..errors import NotInterval
from ..ir import FALSE, TRUE, Expr, make, show, simplify, substitute
from .atoms import EXACT, MAY, MUST, Solver
from .collect import Collector
from .cover import Cover
from .facts import MOST_PIECES, MOST_RUNS, Form, Piece
from .linear import ZERO, linear
from .pieces import Algebra, Axis, Run, Runs
from .prove import Prover, conjuncts
from .solved import both, breakpoints, either, flipped, tables_of
from .sweep import Sweep

# what matters of a mask that is not solved is looked at more closely if it has so few bounds, in so many steps of proof
_MOST_COLLECTED = 3
_CLOSER = 40
_Solved = list[tuple[Expr, Expr]]  # solved, as written


class Along:
    """The analysis of one mask along one axis. `unsorted` names tables known not to ascend."""

    def __init__(self, axis: Axis, prover: Prover, unsorted: frozenset[int] = frozenset()):
        self.axis, self.prover = axis, prover
        self.solver = Solver(axis, prover, unsorted)
        self.without_tables = Solver(axis, prover, None)
        self.algebra = Algebra(axis, prover)
        self.collector = Collector(self.algebra)
        self.cover = Cover(axis, prover)
        self._bounds: dict[Expr, tuple[Piece, ...] | None] = {}
        self.closer = Collector(Algebra(axis, prover.again(_CLOSER)))

    # the form

    def form(self, predicate: Expr) -> Form | NotInterval:
        """The conjuncts that have a form intersected, the others left as residue."""
        solved: _Solved = []
        refused: list[tuple[NotInterval, Expr]] = []
        written = conjuncts(predicate) or [TRUE]
        for part in written:
            try:
                solved.append((self.solver.part(part, written, EXACT), part))
            except NotInterval as reason:
                refused.append((reason, part))
        whole = self._by_positions(predicate) if refused else None
        if whole is not None:
            solved, refused = [(whole, predicate)], []
        pieces = self.pieces(both(e for e, _ in solved)) if solved else None
        if pieces is None or refused:
            refused += [(NotInterval("has too many bounds", show(part)), part) for _, part in solved if pieces is None]
            return self._partly(written, solved if pieces is not None else [], refused)
        return self._form(pieces, [e for e, _ in solved])

    def _partly(self, written: list[Expr], solved: _Solved, refused: list[tuple[NotInterval, Expr]]) -> Form | NotInterval:
        """What is solved and what the rest implies, where that rests on no further table, and the rest as residue."""
        exact = [e for e, _ in solved]
        tables = tables_of(both(exact))
        implied = [self.solver.part(part, written, MAY) for _, part in refused]
        implied = [e for e in implied if e is not TRUE and (not exact or tables_of(e) <= tables)]
        if not exact and not implied:
            return refused[0][0]
        whole, left_over = both([*exact, *implied]), {part for _, part in refused}
        pieces = self._all_pieces(whole)
        if pieces is None:  # then they are a bound only
            pieces, left_over = self._bound(whole), set(written)
        if pieces is None or (not exact and pieces == self._read(self.algebra.everything())):
            return refused[0][0]
        return self._form(pieces, [*exact, *implied], _residue(written, left_over))

    def _form(self, pieces: tuple[Piece, ...], rests_on: list[Expr], residue: Expr | None = None) -> Form:
        return Form(self.axis.name, pieces, residue, tuple(sorted(tables_of(both(rests_on)))))

    def pieces(self, p: Expr) -> tuple[Piece, ...] | None:
        """The pieces of a solved condition, or where they are too many the first ones of each row."""
        return self._all_pieces(p) or Sweep(p, self.axis, self.prover).first_pieces()

    def _all_pieces(self, p: Expr) -> tuple[Piece, ...] | None:
        """By the algebra where that takes few, else by the breakpoints; None where they are too many."""
        runs = self.collector.runs(p)
        if runs is not None and len(runs) <= MOST_PIECES:
            return self._read(runs)
        swept = Sweep(p, self.axis, self.prover).pieces(MOST_RUNS)
        return self._read(runs) if runs is not None and (swept is None or len(runs) <= len(swept)) else swept

    def _read(self, runs: Runs) -> tuple[Piece, ...]:
        ordered = sorted(runs, key=lambda run: run.start is not ZERO)  # a run from the very beginning reads best first
        return tuple(map(self.algebra.piece, ordered)) or (Piece(ZERO, ZERO),)

    # narrow places

    def _by_positions(self, predicate: Expr) -> Expr | None:
        """The predicate solved exactly, where what is not solved of it matters at a few positions only: it is tried at each of them."""
        may, must = (self.solver.solved(predicate, mode) for mode in (MAY, MUST))
        open_ = both((may, flipped(must, self.axis.index))) if may is not must else FALSE
        positions = self.cover.of(open_)
        if positions is None:
            few = must is not FALSE and breakpoints(open_, self.axis.index) <= _MOST_COLLECTED
            runs = self.closer.runs(open_) if few else None
            positions = None if runs is None else self.cover.of_runs(runs)
        if positions is None:
            return None
        return either((must, *(self._at(predicate, position) for position in positions)))

    def _at(self, predicate: Expr, position: Expr) -> Expr:
        """The one position, if the predicate holds there."""
        index, after = self.axis.index, linear(position).shifted(1).expr()
        holds = simplify(substitute(predicate, {index: self.solver.within(position)}))
        return both((make("le", (position, index)), make("lt", (index, after)), holds))

    # bounds

    def bounds(self, predicate: Expr) -> tuple[Form, ...]:
        """What is kept lies within each of these, given its tables: a form for each set of tables that occurs."""
        groups: dict[frozenset[int], list[Expr]] = {}
        written = conjuncts(predicate)
        for part in written:
            implied = self.solver.part(part, written, MAY)
            groups.setdefault(tables_of(implied), []).append(implied)
            if tables_of(implied):
                groups.setdefault(frozenset(), []).append(self.without_tables.part(part, written, MAY))
        found = []
        for tables in sorted(groups, key=sorted):
            pieces = self._bound(both(groups[tables]))
            if pieces is not None:
                found.append(Form(self.axis.name, pieces, None, tuple(sorted(tables))))
        return tuple(found)

    def _bound(self, p: Expr) -> tuple[Piece, ...] | None:
        """The pieces of a necessary condition, at worst the hull of them; None where that says nothing."""
        if p not in self._bounds:
            runs = self.collector.runs(p)
            hull = None if runs is not None else Sweep(p, self.axis, self.prover).hull()
            pieces = self._read(runs) if runs is not None else None if hull is None else (hull,)
            self._bounds[p] = None if pieces == self._read(self.algebra.everything()) else pieces
        return self._bounds[p]

    # words

    def said(self, atom: Expr) -> str:
        """In words, what the atom keeps along the axis."""
        try:
            found = self.solver.solved(atom)
        except NotInterval as reason:
            return str(reason)
        runs = self.collector.runs(found)
        text = "many pieces" if runs is None else " | ".join(map(self._run_text, runs)) or "nothing"
        given = ", ".join(f"t{n}" for n in sorted(tables_of(found)))
        return f"{text}, given that {given} ascends" if given else text

    def _run_text(self, run: Run) -> str:
        whole = run.start is ZERO and run.stop is self.axis.length
        if whole and run.guards:
            return f"all where {' & '.join(map(show, run.guards))}"
        return "all" if whole else str(self.algebra.piece(run))


def _residue(written: list[Expr], left_over: set[Expr]) -> Expr | None:
    """The left-over conjuncts, in the order they were written."""
    residue = None
    for part in written:
        if part in left_over:
            residue = part if residue is None else make("and", (residue, part))
    return residue
