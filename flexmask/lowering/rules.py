"""What each operation of the IR is in Triton: text, machine type, and where a cast or a helper function is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ir import FLOAT, INT, SCORE, Expr, uses
from .ranges import INT32, Range, fits

# bounds of integer nodes; None for floats
Ranges = Mapping[Expr, Range | None]


@dataclass(frozen=True)
class Value:
    """Text of a node, its machine type ("int1", "int32", "int64", "float32"), and whether it is a literal or needs no brackets."""

    text: str
    type: str
    literal: bool = False
    atom: bool = True

    @property
    def operand(self) -> str:
        return self.text if self.atom else f"({self.text})"


def literal_value(node: Expr) -> Value:
    x = node.value
    if node.kind == FLOAT:
        if math.isnan(x) or abs(x) > 3.4028235677973366e38:  # beyond the last number that rounds to a finite float32
            return Value(f'float("{"nan" if math.isnan(x) else "inf" if x > 0 else "-inf"}")', "float32", literal=True)
        return Value(repr(x), "float32", literal=True, atom=x >= 0)
    if node.kind == INT:
        return Value(repr(x), "int32" if fits((x, x), INT32) else "int64", literal=True, atom=x >= 0)
    return Value(repr(x), "int1", literal=True)


def loose(value: Value) -> Value:
    """A literal that stands where a tensor's method is called."""
    return Value(f"tl.full((), {value.text}, tl.{value.type})", value.type) if value.literal else value


def wide_value(place: Value) -> str:
    return f"tl.full((), {place.text}, tl.int64)" if place.literal else convert(place, "int64").operand


def convert(value: Value, wanted: str) -> Value:
    if value.type == wanted:
        return value
    if value.literal:
        number = float(value.text) if wanted == "float32" and value.type != "int1" else {"True": 1, "False": 0}.get(value.text, value.text)
        if wanted == "float32":
            return Value(repr(float(number)), wanted, literal=True, atom=float(number) >= 0)
        return Value(str(number), wanted, literal=True, atom=not str(number).startswith("-"))
    if wanted == "int1":
        return Value(f"{value.operand} != 0", wanted, atom=False)
    return Value(f"{value.operand}.to(tl.{wanted})", wanted)


def number_value(value: Value) -> Value:
    """Bools as integers, where arithmetic needs numbers."""
    return convert(value, "int32") if value.type == "int1" else value


def cast_value(x: Value, name: str) -> Value:
    if name == "bool":
        return convert(x, "int1")
    if name == "bfloat16":
        return Value(f"round_bfloat16({convert(loose(number_value(x)), 'float32').text})", "float32")
    if name == "float16":
        return Value(f"{convert(loose(number_value(x)), 'float32').operand}.to(tl.float16).to(tl.float32)", "float32")
    wanted = {"float32": "float32", "float64": "float32"}.get(name, name)
    if wanted == "int64" and x.type in ("int32", "int1"):
        return number_value(x)  # widened later, where a range shows the need
    return convert(loose(x) if x.literal and x.type != wanted else x, wanted)


Rule = Callable[[Expr, list[Value], Ranges], Value]


def _common(node: Expr, args: list[Value], ranges: Ranges) -> list[Value]:
    """Numeric arguments in the type that the result is computed in: float32, else int64 where int32 could overflow."""
    args = [number_value(a) for a in args]
    if node.kind == FLOAT or any(a.type == "float32" for a in args):
        return [convert(a, "float32") for a in args]
    if any(a.literal and a.type == "int64" for a in args):
        return [convert(a, "int64") for a in args]  # Triton refuses a literal that does not fit the other operand
    known = ranges[node]
    if node.kind != "bool" and known is not None and not fits(known, INT32) and all(a.type == "int32" for a in args):
        at = next(i for i, a in enumerate(args) if not a.literal)  # one wide operand makes the operation wide
        args[at] = convert(args[at], "int64")
    return args


def _type_of(args: list[Value]) -> str:
    types = {a.type for a in args}
    return "float32" if "float32" in types else "int64" if "int64" in types else "int32"


def _infix(symbol: str, result: str | None = None) -> Rule:
    def rule(node: Expr, args: list[Value], ranges: Ranges) -> Value:
        args = _common(node, args, ranges)
        return Value(f" {symbol} ".join(a.operand for a in args), result or _type_of(args), atom=False)

    return rule


def _logic(symbol: str) -> Rule:
    def rule(node: Expr, args: list[Value], ranges: Ranges) -> Value:
        args = [convert(a, "int1") for a in args]
        if any(a.literal for a in args):
            args = [loose(a) for a in args]
        return Value(f" {symbol} ".join(a.operand for a in args), "int1", atom=False)

    return rule


def _call(function: str) -> Rule:
    """A function of float32 numbers."""

    def rule(node: Expr, args: list[Value], ranges: Ranges) -> Value:
        args = [convert(a, "float32") for a in map(number_value, args)]
        return Value(f"{function}({', '.join(a.text for a in args)})", "float32")

    return rule


def _divide(infix: str, helper: str, float_helper: str) -> Rule:
    def rule(node: Expr, args: list[Value], ranges: Ranges) -> Value:
        args = _common(node, args, ranges)
        if node.kind == FLOAT:
            return Value(f"{float_helper}({', '.join(loose(a).text for a in args)})", "float32")
        first, second = (ranges[a] for a in node.args)
        if first is not None and second is not None and first[0] >= 0 and second[0] > 0:
            return Value(f"{args[0].operand} {infix} {args[1].operand}", _type_of(args), atom=False)
        return Value(f"{helper}({args[0].text}, {args[1].text})", _type_of(args))

    return rule


