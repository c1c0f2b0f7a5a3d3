"""compile and attention: check what comes in, find or make what is needed, run it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import reference
from .errors import BackendError, TraceError
from .frontend import Traced, captured
from .inspect.explain import explain_map, explain_mask, explain_score
from .ir import show
from .mods import Mask, Score
from .options import read_options
from .runtime import backward_kernels, forward, ops
from .runtime.checks import Shapes, as_autocast, check_inputs, check_request, check_scale, make_extras
from .runtime.differentiable import Call, attend
from .runtime.extras import NO_EXTRAS, Extras
from .runtime.maps import interpreting, refill_maps
from .runtime.request import Request, Result
from .runtime.steady import find_steady
from .runtime.store import default_store

BACKENDS = ("cpu", "triton", "reference")


class Attention:
    """Attention under a mask and a score mod, compiled at the first call and kept. Made by `flexmask.compile`.

    Called with q [B, Hq, Q, D], k [B or 1, Hkv, KV, D], v [B or 1, Hkv, KV, Dv], all of one dtype (float16, bfloat16, float32, float64)
    and device, it returns [B, Hq, Q, Dv] in that dtype; with `return_lse=True` also the logarithm of the softmax's denominator,
    [B, Hq, Q], natural, float32 (float64 for float64 inputs). A query that keeps no key gives 0 and lse -inf, and no gradient.
    Gradients flow to q, k, v, `sinks` and the float tensors that the score mod captures; the pass back computes scores anew.

    `sinks` [Hq] is a learned logit a head that takes part in the softmax's denominator and has no value, as in gpt-oss (arXiv
    2508.10925): a row's probabilities then add up to less than 1, lse includes it, and a row that keeps no key has lse = sink.
    `dropout_p` in [0, 1) zeroes kept pairs' probabilities at random and scales the others by 1 / (1 - dropout_p). Which ones follows
    from `seed` (an int, or an int64 tensor of one element on q's device; by default drawn from torch's generator), batch entry, head,
    query and key alone: neither tile sizes nor the backend change it. `return_max_scores=True` adds the greatest score of each row
    after the score mod, [B, Hq, Q], without gradient: (out, max_scores), or (out, lse, max_scores).

    Under torch.autocast q, k and v are cast as for scaled_dot_product_attention. Inside torch.compile, torch.export, torch.func.grad
    and under dispatch modes the call is the operator `flexmask::attention`.
    """

    def __init__(
        self,
        mask: Mask | None,
        score: Score | None,
        scale: float | None,
        enable_gqa: bool,
        backend: str | None,
        deterministic: bool | None = None,
        autotune: bool = False,
    ):
        if backend is not None and backend not in BACKENDS:
            raise BackendError(f"backend is one of {', '.join(BACKENDS)}, or None to choose by device; got {backend!r}.")
        self.mask, self.score, self.scale, self.enable_gqa, self.backend = mask, score, scale, enable_gqa, backend
        self.deterministic, self.autotune = deterministic, autotune
        self._source_for: tuple[Shapes, torch.dtype] | None = None
        self._last: tuple[Any, Call] | None = None  # the last call without extras, and what it followed from
        # the layout of the last call, and what was found of it
        self._good: tuple[Any, tuple[Shapes, float]] = (None, (Shapes(0, 0, 0, 0, 0, 0, 0), 0.0))
        self._debug = 0 if torch.compiler.is_dynamo_compiling() else read_options().debug

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        sinks: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        seed: int | torch.Tensor | None = None,
        return_lse: bool = False,
        return_max_scores: bool = False,
    ) -> Any:
        q, k, v = as_autocast(q, k, v)
        shapes, scale = self._checked_inputs(q, k, v)
        # Dynamo would take the numbers of NO_EXTRAS for inputs, and trace twice to find that they are none
        plain = sinks is None and not dropout_p and not return_max_scores and not torch.compiler.is_dynamo_compiling()
        extras = NO_EXTRAS if plain else make_extras(q, sinks, dropout_p, seed, return_max_scores)
        if torch.compiler.is_dynamo_compiling():
            found = self._traced_by_dynamo(q, k, v, extras, scale)
        else:
            found = self._run(q, k, v, extras, shapes, scale)
        parts = (found.out, *[found.lse] * return_lse, *[found.peaks] * return_max_scores)
        return parts if len(parts) > 1 else found.out

    def _checked_inputs(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Shapes, float]:
        """The sizes of a call and its scale, checked. What has been found good once is not looked at again."""
        if torch.compiler.is_dynamo_compiling() or not type(q) is type(k) is type(v) is torch.Tensor:
            shapes = check_inputs(q, k, v, self.enable_gqa)
            return shapes, check_scale(self.scale, shapes.head_dim)
        tensors = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
        layout = (*tensors, self.scale, self.enable_gqa)
        good = self._good
        if good[0] != layout:
            shapes = check_inputs(q, k, v, self.enable_gqa)
            good = self._good = (layout, (shapes, check_scale(self.scale, shapes.head_dim)))
        return good[1]

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, shapes: Shapes, scale: float) -> Result:
        backend, _ = self._choose(q.device)
        if backend == "reference":
            return self._reference(q, k, v, extras, scale)
        if ops.is_needed(q, k, v):
            mods = [ops.NOTHING if mod is None else captured(mod.traced()) for mod in (self.mask, self.score)]
            return ops.attend(q, k, v, mods[0], mods[1], extras, scale, backend, self._is_deterministic(), self._is_tuned())
        call = self._call(q, shapes, scale, backend)
        if self._debug and self._source_for != (shapes, q.dtype):
            print(self._debug_text((q, k, v), call.request, backend), file=sys.stderr)
        self._source_for = (shapes, q.dtype)
        return attend(call if extras is NO_EXTRAS else replace(call, extras=extras, steady=None), q, k, v)

    def _call(self, q: torch.Tensor, shapes: Shapes, scale: float, backend: str) -> Call:
        """The call without extras, the last one where nothing has changed, checked against what the mods capture."""
        mods, deterministic, tuned = self._mods(), self._is_deterministic(), self._is_tuned()
        follows, last = (*mods, shapes, scale, backend, deterministic, tuned, q.dtype, q.device), self._last
        if last is None or last[0] != follows:  # traces compare by identity
            store, request = default_store(), Request(*mods, shapes, tuned)
            steady = find_steady(store, request, q, scale, backend, deterministic)
            call = Call(store, request, scale, backend, NO_EXTRAS, deterministic, steady)
            last = self._last = (follows, call)
        return last[1]

    def _traced_by_dynamo(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, scale: float) -> Result:
        """The same as torch.compile runs it, while it makes its graph."""
        from .frontend.tape import captured_by_dynamo  # brings Dynamo, which is there

        backend = self.backend or ("cpu" if q.device.type == "cpu" else "triton")
        if backend == "reference":
            return self._reference(q, k, v, extras, scale)
        mask = ops.NOTHING if self.mask is None else captured_by_dynamo(self.mask, "mask")
        score = ops.NOTHING if self.score is None else captured_by_dynamo(self.score, "score")
        return ops.attend(q, k, v, mask, score, extras, scale, backend, self._is_deterministic(), self._is_tuned())

    def _reference(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, scale: float) -> Result:
        found = reference.attention(
            q, k, v, self.mask, self.score, scale, self.enable_gqa, True, sinks=extras.sinks, dropout_p=extras.dropout_p,
            seed=extras.seed, return_max_scores=extras.peaks,
        )  # fmt: skip
        return Result(*found)

    def _is_deterministic(self) -> bool:
        return torch.are_deterministic_algorithms_enabled() if self.deterministic is None else self.deterministic

    def _is_tuned(self) -> bool:
        """Whether sizes may be measured: which ones win may differ from one measurement to the next, and with them the last bits."""
        return self.autotune and not self._is_deterministic()

    def source(self, part: str = "forward", *, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> str:
        """The generated kernel as one self-contained Python file, for the shapes of the last call, or else for `head_dim` and `dtype`.

        On a machine without a GPU it is the kernel that an sm_90 GPU would run. Where two kernels take turns, by whether a captured
        table ascends, "forward" is the one that compares with intervals and "forward, evaluated" the one that evaluates the mask.
        """
        return self.source_path(part, head_dim=head_dim, dtype=dtype).read_text(encoding="utf-8")

    def source_path(self, part: str = "forward", *, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Path:
        """The file that `source` shows (a pathlib.Path in the cache directory). Raises BackendError for a kernel that there is not."""
        shapes, dtype = self._source_for or (Shapes(1, 1, 1, 4096, 4096, head_dim, head_dim), dtype)
        paths = forward.kernel_paths(default_store(), self._traces(shapes), dtype)
        found = dict(zip(("forward", "forward, evaluated"), paths, strict=False))
        if part not in found:
            raise BackendError(f"the kernels are {' and '.join(map(repr, found))}; got {part!r}.")
        return found[part]

    def update_maps(self) -> None:
        """Make the mask's maps on a GPU again, in the memory they have, from what its captured tensors hold now; nothing is waited for.

        For CUDA graphs: a replay runs no Python, so a graph whose captured tensors change between replays must hold this call before
        its first attention. Call the attention once before the capture, so that its kernels and maps exist. Elsewhere there is no
        need of it: a call sees by itself that a captured tensor was changed, and on the CPU maps are simply made anew.

            with torch.cuda.graph(graph):
                attn.update_maps()
                out = attn(q, k, v)
        """
        if self.mask is not None:
            refill_maps(default_store(), self.mask.traced())

    def explain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
        """What was derived from the mask and score for these tensors, the path chosen, and why."""
        shapes = check_inputs(q, k, v, self.enable_gqa)
        return "\n".join(self._explain((q, k, v), self._request(q, shapes), self._choose(q.device)[0]))

    def _explain(self, tensors: tuple[torch.Tensor, ...], request: Request, backend: str) -> list[str]:
        lines = [] if request.mask is None else explain_mask(request.mask, default_store().facts(request.mask)[1])
        lines += [] if request.score is None else explain_score(request.score)
        lines.append(f"path {backend}: {self._choose(tensors[0].device)[1]}")
        if backend != "reference":
            tile_map, choices = forward.describe(default_store(), request, tensors, backend)
            lines += [] if tile_map is None else explain_map(tile_map)
            if backend == "triton":
                choices += backward_kernels.describe(default_store(), request, tensors, self._is_deterministic())
            lines += [f"  {line}" for line in choices]
        return lines + self._explain_tuning(backend)

    def _explain_tuning(self, backend: str) -> list[str]:
        """Why nothing is measured where that was asked for."""
        if not self.autotune or (backend == "triton" and self._is_tuned()):
            return []
        why = "deterministic gradients were asked for" if backend == "triton" else f'the "{backend}" backend has no sizes to choose'
        return [f"  tiles           not measured, as {why}"]

    def _debug_text(self, tensors: tuple[torch.Tensor, ...], request: Request, backend: str) -> str:
        """What FLEXMASK_DEBUG asks for: 1 the path, 2 also facts and map, 3 also the expressions as traced, 4 also the kernel's file."""
        lines = [f"flexmask: path {backend}: {self._choose(tensors[0].device)[1]}"]
        if self._debug >= 2:
            lines = self._explain(tensors, request, backend)
        if self._debug >= 3:
            lines += [f"{t.kind} as traced: {show(t.expr, t.names())}" for t in (request.mask, request.score) if t is not None]
        if self._debug >= 4:
            paths = forward.kernel_paths(default_store(), request, tensors[0].dtype)
            lines += [f"kernel source: {path}" for path in paths]
        return "\n".join(lines)

    def _choose(self, device: torch.device) -> tuple[str, str]:
        """The backend for tensors on `device`, and the reason. A backend that was asked for is used or refused, never replaced."""
        natural = "cpu" if device.type == "cpu" else "triton"
        if self.backend is None:
            if device.type not in ("cpu", "cuda"):
                raise BackendError(f"flexmask runs on cpu and cuda tensors; these are on {device}.")
            return natural, f"the tensors are on {device}"
        if self.backend == "cpu" and natural != "cpu":
            raise BackendError(f'backend="cpu" takes CPU tensors; these are on {device}.')
        if self.backend == "triton" and natural == "cpu" and not interpreting():
            raise BackendError('backend="triton" takes CUDA tensors, or TRITON_INTERPRET=1 in the environment for tests; these are on cpu.')
        return self.backend, "asked for"

    def _mods(self) -> tuple[Traced | None, Traced | None]:
        """The mask and the score as they are now."""
        return None if self.mask is None else self.mask.traced(), None if self.score is None else self.score.traced()

    def _traces(self, shapes: Shapes) -> Request:
        return Request(*self._mods(), shapes, self._is_tuned())

    def _request(self, q: torch.Tensor, shapes: Shapes) -> Request:
        request = self._traces(shapes)
        check_request((request.mask, request.score), shapes, q.device)
        return request

    def __repr__(self) -> str:
        return f"<flexmask.Attention mask={self.mask!r} score={self.score!r}>"


