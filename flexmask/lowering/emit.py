"""An expression as the text of small Triton device functions, named as the user named things.

`mask_row(tables, numbers, b, h, q_idx)` computes what depends on the query row only, once a tile row; `mask_mod(tables, numbers, row, b,
h, q_idx, kv_idx)` the rest, once a tile; a score mod likewise. Indices are int32: b and h numbers, q_idx [BLOCK_Q, 1], kv_idx [1, BLOCK_KV].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import BackendError
from ..ir import FLOAT, INT, SCORE, Expr, K, show, uses, walk
from .captures import CaptureSpec, Scope
from .ranges import INT32, Range, fits, range_of

LINE = 100


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


def emit_function(name: str, expr: Expr, captures: CaptureSpec, kind: str) -> str:
    """The text of two device functions, `{kind}_row` and `{kind}_mod`, for `expr`; kind is "mask" or "score".

    `name` is the user's name for the mod, for the docstrings. Raises BackendError for expressions that belong on the host (`search`,
    lengths).

    >>> from flexmask.ir import Q, K
    >>> print(emit_function("causal", Q >= K, CaptureSpec(), "mask").split("return")[-1].strip())
    kv_idx <= q_idx
    """
    hoisted = _row_values(expr)
    title = _comment(name)
    rows = _Body(captures, frozenset(hoisted), {})
    row_lines = rows.lines(hoisted)
    names = [rows.done[node].text for node in hoisted]
    row_text = _function(
        f"{kind}_row(tables, numbers, b, h, q_idx)", f"What `{title}` needs of a query row.", row_lines, _tuple(names)
    )
    body = _Body(captures, frozenset(), {node: Value(n, rows.done[node].type) for node, n in zip(hoisted, names, strict=True)})
    lines = body.lines([expr])
    unpack = [f"{_tuple(names, bare=len(names) > 1)} = row"] if names else []
    head = f"{kind}_mod(tables, numbers, row, {'score, ' if kind == 'score' else ''}b, h, q_idx, kv_idx)"
    doc = f"`{title}`: {show(expr, captures.identifiers)}"
    mod_text = _function(head, doc, unpack + lines, _result(body.done[expr], kind))
    return f"{row_text}\n\n\n{mod_text}"


def _row_values(expr: Expr) -> list[Expr]:
    """The greatest sub-expressions that need computing and depend on neither the key nor the score."""
    varying: set[Expr] = set()
    for node in walk(expr):
        if node in (K, SCORE) or any(a in varying for a in node.args):
            varying.add(node)
    users = [a for node in walk(expr) if node in varying for a in node.args] if expr in varying else [expr]
    return [n for n in dict.fromkeys(users) if n not in varying and n.op not in ("index", "const", "scalar")]


def _comment(text: str) -> str:
    """A name as it may stand in a docstring: one line, printable, without quotes or backslashes."""
    return "".join(c if c.isprintable() and c not in "\"'`\\" else "?" for c in text)[:80]


def _tuple(names: list[str], bare: bool = False) -> str:
    text = ", ".join(names) + ("," if len(names) == 1 else "")
    return text if bare else f"({text})"


def _result(value: Value, kind: str) -> str:
    """What the function returns: at least two dimensions are not needed, but it must be a tensor of the right type."""
    wanted = "int1" if kind == "mask" else "float32"
    if value.literal:
        return f"tl.full((1, 1), {value.text}, tl.{wanted})"
    return _convert(value, wanted).text


def _function(head: str, doc: str, lines: list[str], result: str) -> str:
    lines = [f'"""{doc}"""', *lines, f"return {result}"]
    if len(lines[0]) > 120:
        lines[0] = '"""' + "\n    ".join([doc[:doc.index(":") + 1], *_wrap(doc[doc.index(":") + 2 :])]) + '\n    """'
    return f"@triton.jit\ndef {head}:\n    " + "\n    ".join(lines)


def _wrap(text: str, width: int = 110) -> list[str]:
    """`text` in lines, broken at spaces."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


