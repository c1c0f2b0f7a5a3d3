"""The statements of a device function: what computes some nodes of an expression, and the function's text around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BackendError
from ..ir import FLOAT, SCORE, Expr, K, Q, uses, walk
from .captures import CaptureSpec, Scope, TensorSpec
from .ranges import Range, range_of
from .rules import RULES, Value, cast_value, convert, literal_value, loose, number_value, wide_value

LINE = 100


def write_tuple(names: list[str], bare: bool = False) -> str:
    text = ", ".join(names) + ("," if len(names) == 1 else "")
    return text if bare else f"({text})"


def write_result(value: Value, kind: str) -> str:
    """What the function returns: at least two dimensions are not needed, but it must be a tensor of the right type."""
    wanted = "int1" if kind == "mask" else "float32"
    if value.literal:
        return f"tl.full((1, 1), {value.text}, tl.{wanted})"
    return convert(value, wanted).text


def write_function(head: str, doc: str, lines: list[str], result: str | None = None) -> str:
    lines = [f'"""{doc}"""', *lines, *([] if result is None else [f"return {result}"])]
    if len(lines[0]) > 120:
        title, _, rest = doc.partition(": ")
        lines[0] = '"""' + "\n    ".join([title + ":" * bool(rest), *_wrap(rest)] if len(title) <= 120 else _wrap(doc)) + '\n    """'
    return f"@triton.jit\ndef {head}:\n    " + "\n    ".join(lines)


def _wrap(text: str, width: int = 110) -> list[str]:
    """`text` in lines, broken at spaces."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def _stored(spec: TensorSpec) -> str:
    """The type that a table's entries are computed with."""
    if spec.kind == FLOAT:
        return "float32"
    return {"bool": "int1", "int64": "int64", "uint64": "int64", "uint32": "int64"}.get(spec.dtype, "int32")


# types that `gather` reads; narrower ones Triton never fetches ahead
_GATHERED = ("int32", "int64", "float32", "float64")


def is_gathered(load: Expr, dtype: str) -> bool:
    """Whether `functions.gather` reads a table of this type: at places that depend on query and key, other than one key after the other."""
    return dtype in _GATHERED and uses(load, Q) and uses(load, K) and load.args[-1] is not K


def write_call(function: str, arguments: list[str]) -> str:
    text = f"{function}({', '.join(arguments)})"
    return text if len(text) <= LINE else f"{function}(\n        " + ",\n        ".join(arguments) + ",\n    )"


@dataclass(frozen=True)
class Row:
    """What is computed once a tile row: the statements, the variables in the order of the tuple that passes them on, and their nodes."""

    lines: list[str]
    names: list[str]
    given: dict[Expr, Value]

    @classmethod
    def of(cls, expr: Expr, captures: CaptureSpec) -> Row:
        hoisted = row_values(expr)
        body = Body(captures, ("b", "h", "q_idx"), frozenset(hoisted), {})
        lines = body.lines(hoisted)
        return cls(lines, [body.done[node].text for node in hoisted], {node: body.done[node] for node in hoisted})

    @property
    def unpacked(self) -> list[str]:
        """The statement that names the tuple's values again."""
        return [f"{write_tuple(self.names, bare=len(self.names) > 1)} = row"] if self.names else []


def row_values(expr: Expr) -> list[Expr]:
    """The greatest sub-expressions that need computing and depend on neither the key nor the score."""
    varying: set[Expr] = set()
    for node in walk(expr):
        if node in (K, SCORE) or any(a in varying for a in node.args):
            varying.add(node)
    users = [a for node in walk(expr) if node in varying for a in node.args] if expr in varying else [expr]
    return [n for n in dict.fromkeys(users) if n not in varying and n.op not in ("index", "const", "scalar")]


