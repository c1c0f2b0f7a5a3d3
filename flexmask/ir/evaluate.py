"""What an expression means: its value on Python numbers or, broadcast, on tensors. Everything else is tested against this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .expr import Expr, walk
from .ops import CASTS, FLOAT, OPS, Op

Value = Any  # bool | int | float | torch.Tensor


@dataclass(frozen=True)
class Env:
    """Values of the leaves: `indices` maps "b", "h", "q_idx", "kv_idx", "score", "q_len", "kv_len" to numbers or tensors.

    Tensors must broadcast against each other; index tensors should be int64. Nothing here waits for a GPU.
    """

    indices: dict[str, Value] = field(default_factory=dict)
    tensors: Sequence[torch.Tensor] = ()
    scalars: Sequence[int | float] = ()


def evaluate(expr: Expr, env: Env) -> Value:
    """The value of `expr`. Indices count from the end when negative, as in Python; out of range raises IndexError."""
    return evaluate_all((expr,), env)[0]


def evaluate_all(exprs: Sequence[Expr], env: Env) -> list[Value]:
    """The values of several expressions; what they share is computed once."""
    values: dict[Expr, Value] = {}
    for expr in exprs:
        for node in walk(expr):
            if node not in values:
                values[node] = _value(node, [values[a] for a in node.args], env)
    return [values[expr] for expr in exprs]


def _value(node: Expr, args: list[Value], env: Env) -> Value:
    if node.op == "const":
        return node.value
    if node.op == "index":
        return env.indices[node.value]
    if node.op == "scalar":
        return env.scalars[node.value]
    if node.op == "load":
        return _load(env.tensors[node.value], args)
    if node.op == "search":
        return _search(env, node, args)
    if node.op == "cast":
        return _cast(args[0], node.value)
    row = OPS[node.op]
    assert row.python is not None and row.torch is not None
    if not any(isinstance(a, torch.Tensor) for a in args):
        return row.python(*args) if node.kind != FLOAT else _of_floats(row, args)
    return row.torch(*_as_tensors(args))


def _of_floats(row: Op, args: list[Value]) -> float:
    """The value on Python numbers; where Python raises, or gives a complex number, the infinity or NaN that tensors give."""
    assert row.python is not None and row.torch is not None
    try:
        value = row.python(*args)
    except (ZeroDivisionError, ValueError, OverflowError):
        value = None
    if value is None or isinstance(value, complex):
        value = row.torch(*(torch.tensor(a, dtype=torch.bool if isinstance(a, bool) else torch.float64) for a in args)).item()
    return float(value)


def _as_tensors(args: list[Value]) -> list[torch.Tensor]:
    """All arguments as tensors on one device; `full` fills on the device, so no host value is waited for."""
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    return [a if isinstance(a, torch.Tensor) else _full(a, device) for a in args]


def _full(x: bool | int | float, device: torch.device) -> torch.Tensor:
    dtype = torch.bool if isinstance(x, bool) else torch.int64 if isinstance(x, int) else torch.float32
    return torch.full((), x, dtype=dtype, device=device)


def _load(table: torch.Tensor, indices: list[Value]) -> Value:
    if not any(isinstance(i, torch.Tensor) for i in indices):
        return table[tuple(indices)] if table.device.type != "cpu" else table[tuple(indices)].item()
    where = tuple(i.to(table.device).long() if isinstance(i, torch.Tensor) else _full(int(i), table.device) for i in indices)
    return _widen(table[where])


def _widen(x: torch.Tensor) -> torch.Tensor:
    """Mods compute on int64 and at least float32, so that narrow tables neither wrap around nor round."""
    if x.dtype == torch.bool or x.dtype in (torch.float32, torch.float64, torch.int64):
        return x
    return x.float() if x.dtype.is_floating_point else x.long()


def _search(env: Env, node: Expr, args: list[Value]) -> Value:
    number, side = node.value
    table, target = env.tensors[number], args[-1]
    lead = tuple(i.long() if isinstance(i, torch.Tensor) else i for i in args[:-1])
    rows = _widen(table[lead]) if lead else _widen(table)
    if not isinstance(target, torch.Tensor):
        target = _full(target, table.device)
    if rows.dim() == 1:
        return torch.searchsorted(rows.contiguous(), target.contiguous(), right=side == "right")
    target = target.reshape(1) if target.dim() == 0 else target
    # leading indices have a 1 on the target's last axis: [.., 1, n] -> [.., n] sequences, one for each row of targets
    rows = rows.squeeze(-2)
    shape = torch.broadcast_shapes(rows.shape[:-1], target.shape[:-1])
    rows = rows.expand(*shape, rows.shape[-1]).contiguous()
    target = target.expand(*shape, target.shape[-1]).contiguous()
    return torch.searchsorted(rows, target, right=side == "right")


def _cast(x: Value, name: str) -> Value:
    dtype: torch.dtype = getattr(torch, name)
    if isinstance(x, torch.Tensor):
        return _widen(x.to(dtype))
    if name in ("float16", "bfloat16", "float32"):
        return torch.tensor(x, dtype=dtype).item()
    return {"bool": bool, "int": int, "float": float}[CASTS[name]](x)
