"""Dense float64 attention: the oracle. It calls the mask or score at every pair of indices and shares no code with the compiler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

Mod = Callable[..., Any]
_CHUNK = 1 << 22  # (b, h, q, kv) points held at a time: 32 MiB a float64 temporary
_POSITIONS = {
    "b": 0, "batch": 0, "batch_idx": 0, "h": 1, "head": 1, "head_idx": 1, "q": 2, "q_idx": 2, "k": 3, "kv": 3, "k_idx": 3, "kv_idx": 3,
}  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mod | None = None,
    score: Mod | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    rows: torch.Tensor | slice | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_max_scores: bool = False,
) -> Any:
    """softmax(score(q @ k^T * scale)) @ v over the kept pairs, computed densely in float64.

    q [B, Hq, Q, D], k [B|1, Hkv, KV, D], v [B|1, Hkv, KV, Dv] -> [B, Hq, Q, Dv] in q's dtype (pass `q.double()` for all digits).
    `mask` and `score` are Mask and Score objects, or plain functions taking (b, h, q_idx, kv_idx) and (score, b, h, q_idx, kv_idx)
    in this order. `scale` defaults to D**-0.5. With `return_lse` also lse [B, Hq, Q], natural logarithm, float32 (float64 if q is).
    `rows` (slice or int tensor) computes these query rows only, each with its true q_idx.

    `sinks` [Hq] is one more logit a head, without a value, in softmax and lse (as gpt-oss learns them, after Xiao et al. 2023). `dropout_p`
    in [0, 1) zeroes that share of the probabilities and multiplies the others by 1 / (1 - dropout_p); which ones follows from `seed` (int
    or integer tensor of one element, by default drawn by torch) and the indices. `return_max_scores` adds each row's greatest score
    [B, Hq, Q] after scale and score mod, sink excluded, like lse but without gradient; results are (out, lse, max_scores).

    A row that keeps nothing gives 0, lse -inf (or its sink) and gradient 0. A pair that is not kept has no influence: NaN or inf there goes
    nowhere. Differentiable once in q, k, v, sinks and every captured tensor. Memory is bounded by a chunk of rows.
    Raises ValueError for shapes that do not fit and a dropout_p outside [0, 1), and TypeError for a mask whose values are not bool.

    >>> import torch
    >>> from flexmask import masks, reference
    >>> q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    >>> out, lse = reference.attention(q, k, v, mask=masks.causal, return_lse=True)
    >>> torch.equal(out[:, :, 0], v[:, :, 0]), lse.shape
    (True, torch.Size([1, 2, 5]))
    """
    _check_shapes(q, k, v, enable_gqa)
    _check_order(mask, first=0)
    _check_order(score, first=1)
    _check_extras(q, sinks, dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse, peaks = _by_chunks(q, k, v, mask, score, scale, rows, sinks, dropout_p, seed)
    found = [out] + [lse] * return_lse + [peaks] * return_max_scores
    return found[0] if len(found) == 1 else tuple(found)


def _by_chunks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mod | None, score: Mod | None, scale: float,
    rows: torch.Tensor | slice | None, sinks: torch.Tensor | None, dropout_p: float, seed: int | torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(out, lse, greatest scores), some rows at a time."""
    batch, heads = q.shape[:2]
    index = _row_numbers(rows, q.shape[2], q.device)
    wide = [x.double().expand(batch, *x.shape[1:]).repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v)]
    if dropout_p and seed is None:
        seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,))

    def one(numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        places = _grid((batch, heads, len(numbers), k.shape[2]), numbers)
        drop = _dropped(seed, places, dropout_p) if dropout_p and seed is not None else None
        return _attend(q[:, :, numbers].double(), wide[0], wide[1], numbers, mask, score, scale, sinks, drop, dropout_p)

    chunks = list(_chunks(index, batch * heads * k.shape[2]))
    keep_graph = torch.is_grad_enabled() and len(chunks) > 1
    parts = [checkpoint(one, c, use_reentrant=False) if keep_graph else one(c) for c in chunks]
    out, lse, peaks = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out.to(q.dtype), lse.to(real), peaks.to(real)


def dense_mask(
    mask: Mod | None, B: int, H: int, Q: int, KV: int, device: torch.device | str = "cpu", rows: torch.Tensor | slice | None = None
) -> torch.Tensor:
    """The mask at every pair, bool [B, H, Q, KV]; with `rows`, those query rows only.

    >>> from flexmask import masks, reference
    >>> reference.dense_mask(masks.causal, 1, 1, 2, 3)[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0]]
    """
    _check_order(mask, first=0)
    device = torch.device(device)
    parts = [_keep(mask, B, H, c, KV) for c in _chunks(_row_numbers(rows, Q, device), B * H * KV)]
    return torch.cat(parts, dim=2).contiguous()


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, enable_gqa: bool) -> None:
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v are [B, H, N, D]; got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}.")
    if k.shape[:3] != v.shape[:3] or k.shape[0] not in (1, q.shape[0]) or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k and v need shapes [B|1, Hkv, KV, D] and [B|1, Hkv, KV, Dv] for q {list(q.shape)}; got {list(k.shape)}, {list(v.shape)}."
        )
    if q.shape[1] != k.shape[1] and (not enable_gqa or q.shape[1] % k.shape[1]):
        raise ValueError(
            f"{q.shape[1]} query heads over {k.shape[1]} key heads: pass enable_gqa=True, with a whole number of heads to a group."
        )