def _true_divide(node: Expr, args: list[Value], ranges: Ranges) -> Value:
    """Rounded to nearest, as a quotient of integers may be compared or floored; scores are not, and `/` is much faster."""
    args = [convert(number_value(a), "float32") for a in args]
    if uses(node, SCORE):
        return Value(f"{args[0].operand} / {args[1].operand}", "float32", atom=False)
    return Value(f"tl.div_rn({args[0].text}, {args[1].text})", "float32")


def _extreme(function: str) -> Rule:
    def rule(node: Expr, args: list[Value], ranges: Ranges) -> Value:
        args = _common(node, args, ranges)
        nan = ", propagate_nan=tl.PropagateNan.ALL" if node.kind == FLOAT else ""
        return Value(f"{function}({args[0].text}, {args[1].text}{nan})", _type_of(args))

    return rule


def _power(node: Expr, args: list[Value], ranges: Ranges) -> Value:
    exponent = node.args[1]
    base = number_value(args[0])
    if exponent.op == "const" and exponent.value in (1, 2, 3, 4) and not base.literal and base.atom:
        wide = "float32" if node.kind == FLOAT else "int64"
        base = convert(base, wide)
        return Value(" * ".join([base.operand] * int(exponent.value)), wide, atom=False)
    if node.kind == FLOAT:
        return Value(f"float_pow({', '.join(loose(convert(number_value(a), 'float32')).text for a in args)})", "float32")
    return Value(f"int_pow({', '.join(loose(number_value(a)).text for a in args)})", "int64")


def _shift(symbol: str) -> Rule:
    def rule(node: Expr, args: list[Value], ranges: Ranges) -> Value:
        value, count = (convert(loose(number_value(a)), "int64") for a in args)
        return Value(f"{value.operand} {symbol} {count.operand}", "int64", atom=False)

    return rule


def _where(node: Expr, args: list[Value], ranges: Ranges) -> Value:
    condition = loose(convert(args[0], "int1"))
    if node.kind == "bool":
        choices = [loose(convert(a, "int1")) for a in args[1:]]
    else:
        choices = [number_value(a) for a in args[1:]]
        choices = _common(node, choices, ranges)
    result = "int1" if node.kind == "bool" else _type_of(choices)
    return Value(f"tl.where({condition.text}, {', '.join(c.text for c in choices)})", result)


def _sign(node: Expr, args: list[Value], ranges: Ranges) -> Value:
    x = loose(number_value(args[0])).operand
    wanted = "float32" if node.kind == FLOAT else "int32"
    return Value(f"({x} > 0).to(tl.{wanted}) - ({x} < 0).to(tl.{wanted})", wanted, atom=False)


def _unary(template: str) -> Rule:
    def rule(node: Expr, args: list[Value], ranges: Ranges) -> Value:
        (x,) = _common(node, args, ranges)
        return Value(template.format(x.operand), x.type, atom=template.endswith(")"))

    return rule


def _rounding(function: str) -> Rule:
    """floor, ceil and the like leave integers as they are."""

    def rule(node: Expr, args: list[Value], ranges: Ranges) -> Value:
        x = number_value(args[0])
        return Value(f"{function}({loose(x).text})", "float32") if x.type == "float32" else x

    return rule


def _classify(template: str) -> Rule:
    def rule(node: Expr, args: list[Value], ranges: Ranges) -> Value:
        return Value(template.format(loose(convert(number_value(args[0]), "float32")).operand), "int1", atom=False)

    return rule


RULES: dict[str, Rule] = {
    "add": _infix("+"), "sub": _infix("-"), "mul": _infix("*"),
    "floordiv": _divide("//", "floor_div", "float_floor_div"), "mod": _divide("%", "floor_mod", "float_floor_mod"),
    "truediv": _true_divide, "pow": _power, "neg": _unary("-{}"), "abs": _unary("tl.abs({})"),
    "min": _extreme("tl.minimum"), "max": _extreme("tl.maximum"), "sign": _sign,
    "lt": _infix("<", "int1"), "le": _infix("<=", "int1"), "eq": _infix("==", "int1"), "ne": _infix("!=", "int1"),
    "and": _logic("&"), "or": _logic("|"), "xor": _logic("^"),
    "not": lambda node, args, ranges: Value(f"~{loose(convert(args[0], 'int1')).operand}", "int1", atom=False),
    "bitand": _infix("&"), "bitor": _infix("|"), "bitxor": _infix("^"), "invert": _unary("~{}"),
    "lshift": _shift("<<"), "rshift": _shift(">>"), "where": _where,
    "exp": _call("tl.exp"), "exp2": _call("tl.exp2"), "log": _call("tl.log"), "log2": _call("tl.log2"),
    "sqrt": _call("tl.sqrt_rn"), "rsqrt": lambda n, a, r: Value(f"tl.div_rn(1.0, {_call('tl.sqrt_rn')(n, a, r).text})", "float32"),
    "sin": _call("sine"), "cos": _call("cosine"), "tanh": _call("tanh"), "sigmoid": _call("sigmoid"), "erf": _call("tl.erf"),
    "floor": _rounding("tl.floor"), "ceil": _rounding("tl.ceil"), "trunc": _rounding("truncate"), "round": _rounding("round_even"),
    "isnan": _classify("{0} != {0}"), "isinf": _classify("tl.abs({0}) == float(\"inf\")"),
}  # fmt: skip
