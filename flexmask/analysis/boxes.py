"""The tile test as an expression: does a mask keep nothing, everything, or something unknown of a box of positions?

The mask's predicate is turned into two predicates about a tile, `some` and `every`, which read the least and greatest values of a few
*terms* in the tile's block row and block column. Both are proofs: what they cannot tell stays unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ir import BOOL, FALSE, FLOAT, INT, TRUE, Expr, K, Q, const, load, make, show, simplify, substitute, walk
from .box_floats import FLOAT_RULES, cast_float, compare_floats, from_integers, to_integers, widened
from .box_spans import INTEGER_RULES, LIMIT, WILD, Span, Truth, absolute, choose, compare, conditions, point, provided, total
from .box_terms import UNSTEADY, Terms, steady
from .linear import ZERO, Linear, linear, order
from .prove import negation
from .ranges import index_range

_COMPARISONS = ("lt", "le", "eq", "ne")
_INDICES = dict.fromkeys(("b", "h", "q_idx", "kv_idx", "q_len", "kv_len"), (0, 2**31 - 1))
# a sum of more parts than this is not followed
_MOST_PARTS = 31
# beyond any value that is compared, or as far as a bound may be moved
_FAR = 2**62
_NEITHER, _BOTH = frozenset[Expr](), frozenset((Q, K))


@dataclass(frozen=True)
class BoxTest:
    """What a mask keeps of a tile, as plain expressions.

    `some` is False only for tiles that keep nothing, `every` True only for tiles that keep all their places. Both are bool
    expressions over b, h, q_len, kv_len, scalars and loads, in which q_idx is the number of the block row and kv_idx the number of the
    block column. `rows` are terms over b, h, q_idx and the lengths, `columns` over kv_idx. Term number i of rows + columns has its
    minimum over the valid places of each block in tensor number `tensors + 2 * i`, its maximum in the next one, both of shape
    [B|1, H|1, blocks]: int64 (bools as 0 and 1), or float32 for float terms, where a block that holds a NaN has NaN in both.
    """

    some: Expr
    every: Expr
    rows: tuple[Expr, ...]
    columns: tuple[Expr, ...]

    @property
    def terms(self) -> tuple[Expr, ...]:
        return self.rows + self.columns

    def __str__(self) -> str:
        rows, columns = (", ".join(map(show, terms)) or "-" for terms in (self.rows, self.columns))
        return f"some: {show(self.some)}\nevery: {show(self.every)}\nrows: {rows}\ncolumns: {columns}"


def box_test(predicate: Expr, tensors: int) -> BoxTest:
    """The box test of a mask's simplified predicate that captures `tensors` tables.

    Exact for comparisons of sums whose parts depend on q_idx alone, on kv_idx alone, or on neither, whatever the parts compute; where
    they are mixed (products, remainders, tables of pairs), by interval rules. Every index into a table must be in range.

    >>> from flexmask.ir import K, Q
    >>> print(box_test(K <= Q, 0))
    some: t2[0, 0, kv_idx] <= t1[0, 0, q_idx]
    every: t3[0, 0, kv_idx] <= t0[0, 0, q_idx]
    rows: q_idx
    columns: kv_idx
    """
    found = _Derivation(tensors, predicate)
    truth = found.truth(predicate)
    rows, columns, (some, every) = found.terms.numbered(simplify(truth.some), simplify(truth.every))
    return BoxTest(some, every, rows, columns)


class _Derivation:
    """One predicate turned into a test. Truths, spans and axes of its parts are found once."""

    def __init__(self, tensors: int, predicate: Expr):
        self.terms = Terms(tensors)
        self._axes: dict[Expr, frozenset[Expr]] = {}
        self._truths: dict[Expr, Truth] = {}
        self._spans: dict[Expr, Span | None] = {}
        self._nodes = frozenset(walk(predicate))
        # numbers that no range can be told of
        self._scalars = (math.nan,) * (1 + max((n.value for n in self._nodes if n.op == "scalar"), default=0))

    def axes(self, e: Expr) -> frozenset[Expr]:
        """Which of q_idx and kv_idx `e` depends on."""
        if e not in self._axes:
            self._axes[e] = frozenset((e,)) if e in (Q, K) else _NEITHER.union(*map(self.axes, e.args))
        return self._axes[e]

    def truth(self, e: Expr) -> Truth:
        if e not in self._truths:
            self._truths[e] = self._truth(e)
        return self._truths[e]

    def span(self, e: Expr) -> Span | None:
        """Where the values of a number or bool lie; None where nothing is known."""
        if e not in self._spans:
            self._spans[e] = self._float(e) if e.kind == FLOAT else self._sum(linear(e))
        return self._spans[e]

    # bools

    def _truth(self, e: Expr) -> Truth:
        axes = self.axes(e)
        if not axes:
            return Truth(e, e)
        found = self._summarised(e) if len(axes) == 1 and not self._is_plain(e) else None
        if found is not None:
            return found
        if e.op in ("and", "or"):
            return self._joined(e)
        if e.op == "not":
            return self.truth(e.args[0]).negated()
        if e.op == "where":
            c, x, y = e.args
            return self.truth((c & x) | (~c & y))
        if e.op == "xor" or (e.op in ("eq", "ne") and e.args[0].kind == e.args[1].kind == BOOL):
            p, r = map(self.truth, e.args)
            differ = Truth((p.some & ~r.every) | (r.some & ~p.every), (p.every & ~r.some) | (r.every & ~p.some))
            return differ.negated() if e.op == "eq" else differ
        if e.op in _COMPARISONS:
            return self._compare(e.op, *e.args)
        return self._other_bool(e)

    def _summarised(self, e: Expr) -> Truth | None:
        """A bool of one axis as one term."""
        found = self._term(e)
        return None if found is None else Truth(make("ne", (found.hi, ZERO)), make("ne", (found.lo, ZERO)))

    def _is_plain(self, e: Expr) -> bool:
        """Whether `e`, of one axis, is made of half-lines of its index: these share the summaries of the index itself."""
        if e.op in ("and", "or", "not"):
            return all(self._is_plain(a) for a in e.args)
        if not self.axes(e):
            return True
        if e.op not in _COMPARISONS or FLOAT in (e.args[0].kind, e.args[1].kind):
            return False
        x = linear(e.args[0]) - linear(e.args[1])
        varying = [(m, c) for m, c in x.terms.items() if self.axes(m)]
        return len(varying) == 1 and varying[0][0] in (Q, K) and (abs(varying[0][1]) == 1 or e.op in ("lt", "le"))

    def _joined(self, e: Expr) -> Truth:
        """and, or: parts of one axis are joined before they are summarised, which is exact."""
        groups: dict[frozenset[Expr], list[Expr]] = {}
        for part in _flattened(e, e.op):
            groups.setdefault(self.axes(part), []).append(part)
        truths: list[Truth] = []
        for axes, parts in groups.items():
            alone = len(axes) != 1 or all(map(self._is_plain, parts))
            whole = None if alone else self._summarised(_chain(e.op, parts))
            truths += [whole] if whole is not None else map(self.truth, parts)
        some, every = [t.some for t in truths], [t.every for t in truths]
        if e.op == "and":
            some += self._together(groups)
        else:  # all is kept where nothing is of the negation
            negated = {axes: list(map(negation, parts)) for axes, parts in groups.items()}
            every += [make("not", (x,)) for x in self._together(negated)]
        return Truth(_chain(e.op, some), _chain(e.op, every))

    def _together(self, groups: Mapping[frozenset[Expr], list[Expr]]) -> list[Expr]:
        """For conditions that must hold together, by axes: what those on both axes come to in the places that meet the others."""
        met = (self._met(part, groups) for part in groups.get(_BOTH, ()))
        return [x for x in met if x is not None]

    def _met(self, e: Expr, groups: Mapping[frozenset[Expr], list[Expr]]) -> Expr | None:
        """Whether two table values may compare as `e` says in places that meet the other conditions on each axis; None: no such."""
        if e.op not in _COMPARISONS or not self._is_apart(*e.args) or FLOAT in (e.args[0].kind, e.args[1].kind):
            return None
        sides, limited = [], False
        for x, y in (e.args, e.args[::-1]):
            met = [p for p in groups.get(self.axes(x), ()) if not self._is_plain(p)]
            if e.op == "eq":  # what is said of one side holds for the other
                said = [substitute(p, {y: x}) for p in groups.get(self.axes(y), ())]
                met += [p for p in said if self.axes(p) == self.axes(x) and self._is_defined(p) and not self._is_plain(p)]
            limited = limited or bool(met)
            sides.append(self._term_where(met, x))
        return None if sides[0] is None or sides[1] is None or not limited else compare(e.op, *sides).some

    def _is_defined(self, e: Expr) -> bool:
        """Whether `e`, made of parts of the predicate, reads no table at another place than that does, and divides by nothing else."""
        new = (n for n in walk(e) if n not in self._nodes)
        return not any(n.op == "load" or (n.op in ("floordiv", "mod") and n.args[1].op != "const") for n in new)

    def _other_bool(self, e: Expr) -> Truth:
        if e.op == "cast":
            x = e.args[0]
            return self.truth(x) if x.kind == BOOL else self._compare("ne", x, const(0.0) if x.kind == FLOAT else ZERO)
        found = self._corners(e) if e.op == "load" else None
        return Truth(TRUE, FALSE) if found is None else provided(Truth(_chain("or", found[0]), _chain("and", found[0])), found[1])

    def _compare(self, op: str, x: Expr, y: Expr) -> Truth:
        if FLOAT in (x.kind, y.kind):
            return compare_floats(op, self._as_float(x), self._as_float(y))
        if self._is_apart(x, y):
            return compare(op, self._term(x), self._term(y))  # as it stands: there is no sum that could overflow
        return compare(op, *self._sides(linear(x) - linear(y)))

    def _is_apart(self, x: Expr, y: Expr) -> bool:
        """Whether each side depends on an axis of its own, and one of them reads a table along it."""
        if len(self.axes(x)) != 1 or len(self.axes(y)) != 1 or self.axes(x) == self.axes(y):
            return False
        return any(node.op == "load" and self.axes(node) for side in (x, y) for node in walk(side))

    # integers

    def _sides(self, x: Linear) -> tuple[Span | None, Span | None]:
        """Two spans whose difference is `x`. What depends on neither axis stands alone on one side, so that it may be huge."""
        fixed, parts = self._split(x)
        if not fixed:
            left, right = ({p: abs(c) for p, c in parts.items() if (c > 0) == positive} for positive in (True, False))
            return self._total(left, max(x.constant, 0)), self._total(right, max(-x.constant, 0))
        alone = Linear(fixed, x.constant)
        if _leading(fixed) < 0:
            return self._total(parts, 0), self._fixed(alone.scaled(-1))
        return self._fixed(alone), self._total({p: -c for p, c in parts.items()}, 0)

    def _sum(self, x: Linear) -> Span | None:
        """The span of a sum: what depends on one axis is one term, the rest varies independently."""
        fixed, parts = self._split(x)
        if not fixed:
            return self._total(parts, x.constant)
        found, alone = self._total(parts, 0), self._fixed(Linear(fixed, x.constant))
        return None if found is None else total([(found, 1), (alone, 1)], 0) if parts else alone

    def _split(self, x: Linear) -> tuple[dict[Expr, int], dict[Expr, int]]:
        """The monomials that depend on neither axis, and the others as parts: one for each axis, and each that depends on both."""
        groups: dict[object, dict[Expr, int]] = {}
        for m, c in x.terms.items():
            axes = self.axes(m)
            groups.setdefault(m if axes == _BOTH else axes, {})[m] = c
        fixed = groups.pop(_NEITHER, {})
        return fixed, dict(map(_part, groups.values()))

    def _total(self, parts: Mapping[Expr, int], constant: int) -> Span | None:
        if len(parts) > _MOST_PARTS:
            return None
        spans = [(self._term(p) if len(self.axes(p)) == 1 else self._monomial(p), c) for p, c in parts.items()]
        known = [(span, c) for span, c in spans if span is not None]
        if len(known) < len(spans):
            return None
        alone = not constant and list(parts.values()) == [1] and not linear(next(iter(parts))).terms.keys().isdisjoint(parts)
        return known[0][0] if alone else total(known, constant)

    def _fixed(self, x: Linear) -> Span:
        """A sum that depends on neither axis. Only where it adds up tables may it overflow; scalars are not that large."""
        e = x.expr()
        known = index_range(e, _INDICES, self._scalars)
        if known is not None:
            return point(e, known.lo, known.hi)
        if e in x.terms:
            return point(e)
        tables = [m for m in x.terms if any(n.op == "load" for n in walk(m))]
        return Span(e, e, given=conditions(point(m).within(-LIMIT, LIMIT) for m in tables))

    def _term(self, e: Expr) -> Span | None:
        """An expression of one axis, summarised; None for what two computations may round apart."""
        ends = self.terms.ends(e) if steady(e) else None
        known = None if e.kind == FLOAT else index_range(e, _INDICES, self._scalars)
        least, most = (-WILD, WILD) if known is None else (known.lo, known.hi)
        return None if ends is None else Span(*ends, least, most)

    def _term_where(self, met: list[Expr], e: Expr) -> Span | None:
        """The span of a term over just the places that meet some conditions: nowhere, it begins after its end."""
        if not met:
            return self._term(e)
        least, most = (self._term(make("where", (_chain("and", met), e, const(end)))) for end in (_FAR, -_FAR))
        return None if least is None or most is None else Span(least.lo, most.hi)

    def _monomial(self, m: Expr) -> Span | None:
        """An integer operation on both axes."""
        if m.op == "load":
            return self._table(m)
        if m.op == "where":
            return self._choice(m, self.span)
        if m.op == "cast":
            inner = self.span(m.args[0])
            return None if inner is None else to_integers(inner, m.value)
        if m.op == "max" and linear(m.args[0]) == linear(m.args[1]).scaled(-1):  # how abs is written
            inner = self.span(m.args[0])
            return None if inner is None else absolute(inner)
        return _ruled(m, INTEGER_RULES, self.span)

    def _choice(self, e: Expr, of: Callable[[Expr], Span | None]) -> Span | None:
        x, y = of(e.args[1]), of(e.args[2])
        return None if x is None or y is None else choose(self.truth(e.args[0]), x, y)

    # floats

    def _as_float(self, e: Expr) -> Span | None:
        found = self.span(e)
        return found if e.kind == FLOAT or found is None else from_integers(found)

    def _float(self, e: Expr) -> Span | None:
        if not self.axes(e):
            return point(e)
        if len(self.axes(e)) == 1 and all(map(steady, e.args)) and (steady(e) or e.op in UNSTEADY):
            ends = self.terms.ends(e)
            return None if ends is None else Span(*ends) if steady(e) else widened(Span(*ends))
        if e.op == "load":
            return self._table(e)
        if e.op == "where":
            return self._choice(e, self._as_float)
        if e.op == "cast":
            inner = self.span(e.args[0])
            return None if inner is None else (cast_float if e.args[0].kind == FLOAT else from_integers)(inner, e.value)
        return _ruled(e, FLOAT_RULES, self._as_float)

    # tables indexed by both axes

    def _table(self, e: Expr) -> Span | None:
        found = self._corners(e)
        return None if found is None else Span(_chain("min", found[0]), _chain("max", found[0]), given=found[1])

    def _corners(self, e: Expr) -> tuple[list[Expr], tuple[Expr, ...]] | None:
        """Given that each index takes at most two values in the tile, the entries at all their combinations."""
        places: list[tuple[Expr, ...]] = [()]
        given: list[Expr] = []
        for i in e.args:
            found = self._slow(i) if self.axes(i) else point(i)
            if found is None:
                return None
            ends = dict.fromkeys((found.lo, found.hi))
            places = [(*place, end) for place in places for end in ends]
            given += [found.hi - found.lo <= 1] if len(ends) == 2 else []
        return [load(e.value, e.kind, *place) for place in places], tuple(given)

    def _slow(self, i: Expr) -> Span | None:
        """An index that moves along one axis, but not in step with it."""
        if i.kind != INT or len(self.axes(i)) > 1 or any(m in (Q, K) for m in linear(i).terms):
            return None
        return self._term(i)


def _flattened(e: Expr, op: str) -> list[Expr]:
    return [part for a in e.args for part in _flattened(a, op)] if e.op == op else [e]


def _chain(op: str, parts: list[Expr]) -> Expr:
    result = parts[0]
    for part in parts[1:]:
        result = make(op, (result, part))
    return result


def _leading(terms: Mapping[Expr, int]) -> int:
    return min(terms.items(), key=lambda t: order(t[0]))[1]


def _part(terms: dict[Expr, int]) -> tuple[Expr, int]:
    """A sum as an expression and a coefficient, so that sums that are multiples of each other share the expression."""
    factor = math.gcd(*terms.values()) * (1 if _leading(terms) > 0 else -1)
    return Linear({m: c // factor for m, c in terms.items()}).expr(), factor


def _ruled(e: Expr, rules: Mapping[str, Callable[..., Span]], of: Callable[[Expr], Span | None]) -> Span | None:
    """By the operation's rule, if it has one and the arguments have spans."""
    rule = rules.get(e.op)
    spans = [of(a) for a in e.args] if rule else [None]
    return None if rule is None or None in spans else rule(*spans)
