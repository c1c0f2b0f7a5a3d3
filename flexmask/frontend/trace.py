"""trace: a Python function, called once with symbols, becomes a Traced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from .. import ir
from ..errors import TraceError
from .arithmetic import cast
from .guards import Guards
from .lift import Lifter
from .places import definition, enter, in_traceback, resolve
from .recorder import Recorder
from .signature import bind
from .symbol import Symbol
from .tables import TableView
from .traced import Traced


class TorchCalls(TorchFunctionMode):
    """While active, every call into torch comes to the recorder first."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.torch_call(func, args, kwargs or {})


def trace(mod: Callable[..., Any], kind: str) -> Traced:
    """What `mod` computes, as an expression of (b, h, q_idx, kv_idx), for kind "score" of (score, b, h, q_idx, kv_idx).

    `mod` is a Mask, a Score or any callable; parameters are matched as `bind` says. Captured numbers become run-time scalars,
    captured tensors tables. Raises TraceError, pointing at the user's line, for what cannot be compiled; an exception of the
    user's own code passes through.

    >>> import torch
    >>> from flexmask.frontend import trace
    >>> doc = torch.tensor([0, 0, 1])
    >>> trace(lambda q, k: doc[q] == doc[k], "mask").expr
    t0[q_idx] == t0[kv_idx]
    """
    if not callable(mod):
        raise TraceError(f"a {kind} is a function; got {type(mod).__name__}.")
    recorder = Recorder()
    lifter = Lifter(recorder)
    binding = bind(mod, kind)
    lifted = lifter.lift(mod, _name(mod))
    positional = tuple(symbol_of(recorder, role) for role, keyword in binding if keyword is None)
    named = {keyword: symbol_of(recorder, role) for role, keyword in binding if keyword is not None}
    try:
        with TorchCalls(recorder):
            result = enter(lifted, positional, named)
    except TraceError as error:
        error.at = error.at or in_traceback(error.__traceback__)
        raise
    return settle(recorder, mod, kind, result_of(recorder, mod, kind, result), lifter.guards.freeze())


def symbol_of(recorder: Recorder, role: str) -> Symbol:
    """The index (or the score) that a parameter stands for."""
    return Symbol(ir.INDICES[role], recorder, False)


def _name(mod: Any) -> str:
    """What the user calls it: a Mask's own name, else the function's."""
    while isinstance(mod, functools.partial):
        mod = mod.func
    name = getattr(mod, "name", None)
    if not isinstance(name, str):
        name = getattr(mod, "__name__", None) or type(mod).__name__
    return "lambda" if name == "<lambda>" else str(name)


# what came back


def result_of(recorder: Recorder, mod: Any, kind: str, result: Any) -> ir.Expr:
    if result is None:
        raise TraceError(f"the {kind} `{_name(mod)}` returns None. Add `return`.", definition(mod))
    if not isinstance(result, (Symbol, TableView, torch.Tensor, bool, int, float, np.generic)):
        raise TraceError(
            f"the {kind} `{_name(mod)}` returns a {type(result).__name__}; it must return one {_WANTED[kind]}.", definition(mod)
        )
    try:
        expr = recorder.operand(result).expr
    except TraceError as error:
        raise TraceError(f"the {kind} `{_name(mod)}` returns more than one {_WANTED[kind]}: {error.message}", definition(mod)) from None
    return _keep(recorder, mod, expr) if kind == "mask" else _new_score(recorder, mod, expr)


_WANTED = {"mask": "condition", "score": "number"}


def _keep(recorder: Recorder, mod: Any, expr: ir.Expr) -> ir.Expr:
    if expr.kind != ir.BOOL:
        raise _wrong_kind(recorder, mod, expr, f"a mask returns a condition; `{_name(mod)}` returns the {expr.kind}", "Write `{} != 0`.")
    return expr


def _new_score(recorder: Recorder, mod: Any, expr: ir.Expr) -> ir.Expr:
    if expr.kind == ir.BOOL:
        remedy = 'Write `torch.where({}, score, -float("inf"))`, or make it a mask.'
        raise _wrong_kind(recorder, mod, expr, f"a score returns a number; `{_name(mod)}` returns the condition", remedy)
    if expr.op == "const":
        return ir.const(float(expr.value))
    return expr if expr.kind == ir.FLOAT else cast(expr, "float32")


def _wrong_kind(recorder: Recorder, mod: Any, expr: ir.Expr, found: str, remedy: str) -> TraceError:
    place = recorder.places.get(expr)
    text = recorder.show(expr)
    return TraceError(f"{found} `{text}`. {remedy.format(text)}", definition(mod) if place is None else resolve(*place))


# canonical numbers


def settle(recorder: Recorder, mod: Any, kind: str, raw: ir.Expr, guards: Guards | None = None) -> Traced:
    """Captures renumbered by first appearance, unused ones dropped, specialised numbers turned into constants."""
    moved, tensors, scalars = _renumber(recorder, raw)
    places = {moved[old]: recorder.places[old] for old in reversed(moved) if old in recorder.places}
    taken = set(ir.INDICES)
    return Traced(
        kind=kind,
        name=_name(mod),
        expr=moved[raw],
        tensors=tuple(recorder.tensors[i] for i in tensors),
        tensor_names=tuple(_unique(recorder.names.get(id(recorder.tensors[i]), f"tensor{n}"), taken) for n, i in enumerate(tensors)),
        promised=frozenset(n for n, i in enumerate(tensors) if id(recorder.tensors[i]) in recorder.promised),
        scalars=tuple(recorder.scalars[i] for i in scalars),
        scalar_names=tuple(_unique(recorder.scalar_names[i], taken) for i in scalars),
        specialised=tuple(sorted((recorder.scalar_names[i], recorder.scalars[i]) for i in recorder.specialised)),
        volatile=recorder.volatile,
        places=places,
        guards=guards or Guards(),
    )


def _renumber(recorder: Recorder, raw: ir.Expr) -> tuple[dict[ir.Expr, ir.Expr], list[int], list[int]]:
    moved: dict[ir.Expr, ir.Expr] = {}
    tensors: dict[int, int] = {}
    scalars: dict[int, int] = {}
    for node in ir.walk(raw):
        args = tuple(moved[a] for a in node.args)
        if node.op == "load":
            moved[node] = ir.load(tensors.setdefault(node.value, len(tensors)), node.kind, *args)
        elif node.op == "scalar" and node.value in recorder.specialised:
            moved[node] = ir.const(recorder.scalars[node.value])
        elif node.op == "scalar":
            moved[node] = ir.scalar(scalars.setdefault(node.value, len(scalars)), node.kind)
        else:
            moved[node] = ir.make(node.op, args, node.value, node.kind if not args else None) if args else node
    return moved, list(tensors), list(scalars)


def _unique(name: str, taken: set[str]) -> str:
    number, free = 2, name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    taken.add(free)
    return free
