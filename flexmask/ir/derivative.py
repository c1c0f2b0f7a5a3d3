"""Derivatives of expressions, as expressions: one law an operation, applied from the leaves up, each node once.

A law is text that `parse` reads: on the left an operation of X and Y (and a condition P), on the right its change where X and Y change
by dX and dY; F is the value of the operation itself, so what the value needs is shared with its derivative. The laws choose the
subgradients that torch's autograd chooses for the operations of `ir.ops`: abs has slope 0 at 0, min and max share it where they tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from .expr import FALSE, TRUE, Expr, const, make, walk
from .ops import BOOL, FLOAT
from .printer import parse
from .simplify import simplify

ZERO, ONE = const(0.0), const(1.0)

DIFFERENTIALS = [
    ("X + Y", "dX + dY"),
    ("X - Y", "dX - dY"),
    ("X * Y", "Y * dX + X * dY"),
    ("X / Y", "(dX - F * dY) * (1.0 / Y)"),
    ("X % Y", "dX - (X // Y) * dY"),
    ("pow(X, Y)", "where(Y == 0.0, 0.0, Y * pow(X, Y - 1.0)) * dX + where(X == 0.0, 0.0, F * log(X)) * dY"),
    ("-X", "-dX"),
    ("abs(X)", "sign(X) * dX"),
    ("min(X, Y)", "where(Y < X, 0.0, where(X < Y, 1.0, 0.5)) * dX + where(X < Y, 0.0, where(Y < X, 1.0, 0.5)) * dY"),
    ("max(X, Y)", "where(X < Y, 0.0, where(Y < X, 1.0, 0.5)) * dX + where(Y < X, 0.0, where(X < Y, 1.0, 0.5)) * dY"),
    ("where(P, X, Y)", "where(P, dX, dY)"),
    ("exp(X)", "F * dX"),
    ("exp2(X)", f"{math.log(2)!r} * F * dX"),
    ("log(X)", "dX * (1.0 / X)"),
    ("log2(X)", f"{1 / math.log(2)!r} * (dX * (1.0 / X))"),
    ("sqrt(X)", "0.5 * (dX * (1.0 / F))"),
    ("rsqrt(X)", "-0.5 * (F * F * F) * dX"),
    ("sin(X)", "cos(X) * dX"),
    ("cos(X)", "-sin(X) * dX"),
    ("tanh(X)", "(1.0 - F * F) * dX"),
    ("sigmoid(X)", "F * (1.0 - F) * dX"),
    ("erf(X)", f"{2 / math.sqrt(math.pi)!r} * exp(-(X * X)) * dX"),
]
# piecewise constant: no gradient passes
FLAT = frozenset({"floordiv", "sign", "floor", "ceil", "trunc", "round"})

# how many choices deep a factor is moved inside, so that an infinite slope stays away from the branch that is not taken
_DEEPEST = 3


@lru_cache(maxsize=1024)
def derivative(expr: Expr, wrt: Expr) -> Expr:
    """d `expr` / d `wrt` as a simplified float expression; `wrt`, SCORE or a load of a float table, counts as an independent variable.

    Integers and bools, and so indices and conditions, pass no gradient; casts from float to float pass it whole. The result shares
    nodes with `expr` and has a number of further ones proportional to its own. Raises ValueError where `wrt` is no float.

    >>> from flexmask.ir import K, Q, SCORE, load, parse
    >>> derivative(parse("30.0 * tanh(score / 30.0)"), SCORE)
    1.0 - tanh(score / 30.0) * tanh(score / 30.0)
    >>> slope = load(0, "float", parse("h"))
    >>> derivative(parse("score + t0[h] * (kv_idx - q_idx)", ["float"]), slope)
    float32(kv_idx - q_idx)
    """
    if wrt.kind != FLOAT:
        raise ValueError(f"only floats have derivatives; `{wrt!r}` is of kind {wrt.kind}.")
    change: dict[Expr, Expr] = {}
    for node in walk(expr):
        change[node] = ONE if node is wrt else _change(node, [change[a] for a in node.args])
    return simplify(change[expr])


def float_loads(expr: Expr) -> tuple[Expr, ...]:
    """The distinct loads of float tables that `expr` depends on by a derivative that is not 0 everywhere, in the order of `walk`.

    >>> from flexmask.ir import parse
    >>> float_loads(parse("where(t0[q_idx] < 0.0, score * t1[h], score)", ["float", "float"]))
    (t1[h],)
    """
    loads = [node for node in walk(expr) if node.op == "load" and node.kind == FLOAT]
    return tuple(node for node in loads if derivative(expr, node) is not ZERO)


def _change(node: Expr, changes: list[Expr]) -> Expr:
    """The change of `node` for those of its arguments."""
    if node.kind != FLOAT or node.op in FLAT or node.op == "load" or all(c is ZERO for c in changes):
        return ZERO
    if node.op == "cast":
        return changes[0]
    names, steps, result = _laws()[node.op]
    values = {f"d{name}": c for name, c in zip(names, changes, strict=True)}
    values |= {name: a if a.kind == BOOL else _float(a) for name, a in zip(names, node.args, strict=True)}
    values["F"] = node
    made: dict[Expr, Expr] = {}
    for step in steps:
        made[step] = _step(step, made, values)
    return made[result]


def _step(step: Expr, made: dict[Expr, Expr], values: dict[str, Expr]) -> Expr:
    """One node of a law, its variables bound to `values`."""
    if step.op == "var":
        return values[step.value]
    if step.op == "const":
        return step
    args = tuple(made[a] for a in step.args)
    return _SHORT[step.op](*args) if step.op in _SHORT else make(step.op, args)


@lru_cache(maxsize=1)
def _laws() -> dict[str, tuple[list[str], list[Expr], Expr]]:
    """The table read once: of each operation the names of its arguments, the nodes of its law in order, and the last of them."""
    variables = {name: make("var", (), name, BOOL if name == "P" else FLOAT) for name in ("X", "Y", "P", "F", "dX", "dY")}
    table = {}
    for left, right in DIFFERENTIALS:
        pattern, result = (parse(text, variables=variables) for text in (left, right))
        table[pattern.op] = ([a.value for a in pattern.args], list(walk(result)), result)
    return table


def _float(expr: Expr) -> Expr:
    if expr.kind == FLOAT:
        return expr
    return const(float(expr.value)) if expr.op == "const" else make("cast", (expr,), "float32")


# Constructors that leave out what a law does not need. They take 0 * x for 0, whatever x is: what does not depend on a variable has no
# derivative, infinite or not.


def _add(x: Expr, y: Expr) -> Expr:
    if ZERO in (x, y):
        return y if x is ZERO else x
    if x is y:
        return _mul(const(2.0), x)
    return make("sub", (x, y.args[0])) if y.op == "neg" else make("add", (x, y))


def _sub(x: Expr, y: Expr) -> Expr:
    if y is ZERO:
        return x
    if x is ZERO:
        return _neg(y)
    if x.op == y.op == "const":
        return const(x.value - y.value)
    return make("add", (x, y.args[0])) if y.op == "neg" else make("sub", (x, y))


def _neg(x: Expr) -> Expr:
    if x.op == "const":
        return ZERO if x is ZERO else const(-x.value)
    return x.args[0] if x.op == "neg" else make("neg", (x,))


def _mul(x: Expr, y: Expr, depth: int = _DEEPEST) -> Expr:
    """The product. Constants stand first, reciprocals last, where they meet what cancels them; choices stand outside."""
    if ZERO in (x, y):
        return ZERO
    for one, other in ((x, y), (y, x)):
        if one.op == "const":
            return _scaled(one.value, other)
        if one.op == "neg":
            return _neg(_mul(one.args[0], other, depth))
        if one.op == "where" and ZERO in one.args and depth:
            condition, yes, no = one.args
            return _where(condition, _mul(yes, other, depth - 1), _mul(no, other, depth - 1))
        if _cancels(one, other):
            return ONE
        if other.op == "mul" and _cancels(one, other.args[1]):
            return other.args[0]
    return _arranged(x, y)


def _arranged(x: Expr, y: Expr) -> Expr:
    """The product of two factors that do not simplify: the constant or the reciprocal of one of them moves outside."""
    for one, other in ((x, y), (y, x)):
        if one.op == "mul" and one.args[0].op == "const":
            return make("mul", (one.args[0], make("mul", (one.args[1], other))))
        if one.op == "mul" and _is_reciprocal(one.args[1]) and not _is_reciprocal(other):
            return make("mul", (make("mul", (one.args[0], other)), one.args[1]))
    return make("mul", (y, x) if _is_reciprocal(x) else (x, y))


def _scaled(factor: float, x: Expr) -> Expr:
    if x.op == "const":
        return const(factor * x.value)
    if x.op == "neg":
        return _scaled(-factor, x.args[0])
    if x.op == "mul" and x.args[0].op == "const":
        factor, x = factor * x.args[0].value, x.args[1]
    if math.isclose(factor, 1.0, rel_tol=4e-16):  # 49 * (1 / 49) is not 1
        return x
    return make("neg", (x,)) if factor == -1.0 else make("mul", (const(factor), x))


def _is_reciprocal(x: Expr) -> bool:
    return x.op == "truediv" and x.args[0] is ONE


def _cancels(x: Expr, y: Expr) -> bool:
    return _is_reciprocal(y) and y.args[1] is x


def _truediv(x: Expr, y: Expr) -> Expr:
    return const(x.value / y.value) if x.op == y.op == "const" and y.value != 0.0 else make("truediv", (x, y))


def _pow(x: Expr, y: Expr) -> Expr:
    return x if y is ONE else ONE if y is ZERO else make("pow", (x, y))


def _eq(x: Expr, y: Expr) -> Expr:
    return const(x.value == y.value) if x.op == y.op == "const" else make("eq", (x, y))


def _log(x: Expr) -> Expr:
    return const(math.log(x.value)) if x.op == "const" and 0.0 < x.value < math.inf else make("log", (x,))


def _where(condition: Expr, x: Expr, y: Expr) -> Expr:
    if condition is TRUE or x is y:
        return x
    return y if condition is FALSE else make("where", (condition, x, y))


_SHORT: dict[str, Callable[..., Expr]] = {
    "add": _add, "sub": _sub, "neg": _neg, "mul": _mul, "truediv": _truediv, "pow": _pow, "eq": _eq, "log": _log, "where": _where,
}  # fmt: skip
