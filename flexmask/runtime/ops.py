"""Attention as operators of torch's dispatcher: what torch.compile, torch.export, torch.func and dispatch modes see of it.

Their arguments are tensors, numbers and texts only. The structure of a mask and a score travels as text (`frontend.to_text`), its captures
beside it: first the mask's, then the score's. A plain eager call goes past them (`differentiable.attend`), at less cost.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..frontend import Captured, Traced, from_text
from ..ir import simplify
from ..lowering import gradient_tables
from .backward import Saved
from .checks import Shapes, check_inputs
from .differentiable import Call
from .extras import NO_EXTRAS, Extras
from .request import Request, Result
from .steady import find_steady
from .store import default_store


class Constants(NamedTuple):
    """What of a call the operators take as constants."""

    mask: str  # as `to_text` writes it, "" for none
    score: str
    scale: float
    dropout_p: float
    peaks: bool
    backend: str
    deterministic: bool
    autotune: bool


class Captures(NamedTuple):
    """The tensors and numbers that the mask and the score capture, the mask's first."""

    tables: Sequence[Tensor]
    ints: Sequence[int]
    floats: Sequence[float]


@torch.library.custom_op("flexmask::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seed: Tensor | None,
    tables: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
    mask: str, score: str, scale: float, dropout_p: float, peaks: bool, backend: str, deterministic: bool, autotune: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, Q, Dv], lse [B, Hq, Q], max scores [B, Hq, Q], or [0] where `peaks` is false)."""
    constants = Constants(mask, score, scale, dropout_p, peaks, backend, deterministic, autotune)
    call = _call(q, k, v, sinks, seed, Captures(tables, ints, floats), constants)
    found = call.forward(q, k, v)
    return found.out, found.lse, found.lse.new_empty(0) if found.peaks is None else found.peaks


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seed: Tensor | None,
    tables: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
    mask: str, score: str, scale: float, dropout_p: float, peaks: bool, backend: str, deterministic: bool, autotune: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = (q.shape[0], q.shape[1], q.shape[2])
    lse = q.new_empty(rows, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return q.new_empty((*rows, v.shape[3])), lse, torch.empty_like(lse) if peaks else lse.new_empty(0)


@torch.library.custom_op("flexmask::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    tables: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
    mask: str, score: str, scale: float, dropout_p: float, backend: str, deterministic: bool, autotune: bool, wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, gradient of the sinks if there are any, then those of the `wanted` tensors of the score, by their numbers there]."""
    constants = Constants(mask, score, scale, dropout_p, False, backend, deterministic, autotune)
    call = _call(q, k, v, sinks, seed, Captures(tables, ints, floats), constants)
    found = call.backward(Saved(q, k, v, out, lse), dout, dlse, list(wanted))
    some = [] if sinks is None or found.sinks is None else [found.sinks.to(sinks.dtype)]
    given = call.request.score_tensors
    return [found.dq, found.dk, found.dv, *some, *(found.tables[n].to(given[n].dtype) for n in wanted)]


@attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    tables: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
    mask: str, score: str, scale: float, dropout_p: float, backend: str, deterministic: bool, autotune: bool, wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    first = len(tables) - len(_tensors_of(score))
    given = [q, k, v, *([] if sinks is None else [sinks]), *(tables[first + n] for n in wanted)]
    return [x.new_empty(x.shape) for x in given]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, sinks, seed, tables, ints, floats, *constants = inputs
    out, lse, peaks = output
    ctx.save_for_backward(q, k, v, out, lse, sinks, seed, *tables)
    ctx.numbers, ctx.constants = (ints, floats), Constants(*constants)
    ctx.mark_non_differentiable(peaks)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None, needed: Sequence[bool]) -> list[Tensor | None]:
    """Those of q, k, v, sinks, and of each captured tensor, None where there is none; `needed` says of which tensors they are."""
    q, k, v, out, lse, sinks, seed, *tables = ctx.saved_tensors
    s: Constants = ctx.constants
    dout = torch.zeros_like(out) if dout is None else dout
    first = len(tables) - len(_tensors_of(s.score))
    carrying = gradient_tables(simplify(from_text(s.score).expr)) if s.score else ()
    wanted = [n for n in carrying if needed[first + n]]
    run = _BackwardOnce.apply if _is_transformed() else attention_backward
    dq, dk, dv, *rest = run(
        q, k, v, out, lse, dout, dlse, sinks, seed, tables, *ctx.numbers, s.mask, s.score, s.scale, s.dropout_p, s.backend,
        s.deterministic, s.autotune, wanted,
    )  # fmt: skip
    dsinks = rest.pop(0) if sinks is not None else None
    found = dict(zip(wanted, rest, strict=True))
    return [dq, dk, dv, dsinks, *(found.get(n - first) for n in range(len(tables)))]


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> Any:
    dq, dk, dv, dsinks, *dtables = _gradients(ctx, dout, dlse, ctx.needs_input_grad[5])
    # torch takes an empty list for one of tensors, and wants a list of gradients in its place
    numbers: list[Any] = [None if given else [] for given in ctx.numbers]
    return dq, dk, dv, dsinks, None, dtables, *numbers, *[None] * len(ctx.constants)


