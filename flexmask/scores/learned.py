"""Scores with learned or data-dependent terms: by head, key, pair, picture axis, or accumulated gates."""

from __future__ import annotations

from typing import Any

import torch

from ..mods import Score, score


def head_bias(bias: torch.Tensor) -> Score:
    """score + bias[h]. `bias`: float [H] or, for bias[b, h], [B, H].

    >>> import torch
    >>> from flexmask import scores
    >>> float(scores.head_bias(torch.tensor([1.0, 2.0]))(0.5, 0, 1, 0, 0))
    2.5
    """
    if bias.dim() == 2:

        @score
        def batch_head_bias(score: Any, b: Any, h: Any) -> Any:
            return score + bias[b, h]

        return batch_head_bias

    @score
    def head_bias(score: Any, h: Any) -> Any:
        return score + bias[h]

    return head_bias


def key_bias(bias: torch.Tensor) -> Score:
    """A term for each key: score + bias[kv_idx], bias[b, kv_idx] or bias[b, h, kv_idx], by the number of dimensions.

    >>> import torch
    >>> from flexmask import scores
    >>> float(scores.key_bias(torch.tensor([[1.0, 2.0, 3.0]]))(0.5, 0, 0, 0, 2))
    3.5
    """
    if bias.dim() == 1:

        @score
        def key_bias(score: Any, kv_idx: Any) -> Any:
            return score + bias[kv_idx]

        return key_bias
    if bias.dim() == 2:

        @score
        def batch_key_bias(score: Any, b: Any, kv_idx: Any) -> Any:
            return score + bias[b, kv_idx]

        return batch_key_bias

    @score
    def head_key_bias(score: Any, b: Any, h: Any, kv_idx: Any) -> Any:
        return score + bias[b, h, kv_idx]

    return head_key_bias


def full_bias(bias: torch.Tensor) -> Score:
    """A term for each pair: score + bias[b, h, q_idx, kv_idx]. `bias`: float [Q, KV], [H, Q, KV] or [B, H, Q, KV], B or H may be 1.

    >>> import torch
    >>> from flexmask import scores
    >>> float(scores.full_bias(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))(0.5, 0, 0, 1, 0))
    3.5
    """
    if bias.dim() not in (2, 3, 4):
        raise ValueError(f"expected a tensor [Q, KV], [H, Q, KV] or [B, H, Q, KV]; got {list(bias.shape)}.")
    whole = bias[(None,) * (4 - bias.dim())]
    if whole.shape[:2] == (1, 1):
        plane = whole[0, 0]
        return Score(lambda score, b, h, q_idx, kv_idx: score + plane[q_idx, kv_idx], "full_bias")
    if whole.shape[0] == 1:
        by_head = whole[0]
        return Score(lambda score, b, h, q_idx, kv_idx: score + by_head[h, q_idx, kv_idx], "full_bias")
    if whole.shape[1] == 1:
        by_batch = whole[:, 0]
        return Score(lambda score, b, h, q_idx, kv_idx: score + by_batch[b, q_idx, kv_idx], "full_bias")

    @score
    def full_bias(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + bias[b, h, q_idx, kv_idx]

    return full_bias


def decomposed_bias(rows: torch.Tensor, columns: torch.Tensor, width: int) -> Score:
    """A picture's two axes apart: score + rows[b, h, q_idx, kv_idx // width] + columns[b, h, q_idx, kv_idx % width].

    The decomposed relative positions of MViTv2 and SAM (arXiv 2112.01526, 2304.02643); `rows` float [B, H, Q, height], `columns`
    float [B, H, Q, width], usually products of q with learned tables, so that gradients to them matter.

    >>> import torch
    >>> from flexmask import scores
    >>> rows, columns = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[10.0, 20.0]]]])
    >>> float(scores.decomposed_bias(rows, columns, width=2)(0.0, 0, 0, 0, 3))
    22.0
    """
    if rows.dim() != 4 or columns.dim() != 4 or columns.shape[-1] != width:
        raise ValueError(f"expected [B, H, Q, height] and [B, H, Q, {width}]; got {list(rows.shape)} and {list(columns.shape)}.")

    @score
    def decomposed_bias(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + rows[b, h, q_idx, kv_idx // width] + columns[b, h, q_idx, kv_idx % width]

    return decomposed_bias


def forgetting(cumulative: torch.Tensor) -> Score:
    """Forgetting attention: score + c[b, h, q_idx] - c[b, h, kv_idx], c being the running sum of log forget gates (arXiv 2503.02130).

    `cumulative`: float [B, H, N], `torch.nn.functional.logsigmoid(gate).cumsum(-1)`; use with a causal mask.

    >>> import torch
    >>> from flexmask import scores
    >>> gates = torch.tensor([[[-1.0, -2.0, -4.0]]])
    >>> float(scores.forgetting(gates.cumsum(-1))(0.0, 0, 0, 2, 0))
    -6.0
    """
    if cumulative.dim() != 3:
        raise ValueError(f"expected running sums [B, H, N]; got {list(cumulative.shape)}.")

    @score
    def forgetting(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + cumulative[b, h, q_idx] - cumulative[b, h, kv_idx]

    return forgetting


def group_bias(group: torch.Tensor, table: torch.Tensor) -> Score:
    """A term for each pair of token kinds: score + table[group[q_idx], group[kv_idx]].

    `group`: int [N], the kind of each token (modality, speaker, turn); `table`: float [G, G], learnable.

    >>> import torch
    >>> from flexmask import scores
    >>> bias = scores.group_bias(torch.tensor([0, 1, 1]), torch.tensor([[0.0, -1.0], [-2.0, 0.5]]))
    >>> float(bias(0.0, 0, 0, 1, 0)), float(bias(0.0, 0, 0, 1, 2))
    (-2.0, 0.5)
    """

    @score
    def group_bias(score: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[group[q_idx], group[kv_idx]]

    return group_bias
