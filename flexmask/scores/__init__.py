"""Ready-made score mods, each a few lines over (score, b, h, q_idx, kv_idx); `chain` applies several in turn.

All are functions of numbers and tensors that make a score. Numbers and tensors are run-time values, and tensors that require a
gradient get one. The score they receive is q @ k * scale.

>>> import torch
>>> from flexmask import reference, scores
>>> q, k, v = torch.randn(3, 1, 4, 6, 8)
>>> reference.attention(q, k, v, score=scores.chain(scores.alibi(4), scores.softcap(30.0))).shape
torch.Size([1, 4, 6, 8])
"""

from .learned import decomposed_bias, forgetting, full_bias, group_bias, head_bias, key_bias
from .position import (
    alibi,
    alibi_slopes,
    distance_decay,
    kerple,
    relative_bias,
    swin_bias,
    t5_bias,
    t5_buckets,
    window_bias,
)
from .scaling import at_offset, chain, checkerboard, floor_scaling, head_gate, log_n_scaling, softcap, temperature

__all__ = [
    "alibi", "alibi_slopes", "at_offset", "chain", "checkerboard", "decomposed_bias", "distance_decay", "floor_scaling", "forgetting",
    "full_bias", "group_bias", "head_bias", "head_gate", "kerple", "key_bias", "log_n_scaling", "relative_bias", "softcap", "swin_bias",
    "t5_bias", "t5_buckets", "temperature", "window_bias",
]  # fmt: skip
