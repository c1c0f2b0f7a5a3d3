"""Masks of tokens' groups: documents in a packed sequence, prefixes, padding, questions with several answers, evicted keys."""

from __future__ import annotations

from typing import Any

import torch

from ..mods import Mask, mask, sorted
from .tables import Ids, expect, per_batch, per_token


def document(doc: Ids) -> Mask:
    """Attention within a document: doc[q_idx] == doc[kv_idx]. `doc`: ids, int [N] or [B, N], in any order; where they
    always ascend, `flexmask.sorted(doc)` spares looking whether they do.

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.causal & masks.document(torch.tensor([0, 0, 0, 1, 1]))
    >>> [k for k in range(5) if m(0, 0, 4, k)]
    [3, 4]
    """
    if expect(doc, (1, 2), "document ids [N] or [B, N]") == 2:

        @mask
        def batch_document(b: Any, q_idx: Any, kv_idx: Any) -> Any:
            return doc[b, q_idx] == doc[b, kv_idx]

        return batch_document

    @mask
    def document(q_idx: Any, kv_idx: Any) -> Any:
        return doc[q_idx] == doc[kv_idx]

    return document


def offsets(lengths: torch.Tensor) -> torch.Tensor:
    """Document lengths [D] -> offsets [D + 1], int32, starting with 0: the cu_seqlens of variable-length attention.

    >>> import torch
    >>> from flexmask import masks
    >>> masks.offsets(torch.tensor([3, 0, 2])).tolist()
    [0, 3, 3, 5]
    """
    expect(lengths, 1, "document lengths [D]")
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def document_ids(cu_seqlens: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """Offsets [D + 1] -> the document of each position, int32 [length]; `length` defaults to the last offset (read from the device).

    Positions from the last offset on belong together, to document D.

    >>> import torch
    >>> from flexmask import masks
    >>> masks.document_ids(torch.tensor([0, 2, 5]), length=6).tolist()
    [0, 0, 1, 1, 1, 2]
    """
    expect(cu_seqlens, 1, "offsets [D + 1]")
    positions = torch.arange(int(cu_seqlens[-1]) if length is None else length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True).to(torch.int32)


def packed(cu_seqlens: torch.Tensor, length: int | None = None) -> Mask:
    """Attention within the documents [cu_seqlens[i], cu_seqlens[i + 1]) of one packed sequence; see `document_ids` for the arguments.

    The offsets are read when the mask is built: a later change in them needs a new mask (the kernel stays the same).

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.packed(masks.offsets(torch.tensor([2, 3])))
    >>> [k for k in range(5) if m(0, 0, 3, k)]
    [2, 3, 4]
    """
    return document(sorted(document_ids(cu_seqlens, length)))  # counting documents up to a position ascends


def per_document(inner: Mask, cu_seqlens: torch.Tensor, length: int | None = None) -> Mask:
    """`inner` within each packed document, with positions counted from the document's start; arguments as for `packed`.

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.per_document(masks.prefix_lm(2), torch.tensor([0, 3, 7]))
    >>> [k for k in range(7) if m(0, 0, 3, k)]
    [3, 4]
    """
    first = torch.nn.functional.pad(cu_seqlens.to(torch.int32), (0, 1), value=-1)
    start = first[document_ids(cu_seqlens, length).long()]
    inner = mask(inner)

    @mask
    def per_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        # documents differ in where they start, so the starts serve as ids
        return (start[q_idx] == start[kv_idx]) & inner(b, h, q_idx - start[q_idx], kv_idx - start[kv_idx])

    return per_document


def prefix_lm(prefix: int | torch.Tensor) -> Mask:
    """Causal, with the first `prefix` keys seen by all: kv_idx < prefix or kv_idx <= q_idx (T5, arXiv 1910.10683).

    `prefix`: a number, a 0-dimensional tensor, or int [B].

    >>> from flexmask import masks
    >>> m = masks.prefix_lm(3)
    >>> [k for k in range(6) if m(0, 0, 0, k)]
    [0, 1, 2]
    """
    length = per_batch(prefix)

    @mask
    def prefix_lm(b: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx < length(b)) | (q_idx >= kv_idx)

    return prefix_lm


def prefix_document(doc: Ids, prefix_end: Ids) -> Mask:
    """A prefix LM in each document: same document, and kv_idx <= q_idx or kv_idx < prefix_end[kv_idx].

    `doc`: ids, int [N] or [B, N]; `prefix_end`, same shape: for each position, where its document's prefix ends in the sequence.

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.prefix_document(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 2, 2, 4, 4]))
    >>> [k for k in range(5) if m(0, 0, 0, k)]
    [0, 1]
    """
    ids, end = per_token(doc), per_token(prefix_end)

    @mask
    def prefix_document(b: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids(b, q_idx) == ids(b, kv_idx)) & ((q_idx >= kv_idx) | (kv_idx < end(b, kv_idx)))

    return prefix_document


def padding(lengths: torch.Tensor) -> Mask:
    """Keys up to each sequence's length: kv_idx < lengths[b]. `lengths`: int [B].

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.padding(torch.tensor([5, 2]))
    >>> [k for k in range(6) if m(1, 0, 0, k)]
    [0, 1]
    """
    expect(lengths, 1, "lengths [B]")

    @mask
    def padding(b: Any, kv_idx: Any) -> Any:
        return kv_idx < lengths[b]

    return padding


def key_padding(keep: torch.Tensor) -> Mask:
    """Keys that are marked: keep[b, kv_idx]. `keep`: bool [B, KV] or [KV], true for tokens, false for padding.

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.key_padding(torch.tensor([[False, True, True]]))
    >>> [k for k in range(3) if m(0, 0, 0, k)]
    [1, 2]
    """
    kept = per_token(keep)

    @mask
    def key_padding(b: Any, kv_idx: Any) -> Any:
        return kept(b, kv_idx)

    return key_padding


def shared_question(doc: Ids, segment: Ids) -> Mask:
    """Several answers to one question in one sequence, each blind to the others (reward models, DPO; arXiv 2410.01359).

    kv_idx <= q_idx, same document, and segment[kv_idx] == 0 (the question) or the same segment.
    `doc` and `segment`: int [N] or [B, N]; segment 0 is a document's question, 1, 2, ... its answers.

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.shared_question(torch.zeros(5, dtype=torch.int32), torch.tensor([0, 0, 1, 2, 2]))
    >>> [k for k in range(5) if m(0, 0, 4, k)]
    [0, 1, 3, 4]
    """
    ids, part = per_token(doc), per_token(segment)

    @mask
    def shared_question(b: Any, q_idx: Any, kv_idx: Any) -> Any:
        same_part = (part(b, kv_idx) == 0) | (part(b, q_idx) == part(b, kv_idx))
        return (q_idx >= kv_idx) & (ids(b, q_idx) == ids(b, kv_idx)) & same_part

    return shared_question


def shared_prefix(prefix: int | torch.Tensor, doc: Ids) -> Mask:
    """Documents that all continue one prefix: kv_idx <= q_idx, and kv_idx < prefix or the same document.

    `prefix`: tokens in the common prefix, a number or int [B]; `doc`: ids, int [N] or [B, N].

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.shared_prefix(2, torch.tensor([0, 0, 1, 1, 2]))
    >>> [k for k in range(5) if m(0, 0, 4, k)]
    [0, 1, 4]
    """
    length, ids = per_batch(prefix), per_token(doc)

    @mask
    def shared_prefix(b: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & ((kv_idx < length(b)) | (ids(b, q_idx) == ids(b, kv_idx)))

    return shared_prefix


def causal_blockwise(doc: Ids, test_start: int | torch.Tensor) -> Mask:
    """In-context learning: examples see themselves, the test example sees all (arXiv 2410.01359).

    kv_idx <= q_idx, and the same document or q_idx >= test_start. `doc`: ids, int [N] or [B, N]; `test_start`: a number or int [B].

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.causal_blockwise(torch.tensor([0, 0, 1, 1, 2]), 4)
    >>> [k for k in range(5) if m(0, 0, 3, k)], [k for k in range(5) if m(0, 0, 4, k)]
    ([2, 3], [0, 1, 2, 3, 4])
    """
    ids, start = per_token(doc), per_batch(test_start)

    @mask
    def causal_blockwise(b: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & ((ids(b, q_idx) == ids(b, kv_idx)) | (q_idx >= start(b)))

    return causal_blockwise


def qk_sparse(span: Ids) -> Mask:
    """Causal, less the pairs of different tokens in one marked span (QK-sparse attention, arXiv 2306.01160, 2410.01359).

    kv_idx <= q_idx, and span[q_idx] != span[kv_idx] or span[kv_idx] < 0 or q_idx == kv_idx.
    `span`: int [N] or [B, N], the number of the span a token lies in, -1 for none.

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.qk_sparse(torch.tensor([-1, 0, 0, 0, -1]))
    >>> [k for k in range(5) if m(0, 0, 3, k)], [k for k in range(5) if m(0, 0, 4, k)]
    ([0, 3], [0, 1, 2, 3, 4])
    """
    number = per_token(span)

    @mask
    def qk_sparse(b: Any, q_idx: Any, kv_idx: Any) -> Any:
        apart = (number(b, q_idx) != number(b, kv_idx)) | (number(b, kv_idx) < 0)
        return (q_idx >= kv_idx) & (apart | (q_idx == kv_idx))

    return qk_sparse


def transfusion(image: Ids) -> Mask:
    """Causal text with images whose tokens see each other: kv_idx <= q_idx, or both in one image (Transfusion, arXiv 2408.11039).

    `image`: int [N] or [B, N], the number of the image a token belongs to, -1 for text.

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.transfusion(torch.tensor([-1, 0, 0, 0, -1]))
    >>> [k for k in range(5) if m(0, 0, 1, k)], [k for k in range(5) if m(0, 0, 0, k)]
    ([0, 1, 2, 3], [0])
    """
    number = per_token(image)

    @mask
    def transfusion(b: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) | ((number(b, q_idx) == number(b, kv_idx)) & (number(b, q_idx) >= 0))

    return transfusion


def random_eviction(evict: Ids) -> Mask:
    """Causal attention to keys not yet evicted: kv_idx <= q_idx < evict[kv_idx].

    `evict`: int [KV] or [B, H, KV], the first query row that no longer sees the key (at least KV: never evicted). (arXiv 2410.01359)

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.random_eviction(torch.tensor([4, 2, 4, 4]))
    >>> [k for k in range(4) if m(0, 0, 3, k)]
    [0, 2, 3]
    """
    if expect(evict, (1, 3), "a tensor [KV] or [B, H, KV]") == 3:

        @mask
        def head_eviction(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return (q_idx >= kv_idx) & (q_idx < evict[b, h, kv_idx])

        return head_eviction

    @mask
    def random_eviction(q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (q_idx < evict[kv_idx])

    return random_eviction
