"""Masks read from tables (blocks, trees, whole matrices), block diffusion, and masks at an offset."""

from __future__ import annotations

from typing import Any

import torch

from ..mods import Mask, mask
from .tables import expect, per_batch, per_pair, positive


def from_dense(keep: torch.Tensor) -> Mask:
    """A mask given as a matrix: keep[b, h, q_idx, kv_idx]. `keep`: bool [Q, KV], [H, Q, KV] or [B, H, Q, KV], B or H may be 1.

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.from_dense(torch.tensor([[True, False], [True, True]]))
    >>> bool(m(0, 0, 0, 1)), bool(m(0, 0, 1, 0))
    (False, True)
    """
    kept = per_pair(keep)

    @mask
    def from_dense(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kept(b, h, q_idx, kv_idx)

    return from_dense


def block_sparse(table: torch.Tensor, block: int) -> Mask:
    """Whole blocks of `block` x `block` pairs: table[b, h, q_idx // block, kv_idx // block].

    `table`: bool [Qb, KVb], [H, Qb, KVb] or [B, H, Qb, KVb], B or H may be 1 (NSA, MoBA, VSA and other chosen blocks).

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.block_sparse(torch.tensor([[True, False], [False, True]]), block=3)
    >>> [k for k in range(6) if m(0, 0, 4, k)]
    [3, 4, 5]
    """
    positive(block=block)
    kept = per_pair(table)

    @mask
    def block_sparse(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kept(b, h, q_idx // block, kv_idx // block)

    return block_sparse


def random_blocks(n_blocks: int, n_random: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """A table for `bigbird`: bool [n_blocks, n_blocks] with `n_random` true entries in each row, on the generator's device.

    >>> from flexmask import masks
    >>> masks.random_blocks(5, 2).sum(dim=1).tolist()
    [2, 2, 2, 2, 2]
    """
    device = generator.device if generator is not None else torch.device("cpu")
    order = torch.rand(n_blocks, n_blocks, generator=generator, device=device).argsort(dim=1)
    return order < n_random


def bigbird(block: int, n_global: int, n_window: int, random: torch.Tensor) -> Mask:
    """BigBird (arXiv 2007.14062) on blocks of `block` tokens: the first `n_global` blocks see and are seen by all, each block sees
    the `n_window` blocks on either side, and those of its row in `random`, bool [Qb, KVb], [H, Qb, KVb] or [B, H, Qb, KVb].

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.bigbird(2, n_global=1, n_window=0, random=torch.zeros(4, 4, dtype=torch.bool))
    >>> [k for k in range(8) if m(0, 0, 5, k)]
    [0, 1, 4, 5]
    """
    positive(block=block)
    chosen = per_pair(random)

    @mask
    def bigbird(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        row, column = q_idx // block, kv_idx // block
        return (abs(row - column) <= n_window) | (row < n_global) | (column < n_global) | chosen(b, h, row, column)

    return bigbird


def vertical_slash(vertical: torch.Tensor, slash: torch.Tensor) -> Mask:
    """Chosen keys and chosen distances: kv_idx <= q_idx, and vertical[h, kv_idx] or slash[h, q_idx - kv_idx].

    MInference (arXiv 2407.02490). `vertical` bool [H, KV], `slash` bool [H, Q] (by distance).

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.vertical_slash(torch.tensor([[True, False, False, False]]), torch.tensor([[True, False, True, False]]))
    >>> [k for k in range(4) if m(0, 0, torch.tensor(3), k)]
    [0, 1, 3]
    """
    expect(vertical, 2, "vertical [H, KV]")
    expect(slash, 2, "slash [H, Q]")

    @mask
    def vertical_slash(h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = torch.clamp(q_idx - kv_idx, min=0)
        return (q_idx >= kv_idx) & (vertical[h, kv_idx] | slash[h, distance])

    return vertical_slash


def ancestors(parents: torch.Tensor) -> torch.Tensor:
    """Parents of a tree's nodes, int [T], parents[i] < i and -1 for a root -> bool [T, T], true at (node, itself or an ancestor).

    >>> import torch
    >>> from flexmask import masks
    >>> masks.ancestors(torch.tensor([-1, 0, 0, 1])).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """
    expect(parents, 1, "parents [T]")
    table = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
    for node, parent in enumerate(parents.tolist()):
        if not -1 <= parent < node:
            raise ValueError(f"a node comes after its parent; node {node} has parent {parent}.")
        if parent >= 0:
            table[node] |= table[parent]
    return table


def tree(keep: torch.Tensor, prefix: int | torch.Tensor = 0) -> Mask:
    """Drafted tokens in a tree, verified in one pass (SpecInfer, arXiv 2305.09781; Medusa): the cached prefix and the own ancestors.

    Queries are the T drafted tokens; keys are `prefix` cached tokens and then the T drafted ones. `keep`: bool [T, T] or [B, T, T],
    true where a drafted token may see another, such as `ancestors(parents)`; `prefix`: a number or int [B].

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.tree(masks.ancestors(torch.tensor([-1, 0, 0])), prefix=2)
    >>> [k for k in range(5) if m(0, 0, 2, torch.tensor(k))]
    [0, 1, 2, 4]
    """
    cached, drafted = per_batch(prefix), keep.shape[-1]
    expect(keep, (2, 3), "a tensor [T, T] or [B, T, T]")
    visible = per_pair(keep if keep.dim() == 2 else keep[:, None])

    @mask
    def tree(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        node = kv_idx - cached(b)
        return (node < 0) | ((node < drafted) & visible(b, h, q_idx, torch.clamp(node, 0, drafted - 1)))

    return tree


def block_diffusion(length: int, block: int) -> Mask:
    """Training mask of block diffusion, BD3-LM (arXiv 2503.09573): q_len = kv_len = 2 * length, noised tokens and then clean ones.

    Noised tokens see their own noised block and the clean blocks before it; clean tokens see clean blocks up to their own.

    >>> from flexmask import masks, reference
    >>> rows = reference.dense_mask(masks.block_diffusion(4, 2), 1, 1, 8, 8)[0, 0]
    >>> rows[2].nonzero().flatten().tolist(), rows[6].nonzero().flatten().tolist()
    ([2, 3, 4, 5], [4, 5, 6, 7])
    """
    positive(length=length, block=block)

    @mask
    def block_diffusion(q_idx: Any, kv_idx: Any) -> Any:
        q_clean, kv_clean = q_idx >= length, kv_idx >= length
        q_block = torch.where(q_clean, q_idx - length, q_idx) // block
        kv_block = torch.where(kv_clean, kv_idx - length, kv_idx) // block
        own = (q_block == kv_block) & (q_clean == kv_clean)
        return own | (kv_clean & (q_block > kv_block))

    return block_diffusion


def at_offset(inner: Mask, q_offset: int | torch.Tensor = 0, kv_offset: int | torch.Tensor = 0) -> Mask:
    """`inner` for a slice of the sequence: query row i is position i + q_offset, key column j position j + kv_offset.

    For decoding with a key cache (q_offset = tokens before the query), chunked prefill and context-parallel shards. Offsets are
    run-time values: numbers, 0-dimensional tensors, or int [B].

    >>> from flexmask import masks
    >>> m = masks.at_offset(masks.sliding_window(3), q_offset=7)
    >>> [k for k in range(10) if m(0, 0, 0, k)]
    [5, 6, 7]
    """
    inner = mask(inner)
    rows, columns = per_batch(q_offset), per_batch(kv_offset)

    @mask
    def at_offset(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return inner(b, h, q_idx + rows(b), kv_idx + columns(b))

    return at_offset