def _check_extras(q: torch.Tensor, sinks: torch.Tensor | None, dropout_p: float) -> None:
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks hold one logit for each of {q.shape[1]} query heads; got shape {list(sinks.shape)}.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is a chance below 1; got {dropout_p}.")


def _check_order(mod: Mod | None, first: int) -> None:
    """A plain function is called in torch's order, so a known name elsewhere is a mistake that would pass silently."""
    if not inspect.isfunction(mod):
        return
    names = list(inspect.signature(mod).parameters)
    for place, name in enumerate(names):
        if _POSITIONS.get(name, place - first) != place - first:
            raise ValueError(
                f"a plain function takes (b, h, q_idx, kv_idx) in this order; "
                f"wrap {mod.__name__}({', '.join(names)}) with flexmask.mask or flexmask.score."
            )


def _row_numbers(rows: torch.Tensor | slice | None, count: int, device: torch.device) -> torch.Tensor:
    every = torch.arange(count, device=device)
    return every if rows is None else every[rows if isinstance(rows, slice) else rows.to(device)].reshape(-1)


def _chunks(rows: torch.Tensor, points_per_row: int) -> Iterator[torch.Tensor]:
    step = max(1, _CHUNK // max(1, points_per_row))
    return iter(rows.split(step)) if len(rows) else iter([rows])


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, mask: Mod | None, score: Mod | None, scale: float,
    sinks: torch.Tensor | None, drop: torch.Tensor | None, dropout_p: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(out, lse, greatest scores) of these rows; `drop` says which pairs dropout drops."""
    keep = _keep(mask, q.shape[0], q.shape[1], rows, k.shape[2])
    scores: torch.Tensor = _Scores.apply(q, k, keep) * scale
    if score is not None:
        scores = _modify(score, scores, keep, rows)
    scores = scores.masked_fill(~keep, -math.inf)
    peaks = scores.detach().amax(dim=-1, keepdim=True) if k.shape[2] else scores.new_full((*q.shape[:3], 1), -math.inf)
    sink = scores.new_full((1, 1, 1), -math.inf) if sinks is None else sinks.double()[:, None, None]
    highest = torch.maximum(peaks, sink.detach())
    # an empty row has no maximum; 0 keeps its exponentials at 0 instead of NaN
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    weights = torch.where(keep, torch.exp(scores - highest), 0.0)
    total = weights.sum(dim=-1, keepdim=True) + torch.exp(sink - highest)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, highest + torch.log(total)).squeeze(-1)
    weights = weights / total
    if drop is not None:
        weights, keep = weights.masked_fill(drop, 0.0) / (1 - _chance(dropout_p)), keep & ~drop
    return _Mix.apply(weights, v, keep), lse, peaks.squeeze(-1)


def _chance(dropout_p: float) -> float:
    """The chance in whole parts of 2**24, as which dropout counts it."""
    return min(round(dropout_p * 2**24), 2**24 - 1) / 2**24


def _dropped(seed: int | torch.Tensor, places: tuple[torch.Tensor, ...], dropout_p: float) -> torch.Tensor:
    """Whether pairs are dropped, bool [B, H, Q, KV]: uniform numbers of 24 bits, by a hash of the seed and the indices, are small.

    The hash is C. Wellons's lowbias32 (public domain), here on 32 bits held in int64; for pairs it takes in a second key half-way.
    """
    whole = int(seed) % (1 << 64)
    b, h, q, kv = (x.view(-1, *[1] * (3 - axis)) for axis, x in enumerate(places))
    keys = []
    for start in (0x9E3779B9, 0x85EBCA6B):
        key = _scramble(torch.full_like(kv[:1], (whole & 0xFFFFFFFF) ^ start))
        for part in (torch.full_like(key, whole >> 32), b, h, q):
            key = _scramble(key ^ part)
        keys.append(key)
    return (_scramble(kv ^ keys[0], keys[1]) >> 8) < round(_chance(dropout_p) * 2**24)


def _scramble(x: torch.Tensor, half_way: torch.Tensor | int = 0) -> torch.Tensor:
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15) ^ half_way, 0x846CA68B)
    return x ^ (x >> 16)


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x * factor modulo 2**32, in halves so that nothing overflows."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


def _keep(mask: Mod | None, batch: int, heads: int, rows: torch.Tensor, columns: int) -> torch.Tensor:
    """bool [batch, heads, len(rows), columns]."""
    shape = (batch, heads, len(rows), columns)
    if mask is None or 0 in shape:
        return torch.ones(shape, dtype=torch.bool, device=rows.device)

    def at_point(*indices: torch.Tensor) -> torch.Tensor:
        with _PointSemantics(torch.float32, keep=None):
            value = mask(*indices)
        value = value if isinstance(value, torch.Tensor) else torch.tensor(value, device=rows.device)
        if value.dtype != torch.bool:
            raise TypeError(f"a mask gives bools, not {value.dtype}: compare its value with something.")
        return value

    keep: torch.Tensor = _over_grid(at_point, 0)(*_grid(shape, rows))
    return keep


def _modify(score: Mod, scores: torch.Tensor, keep: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if 0 in scores.shape:
        return scores

    def at_point(value: torch.Tensor, kept: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
        with _PointSemantics(torch.float64, keep=kept):
            new = score(torch.where(kept, value, value.detach()), *indices)
        return new.double() if isinstance(new, torch.Tensor) else torch.tensor(new, dtype=torch.float64, device=rows.device)

    modified: torch.Tensor = _over_grid(at_point, 2)(scores, keep, *_grid(tuple(scores.shape), rows))
    return modified


def _grid(shape: tuple[int, ...], rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    b, h, kv = (torch.arange(shape[i], device=rows.device) for i in (0, 1, 3))
    return b, h, rows, kv


def _over_grid(function: Mod, extra: int) -> Mod:
    """`function` of `extra` values and four indices at one point -> the same over [B, H, Q, KV] values and four index vectors."""
    for axis in (3, 2, 1, 0):
        in_dims = (0,) * extra + tuple(0 if i == axis else None for i in range(4))
        function = torch.vmap(function, in_dims=in_dims)
    return function


class _PointSemantics(TorchFunctionMode):
    """What a mod means at one point: `tensor[index]` gathers, and narrow numbers are widened so that they neither wrap nor round.

    `keep` (bool at the point) cuts gradients into captured tensors at pairs that are not kept, where 0 * inf would be NaN.
    """

    def __init__(self, real: torch.dtype, keep: torch.Tensor | None):
        super().__init__()
        self.real, self.keep = real, keep

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(self.real)  # what `0.5 * q_idx` and `q_idx / 3` come out as
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self.default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return self._captured(_gather(args[0], args[1]))
        if getattr(func, "__name__", "") != "__get__":  # .shape, .dtype and the like are the tensor's own
            args, kwargs = tree_map(self._operand, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _operand(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dim() > 0:
            return x
        return self._widen(x if torch._C._functorch.is_batchedtensor(x) else self._captured(x))

    def _captured(self, x: torch.Tensor) -> torch.Tensor:
        if self.keep is None or x.dim() > 0 or not x.dtype.is_floating_point:
            return x
        return torch.where(self.keep, x, x.detach())

    def _widen(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype in (torch.bool, torch.int64, torch.float64):
            return x
        return x.to(self.real if x.dtype.is_floating_point else torch.int64)


def _gather(table: torch.Tensor, index: Any) -> torch.Tensor:
    """`table[index]` for indices that are ints, whole slices or 0-dimensional (batched) integer tensors."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(isinstance(p, torch.Tensor) for p in parts) or any(p is None for p in parts):
        return table[index]
    if Ellipsis in [p for p in parts if not isinstance(p, torch.Tensor)]:
        place = next(i for i, p in enumerate(parts) if p is Ellipsis)
        parts[place : place + 1] = [slice(None)] * (table.dim() - len(parts) + 1)
    gathered: torch.Tensor = torch.ops.aten.index(table, [_position(p, table.device) for p in parts])
    return gathered


def _position(part: Any, device: torch.device) -> torch.Tensor | None:
    if isinstance(part, torch.Tensor):
        return part if part.dtype == torch.bool else part.long()
    if isinstance(part, slice):
        if part != slice(None):
            raise TypeError(f"a table is indexed by indices and whole slices, not by {part}.")
        return None
    return torch.tensor(part, dtype=torch.int64, device=device)


class _Scores(torch.autograd.Function):
    """x @ y^T [.., M, N] at kept pairs and 0 elsewhere; other pairs carry no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y, keep)
        return torch.where(keep, x @ y.mT, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, y, keep = ctx.saved_tensors
        grad = torch.where(keep, grad, 0.0)
        return _weighted_sum(grad, y, keep), _weighted_sum(grad.mT, x, keep.mT), None


class _Mix(torch.autograd.Function):
    """weights [.., M, N] @ y [.., N, D], the weights being 0 at pairs that are not kept; these carry no gradient."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, y: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weights, y, keep)
        return _weighted_sum(weights, y, keep)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        weights, y, keep = ctx.saved_tensors
        return torch.where(keep, grad @ y.mT, 0.0), _weighted_sum(weights.mT, grad, keep.mT), None


def _weighted_sum(weights: torch.Tensor, y: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """weights @ y where 0 * NaN is 0 for pairs that are not kept: NaN and inf of `y` reach only the rows that keep them."""
    bad = ~y.isfinite().all(dim=-1)
    out = weights @ y.masked_fill(bad.unsqueeze(-1), 0.0)
    for column in bad.flatten(0, -2).any(dim=0).nonzero().flatten().tolist():
        value = torch.where((keep & bad.unsqueeze(-2))[..., column, None], y[..., None, column, :], 0.0)
        out = out + weights[..., column, None] * value
    return out