class Body:
    """The statements that compute some nodes from `indices`. `forced` nodes become variables; `done` nodes have values already."""

    def __init__(self, captures: CaptureSpec, indices: tuple[str, ...], forced: frozenset[Expr], done: dict[Expr, Value]):
        self.captures = captures
        self.indices = indices
        self.forced = forced
        self.done: dict[Expr, Value] = dict(done)
        self.ranges: dict[Expr, Range | None] = {}
        self.scope = Scope([*captures.identifiers.values(), *(v.text for v in self.done.values())])
        self.statements: list[str] = []
        self.bound: dict[str, str] = {}

    def lines(self, roots: list[Expr]) -> list[str]:
        """The statements after which every root is done."""
        uses: Counter[Expr] = Counter(roots)
        order = [n for root in roots for n in walk(root)]
        for node in dict.fromkeys(order):
            self.ranges[node] = range_of(node, [self.ranges[a] for a in node.args], self.captures)
        needed = self._needed(roots)
        for node in needed:
            uses.update(node.args)
        for node in needed:
            self._settle(node, uses[node] > 1)
        return self.written()

    def written(self) -> list[str]:
        """All statements so far, those that name captures first."""
        return list(self.bound.values()) + self.statements

    def _needed(self, roots: list[Expr]) -> list[Expr]:
        """Nodes to compute, arguments first; what is done already hides what lies below it."""
        order: dict[Expr, None] = {}
        stack = [(root, False) for root in reversed(roots)]
        while stack:
            node, ready = stack.pop()
            if ready:
                order[node] = None
            elif node not in self.done and node not in order:
                stack.append((node, True))
                stack.extend((a, False) for a in reversed(node.args))
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
            if node.value not in self.indices:
                raise BackendError(f"this device function is not given {node.value}, only {', '.join(self.indices)}")
            return Value(node.value, "float32" if node is SCORE else "int32")
        if node.op == "scalar":
            return self._scalar(node)
        if node.op == "load":
            return self._load(node, args)
        if node.op == "search":
            return self._search(node, args)
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
        address, checks = self._address(node.value, node.args, args)
        wanted = _stored(spec)
        exact = spec.dtype in ("bool", "int32", "int64", "float32")
        if is_gathered(node, spec.dtype):
            text = write_call("gather", [address, " & ".join(checks), f"tl.{spec.dtype}"])
        else:
            text = write_call("tl.load", [address, f"mask={' & '.join(checks)}", "other=0"] if checks else [address])
        return Value(text if exact else f"{text}.to(tl.{wanted})", wanted)

    def _search(self, node: Expr, args: list[Value]) -> Value:
        number, side = node.value
        spec = self.captures.tensors[number]
        row, checks = self._address(number, node.args[:-1], args[:-1])
        last, target = spec.rank - 1, loose(number_value(args[-1]))
        stride, size = (self.part(number, word, last) for word in ("stride", "size"))
        wanted = "float32" if target.type == "float32" else "int32" if spec.kind == "bool" else _stored(spec)
        if wanted == "float32":
            target = convert(target, wanted)
        valid = " & ".join(checks) or "True"
        return Value(write_call("count_below", [row, stride, size, target.text, valid, str(side == "right"), f"tl.{wanted}"]), "int32")

    def _address(self, number: int, indices: Sequence[Expr], args: Sequence[Value]) -> tuple[str, list[str]]:
        """The address of an entry, or of the row that leading indices choose, and the checks that it is inside the table."""
        name = self.captures.identifiers[f"t{number}"]
        self.bound[name] = f"{name} = tables[{sum(1 + t.rank for t in self.captures.tensors[:number])}]"
        address, checks = name, []
        for axis, (index, arg) in enumerate(zip(indices, args, strict=True)):
            stride, size = (self.part(number, word, axis) for word in ("stride", "size"))
            place, check = self.place(index, number_value(arg), size)
            address += f" + {wide_value(place)} * {stride}"
            checks.append(check)
        return address, checks

    def part(self, number: int, word: str, axis: int) -> str:
        """The name of a table's stride or size along an axis."""
        before = self.captures.tensors[:number]
        name = self.captures.identifiers[f"t{number}_{word}_{axis}"]
        if word == "stride":
            self.bound[name] = f"{name} = tables[{sum(1 + t.rank for t in before) + 1 + axis}]"
        else:
            self.bound[name] = f"{name} = number(numbers[{sum(t.rank for t in before) + axis}])"
        return name

    def place(self, index: Expr, arg: Value, size: str) -> tuple[Value, str]:
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
