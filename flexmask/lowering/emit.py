"""An expression as the text of small Triton device functions, named as the user named things.

`mask_row(tables, numbers, b, h, q_idx)` computes what depends on the query row only, once a tile row;
`mask_mod(tables, numbers, row, b, h, q_idx, kv_idx)` the rest, once a tile; a score mod likewise, with `score` after `row`.
Indices are int32: b and h numbers, q_idx [BLOCK_Q, 1], kv_idx [1, BLOCK_KV].
"""

from __future__ import annotations

from collections import Counter

from ..errors import BackendError
from ..ir import FLOAT, SCORE, Expr, K, show, walk
from .captures import CaptureSpec, Scope
from .ranges import Range, range_of
from .rules import RULES, Value, cast_value, convert, literal_value, number_value, wide_value

LINE = 100


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
    row_text = _function(f"{kind}_row(tables, numbers, b, h, q_idx)", f"What `{title}` needs of a query row.", row_lines, _tuple(names))
    body = _Body(captures, frozenset(), {node: Value(n, rows.done[node].type) for node, n in zip(hoisted, names, strict=True)})
    lines = body.lines([expr])
    unpack = [f"{_tuple(names, bare=len(names) > 1)} = row"] if names else []
    head = f"{kind}_mod(tables, numbers, row, {'score, ' if kind == 'score' else ''}b, h, q_idx, kv_idx)"
    doc = f"`{title}`: {_shown(expr, captures)}"
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


def _shown(expr: Expr, captures: CaptureSpec) -> str:
    """The expression as text, unless sharing makes its text much longer than itself."""
    size: dict[Expr, int] = {}
    for node in walk(expr):
        size[node] = 1 + sum(size[a] for a in node.args)
    return show(expr, captures.identifiers) if size[expr] <= 300 else f"an expression of {len(size)} operations"


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
    return convert(value, wanted).text


def _function(head: str, doc: str, lines: list[str], result: str) -> str:
    lines = [f'"""{doc}"""', *lines, f"return {result}"]
    if len(lines[0]) > 120:
        lines[0] = '"""' + "\n    ".join([doc[: doc.index(":") + 1], *_wrap(doc[doc.index(":") + 2 :])]) + '\n    """'
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
            return literal_value(node)
        if node.op == "index":
            if node.value in ("q_len", "kv_len"):
                raise BackendError(f"a kernel's mask or score cannot use {node.value}")
            return Value(node.value, "float32" if node is SCORE else "int32")
        if node.op == "scalar":
            return self._scalar(node)
        if node.op == "load":
            return self._load(node, args)
        if node.op == "cast":
            return cast_value(args[0], node.value)
        rule = RULES.get(node.op)
        if rule is None:
            raise BackendError(f"`{node.op}` has no meaning in a kernel")
        if all(a.literal for a in args):
            args = [Value(f"tl.full((), {a.text}, tl.{a.type})", a.type) for a in args]
        return rule(node, args, self.ranges)

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
            place, check = self._place(index, number_value(arg), size)
            address += f" + {wide_value(place)} * {stride}"
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