class _Body:
    """The statements that compute some nodes. `forced` nodes become variables; `done` nodes have values already."""

    def __init__(self, captures: CaptureSpec, forced: frozenset[Expr], done: dict[Expr, Value]):
        self.captures = captures
        self.forced = forced
        self.done: dict[Expr, Value] = dict(done)
        self.ranges: dict[Expr, Range | None] = {}
        self.scope = Scope([*captures.identifiers.values(), *(v.text for v in self.done.values())])
        self.statements: list[str] = []
        self.bound: dict[str, str] = {}

    def lines(self, roots: list[Expr]) -> list[str]:
        uses: Counter[Expr] = Counter(roots)
        order = [n for root in roots for n in walk(root)]
        for node in dict.fromkeys(order):
            self.ranges[node] = range_of(node, [self.ranges[a] for a in node.args], self.captures)
        needed = self._needed(roots)
        for node in needed:
            uses.update(node.args)
        for node in needed:
            self._settle(node, uses[node] > 1)
        return list(self.bound.values()) + self.statements

    def _needed(self, roots: list[Expr]) -> list[Expr]:
        """Nodes to compute, arguments first; what is done already hides what lies below it."""
        order: dict[Expr, None] = {}

        def visit(node: Expr) -> None:
            if node in self.done or node in order:
                return
            for a in node.args:
                visit(a)
            order[node] = None

        for root in roots:
            visit(root)
        return list(order)

    def _settle(self, node: Expr, shared: bool) -> None:
        value = self._value(node)
        leaf = node.op in ("index", "const", "scalar")
        if not leaf and (shared or node in self.forced or node.op == "load" or len(value.text) > LINE):
            name = self.scope.take(self._name(node), "value")
            self.statements.append(f"{name} = {value.text}")
            value = Value(name, value.type)
        self.done[node] = value

    def _name(self, node: Expr) -> str:
        if node.op == "load":
            stem = self.captures.identifiers[f"t{node.value}"]
            simple = [str(a.value) for a in node.args if a.op == "index"]
            return "_".join([stem, *(simple if len(simple) == len(node.args) else ["value"])])
        return {"bool": "keep", "int": "place", "float": "value"}[node.kind]

    def _value(self, node: Expr) -> Value:
        args = [self.done[a] for a in node.args]
        if node.op == "const":
            return _literal(node)
        if node.op == "index":
            if node.value in ("q_len", "kv_len"):
                raise BackendError(f"a kernel's mask or score cannot use {node.value}")
            return Value(node.value, "float32" if node is SCORE else "int32")
        if node.op == "scalar":
            return self._scalar(node)
        if node.op == "load":
            return self._load(node, args)
        if node.op == "cast":
            return _cast(args[0], node.value)
        rule = _RULES.get(node.op)
        if rule is None:
            raise BackendError(f"`{node.op}` has no meaning in a kernel")
        if all(a.literal for a in args):
            args = [Value(f"tl.full((), {a.text}, tl.{a.type})", a.type) for a in args]
        return rule(node, args, self)

    def _scalar(self, node: Expr) -> Value:
        name = self.captures.identifiers[f"s{node.value}"]
        at = sum(t.rank for t in self.captures.tensors) + node.value
        number = f"numbers[{at}]"
        self.bound[name] = f"{name} = {number if node.kind == FLOAT else f'number({number})'}"
        return Value(name, "float32" if node.kind == FLOAT else "int32")

    def _load(self, node: Expr, args: list[Value]) -> Value:
        spec = self.captures.tensors[node.value]
        name = self.captures.identifiers[f"t{node.value}"]
        first = sum(1 + t.rank for t in self.captures.tensors[: node.value])
        first_size = sum(t.rank for t in self.captures.tensors[: node.value])
        self.bound[name] = f"{name} = tables[{first}]"
        address, checks = name, []
        for axis, (index, arg) in enumerate(zip(node.args, args, strict=True)):
            stride, size = (self.captures.identifiers[f"t{node.value}_{word}_{axis}"] for word in ("stride", "size"))
            self.bound[stride] = f"{stride} = tables[{first + 1 + axis}]"
            self.bound[size] = f"{size} = number(numbers[{first_size + axis}])"
            place, check = self._place(index, _number(arg), size)
            address += f" + {_wide(place)} * {stride}"
            checks.append(check)
        stored = {"bool": "int1", "int64": "int64", "uint64": "int64", "uint32": "int64"}.get(spec.dtype, "int32")
        wanted = "float32" if spec.kind == FLOAT else stored
        call = [address, f"mask={' & '.join(checks)}", "other=0"] if checks else [address]
        text = f"tl.load({', '.join(call)})"
        if len(text) > LINE:
            text = "tl.load(\n        " + ",\n        ".join(call) + ",\n    )"
        exact = spec.dtype in ("bool", "int32", "int64", "float32")
        return Value(text if exact else f"{text}.to(tl.{wanted})", wanted)

    def _place(self, index: Expr, arg: Value, size: str) -> tuple[Value, str]:
        """The index as an address takes it, wrapped where it may be negative, and the check that it is inside."""
        known = self.ranges[index]
        if known is not None and known[0] >= 0:
            return arg, f"({arg.operand} < {size})"
        if not arg.atom or arg.literal:
            arg = self._variable(arg)
        wrapped = self._variable(Value(f"tl.where({arg.text} < 0, {arg.text} + {size}, {arg.text})", arg.type))
        return wrapped, f"({wrapped.text} >= 0) & ({wrapped.text} < {size})"

    def _variable(self, value: Value) -> Value:
        name = self.scope.take("place", "place")
        text = f"tl.full((), {value.text}, tl.{value.type})" if value.literal else value.text
        self.statements.append(f"{name} = {text}")
        return Value(name, value.type)


