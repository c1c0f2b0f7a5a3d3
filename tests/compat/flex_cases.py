"""Masks and score mods as torch documents them for flex_attention, each with the sizes it is run at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Example:
    """One documented use: q [batch, heads, q_len, 16], k and v [batch, kv_heads, kv_len, 16]."""

    mask_mod: Callable[..., Any] | None = None
    score_mod: Callable[..., Any] | None = None
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    q_len: int = 72
    kv_len: int = 72
    mask_sizes: tuple[int | None, int | None] = (None, None)
    scale: float | None = None
    learned: tuple[torch.Tensor, ...] = ()


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def relative_positional(score, b, h, q_idx, kv_idx):
    return score + (q_idx - kv_idx)


def checkerboard(score, batch, head, token_q, token_kv):
    score = torch.where(torch.abs(token_kv - token_q) == 1, score * 0.5, score)
    return torch.where(torch.abs(token_kv - token_q) == 2, score * 2.0, score)


def causal_score(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score, -float("inf"))


def _alibi(heads: int):
    slopes = torch.exp2(-((torch.arange(1, heads + 1, dtype=torch.float64)) * 8.0 / heads))

    def alibi_mod(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    return alibi_mod


def _alibi_from_numbers(heads: int):
    def alibi_mod(score, b, h, q_idx, kv_idx):
        return score + torch.exp2(-((h + 1) * 8.0 / heads)) * (q_idx - kv_idx)

    return alibi_mod


def _softcap(cap: float):
    def tanh_softcap(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)

    return tanh_softcap


def _sliding_window(size: int):
    def sliding_window_causal(b, h, q_idx, kv_idx):
        causal_mask = q_idx >= kv_idx
        window_mask = q_idx - kv_idx <= size
        return causal_mask & window_mask

    return sliding_window_causal


def _prefix_lm(lengths: torch.Tensor):
    def prefix_mask(b, h, q_idx, kv_idx):
        return (kv_idx < lengths[b]) | (q_idx >= kv_idx)

    return prefix_mask


def _documents(document_id: torch.Tensor):
    def document_causal_mask(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (document_id[q_idx] == document_id[kv_idx])

    return document_causal_mask


def _in_documents(offsets: torch.Tensor, inner: Callable[..., Any]):
    """Jagged sequences: positions count from each sequence's own beginning, and the sequences do not see each other."""
    counts = offsets[1:] - offsets[:-1]
    document_id = torch.repeat_interleave(torch.arange(len(counts)), counts)

    def doc_mask_mod(b, h, q_idx, kv_idx):
        same_doc = document_id[q_idx] == document_id[kv_idx]
        q_logical = q_idx - offsets[document_id[q_idx]]
        kv_logical = kv_idx - offsets[document_id[kv_idx]]
        return same_doc & inner(b, h, q_logical, kv_logical)

    return doc_mask_mod


def _natten(width: int, kernel: int):
    def natten_mask(b, h, q_idx, kv_idx):
        q_x, q_y = q_idx // width, q_idx % width
        kv_x, kv_y = kv_idx // width, kv_idx % width
        center_x = q_x.clamp(kernel // 2, (width - 1) - kernel // 2)
        center_y = q_y.clamp(kernel // 2, (width - 1) - kernel // 2)
        return ((center_x - kv_x).abs() <= kernel // 2) & ((center_y - kv_y).abs() <= kernel // 2)

    return natten_mask


def _learned_bias(bias: torch.Tensor):
    def bias_mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, q_idx, kv_idx]

    return bias_mod


def _learned_relative(bias: torch.Tensor, most: int):
    def relative_mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, torch.clamp(q_idx - kv_idx, -most, most) + most]

    return relative_mod


def _offset(length: int, inner: Callable[..., Any]):
    """Decoding: queries stand at the end of the keys."""

    def offset_mask(b, h, q_idx, kv_idx):
        return inner(b, h, q_idx + length, kv_idx)

    return offset_mask


def examples() -> dict[str, Example]:
    seeded = torch.Generator().manual_seed(7)
    document = torch.tensor([0] * 20 + [1] * 7 + [2] * 45)
    offsets = torch.tensor([0, 20, 27, 72])
    table = torch.randn(4, 72, 72, generator=seeded, dtype=torch.float64).requires_grad_()
    distances = torch.randn(4, 17, generator=seeded, dtype=torch.float64).requires_grad_()
    padding = torch.tensor([72, 31])
    return {
        "nothing": Example(),
        "causal": Example(causal),
        "causal as a score mod": Example(score_mod=causal_score),
        "relative positions": Example(score_mod=relative_positional),
        "checkerboard": Example(score_mod=checkerboard),
        "alibi from a table": Example(causal, _alibi(4)),
        "alibi from numbers": Example(score_mod=_alibi_from_numbers(4)),
        "tanh soft-capping": Example(causal, _softcap(2.0), scale=0.7),
        "sliding window": Example(_sliding_window(11)),
        "prefix language model": Example(_prefix_lm(torch.tensor([5, 40])), mask_sizes=(2, None)),
        "documents": Example(_documents(document)),
        "jagged sequences": Example(_in_documents(offsets, _sliding_window(6)), batch=1),
        "neighbourhood of an image": Example(_natten(8, 5), q_len=64, kv_len=64),
        "padding, grouped heads": Example(lambda b, h, q, kv: kv < padding[b], kv_heads=2, mask_sizes=(2, 1)),
        "one window a head": Example(lambda b, h, q, kv: (q - kv).abs() <= 3 * h, mask_sizes=(1, 4)),
        "decoding": Example(_offset(71, causal), _softcap(3.0), q_len=1, kv_len=72),
        "more keys than queries": Example(_offset(30, causal), q_len=40, kv_len=70),
        "rows that keep nothing": Example(lambda b, h, q, kv: (q > 4) & (kv <= q - 5)),
        "learned bias": Example(causal, _learned_bias(table), learned=(table,)),
        "learned relative bias": Example(score_mod=_learned_relative(distances, 8), kv_heads=1, learned=(distances,)),
    }