attention.register_autograd(_differentiate, setup_context=_save)


class _Transformable(torch.autograd.Function):
    """The operator for torch.func's transforms, which do not know the gradients that are registered with operators."""

    @staticmethod
    def forward(numbers: Any, constants: Constants, q: Tensor, k: Tensor, v: Tensor, sinks: Any, seed: Any, *tables: Tensor) -> Any:
        found: tuple[Tensor, Tensor, Tensor] = attention(q, k, v, sinks, seed, tables, *numbers, *constants)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        numbers, constants, q, k, v, sinks, seed, *tables = inputs
        _save(ctx, (q, k, v, sinks, seed, tables, *numbers, *constants), output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None) -> Any:
        dq, dk, dv, dsinks, *dtables = _gradients(ctx, dout, dlse, ctx.needs_input_grad[7:])
        return None, None, dq, dk, dv, dsinks, None, *dtables


class _BackwardOnce(torch.autograd.Function):
    """The backward operator under torch.func's transforms, which ask for second derivatives beforehand."""

    @staticmethod
    def forward(*given: Any) -> Any:
        *tensors, tables, ints, floats = given[:12]
        return tuple(attention_backward(*tensors, tables, ints, floats, *given[12:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("flexmask's attention is differentiable once; a second derivative was asked for.")


NOTHING: Captured = ("", [], [], [])


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Captured, score: Captured, extras: Extras, scale: float, backend: str, deterministic: bool,
    autotune: bool = False,
) -> Result:  # fmt: skip
    """The result of the operator, for a mask and a score as `captured_of` gives them, or `NOTHING`."""
    if not torch.compiler.is_dynamo_compiling() and "torch.utils.flop_counter" in sys.modules:
        from .flops import join_counters  # not before somebody counts: it brings triton

        join_counters()
    tables, numbers = [*mask[1], *score[1]], ([*mask[2], *score[2]], [*mask[3], *score[3]])
    constants = Constants(mask[0], score[0], scale, extras.dropout_p, extras.peaks, backend, deterministic, autotune)
    if not torch.compiler.is_dynamo_compiling() and _is_transformed():
        out, lse, peaks = _Transformable.apply(numbers, constants, q, k, v, extras.sinks, extras.seed, *tables)
    else:
        out, lse, peaks = attention(q, k, v, extras.sinks, extras.seed, tables, *numbers, *constants)
    return Result(out, lse, peaks if extras.peaks else None)


def is_needed(*tensors: Tensor) -> bool:
    """Whether a call has to be an operator: something looks at torch's dispatcher, or the tensors are not plain ones."""
    if torch._C._len_torch_dispatch_stack() or _is_transformed():
        return True
    return any(type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in tensors)


def _call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seed: Tensor | None, captures: Captures, s: Constants) -> Call:
    store = default_store()
    layout = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
    shapes: Shapes | None = store.checked.get(layout)
    if shapes is None:
        shapes = check_inputs(q, k, v, True)
        store.checked.put(layout, shapes)
    request = request_of(shapes, captures, s.mask, s.score, s.autotune)
    steady = find_steady(store, request, q, s.scale, s.backend, s.deterministic)
    plain = sinks is None and seed is None and not s.peaks
    extras = NO_EXTRAS if plain else Extras(sinks, s.dropout_p, seed, s.peaks)
    return Call(store, request, s.scale, s.backend, extras, s.deterministic, steady if plain else None)


def _is_transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def request_of(shapes: Shapes, captures: Captures, mask: str, score: str, autotune: bool = False) -> Request:
    """The mask and the score over their captures, for these shapes."""
    tables, ints, floats = list(captures.tables), list(captures.ints), list(captures.floats)
    found: list[Traced | None] = [None, None]
    for at, text in enumerate((mask, score)):
        if text:
            structure, number = from_text(text), len(_tensors_of(text))
            scalars = [floats.pop(0) if kind == "float" else ints.pop(0) for kind in structure.scalar_kinds]
            found[at] = structure.over(tables[:number], scalars)
            del tables[:number]
    return Request(found[0], found[1], shapes, autotune)


def _tensors_of(text: str) -> tuple[str, ...]:
    return from_text(text).tensor_names if text else ()