def _literal(node: Expr) -> Value:
    x = node.value
    if node.kind == FLOAT:
        if math.isnan(x) or abs(x) > 3.4028235677973366e38:  # beyond the last number that rounds to a finite float32
            return Value(f'float("{"nan" if math.isnan(x) else "inf" if x > 0 else "-inf"}")', "float32", literal=True)
        return Value(repr(x), "float32", literal=True, atom=x >= 0)
    if node.kind == INT:
        return Value(repr(x), "int32" if fits((x, x), INT32) else "int64", literal=True, atom=x >= 0)
    return Value(repr(x), "int1", literal=True)


def _loose(value: Value) -> Value:
    """A literal that stands where a tensor's method is called."""
    return Value(f"tl.full((), {value.text}, tl.{value.type})", value.type) if value.literal else value


def _wide(place: Value) -> str:
    return f"tl.full((), {place.text}, tl.int64)" if place.literal else _convert(place, "int64").operand


def _convert(value: Value, wanted: str) -> Value:
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


def _number(value: Value) -> Value:
    """Bools as integers, where arithmetic needs numbers."""
    return _convert(value, "int32") if value.type == "int1" else value


def _cast(x: Value, name: str) -> Value:
    if name == "bool":
        return _convert(x, "int1")
    if name == "bfloat16":
        return Value(f"round_bfloat16({_convert(_loose(_number(x)), 'float32').text})", "float32")
    if name == "float16":
        return Value(f"{_convert(_loose(_number(x)), 'float32').operand}.to(tl.float16).to(tl.float32)", "float32")
    wanted = {"float32": "float32", "float64": "float32"}.get(name, name)
    if wanted == "int64" and x.type in ("int32", "int1"):
        return _number(x)  # widened later, where a range shows the need
    return _convert(_loose(x) if x.literal and x.type != wanted else x, wanted)


Rule = Callable[[Expr, list[Value], _Body], Value]


