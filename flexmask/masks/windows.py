"""Masks of positions alone: causal, windows, blocks and strides."""

from __future__ import annotations

from typing import Any

import torch

from ..mods import Mask, mask
from .tables import expect, per_token, positive


@mask
def full(q_idx: Any, kv_idx: Any) -> Any:
    """Every pair: q_idx >= 0."""
    return q_idx >= 0


@mask
def causal(q_idx: Any, kv_idx: Any) -> Any:
    """No key after the query: kv_idx <= q_idx. With q_len != kv_len the corner is the upper left one; see `causal_lower_right`."""
    return q_idx >= kv_idx


def causal_lower_right(q_len: int | torch.Tensor, kv_len: int | torch.Tensor) -> Mask:
    """Causal with the last query on the last key: kv_idx - q_idx <= kv_len - q_len. Lengths: numbers or 0-dimensional tensors.

    >>> from flexmask import masks
    >>> m = masks.causal_lower_right(q_len=2, kv_len=5)
    >>> m(0, 0, 0, 3), m(0, 0, 0, 4)
    (True, False)
    """

    @mask
    def causal_lower_right(q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx - q_idx <= kv_len - q_len

    return causal_lower_right


def sliding_window(size: int | torch.Tensor) -> Mask:
    """Each query and the `size - 1` keys before it: 0 <= q_idx - kv_idx < size (Mistral, arXiv 2310.06825).

    `size` is a number of tokens, at least 1, or a 0-dimensional integer tensor.

    >>> from flexmask import masks
    >>> window = masks.sliding_window(3)
    >>> [k for k in range(10) if window(0, 0, 7, k)]
    [5, 6, 7]
    """
    positive(size=size)

    @mask
    def sliding_window(q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < size)

    return sliding_window


def local_window(left: int | torch.Tensor, right: int | torch.Tensor | None = None) -> Mask:
    """`left` keys before the query, itself, and `right` keys after it: -right <= q_idx - kv_idx <= left; `right` defaults to `left`.

    The same numbers as FlashAttention's window_size=(left, right).

    >>> from flexmask import masks
    >>> window = masks.local_window(2, 1)
    >>> [k for k in range(10) if window(0, 0, 5, k)]
    [3, 4, 5, 6]
    """
    after = left if right is None else right

    @mask
    def local_window(q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx <= left) & (kv_idx - q_idx <= after)

    return local_window


def head_window(sizes: torch.Tensor) -> Mask:
    """A causal window for each head: 0 <= q_idx - kv_idx < sizes[h]. `sizes`: int tensor [H].

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.head_window(torch.tensor([1, 4]))
    >>> bool(m(0, 0, 5, 3)), bool(m(0, 1, 5, 3))
    (False, True)
    """
    expect(sizes, 1, "a tensor [H]")

    @mask
    def head_window(h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < sizes[h])

    return head_window


def dilated(window: int, dilation: int) -> Mask:
    """Every `dilation`-th key within `window` on both sides: |q_idx - kv_idx| <= window and (q_idx - kv_idx) % dilation == 0.

    Longformer (arXiv 2004.05150); combine with `causal` for the decoder's form.

    >>> from flexmask import masks
    >>> m = masks.dilated(4, 2)
    >>> [k for k in range(12) if m(0, 0, 6, k)]
    [2, 4, 6, 8, 10]
    """
    positive(dilation=dilation)

    @mask
    def dilated(q_idx: Any, kv_idx: Any) -> Any:
        return (abs(q_idx - kv_idx) <= window) & ((q_idx - kv_idx) % dilation == 0)

    return dilated


def global_window(n_global: int, window: int) -> Mask:
    """The first `n_global` tokens see and are seen by all, the others a window: |q_idx - kv_idx| <= window (Longformer, arXiv 2004.05150).

    >>> from flexmask import masks
    >>> m = masks.global_window(1, 1)
    >>> [k for k in range(8) if m(0, 0, 5, k)]
    [0, 4, 5, 6]
    """

    @mask
    def global_window(q_idx: Any, kv_idx: Any) -> Any:
        return (abs(q_idx - kv_idx) <= window) | (q_idx < n_global) | (kv_idx < n_global)

    return global_window


def global_tokens(is_global: torch.Tensor, window: int) -> Mask:
    """As `global_window`, with the global tokens marked: bool [N] or [B, N] (Longformer, arXiv 2004.05150).

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.global_tokens(torch.tensor([False, False, True, False, False, False]), window=0)
    >>> [k for k in range(6) if m(0, 0, 5, k)]
    [2, 5]
    """
    marked = per_token(is_global)

    @mask
    def global_tokens(b: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (abs(q_idx - kv_idx) <= window) | marked(b, q_idx) | marked(b, kv_idx)

    return global_tokens


def sink_window(n_sink: int, window: int) -> Mask:
    """The first `n_sink` keys and a causal window: kv_idx <= q_idx, and q_idx - kv_idx < window or kv_idx < n_sink.

    StreamingLLM (arXiv 2309.17453).

    >>> from flexmask import masks
    >>> m = masks.sink_window(2, 3)
    >>> [k for k in range(10) if m(0, 0, 8, k)]
    [0, 1, 6, 7, 8]
    """
    positive(window=window)

    @mask
    def sink_window(q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & ((q_idx - kv_idx < window) | (kv_idx < n_sink))

    return sink_window


def block_causal(block: int) -> Mask:
    """Everything in the query's block of `block` tokens and all before it: kv_idx // block <= q_idx // block.

    >>> from flexmask import masks
    >>> m = masks.block_causal(4)
    >>> [k for k in range(12) if m(0, 0, 5, k)]
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    positive(block=block)

    @mask
    def block_causal(q_idx: Any, kv_idx: Any) -> Any:
        return q_idx // block >= kv_idx // block

    return block_causal


def chunked_causal(chunk: int) -> Mask:
    """Causal within chunks of `chunk` tokens: kv_idx <= q_idx and q_idx // chunk == kv_idx // chunk (Llama 4's local layers).

    >>> from flexmask import masks
    >>> m = masks.chunked_causal(4)
    >>> [k for k in range(12) if m(0, 0, 6, k)]
    [4, 5, 6]
    """
    positive(chunk=chunk)

    @mask
    def chunked_causal(q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (q_idx // chunk == kv_idx // chunk)

    return chunked_causal


def strided(stride: int) -> Mask:
    """The last `stride` keys and every `stride`-th before: kv_idx <= q_idx, and q - k < stride or (q - k) % stride == 0.

    The strided pattern of Sparse Transformers (arXiv 1904.10509).

    >>> from flexmask import masks
    >>> m = masks.strided(3)
    >>> [k for k in range(12) if m(0, 0, 10, k)]
    [1, 4, 7, 8, 9, 10]
    """
    positive(stride=stride)

    @mask
    def strided(q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & ((q_idx - kv_idx < stride) | ((q_idx - kv_idx) % stride == 0))

    return strided


def fixed(block: int, summary: int = 1) -> Mask:
    """The query's block, and the last `summary` keys of each block: the fixed pattern of Sparse Transformers (arXiv 1904.10509).

    kv_idx <= q_idx, and q_idx // block == kv_idx // block or kv_idx % block >= block - summary.

    >>> from flexmask import masks
    >>> m = masks.fixed(4, 1)
    >>> [k for k in range(12) if m(0, 0, 9, k)]
    [3, 7, 8, 9]
    """
    positive(block=block)

    @mask
    def fixed(q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & ((q_idx // block == kv_idx // block) | (kv_idx % block >= block - summary))

    return fixed
