"""A whole backward pass: the terms of the rows, then dq by the map by rows, then dk and dv by the map by columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

# a loaded kernel file, and its map as keywords: starts, stops, ranges, counts, offsets, index, broken
Pass = tuple[Any, Mapping[str, Any]]
Captures = tuple[Sequence[torch.Tensor], Sequence[int | float]]


def backward(
    rows: Sequence[Pass],
    columns: Sequence[Pass],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    scale: float,
    mask: Captures = ((), ()),
    score: Captures = ((), ()),
    grads: Sequence[torch.Tensor | float] = (),
    peaks: Sequence[Pass] = (),
    sinks: torch.Tensor | None = None,
    dropout: tuple[torch.Tensor, int, float] | None = None,
    fused: Sequence[Pass] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv) in the dtypes and shapes of q [B, Hq, Q, D], k [B or 1, Hkv, KV, D] and v [B or 1, Hkv, KV, Dv]; and the gradient of
    the sinks, float32 [Hq], where there are any.

    `rows` and `columns` are the kernels of each part with their maps: one, or two of which a flag on the device chooses. out and dout are
    [B, Hq, Q, Dv], lse and dlse float32 [B, Hq, Q]. `mask` and `score` are captured (tensors, numbers); `grads` what the
    gradients of captured tables are added to, as `backward_q` takes them. `peaks` are the kernels, of the same tiles, that must run
    before those of `rows` which add in fixed point. `sinks` and `dropout` are those that the forward pass was given. `fused` are
    kernels of all three gradients, which take turns, or none; where the last one's map has a flag, `rows` and `columns` are for when that
    says that none of them did anything.
    """
    first = (fused or rows)[0][0]
    terms = first.row_terms(out, lse, dout, dlse)
    mods = (first.pack(*mask), first.pack(*score))
    dq, dkv, found, flag = None, None, None, {}
    sums = first.zeroed_sums(terms) if len(fused) > 1 else None
    for module, tile_map in fused:
        found = module.backward(q, k, v, dout, terms, scale, *mods, **tile_map, into=found, sums=sums)
        dq, dkv = found[0], found[1:]
        flag = {"spared": tile_map["broken"]} if rows else {}
    for module, tile_map in peaks:
        module.backward_q(q, k, v, dout, terms, scale, *mods, **tile_map, grads=grads, dropout=dropout)
    for module, tile_map in rows:
        dq = module.backward_q(q, k, v, dout, terms, scale, *mods, **tile_map, grads=grads, into=dq, dropout=dropout, **flag)
    for module, tile_map in columns:
        dkv = module.backward_kv(q, k, v, dout, terms, scale, *mods, **tile_map, into=dkv, dropout=dropout)
    assert dq is not None and dkv is not None
    return dq, *dkv, None if sinks is None else sinks_gradient(sinks, terms)


def sinks_gradient(sinks: torch.Tensor, terms: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """float32 [Hq], from `terms` [B, Hq, rows] of `row_terms`: a sink takes from every row by the probability that it has there."""
    lse2, shift = terms
    share = torch.exp2(sinks.float()[:, None] * math.log2(math.e) - lse2)
    return (share * shift).sum((0, 2))