def compile(
    mask: Mask | Callable[..., Any] | None = None,
    score: Score | Callable[..., Any] | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
    deterministic: bool | None = None,
    autotune: bool = False,
) -> Attention:
    """Attention with this mask and score mod, as a callable of (q, k, v). All arguments are optional.

    `mask` is a mask or a plain function of (b, h, q_idx, kv_idx); `score` likewise of (score, b, h, q_idx, kv_idx). `scale` multiplies
    q @ k (default head_dim ** -0.5). `enable_gqa` allows fewer key heads than query heads. `backend` is "cpu", "triton" or
    "reference" (dense float64), by default that of the tensors' device. `deterministic=True` gives the score mod's captured tensors
    gradients that are the same bits in every run also on a GPU, where they are else added atomically, at the price of a second pass for
    them; and q likewise, to which on Hopper GPUs programs then add in turn rather than in any order. All other results always are the
    same bits (on the CPU, for a given number of threads). By default torch.use_deterministic_algorithms decides.

    `autotune=True` measures on the user's GPU which sizes of tiles are fastest, at the first call and the first backward pass of a kind
    (these mods, head dims and dtype; batch, heads and lengths up to the next power of two). That takes seconds; later calls, and other
    processes with the same cache directory, read what was found. Where a mask has several kernels that take turns, the one that has its
    turn then is measured. Other sizes add up in another order, so results may differ in rounding from those without it; hence nothing
    is measured where deterministic gradients are asked for, nor while a CUDA graph is captured: call once before. It is without effect
    on the CPU.

    Functions are traced at the first call.
    Raises TraceError, ShapeError or BackendError with what to write instead.

    >>> import torch, flexmask
    >>> attn = flexmask.compile(flexmask.masks.causal)
    >>> x = torch.randn(1, 2, 5, 16)
    >>> attn(x, x, x).shape
    torch.Size([1, 2, 5, 16])
    """
    return Attention(_mod(mask, Mask, "mask"), _mod(score, Score, "score"), scale, enable_gqa, backend, deterministic, autotune)


