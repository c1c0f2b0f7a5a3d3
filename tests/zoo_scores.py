"""Scores of the zoo: the ready-made ones, and as people write them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from zoo_case import Case, entry

from flexmask import scores
from flexmask.mods import Score, score

SCORES: dict[str, Callable[..., Score]] = {}


def a_score(make: Callable[[Case], object]) -> Callable[[Case], object]:
    entry(SCORES, score, make.__name__, make)
    return make


READY_MADE_SCORES: dict[str, Callable[[Case], Score]] = {
    "softcap": lambda c: scores.softcap(2.0),
    "softcap_by_tensor": lambda c: scores.softcap(torch.tensor(1.5, device=c.device)),
    "temperature": lambda c: scores.temperature(0.7),
    "temperature_heads": lambda c: scores.temperature(c.reals(c.H).abs() + 0.5),
    "head_gate": lambda c: scores.head_gate(c.reals(c.H)),
    "head_gate_batch": lambda c: scores.head_gate(c.reals(c.B, c.H, dtype=torch.bfloat16)),
    "log_n_scaling": lambda c: scores.log_n_scaling(8),
    "floor_scaling": lambda c: scores.floor_scaling(0.3, 5),
    "checkerboard": lambda c: scores.checkerboard(),
    "chain": lambda c: scores.chain(scores.alibi(c.H, device=c.device), scores.softcap(3.0), scores.head_gate(c.reals(c.H))),
    "score_at_offset": lambda c: scores.at_offset(scores.alibi(c.H, device=c.device), q_offset=11, kv_offset=2),
    "alibi": lambda c: scores.alibi(c.H, device=c.device),
    "alibi_symmetric": lambda c: scores.alibi(c.reals(c.H).abs(), symmetric=True),
    "relative_bias": lambda c: scores.relative_bias(c.reals(2 * c.n - 1)),
    "relative_bias_clipped": lambda c: scores.relative_bias(c.reals(c.H, 9, dtype=torch.float16)),
    "t5_bias": lambda c: scores.t5_bias(c.reals(32, c.H)),
    "t5_bias_decoder": lambda c: scores.t5_bias(c.reals(12, c.H, dtype=torch.bfloat16), max_distance=40, bidirectional=False),
    "swin_bias": lambda c: _swin(c, height=math.ceil(c.n / 6), width=6),
    "distance_decay": lambda c: scores.distance_decay(0.1),
    "distance_decay_heads": lambda c: scores.distance_decay(c.reals(c.H).abs()),
    "kerple": lambda c: scores.kerple(c.reals(c.H).abs(), c.reals(c.H).abs()),
    "window_bias": lambda c: scores.window_bias(5, 0.5),
    "head_bias": lambda c: scores.head_bias(c.reals(c.H)),
    "key_bias": lambda c: scores.key_bias(c.reals(c.B, c.KV)),
    "full_bias": lambda c: scores.full_bias(c.reals(c.B, c.H, c.Q, c.KV, dtype=torch.float16)),
    "full_bias_shared_heads": lambda c: scores.full_bias(c.reals(c.B, 1, c.Q, c.KV)),
    "decomposed_bias": lambda c: scores.decomposed_bias(c.reals(c.B, c.H, c.Q, math.ceil(c.KV / 4)), c.reals(c.B, c.H, c.Q, 4), width=4),
    "forgetting": lambda c: scores.forgetting(torch.nn.functional.logsigmoid(c.reals(c.B, c.H, c.n)).cumsum(-1)),
    "group_bias": lambda c: scores.group_bias(c.ints(0, 3, c.n), c.reals(3, 3)),
}


def _swin(c: Case, height: int, width: int) -> Score:
    return scores.swin_bias(c.reals((2 * height - 1) * (2 * width - 1), c.H), height, width)


for _name, _make in READY_MADE_SCORES.items():
    entry(SCORES, score, _name, _make)


@a_score
def identity(c):
    return lambda score, b, h, q, k: score


@a_score
def causal_by_score(c):
    """A mask in disguise: -inf where the key is later."""
    return lambda score, b, h, q, k: torch.where(q >= k, score, -float("inf"))


@a_score
def relative_distance(c):
    return lambda score, b, h, q, k: score + (q - k)


@a_score
def squared(c):
    return lambda score, b, h, q, k: score * score


@a_score
def bias_in_steps(c):
    bias = c.reals(c.B, c.H, c.Q, c.KV)
    return lambda score, b, h, q, k: score + bias[b][h][q, k]


@a_score
def table_by_distance_score(c):
    table, n = c.reals(c.H, 2 * c.n), c.n
    return lambda score, b, h, q, k: score + table[h, q - k + n]


@a_score
def document_bias(c):
    doc, bonus = c.documents(c.B, dtype=torch.int16), c.reals(c.H)
    return lambda score, b, h, q, k: score + torch.where(doc[b, q] == doc[b, k], bonus[h], 0.0)


@a_score
def sigmoid_gate(c):
    gate = c.reals(c.H, c.KV)
    return lambda score, b, h, q, k: score * torch.sigmoid(gate[h, k])


@a_score
def smooth_functions(c):
    return lambda score, b, h, q, k: torch.log(1.0 + torch.exp(score)) + torch.sqrt((q + k).float()) / 10.0 + torch.sin(score / 3.0)


@a_score
def noncontiguous_bias(c):
    bias = c.reals(c.KV, 2 * c.Q).T[::2]
    return lambda score, b, h, q, k: score + bias[q, k]


@a_score
def named_parameters(c):
    def alibi(score, q_idx, kv_idx, head_idx, bias_factor=0.05):
        return score - bias_factor * (head_idx + 1) * abs(q_idx - kv_idx)

    return alibi


@a_score
def partial_score(c):
    def scaled(score, b, h, q, k, factor):
        return score * factor

    return functools.partial(scaled, factor=0.3)


@a_score
def table_by_sign_of_score(c):
    factor = c.reals(c.H, 2)
    return lambda score, b, h, q, k: score * factor[h, (score > 0).to(torch.int64)]
