"""Which kernels a mask needs: how PARTIAL tiles are masked, and on what that depends."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from ..analysis import MOST_PIECES, Facts, Form
from ..frontend import Traced
from ..ir import SCORE, TRUE, Expr, K, Q, simplify, uses, walk
from ..lowering import is_gathered


@dataclass(frozen=True)
class Variant:
    """One way to mask, `why` in words. `map_form` "none" (every tile is full), "range" or "list"; PARTIAL tiles compare with `pieces`
    intervals a line (of the lines that cross the map's, if `crossed`), read their `bits`, or evaluate the predicate; `starts`: whether
    intervals may begin after the first place. `runs` "always", or for one of two kernels of which a flag on the device chooses: where
    intervals or bits "hold", or where they "fail".
    """

    map_form: str
    pieces: int
    starts: bool
    runs: str
    why: str
    bits: bool = False
    crossed: bool = False

    @property
    def evaluated(self) -> bool:
        """Whether PARTIAL tiles evaluate the predicate."""
        return self.map_form == "list" and not self.pieces and not self.bits


NO_MASK = Variant("none", 0, True, "always", "no mask: every tile is full")


def variants(facts: Facts | None, promised: Set[int] = frozenset(), axis: str = "row") -> tuple[Variant, ...]:
    """The kernels for a mask of which only the structure is known: one, or two where whether its intervals hold depends on values."""
    if facts is None or facts.predicate is TRUE:
        return (NO_MASK,)
    form = facts.rows if axis == "row" else facts.columns
    if not isinstance(form, Form):
        return _without_form(facts.predicate, f"partial tiles evaluate the predicate: {form.reason}")
    if form.residue is not None:
        return _without_form(facts.predicate, "partial tiles evaluate the predicate, a part of which is no interval; bounds limit the work")
    if not (set(form.sorted_tables) - promised) and form.certain:
        return (by_intervals(facts, axis, "always"),)
    return by_intervals(facts, axis, "hold"), _evaluated("fail", "partial tiles evaluate the predicate where the intervals do not hold")


def hopper_variants(facts: Facts | None, promised: Set[int] = frozenset(), axis: str = "row") -> tuple[Variant, ...]:
    """The same for the kernels of the Hopper template, which evaluate no predicate: after the intervals of the lines, if there are any, or
    else of the lines that cross them, come the bits of PARTIAL tiles. Only the last of several kernels, where even those have no room, is
    one that evaluates; each but the last "holds" where all before it fail."""
    plain = variants(facts, promised, axis)
    if facts is None or (plain[0].runs == "always" and not plain[0].evaluated):
        return plain
    crossed = _crossed(facts, promised, axis)
    if crossed is not None and crossed.runs == "always":
        return (crossed,)
    first = [plain[0]] if plain[0].pieces else [] if crossed is None else [crossed]
    bits = Variant("list", 0, True, "hold", "partial tiles read their bits from the map", bits=True)
    return (*first, bits, _evaluated("fail", "partial tiles evaluate the predicate where there are too many different patterns of bits"))


def _crossed(facts: Facts, promised: Set[int], axis: str) -> Variant | None:
    """The variant whose PARTIAL tiles compare with the one interval that each line of the other axis keeps; None where there is none."""
    form, across = (facts.columns, "key") if axis == "row" else (facts.rows, "query")
    if not isinstance(form, Form) or form.residue is not None or not form.certain or len(form.pieces) != 1:
        return None
    holds = bool(set(form.sorted_tables) - promised)
    why = f"partial tiles compare with the interval of each {across}" + (f", where {_condition(form)}" if holds else "")
    return Variant("list", 1, form.sides != "stop", "hold" if holds else "always", why, crossed=True)


# operations on (query, key) pairs in a mod's text, beyond which its values crowd the registers
MANY_PAIR_OPERATIONS = 16


def is_costly(*exprs: Expr) -> bool:
    """Whether expressions read a table at places that depend on both query and key, or compute very much for each pair."""
    pairs = [node for expr in exprs for node in walk(expr) if uses(node, Q) and uses(node, K)]
    return len(pairs) > MANY_PAIR_OPERATIONS or any(node.op == "load" for node in pairs)


def reads_by_score(*exprs: Expr) -> bool:
    """Whether expressions read a table at places computed from the score, which no load can be made for ahead of time."""
    return any(node.op == "load" and uses(node, SCORE) for expr in exprs for node in walk(expr))


def only_gathers(score: Traced | None) -> bool:
    """Whether what makes a score mod costly are tables that it gathers entries of, each alone, which hold nothing for long."""
    if score is None or reads_by_score(score.expr):
        return False
    reads = [node for node in walk(simplify(score.expr)) if node.op == "load" and uses(node, Q) and uses(node, K)]
    return bool(reads) and all(is_gathered(node, str(score.tensors[node.value].dtype).removeprefix("torch.")) for node in reads)


def _without_form(predicate: Expr, why: str) -> tuple[Variant, ...]:
    if not is_costly(predicate):
        return (_evaluated("always", why),)
    return (
        Variant("list", 0, True, "hold", "partial tiles read their bits from the map, as the predicate is costly", bits=True),
        _evaluated("fail", f"{why}; where there are too many different patterns of bits"),
    )


def by_intervals(facts: Facts, axis: str, runs: str) -> Variant:
    """The kernel that compares with intervals. The form must be known and have no residue."""
    form, contiguous = (facts.rows, facts.rows_contiguous) if axis == "row" else (facts.columns, facts.columns_contiguous)
    assert isinstance(form, Form) and form.residue is None
    given = "" if runs == "always" else f", where {_condition(form)}"
    pieces, starts = min(len(form.pieces), MOST_PIECES), form.sides != "stop"
    if contiguous and len(form.pieces) == 1:
        return Variant("range", 1, starts, runs, f"each line keeps one run of blocks; partial tiles compare with intervals{given}")
    return Variant("list", pieces, starts, runs, f"partial tiles compare with intervals{given}")


def by_predicate(runs: str = "always") -> Variant:
    """The kernel that evaluates the predicate in partial tiles."""
    return _evaluated(runs, "partial tiles evaluate the predicate")


def _evaluated(runs: str, why: str) -> Variant:
    return Variant("list", 0, True, runs, why)


def _condition(form: Form) -> str:
    """What must hold, in words."""
    tables = " and ".join(f"t{n}" for n in form.sorted_tables)
    parts = [f"{tables} ascend{'s' * (len(form.sorted_tables) == 1)}"] if tables else []
    parts += [f"no {form.axis} keeps more than {MOST_PIECES} pieces"] * (not form.certain)
    return " and ".join(parts)
