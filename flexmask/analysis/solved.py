"""Solved conditions: and, or, xor, not and where over `bound <= index`, `index < bound` and conditions free of the index."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, reduce

from ..ir import FALSE, INT, TRUE, Expr, make, simplify, walk
from .linear import Linear, divide
from .prove import negation


def both(parts: Iterable[Expr]) -> Expr:
    return reduce(_and, parts, TRUE)


def either(parts: Iterable[Expr]) -> Expr:
    return reduce(_or, parts, FALSE)


def _and(p: Expr, r: Expr) -> Expr:
    if p is FALSE or r is FALSE or opposite(p, r):
        return FALSE
    return r if p is TRUE else p if r is TRUE or r is p else make("and", (p, r))


def _or(p: Expr, r: Expr) -> Expr:
    if p is TRUE or r is TRUE or opposite(p, r):
        return TRUE
    return r if p is FALSE else p if r is FALSE or r is p else make("or", (p, r))


def opposite(p: Expr, r: Expr) -> bool:
    """Whether one is the other's negation, as far as a glance tells."""
    if {p.op, r.op} == {"lt", "le"} and p.args[0].kind == p.args[1].kind == INT:
        return p.args == r.args[::-1]
    return (p.op == "not" and p.args[0] is r) or (r.op == "not" and r.args[0] is p)


def is_since(p: Expr, index: Expr) -> bool:
    return p.op == "le" and p.args[1] is index


def is_until(p: Expr, index: Expr) -> bool:
    return p.op == "lt" and p.args[0] is index


@lru_cache(maxsize=8192)
def normal(p: Expr, index: Expr) -> Expr:
    """A solved condition in and/or over its leaves only."""
    if p.op == "xor":
        x, y = (normal(a, index) for a in p.args)
        return either((both((x, flipped(y, index))), both((flipped(x, index), y))))
    if p.op == "where":
        c, x, y = (normal(a, index) for a in p.args)
        return either((both((c, x)), both((flipped(c, index), y))))
    if p.op in ("and", "or"):
        return (both if p.op == "and" else either)(normal(a, index) for a in p.args)
    return p


@lru_cache(maxsize=8192)
def flipped(p: Expr, index: Expr) -> Expr:
    """The complement of a solved condition, solved too."""
    if p.op in ("and", "or"):
        return (either if p.op == "and" else both)(flipped(a, index) for a in p.args)
    if p.op in ("xor", "where"):
        return flipped(normal(p, index), index)
    if is_since(p, index):
        return make("lt", (index, p.args[0]))
    if is_until(p, index):
        return make("le", (p.args[1], index))
    return negation(p)


def breakpoints(p: Expr, index: Expr) -> int:
    """How many different bounds on the index there are in a solved condition."""
    return sum(is_since(node, index) or is_until(node, index) for node in walk(p))


@lru_cache(maxsize=8192)
def tables_of(p: Expr) -> frozenset[int]:
    """The tables that `p` searches, which have to ascend."""
    return frozenset(node.value[0] for node in walk(p) if node.op == "search")


def condition(x: Linear) -> Expr:
    """`x >= 0` as a comparison without minus signs."""
    low = Linear({m: -c for m, c in x.terms.items() if c < 0}, max(-x.constant, 0))
    high = Linear({m: c for m, c in x.terms.items() if c > 0}, max(x.constant, 0))
    if low.constant == 1 and low.terms:
        return simplify(low.shifted(-1).expr() < high.expr())
    return simplify(low.expr() <= high.expr())


def ceiling(x: Linear, d: int) -> Linear:
    """ceil(x / d) for d > 0."""
    return divide(x, d) if d == 1 else divide(x.shifted(d - 1), d)
