"""Scores changed by a factor or a curve: soft-caps, temperatures, gates."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..mods import Score, score


def softcap(cap: float | torch.Tensor) -> Score:
    """Scores held within (-cap, cap): cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118; Grok). `cap`: number or 0-dimensional tensor.

    >>> import torch
    >>> from flexmask import scores
    >>> scores.softcap(2.0)(torch.tensor([0.0, 100.0]), 0, 0, 0, 0).tolist()
    [0.0, 2.0]
    """

    @score
    def softcap(score: Any) -> Any:
        return cap * torch.tanh(score / cap)

    return softcap


def temperature(value: float | torch.Tensor) -> Score:
    """score / value. `value`: a number, a 0-dimensional tensor, or a float tensor [H] with one temperature a head.

    >>> from flexmask import scores
    >>> scores.temperature(2.0)(3.0, 0, 0, 0, 0)
    1.5
    """
    if isinstance(value, torch.Tensor) and value.dim() == 1:

        @score
        def head_temperature(score: Any, h: Any) -> Any:
            return score / value[h]

        return head_temperature

    @score
    def temperature(score: Any) -> Any:
        return score / value

    return temperature


def head_gate(gate: torch.Tensor) -> Score:
    """Each head's scores times its gate: score * gate[h]. `gate`: float [H] or [B, H], learnable.

    >>> import torch
    >>> from flexmask import scores
    >>> float(scores.head_gate(torch.tensor([1.0, 0.5]))(3.0, 0, 1, 0, 0))
    1.5
    """
    if gate.dim() == 2:

        @score
        def batch_gate(score: Any, b: Any, h: Any) -> Any:
            return score * gate[b, h]

        return batch_gate

    @score
    def head_gate(score: Any, h: Any) -> Any:
        return score * gate[h]

    return head_gate


def log_n_scaling(train_length: int) -> Score:
    """Longer contexts, sharper scores: score * max(1, log(q_idx + 1) / log(train_length)) (arXiv 2202.12172; Qwen's log-n).

    >>> import torch
    >>> from flexmask import scores
    >>> longer = scores.log_n_scaling(16)
    >>> float(longer(3.0, 0, 0, torch.tensor(9), 0)), round(float(longer(3.0, 0, 0, torch.tensor(255), 0)), 4)
    (3.0, 6.0)
    """
    if train_length < 2:
        raise ValueError(f"train_length must be at least 2; got {train_length}.")
    inverse = 1.0 / math.log(train_length)

    @score
    def log_n_scaling(score: Any, q_idx: Any) -> Any:
        return score * torch.clamp(torch.log((q_idx + 1).float()) * inverse, min=1.0)

    return log_n_scaling


def floor_scaling(beta: float, floor_length: int) -> Score:
    """score * (1 + beta * log(1 + (q_idx + 1) // floor_length)): Llama 4's attention temperature for long contexts.

    >>> import torch
    >>> from flexmask import scores
    >>> float(scores.floor_scaling(0.1, 8192)(3.0, 0, 0, torch.tensor(100), 0))
    3.0
    """
    if floor_length < 1:
        raise ValueError(f"floor_length must be at least 1; got {floor_length}.")

    @score
    def floor_scaling(score: Any, q_idx: Any) -> Any:
        return score * (1.0 + beta * torch.log(((q_idx + 1) // floor_length + 1).float()))

    return floor_scaling


def checkerboard(even: float = 2.0, odd: float = 0.5) -> Score:
    """score times `even` where q_idx - kv_idx is even, times `odd` where it is odd.

    >>> import torch
    >>> from flexmask import scores
    >>> scores.checkerboard()(1.0, 0, 0, torch.tensor(3), torch.arange(4)).tolist()
    [0.5, 2.0, 0.5, 2.0]
    """

    @score
    def checkerboard(score: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * torch.where((q_idx - kv_idx) % 2 == 0, even, odd)

    return checkerboard


def chain(*steps: Score) -> Score:
    """Several scores in turn, the first one first: chain(f, g) is g(f(score)).

    >>> from flexmask import scores
    >>> scores.chain(scores.temperature(2.0), scores.temperature(5.0))(30.0, 0, 0, 0, 0)
    3.0
    """
    links = tuple(score(step) for step in steps)

    @score
    def chain(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for link in links:
            score = link(score, b, h, q_idx, kv_idx)
        return score

    return chain


def at_offset(inner: Score, q_offset: int | torch.Tensor = 0, kv_offset: int | torch.Tensor = 0) -> Score:
    """`inner` for a slice of the sequence, as `masks.at_offset`. Offsets: numbers or 0-dimensional integer tensors.

    >>> from flexmask import scores
    >>> scores.at_offset(scores.distance_decay(1.0), q_offset=7)(0.0, 0, 0, 0, 5)
    -2.0
    """
    inner = score(inner)

    @score
    def at_offset(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return inner(score, b, h, q_idx + q_offset, kv_idx + kv_offset)

    return at_offset