def _common(node: Expr, args: list[Value], body: _Body) -> list[Value]:
    """Numeric arguments in the type that the result is computed in: float32, else int64 where int32 could overflow."""
    args = [_number(a) for a in args]
    if node.kind == FLOAT or any(a.type == "float32" for a in args):
        return [_convert(a, "float32") for a in args]
    if any(a.literal and a.type == "int64" for a in args):
        return [_convert(a, "int64") for a in args]  # Triton refuses a literal that does not fit the other operand
    known = body.ranges[node]
    if node.kind != "bool" and known is not None and not fits(known, INT32) and all(a.type == "int32" for a in args):
        at = next(i for i, a in enumerate(args) if not a.literal)  # one wide operand makes the operation wide
        args[at] = _convert(args[at], "int64")
    return args


def _type_of(args: list[Value]) -> str:
    types = {a.type for a in args}
    return "float32" if "float32" in types else "int64" if "int64" in types else "int32"


def _infix(symbol: str, result: str | None = None) -> Rule:
    def rule(node: Expr, args: list[Value], body: _Body) -> Value:
        args = _common(node, args, body)
        return Value(f" {symbol} ".join(a.operand for a in args), result or _type_of(args), atom=False)

    return rule


def _logic(symbol: str) -> Rule:
    def rule(node: Expr, args: list[Value], body: _Body) -> Value:
        args = [_convert(a, "int1") for a in args]
        if any(a.literal for a in args):
            args = [_loose(a) for a in args]
        return Value(f" {symbol} ".join(a.operand for a in args), "int1", atom=False)

    return rule


def _call(function: str) -> Rule:
    """A function of float32 numbers."""

    def rule(node: Expr, args: list[Value], body: _Body) -> Value:
        args = [_convert(a, "float32") for a in map(_number, args)]
        return Value(f"{function}({', '.join(a.text for a in args)})", "float32")

    return rule


def _divide(infix: str, helper: str, float_helper: str) -> Rule:
    def rule(node: Expr, args: list[Value], body: _Body) -> Value:
        args = _common(node, args, body)
        if node.kind == FLOAT:
            return Value(f"{float_helper}({', '.join(_loose(a).text for a in args)})", "float32")
        first, second = (body.ranges[a] for a in node.args)
        if first is not None and second is not None and first[0] >= 0 and second[0] > 0:
            return Value(f"{args[0].operand} {infix} {args[1].operand}", _type_of(args), atom=False)
        return Value(f"{helper}({args[0].text}, {args[1].text})", _type_of(args))

    return rule


def _true_divide(node: Expr, args: list[Value], body: _Body) -> Value:
    """Rounded to nearest, as a quotient of integers may be compared or floored; scores are not, and `/` is much faster."""
    args = [_convert(_number(a), "float32") for a in args]
    if uses(node, SCORE):
        return Value(f"{args[0].operand} / {args[1].operand}", "float32", atom=False)
    return Value(f"tl.div_rn({args[0].text}, {args[1].text})", "float32")


def _extreme(function: str) -> Rule:
    def rule(node: Expr, args: list[Value], body: _Body) -> Value:
        args = _common(node, args, body)
        nan = ", propagate_nan=tl.PropagateNan.ALL" if node.kind == FLOAT else ""
        return Value(f"{function}({args[0].text}, {args[1].text}{nan})", _type_of(args))

    return rule


def _power(node: Expr, args: list[Value], body: _Body) -> Value:
    exponent = node.args[1]
    base = _number(args[0])
    if exponent.op == "const" and exponent.value in (1, 2, 3, 4) and not base.literal and base.atom:
        wide = "float32" if node.kind == FLOAT else "int64"
        base = _convert(base, wide)
        return Value(" * ".join([base.operand] * int(exponent.value)), wide, atom=False)
    if node.kind == FLOAT:
        return Value(f"float_pow({', '.join(_loose(_convert(_number(a), 'float32')).text for a in args)})", "float32")
    return Value(f"int_pow({', '.join(_loose(_number(a)).text for a in args)})", "int64")


