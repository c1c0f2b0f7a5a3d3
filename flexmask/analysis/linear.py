"""Linear normal form of integer expressions: a sum of integer multiples of monomials, plus a constant.

A monomial is any integer expression that is not itself a sum: an index, a scalar, a load, `x // d`, `max(x, y)`, a product.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

from ..ir import BOOL, INT, Expr, const, make

ZERO = const(0)
ONE = const(1)
# products of two sums are multiplied out up to this many terms
_MOST_TERMS = 16
# sorting keys longer than this are replaced by a digest
_LONGEST_KEY = 200
_RANK = {"q_idx": 0, "kv_idx": 1, "b": 2, "h": 3, "q_len": 4, "kv_len": 5}


@dataclass(frozen=True)
class Linear:
    """`sum(c * m) + constant`; no coefficient is 0. Equal sums compare equal."""

    terms: dict[Expr, int] = field(default_factory=dict)
    constant: int = 0

    def __add__(self, other: Linear) -> Linear:
        return self.plus(other, 1)

    def __sub__(self, other: Linear) -> Linear:
        return self.plus(other, -1)

    def plus(self, other: Linear, times: int) -> Linear:
        """`self + times * other`."""
        terms = dict(self.terms)
        for m, c in other.terms.items():
            total = terms.get(m, 0) + times * c
            if total:
                terms[m] = total
            else:
                terms.pop(m, None)
        return Linear(terms, self.constant + times * other.constant)

    def shifted(self, by: int) -> Linear:
        return Linear(self.terms, self.constant + by)

    def scaled(self, by: int) -> Linear:
        return Linear({m: c * by for m, c in self.terms.items()}, self.constant * by) if by else Linear()

    def without(self, monomial: Expr) -> Linear:
        return Linear({m: c for m, c in self.terms.items() if m is not monomial}, self.constant)

    def expr(self) -> Expr:
        """The sum as an expression: positive terms first, indices before captures, so that equal sums read alike."""
        ordered = sorted(self.terms.items(), key=lambda t: (t[1] < 0, order(t[0])))
        positive = [_times(m, c) for m, c in ordered if c > 0]
        negative = [_times(m, -c) for m, c in ordered if c < 0]
        rest = self.constant
        if positive:
            total = positive[0]
        elif negative and rest <= 0:
            total = -negative.pop(0)
        else:
            total, rest = const(rest), 0
        for term in positive[1:]:
            total = total + term
        for term in negative:
            total = total - term
        return total + rest if rest > 0 else total - (-rest) if rest < 0 else total


def _times(monomial: Expr, coefficient: int) -> Expr:
    return monomial if coefficient == 1 else const(coefficient) * monomial


@lru_cache(maxsize=16384)
def leaves(e: Expr) -> frozenset[Expr]:
    """The indices and lengths that occur in `e`."""
    return frozenset((e,)) if e.op == "index" else frozenset().union(*map(leaves, e.args))


@lru_cache(maxsize=16384)
def order(e: Expr) -> tuple[int, str]:
    """A sorting key that does not depend on where objects lie in memory."""
    rank = _RANK.get(e.value, 9) if e.op == "index" else 6 if e.op == "scalar" else 10
    text = f"{e.op}{'' if e.value is None else e.value}({','.join(order(a)[1] for a in e.args)})"
    return rank, text if len(text) <= _LONGEST_KEY else hashlib.sha1(text.encode()).hexdigest()


def single(monomial: Expr, coefficient: int = 1) -> Linear:
    return Linear({monomial: coefficient})


def normal(e: Expr) -> Expr:
    """`e`, an integer expression, written in normal form."""
    return linear(e).expr()


@lru_cache(maxsize=8192)
def linear(e: Expr) -> Linear:
    """The linear normal form of an integer (or bool, as 0 and 1) expression."""
    if e.op == "const":
        return Linear({}, int(e.value))
    if e.kind == BOOL:
        return single(make("where", (e, ONE, ZERO)))
    if e.op in _RULES:
        return _RULES[e.op](e)
    return single(e)


def _product(e: Expr) -> Linear:
    x, y = linear(e.args[0]), linear(e.args[1])
    if not x.terms:
        return y.scaled(x.constant)
    if not y.terms:
        return x.scaled(y.constant)
    if len(x.terms) * len(y.terms) > _MOST_TERMS:
        return single(make("mul", (x.expr(), y.expr())))
    total = x.scaled(y.constant) + Linear(y.terms).scaled(x.constant)
    for m, c in x.terms.items():
        for n, d in y.terms.items():
            total = total.plus(single(make("mul", (m, n) if order(m) <= order(n) else (n, m))), c * d)
    return total


def _divided(e: Expr) -> Linear:
    x, d = linear(e.args[0]), linear(e.args[1])
    if d.terms or d.constant == 0:
        return single(make("floordiv", (x.expr(), d.expr())))
    return divide(x, d.constant)


def divide(x: Linear, d: int) -> Linear:
    """`x // d`, with the multiples of `d` taken out of the division."""
    if d < 0:
        x, d = x.scaled(-1), -d
    whole = Linear({m: c // d for m, c in x.terms.items() if c % d == 0}, x.constant // d)
    rest = Linear({m: c for m, c in x.terms.items() if c % d}, x.constant % d)
    if not rest.terms:
        return whole
    (m, c), *others = rest.terms.items()
    if not others and c == 1 and m.op == "floordiv" and _positive_constant(m.args[1]):
        inner = m.args[1].value  # (x // i + c) // d == (x + c * i) // (i * d)
        return whole + divide(linear(m.args[0]).shifted(rest.constant * inner), inner * d)
    return whole + single(make("floordiv", (rest.expr(), const(d))))


def _positive_constant(e: Expr) -> bool:
    return e.op == "const" and e.value > 0


def _remainder(e: Expr) -> Linear:
    x, d = linear(e.args[0]), linear(e.args[1])
    if d.terms or d.constant == 0:
        return single(make("mod", (x.expr(), d.expr())))
    if d.constant < 0:  # x % -d == -(-x % d)
        return _rest(x.scaled(-1), -d.constant).scaled(-1)
    return _rest(x, d.constant)


def _rest(x: Linear, d: int) -> Linear:
    """x % d for d > 0."""
    rest = Linear({m: c for m, c in x.terms.items() if c % d}, x.constant % d)
    return single(make("mod", (rest.expr(), const(d)))) if rest.terms else Linear({}, rest.constant)


def _shifted(e: Expr) -> Linear:
    x, n = linear(e.args[0]), linear(e.args[1])
    if n.terms or not 0 <= n.constant < 63:
        return single(e)
    return x.scaled(2**n.constant) if e.op == "lshift" else divide(x, 2**n.constant)


def _chosen(e: Expr) -> Linear:
    """min, max, abs and where: a monomial with its integer arguments in normal form."""
    args = tuple(normal(a) if a.kind == INT else a for a in e.args)
    if e.op in ("min", "max") and order(args[0]) > order(args[1]):
        args = args[::-1]
    if e.op == "abs" and args[0].op == "const":
        return Linear({}, abs(args[0].value))
    return linear(args[0]) if args[0] is args[-1] and e.op in ("min", "max") else single(make(e.op, args))


def _cast(e: Expr) -> Linear:
    return linear(e.args[0]) if e.args[0].kind != "float" else single(e)


_RULES = {
    "add": lambda e: linear(e.args[0]) + linear(e.args[1]),
    "sub": lambda e: linear(e.args[0]) - linear(e.args[1]),
    "neg": lambda e: linear(e.args[0]).scaled(-1),
    "invert": lambda e: linear(e.args[0]).scaled(-1).shifted(-1),
    "mul": _product,
    "floordiv": _divided,
    "mod": _remainder,
    "lshift": _shifted,
    "rshift": _shifted,
    "min": _chosen,
    "max": _chosen,
    "abs": _chosen,
    "where": _chosen,
    "cast": _cast,
}
