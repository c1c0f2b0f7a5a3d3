"""A whole backward pass: the terms of the rows, then dq by the map by rows, then dk and dv by the map by columns."""

from __future__ import annotations

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
    grads: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) in the dtypes and shapes of q [B, Hq, Q, D], k [B or 1, Hkv, KV, D] and v [B or 1, Hkv, KV, Dv].

    `rows` and `columns` are the kernels of each part with their maps: one, or two of which a flag on the device chooses. out and dout are
    [B, Hq, Q, Dv], lse and dlse float32 [B, Hq, Q]. `mask` and `score` are captured (tensors, numbers); `grads` contiguous float32
    buffers that the gradients of captured tables are added to.
    """
    first = rows[0][0]
    terms = first.row_terms(out, lse, dout, dlse)
    mods = (first.pack(*mask), first.pack(*score))
    dq, dkv = None, None
    for module, tile_map in rows:
        dq = module.backward_q(q, k, v, dout, terms, scale, *mods, **tile_map, grads=grads, into=dq)
    for module, tile_map in columns:
        dkv = module.backward_kv(q, k, v, dout, terms, scale, *mods, **tile_map, into=dkv)
    assert dq is not None and dkv is not None
    return dq, *dkv
