"""Scores with a term for where query and key stand: ALiBi, relative tables, T5 buckets, decays."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..mods import Score, score


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> torch.Tensor:
    """ALiBi's slopes, float32 [heads]: 2**(-8 (i + 1) / heads) for a power of two; else those of the power of two below, and then
    every other one of twice that power (arXiv 2108.12409, the authors' code).

    >>> from flexmask import scores
    >>> scores.alibi_slopes(4).tolist(), scores.alibi_slopes(3).tolist()
    ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1; got {heads}.")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def alibi(slopes: int | torch.Tensor, symmetric: bool = False, device: torch.device | str | None = None) -> Score:
    """score + slopes[h] * (kv_idx - q_idx), or with `symmetric` score - slopes[h] * |q_idx - kv_idx| (ALiBi, arXiv 2108.12409).

    `slopes`: float [H], or the number of heads for the paper's own, made on `device`.

    >>> import torch
    >>> from flexmask import scores
    >>> float(scores.alibi(torch.tensor([0.5, 0.25]))(1.0, 0, 0, 7, 3))
    -1.0
    """
    table = slopes if isinstance(slopes, torch.Tensor) else alibi_slopes(slopes, device)

    @score
    def alibi(score: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[h] * (kv_idx - q_idx)

    @score
    def symmetric_alibi(score: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - table[h] * abs(q_idx - kv_idx)

    return symmetric_alibi if symmetric else alibi


def relative_bias(table: torch.Tensor) -> Score:
    """A learned number for each distance: score + table[h, clip(q_idx - kv_idx, -R, R) + R].

    `table`: float [H, 2 R + 1] or [2 R + 1]; entry R is distance 0. Distances beyond R use the last entry (Shaw et al.,
    arXiv 1803.02155). For tables without clipping choose R >= N - 1.

    >>> import torch
    >>> from flexmask import scores
    >>> near = scores.relative_bias(torch.tensor([-1.0, 0.0, 1.0]))
    >>> [float(near(0.0, 0, 0, torch.tensor(2), k)) for k in range(5)]
    [1.0, 1.0, 0.0, -1.0, -1.0]
    """
    if table.dim() not in (1, 2) or table.shape[-1] % 2 == 0:
        raise ValueError(f"expected a table [H, 2 R + 1] or [2 R + 1]; got {list(table.shape)}.")
    reach = table.shape[-1] // 2
    if table.dim() == 2:

        @score
        def head_relative_bias(score: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score + table[h, torch.clamp(q_idx - kv_idx, -reach, reach) + reach]

        return head_relative_bias

    @score
    def relative_bias(score: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[torch.clamp(q_idx - kv_idx, -reach, reach) + reach]

    return relative_bias


def t5_buckets(
    buckets: int = 32, max_distance: int = 128, bidirectional: bool = True, device: torch.device | str | None = None
) -> torch.Tensor:
    """T5's bucket of each distance kv_idx - q_idx from -max_distance to max_distance, int32 [2 * max_distance + 1].

    Half of the buckets are single distances, the others grow logarithmically up to `max_distance`; beyond it all is one bucket.
    Computed once in float32 as T5 does, since its rounding decides the bucket's edges (arXiv 1910.10683).

    >>> from flexmask import scores
    >>> scores.t5_buckets(8, 8, bidirectional=False).tolist()[:9]
    [7, 7, 6, 5, 4, 3, 2, 1, 0]
    """
    distance = torch.arange(-max_distance, max_distance + 1)
    side = buckets // 2 if bidirectional else buckets
    exact = side // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(f"T5 needs more buckets or distance; got {buckets} buckets for {max_distance}.")
    length = distance.abs() if bidirectional else (-distance).clamp(min=0)
    grown = torch.log(length.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (side - exact)
    far = (exact + grown.long()).clamp(max=side - 1)
    bucket = torch.where(length < exact, length, far)
    return (bucket + (side * (distance > 0) if bidirectional else 0)).to(torch.int32).to(device)


def t5_bias(table: torch.Tensor, max_distance: int = 128, bidirectional: bool = True) -> Score:
    """T5's relative bias: score + table[bucket(kv_idx - q_idx), h] (arXiv 1910.10683).

    `table`: float [buckets, H], as in T5's checkpoints; `bidirectional` for encoders, False for decoders. T5 does not scale its
    scores: compile with scale=1.

    >>> import torch
    >>> from flexmask import scores
    >>> bias = scores.t5_bias(torch.arange(32.0)[:, None])
    >>> float(bias(0.0, 0, 0, torch.tensor(9), 5)), float(bias(0.0, 0, 0, torch.tensor(5), 9))
    (4.0, 20.0)
    """
    if table.dim() != 2:
        raise ValueError(f"expected a table [buckets, H]; got {list(table.shape)}.")
    bucket = t5_buckets(table.shape[0], max_distance, bidirectional, table.device)

    @score
    def t5_bias(score: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[bucket[torch.clamp(kv_idx - q_idx, -max_distance, max_distance) + max_distance], h]

    return t5_bias


def swin_bias(table: torch.Tensor, height: int, width: int) -> Score:
    """A learned number for each offset in a picture of height x width tokens, row by row (Swin, arXiv 2103.14030).

    score + table[(q_row - kv_row + height - 1) * (2 * width - 1) + q_column - kv_column + width - 1, h];
    `table`: float [(2 * height - 1) * (2 * width - 1), H].

    >>> import torch
    >>> from flexmask import scores
    >>> float(scores.swin_bias(torch.arange(9.0)[:, None], 2, 2)(0.0, 0, 0, 3, 0))
    8.0
    """
    down, across = 2 * height - 1, 2 * width - 1
    if table.dim() != 2 or table.shape[0] != down * across:
        raise ValueError(f"expected a table [{down * across}, H] for {height} x {width}; got {list(table.shape)}.")

    @score
    def swin_bias(score: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        row = q_idx // width - kv_idx // width + height - 1
        column = q_idx % width - kv_idx % width + width - 1
        return score + table[row * across + column, h]

    return swin_bias


def distance_decay(rate: float | torch.Tensor) -> Score:
    """A log decay by distance: score - rate * |q_idx - kv_idx|. `rate`: a number, a 0-dimensional tensor or float [H], rate[h].

    Retention's decay gamma (arXiv 2307.08621) is rate = -log(gamma).

    >>> from flexmask import scores
    >>> scores.distance_decay(0.5)(1.0, 0, 0, 7, 3)
    -1.0
    """
    if isinstance(rate, torch.Tensor) and rate.dim() == 1:

        @score
        def head_distance_decay(score: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score - rate[h] * abs(q_idx - kv_idx)

        return head_distance_decay

    @score
    def distance_decay(score: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - rate * abs(q_idx - kv_idx)

    return distance_decay


def kerple(weight: torch.Tensor, rate: torch.Tensor) -> Score:
    """KERPLE's logarithmic kernel: score - weight[h] * log(1 + rate[h] * |q_idx - kv_idx|) (arXiv 2205.09921). Both positive, float [H].

    >>> import torch
    >>> from flexmask import scores
    >>> float(scores.kerple(torch.ones(1), torch.ones(1))(1.0, 0, 0, torch.tensor(3), 3))
    1.0
    """

    @score
    def kerple(score: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - weight[h] * torch.log(1.0 + rate[h] * abs(q_idx - kv_idx))

    return kerple


def window_bias(size: int | torch.Tensor, bias: float | torch.Tensor) -> Score:
    """A bonus near the query: score + bias where |q_idx - kv_idx| <= size. Numbers or 0-dimensional tensors.

    >>> import torch
    >>> from flexmask import scores
    >>> scores.window_bias(1, 10.0)(0.0, 0, 0, torch.tensor(2), torch.arange(5)).tolist()
    [0.0, 10.0, 10.0, 10.0, 0.0]
    """

    @score
    def window_bias(score: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + torch.where(abs(q_idx - kv_idx) <= size, bias, 0.0)

    return window_bias
