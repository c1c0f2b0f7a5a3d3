"""From an operation as Python or torch writes it to an expression: which kinds it takes, and the casts that make them fit."""

from __future__ import annotations

from collections.abc import Callable

from ..ir import BOOL, FALSE, FLOAT, INT, Expr, const, make

_PROMOTING = {"add", "sub", "mul", "floordiv", "mod", "min", "max", "truediv"}
_FLOAT_FUNCTIONS = {"exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "erf"}
_ROUNDING = {"floor", "ceil", "trunc", "round"}
# torch computes with two bools like this
_OF_BOOLS = {"add": "or", "mul": "and", "min": "and", "max": "or"}
_ON_BOOLS = {"&": "and", "|": "or", "^": "xor", "~": "not"}
_ON_INTS = {"&": "bitand", "|": "bitor", "^": "bitxor", "~": "invert"}
_MOST_MULTIPLIED = 8  # x ** n is written as multiplications up to here


class Misfit(Exception):
    """Kinds that do not fit; `message` has a {0} for the text of each of `parts`, which the recorder writes with the user's names."""

    def __init__(self, message: str, *parts: Expr):
        super().__init__(message)
        self.message, self.parts = message, parts


def combine(op: str, *args: Expr) -> Expr:
    """`op(*args)` as an expression. Besides ir's operations it takes & | ^ ~ (bools or integers), logical_*, bits_* and pos.

    Raises Misfit for kinds that do not fit.
    """
    for names, rule in _RULES:
        if op in names:
            return rule(op, *args)
    raise AssertionError(op)


def cast(expr: Expr, dtype: str) -> Expr:
    """`expr` as `dtype`; nothing is written where that changes nothing."""
    if (dtype, expr.kind) in (("bool", BOOL), ("int64", INT)) or (dtype == "float32" and expr.op == "index" and expr.kind == FLOAT):
        return expr
    return make("cast", (expr,), dtype)


def as_float(expr: Expr) -> Expr:
    return expr if expr.kind == FLOAT else cast(expr, "float32")


def _number(expr: Expr) -> Expr:
    return cast(expr, "int64") if expr.kind == BOOL else expr


def _numbers(args: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Bools among numbers count as 0 and 1."""
    to = "float32" if any(a.kind == FLOAT for a in args) else "int64"
    return tuple(cast(a, to) if a.kind == BOOL else a for a in args)


def _promoting(op: str, *args: Expr) -> Expr:
    if all(a.kind == BOOL for a in args):
        if op in _OF_BOOLS:
            return make(_OF_BOOLS[op], args)
        if op == "sub":
            raise Misfit("`-` of two conditions has no meaning. Write `a & ~b` or `a ^ b`, or subtract `a.int() - b.int()`.")
    return make(op, _numbers(args))


def _power(op: str, base: Expr, exponent: Expr) -> Expr:
    base, exponent = _number(base), _number(exponent)
    if exponent.op == "const" and exponent.kind == INT:
        return _integer_power(base, exponent.value)
    if exponent.op == "const" and exponent.value == 0.5:
        return make("sqrt", (as_float(base),))
    if base.op == "const" and base.value == 2 and FLOAT in (base.kind, exponent.kind):
        return make("exp2", (as_float(exponent),))
    return make("pow", (base, exponent))


def _integer_power(base: Expr, exponent: int) -> Expr:
    if exponent < 0 and base.kind == INT:
        raise Misfit(f"an integer to the power {exponent} is not an integer. Write `{{0}}.float() ** {exponent}`.", base)
    if exponent < 0:
        return make("truediv", (const(1.0), _integer_power(base, -exponent)))
    if exponent > _MOST_MULTIPLIED:
        return make("pow", (base, const(exponent)))
    if exponent == 0:
        return const(1.0 if base.kind == FLOAT else 1)
    half = _integer_power(base, exponent // 2) if exponent > 1 else base
    if exponent == 1:
        return base
    squared = make("mul", (half, half))
    return make("mul", (squared, base)) if exponent % 2 else squared


def _bits(op: str, *args: Expr) -> Expr:
    kinds = {a.kind for a in args}
    if kinds == {BOOL}:
        return make(_ON_BOOLS[op], args)
    if kinds == {INT}:
        return make(_ON_INTS[op], args)
    if FLOAT in kinds:
        raise Misfit(f"`{op}` does not take floats; `{{0}}` is one. Compare it first.", next(a for a in args if a.kind == FLOAT))
    number = next(a for a in args if a.kind == INT)
    raise Misfit(
        f"`{op}` mixes a condition with the integer `{{0}}`. Write `({{0}} != 0)` if it is meant as a condition "
        f"(comparisons next to `{op}` need brackets), or `.int()` after the condition if bits are meant.",
        number,
    )


def _shift(op: str, x: Expr, amount: Expr) -> Expr:
    if FLOAT in (x.kind, amount.kind):
        raise Misfit(f"`{'<<' if op == 'lshift' else '>>'}` shifts integers only. Convert with `.long()`.")
    if amount.op == "const" and amount.value < 0:
        raise Misfit(f"a shift by {amount.value}: shift amounts are not negative.")
    return make(op, (_number(x), _number(amount)))


def _equality(op: str, x: Expr, y: Expr) -> Expr:
    if x.kind == y.kind == BOOL:
        differs = make("xor", (x, y))
        return differs if op == "ne" else make("not", (differs,))
    return make(op, _numbers((x, y)))


def _order(op: str, x: Expr, y: Expr) -> Expr:
    return make(op, (_number(x), _number(y)))


def _signed(op: str, x: Expr) -> Expr:
    if x.kind == BOOL:
        raise Misfit(f"`{op}` of the condition `{{0}}`. Write `~` to negate a condition, or `.int()` to count with it.", x)
    return x if op == "pos" else make(op, (x,))


def _float_function(op: str, x: Expr) -> Expr:
    return make(op, (as_float(x),))


def _rounding(op: str, x: Expr) -> Expr:
    return make(op, (x,)) if x.kind == FLOAT else _number(x)


def _special(op: str, x: Expr) -> Expr:
    return make(op, (x,)) if x.kind == FLOAT else FALSE


def _where(op: str, condition: Expr, x: Expr, y: Expr) -> Expr:
    if condition.kind != BOOL:
        raise Misfit("`where` needs a condition first; `{0}` is a number. Write `{0} != 0`.", condition)
    x, y = (x, y) if x.kind == y.kind else _numbers((x, y))
    return make("where", (condition, x, y))


def _logical(op: str, *args: Expr) -> Expr:
    truths = tuple(a if a.kind == BOOL else make("ne", (a, const(0))) for a in args)
    return make(op.removeprefix("logical_"), truths)


_RULES: list[tuple[set[str], Callable[..., Expr]]] = [
    ({"eq", "ne"}, _equality),
    ({"lt", "le"}, _order),
    ({"&", "|", "^", "~"}, _bits),
    (_PROMOTING, _promoting),
    ({"lshift", "rshift"}, _shift),
    ({"pow"}, _power),
    ({"neg", "abs", "sign", "pos"}, _signed),
    ({"where"}, _where),
    (_FLOAT_FUNCTIONS, _float_function),
    (_ROUNDING, _rounding),
    ({"isnan", "isinf"}, _special),
    ({"logical_and", "logical_or", "logical_xor", "logical_not"}, _logical),
]