def _mod(given: Any, wanted: type, word: str) -> Any:
    if given is None or isinstance(given, wanted):
        return given
    if isinstance(given, (Mask, Score)):
        raise TraceError(f"`{given.name}` was made by flexmask.{given.kind} but passed as {word}=.")
    if isinstance(given, torch.Tensor):
        raise TraceError(f"{word}= takes a function, not a tensor. Write `lambda b, h, q_idx, kv_idx: tensor[q_idx, kv_idx]`, say.")
    return wanted(given)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask | Callable[..., Any] | None = None,
    score: Score | Callable[..., Any] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
    deterministic: bool | None = None,
    autotune: bool = False,
    **call: Any,
) -> Any:
    """`compile` and call in one step, through the same caches. `call` takes what an `Attention` takes: sinks, dropout_p, seed,
    return_lse, return_max_scores. Shapes and errors as there.

    >>> import torch, flexmask
    >>> x = torch.randn(1, 2, 5, 16)
    >>> out, lse = flexmask.attention(x, x, x, mask=flexmask.masks.causal, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 2, 5, 16]), torch.Size([1, 2, 5]))
    """
    attn = compile(mask, score, scale=scale, enable_gqa=enable_gqa, backend=backend, deterministic=deterministic, autotune=autotune)
    return attn(q, k, v, **call)
