"""Checks of what a call brings: shapes, dtypes, devices, and that no index runs out of a captured tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..analysis import index_range
from ..errors import ShapeError
from ..frontend import Traced
from ..ir import INDICES, Expr, show, walk
from .extras import Extras

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Shapes:
    """Sizes of one call: q [batch, heads, q_len, head_dim], k [kv_batch, kv_heads, kv_len, head_dim], v [.., v_head_dim]."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int


def as_autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in autocast's dtype where it is on for their device, but float64 as it is: what torch does for its own attention."""
    if not isinstance(q, torch.Tensor) or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = [x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in (q, k, v)]
    return q, k, v


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, enable_gqa: bool) -> Shapes:
    """The sizes of a call. Raises ShapeError with what was found where q, k and v do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ShapeError(f"{name} is a {type(x).__name__}, not a tensor.")
        if x.dim() != 4:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; attention takes [batch, heads, length, head_dim].")
    if q.dtype not in DTYPES:
        raise ShapeError(f"q is {q.dtype}; attention takes float16, bfloat16, float32 or float64.")
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}. Cast them to one.")
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k and v are on different devices: {q.device}, {k.device}, {v.device}.")
    _check_sizes(q, k, v, enable_gqa)
    return Shapes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def _check_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, enable_gqa: bool) -> None:
    if k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"k and v differ in batch, heads or length: {_sizes(q, k, v)}.")
    if q.shape[3] != k.shape[3]:
        raise ShapeError(f"q and k differ in head_dim: {_sizes(q, k, v)}.")
    if q.shape[3] == 0 or v.shape[3] == 0:
        raise ShapeError(f"a head_dim is 0: {_sizes(q, k, v)}.")
    if k.shape[0] != q.shape[0] and k.shape[0] != 1:
        raise ShapeError(f"the batch of k and v is that of q, or 1: {_sizes(q, k, v)}.")
    if q.shape[1] == k.shape[1]:
        return
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads: {_sizes(q, k, v)}.")
    if not enable_gqa:
        raise ShapeError(f"q has {q.shape[1]} heads and k has {k.shape[1]}; pass enable_gqa=True to share each key head among queries.")


def _sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale of q @ k: as given, or head_dim ** -0.5."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, torch.Tensor) or not math.isfinite(scale):
        raise ShapeError(f"scale is a finite Python number, got {scale!r}.")
    return float(scale)


def make_extras(q: torch.Tensor, sinks: torch.Tensor | None, dropout_p: float, seed: int | torch.Tensor | None, peaks: bool) -> Extras:
    """Sinks [Hq], dropout with its seed, drawn from torch's generator of q's device where none is given, and what else is wanted.

    Raises ShapeError for sinks of another shape or device, for a chance outside of [0, 1), and for a seed that is no whole number.
    """
    if sinks is not None:
        if not isinstance(sinks, torch.Tensor) or sinks.dim() != 1 or sinks.shape[0] != q.shape[1] or not sinks.is_floating_point():
            raise ShapeError(f"sinks is a float tensor with a logit for each of the {q.shape[1]} query heads; got {_described(sinks)}.")
        if sinks.device != q.device:
            raise ShapeError(f"sinks are on {sinks.device}, q on {q.device}.")
    if not 0.0 <= dropout_p < 1.0:
        raise ShapeError(f"dropout_p is a chance in [0, 1), got {dropout_p!r}. With 1 nothing would be left.")
    return Extras(sinks, float(dropout_p), _seed(seed, q.device) if dropout_p > 0 else None, peaks)


def _seed(seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """int64 [1] on the device, without waiting for it."""
    if seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, torch.Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
            raise ShapeError(f"seed is a whole number, or an int64 tensor of one on {device}; got {_described(seed)}.")
        return seed.reshape(1)
    if not isinstance(seed, int):
        raise ShapeError(f"seed is a whole number, or an int64 tensor of one; got {_described(seed)}.")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _described(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else f"{type(x).__name__} {x!r}"


def check_request(traces: Sequence[Traced | None], shapes: Shapes, device: torch.device) -> None:
    """`check_captures` for a call's mask and score."""
    sizes = {"batch": shapes.batch, "heads": shapes.heads, "q_len": shapes.q_len, "kv_len": shapes.kv_len}
    for traced in traces:
        if traced is not None:
            check_captures(traced, **sizes, device=device)


def check_captures(traced: Traced, *, batch: int, heads: int, q_len: int, kv_len: int, device: torch.device) -> None:
    """Raise ShapeError if a captured tensor is on another device or an index certainly leaves it.

    Index ranges are exact for affine indices. An index that depends on data cannot be known here: on the CPU such an access
    raises IndexError when it happens, on a GPU a load outside the tensor gives 0.
    """
    for tensor, name in zip(traced.tensors, traced.tensor_names, strict=True):
        if tensor.device != device:
            raise ShapeError(f"`{name}`, captured by `{traced.name}`, is on {tensor.device}, but the call is on {device}.")
    if 0 in (batch, heads, q_len, kv_len):
        return
    sizes = {"b": batch, "h": heads, "q_idx": q_len, "kv_idx": kv_len}
    ranges = {name: (0, size - 1) for name, size in sizes.items()} | {"q_len": (q_len, q_len), "kv_len": (kv_len, kv_len)}
    for node in walk(traced.expr):
        if node.op == "load":
            for axis, index in enumerate(node.args):
                _check_index(traced, node, axis, index, ranges)


def _check_index(traced: Traced, node: Expr, axis: int, index: Expr, ranges: dict[str, tuple[int, int]]) -> None:
    size = traced.tensors[node.value].shape[axis]
    reach = index_range(index, ranges, traced.scalars)
    if reach is None or (reach.lo >= -size and reach.hi < size) or not reach.exact:
        return
    names = traced.names()
    found = f"index `{show(index, names)}` reaches from {reach.lo} to {reach.hi}"
    remedy = "Clamp the index (torch.clamp), or give the tensor one entry for each index."
    if index in (INDICES["b"], INDICES["h"]) and size == 1:
        remedy = f"Write 0 in place of `{show(index)}`, or expand the tensor."
    raise ShapeError(
        f"`{traced.tensor_names[node.value]}`, captured by `{traced.name}`, has {size} entries on axis {axis}, but {found}. {remedy}",
        traced.locate(node),
    )