def _shift(symbol: str) -> Rule:
    def rule(node: Expr, args: list[Value], body: _Body) -> Value:
        value, count = (_convert(_loose(_number(a)), "int64") for a in args)
        return Value(f"{value.operand} {symbol} {count.operand}", "int64", atom=False)

    return rule


def _where(node: Expr, args: list[Value], body: _Body) -> Value:
    condition = _loose(_convert(args[0], "int1"))
    if node.kind == "bool":
        choices = [_loose(_convert(a, "int1")) for a in args[1:]]
    else:
        choices = [_number(a) for a in args[1:]]
        choices = _common(node, choices, body)
    result = "int1" if node.kind == "bool" else _type_of(choices)
    return Value(f"tl.where({condition.text}, {', '.join(c.text for c in choices)})", result)


def _sign(node: Expr, args: list[Value], body: _Body) -> Value:
    x = _loose(_number(args[0])).operand
    wanted = "float32" if node.kind == FLOAT else "int32"
    return Value(f"({x} > 0).to(tl.{wanted}) - ({x} < 0).to(tl.{wanted})", wanted, atom=False)


def _unary(template: str) -> Rule:
    def rule(node: Expr, args: list[Value], body: _Body) -> Value:
        (x,) = _common(node, args, body)
        return Value(template.format(x.operand), x.type, atom=template.endswith(")"))

    return rule


def _rounding(function: str) -> Rule:
    """floor, ceil and the like leave integers as they are."""

    def rule(node: Expr, args: list[Value], body: _Body) -> Value:
        x = _number(args[0])
        return Value(f"{function}({_loose(x).text})", "float32") if x.type == "float32" else x

    return rule


def _classify(template: str) -> Rule:
    def rule(node: Expr, args: list[Value], body: _Body) -> Value:
        return Value(template.format(_loose(_convert(_number(args[0]), "float32")).operand), "int1", atom=False)

    return rule


_RULES: dict[str, Rule] = {
    "add": _infix("+"), "sub": _infix("-"), "mul": _infix("*"),
    "floordiv": _divide("//", "floor_div", "float_floor_div"), "mod": _divide("%", "floor_mod", "float_floor_mod"),
    "truediv": _true_divide, "pow": _power, "neg": _unary("-{}"), "abs": _unary("tl.abs({})"),
    "min": _extreme("tl.minimum"), "max": _extreme("tl.maximum"), "sign": _sign,
    "lt": _infix("<", "int1"), "le": _infix("<=", "int1"), "eq": _infix("==", "int1"), "ne": _infix("!=", "int1"),
    "and": _logic("&"), "or": _logic("|"), "xor": _logic("^"),
    "not": lambda node, args, body: Value(f"~{_loose(_convert(args[0], 'int1')).operand}", "int1", atom=False),
    "bitand": _infix("&"), "bitor": _infix("|"), "bitxor": _infix("^"), "invert": _unary("~{}"),
    "lshift": _shift("<<"), "rshift": _shift(">>"), "where": _where,
    "exp": _call("tl.exp"), "exp2": _call("tl.exp2"), "log": _call("tl.log"), "log2": _call("tl.log2"),
    "sqrt": _call("tl.sqrt_rn"), "rsqrt": lambda n, a, b: Value(f"tl.div_rn(1.0, {_call('tl.sqrt_rn')(n, a, b).text})", "float32"),
    "sin": _call("sine"), "cos": _call("cosine"), "tanh": _call("tanh"), "sigmoid": _call("sigmoid"), "erf": _call("tl.erf"),
    "floor": _rounding("tl.floor"), "ceil": _rounding("tl.ceil"), "trunc": _rounding("truncate"), "round": _rounding("round_even"),
    "isnan": _classify("{0} != {0}"), "isinf": _classify("tl.abs({0}) == float(\"inf\")"),
}  # fmt: skip
