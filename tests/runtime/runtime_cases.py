"""Masks as expressions, what they keep written out, and states by looking at every pair."""

from __future__ import annotations

import torch

from flexmask.analysis import derive
from flexmask.ir import FALSE, KV_LEN, TRUE, B, Env, H, K, Q, const, evaluate, load, make, scalar, simplify

LONGEST = 320


def t(number, *indices, kind="int"):
    return load(number, kind, *indices)


def eq(x, y):
    return make("eq", (x, y))


def documents(*lead, seed=0, longest=LONGEST):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*lead, longest, generator=generator) < 1 / 20).long().cumsum(-1).int()


def numbers(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


ascending, shuffled = documents(), documents()[torch.randperm(LONGEST, generator=torch.Generator().manual_seed(1))]
s0 = scalar(0, "int")

# name: (predicate, tensors, scalars)
MASKS = {
    "everything": (TRUE, (), ()),
    "nothing": (FALSE, (), ()),
    "causal": (K <= Q, (), ()),
    "causal to the end": (K - KV_LEN <= Q - s0, (), (200,)),
    "window": ((K <= Q) & (Q - K < s0), (), (40,)),
    "no window at all": ((K <= Q) & (Q - K < s0), (), (0,)),
    "two sides": ((Q - K < 9) & (K - Q < 20), (), ()),
    "sink and window": ((K <= Q) & ((Q - K < 30) | (K < 4)), (), ()),
    "three pieces": (((K <= Q) & (Q - K < 10)) | (K < 4) | ((K > 100) & (K < 130)), (), ()),
    "a hole": (~((K > 60) & (K < 70)), (), ()),
    "sorted documents": (eq(t(0, Q), t(0, K)), (ascending,), ()),
    "causal sorted documents": ((K <= Q) & eq(t(0, Q), t(0, K)), (ascending,), ()),
    "causal shuffled documents": ((K <= Q) & eq(t(0, Q), t(0, K)), (shuffled,), ()),
    "bounds from tables": ((K < t(0, Q)) & (K >= t(1, Q)), (numbers(0, 300, LONGEST), numbers(0, 200, LONGEST, seed=2)), ()),
    "eviction": ((K <= Q) & (Q < t(0, K)), (numbers(0, 400, LONGEST),), ()),
    "every other": (eq((Q - K) % 2, const(0)), (), ()),
    "causal, every third": ((K <= Q) & eq((Q - K) % 3, const(0)), (), ()),
    "padding by batch": ((K <= Q) & (K < t(0, B)), (torch.tensor([70, 0]),), ()),
    "documents by batch": (eq(t(0, B, Q), t(0, B, K)), (documents(2, seed=3),), ()),
    "one batch entry shuffled": (eq(t(0, B, Q), t(0, B, K)), (torch.stack([ascending, shuffled]),), ()),
    "window by head": ((K <= Q) & (Q - K < H * 25), (), ()),
    "by batch and head": ((K <= Q) & (K >= t(0, B, H)), (numbers(0, 100, 2, 3),), ()),
    "pairs": (t(0, Q, K, kind="bool"), (numbers(0, 2, LONGEST, LONGEST).bool(),), ()),
}
BATCH, HEADS = 2, 3


def facts_of(name):
    return derive(simplify(MASKS[name][0]), tuple((s > 0) - (s < 0) for s in MASKS[name][2]))


def dense_of(name, q_len, kv_len):
    """bool [BATCH, HEADS, q_len, kv_len]."""
    predicate, tensors, scalars = MASKS[name]
    indices = {"b": torch.arange(BATCH).view(-1, 1, 1, 1), "h": torch.arange(HEADS).view(-1, 1, 1)}
    indices |= {"q_idx": torch.arange(q_len).view(-1, 1), "kv_idx": torch.arange(kv_len), "q_len": q_len, "kv_len": kv_len}
    kept = evaluate(predicate, Env(indices, tensors, scalars))
    return torch.as_tensor(kept, dtype=torch.bool).expand(BATCH, HEADS, q_len, kv_len)


def states_of(dense, block_q, block_kv):
    """Tile states, int8, of a dense mask."""
    *lead, q_len, kv_len = dense.shape
    found = torch.empty(*lead, -(-q_len // block_q), -(-kv_len // block_kv), dtype=torch.int8)
    for i in range(found.shape[-2]):
        for j in range(found.shape[-1]):
            tile = dense[..., i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv].flatten(-2)
            found[..., i, j] = tile.any(-1).to(torch.int8) + tile.all(-1).to(torch.int8)
    return found
