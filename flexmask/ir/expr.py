"""Expr: the one interned, immutable expression node that a mask or score means.

Two structurally equal expressions are the same object, so `is`, `==` and dict keys are structural and cost O(1).
Captured tensors and run-time scalars appear by number only; their values belong to the call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakValueDictionary

from .ops import BOOL, CASTS, FLOAT, INT, OPS

LEAVES = {"index", "const", "scalar"}


class Expr:
    """`op(args)` with an optional static `value`, of kind "bool", "int" or "float".

    op       args                      value
    index    -                         "b" "h" "q_idx" "kv_idx" "score" "q_len" "kv_len"
    const    -                         bool, int or float
    scalar   -                         number of a run-time scalar
    load     one index per dimension   number of a captured tensor
    search   leading indices, target   (number of a captured tensor, "left" or "right"): how many entries of the table's
                                       last axis are < target ("left") or <= target ("right"); the axis ascends
    cast     x                         dtype name, see ops.CASTS
    others   see ops.OPS               None
    """

    __slots__ = ("__weakref__", "args", "kind", "op", "value")
    op: str
    args: tuple[Expr, ...]
    value: Any
    kind: str

    def __repr__(self) -> str:
        from .printer import show  # the printer needs Expr first

        return show(self)

    def __reduce__(self) -> Any:
        raise TypeError("expressions travel as text: use ir.show and ir.parse")

    def __add__(self, other: Expr | int) -> Expr:
        return make("add", (self, _lift(other)))

    def __sub__(self, other: Expr | int) -> Expr:
        return make("sub", (self, _lift(other)))

    def __mul__(self, other: Expr | int) -> Expr:
        return make("mul", (self, _lift(other)))

    def __floordiv__(self, other: Expr | int) -> Expr:
        return make("floordiv", (self, _lift(other)))

    def __mod__(self, other: Expr | int) -> Expr:
        return make("mod", (self, _lift(other)))

    def __neg__(self) -> Expr:
        return make("neg", (self,))

    def __lt__(self, other: Expr | int) -> Expr:
        return make("lt", (self, _lift(other)))

    def __le__(self, other: Expr | int) -> Expr:
        return make("le", (self, _lift(other)))

    def __gt__(self, other: Expr | int) -> Expr:
        return make("lt", (_lift(other), self))

    def __ge__(self, other: Expr | int) -> Expr:
        return make("le", (_lift(other), self))

    def __and__(self, other: Expr) -> Expr:
        return make("and", (self, other))

    def __or__(self, other: Expr) -> Expr:
        return make("or", (self, other))

    def __invert__(self) -> Expr:
        return make("not", (self,))

    def __bool__(self) -> bool:
        raise TypeError("an Expr has no truth value; compare with `is`")


_INTERNED: WeakValueDictionary[tuple[Any, ...], Expr] = WeakValueDictionary()


def make(op: str, args: tuple[Expr, ...] = (), value: Any = None, kind: str | None = None) -> Expr:
    """The interned node. `kind` is needed for leaves and loads only; elsewhere the table gives it."""
    kind = kind or _kind(op, args, value)
    # repr tells 0.0 from -0.0 and lets NaN equal itself
    key = (op, args, repr(value) if isinstance(value, float) else value, kind)
    found = _INTERNED.get(key)
    if found is None:
        found = object.__new__(Expr)
        found.op, found.args, found.value, found.kind = op, args, value, kind
        found = _INTERNED.setdefault(key, found)
    return found


def _kind(op: str, args: tuple[Expr, ...], value: Any) -> str:
    if op == "cast":
        return CASTS[value]
    row = OPS[op]
    if len(args) != row.arity:
        raise ValueError(f"{op} takes {row.arity} arguments, got {len(args)}")
    if row.result != "promote":
        return row.result
    kinds = [a.kind for a in (args[1:] if op == "where" else args)]
    if FLOAT in kinds:
        return FLOAT
    return BOOL if op == "where" and set(kinds) == {BOOL} else INT


def const(value: bool | int | float) -> Expr:
    kind = BOOL if isinstance(value, bool) else INT if isinstance(value, int) else FLOAT
    return make("const", (), value, kind)


def scalar(number: int, kind: str) -> Expr:
    return make("scalar", (), number, kind)


def load(number: int, kind: str, *indices: Expr) -> Expr:
    return make("load", indices, number, kind)


def search(number: int, side: str, *lead_and_target: Expr) -> Expr:
    return make("search", lead_and_target, (number, side), INT)


def _lift(x: Expr | int) -> Expr:
    return x if isinstance(x, Expr) else const(x)


B = make("index", (), "b", INT)
H = make("index", (), "h", INT)
Q = make("index", (), "q_idx", INT)
K = make("index", (), "kv_idx", INT)
SCORE = make("index", (), "score", FLOAT)
Q_LEN = make("index", (), "q_len", INT)
KV_LEN = make("index", (), "kv_len", INT)
TRUE = const(True)
FALSE = const(False)
INDICES = {e.value: e for e in (B, H, Q, K, SCORE, Q_LEN, KV_LEN)}


def walk(expr: Expr) -> Iterator[Expr]:
    """Every distinct node below and including `expr`, arguments before their users."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(expr, False)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))


def rebuild(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """`expr` with `change` applied to every node, leaves first, each distinct node once."""
    done: dict[Expr, Expr] = {}
    for node in walk(expr):
        args = tuple(done[a] for a in node.args)
        if args != node.args:
            kind = node.kind if node.op in ("load", "search") else None
            done[node] = change(make(node.op, args, node.value, kind))
        else:
            done[node] = change(node)
    return done[expr]


def substitute(expr: Expr, table: dict[Expr, Expr]) -> Expr:
    """`expr` with each node that is a key of `table` replaced by its value."""
    return rebuild(expr, lambda e: table.get(e, e))


def uses(expr: Expr, *leaves: Expr) -> bool:
    """Whether any of `leaves` occurs in `expr`."""
    return any(node in leaves for node in walk(expr))


def digest(expr: Expr, extra: str = "") -> str:
    """Structural hash: sha256 over the printed text, the kinds of captures, and `extra`. Stable across processes."""
    kinds = sorted({f"{n.op}{n.value}:{n.kind}" for n in walk(expr) if n.op in ("load", "scalar")})
    return hashlib.sha256("\n".join([repr(expr), *kinds, extra]).encode()).hexdigest()
