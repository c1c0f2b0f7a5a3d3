"""A repeated call traces nothing anew, sees what was rebound, and keeps nothing alive that its user has dropped."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from flex_cases import causal
from torch.nn.attention import flex_attention as theirs

import flexmask
from flexmask import compat as ours
from flexmask.compat import attention
from flexmask.compat.kept import MOST, Kept

Q = torch.randn(1, 2, 16, 16)


class Bias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = 0.5

    def method(self, score, b, h, q_idx, kv_idx):
        return score + self.slope * (q_idx - kv_idx)

    forward = method


class Sloped:
    def __init__(self):
        self.slope = 0.5

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score + self.slope * (q_idx - kv_idx)


def function(score, b, h, q_idx, kv_idx):
    return 2 * score


MODS = {
    "a function": lambda: function, "a closure": lambda: _scaled(3.0), "a bound method": lambda: Bias().method, "an object": Sloped,
    "a module": Bias, "a partial": lambda: functools.partial(function), "a score": lambda: flexmask.score(function),
    "nothing": lambda: None,
}  # fmt: skip


def _scaled(factor):
    def scaled(score, b, h, q_idx, kv_idx):
        return factor * score

    return scaled


def _block_masks():
    return [library.create_block_mask(causal, None, None, 16, 16, device="cpu", BLOCK_SIZE=8) for library in (ours, theirs)]


@pytest.mark.parametrize("name", MODS)
def test_a_repeated_call_traces_nothing(name):
    mod = MODS[name]()
    owner = getattr(mod, "__self__", None)
    for block_mask in (*_block_masks(), flexmask.masks.causal, None):
        ours.flex_attention(Q, Q, Q, mod, block_mask)
        before = flexmask.cache_info()["traces"]
        for _ in range(3):
            again = mod if owner is None else owner.method  # a bound method is a new object each time
            ours.flex_attention(Q, Q, Q, again, block_mask)
        assert flexmask.cache_info()["traces"] == before, block_mask


@pytest.mark.parametrize("masked", [False, True])
def test_what_the_user_drops_goes(masked):
    """Even while the block mask, or the table for calls without one, lives on; objects with methods when Python collects garbage."""
    block_mask = _block_masks()[0] if masked else None
    ours.flex_attention(Q, Q, Q, function, block_mask)
    kept = attention._UNMASKED if block_mask is None else block_mask._kept
    gc.collect()
    size, gone = len(kept._found), []
    for name in ("a closure", "a bound method", "an object", "a module", "a score"):
        held = MODS[name]()
        ours.flex_attention(Q, Q, Q, held, block_mask)
        gone.append(weakref.ref(getattr(held, "__self__", held)))
    assert len(kept._found) >= size + 4
    del held
    gc.collect()
    assert [ref() for ref in gone] == [None] * 5 and len(kept._found) == size


def test_a_captured_tensor_goes_at_once():
    """Without waiting for a garbage collection: it may be large, and on a GPU."""
    gc.disable()
    try:
        block_mask = _block_masks()[0]
        table = torch.randn(16)
        gone = weakref.ref(table)
        mod = _biased(table)
        ours.flex_attention(Q, Q, Q, mod, block_mask)
        del table, mod
        assert gone() is None
    finally:
        gc.enable()


def _biased(table):
    return lambda score, b, h, q_idx, kv_idx: score + table[kv_idx]


def test_a_rebound_capture_is_seen():
    size, factor = 3, 1.0

    def window(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx).abs() < size

    def scaled(score, b, h, q_idx, kv_idx):
        return factor * score

    block_mask = ours.create_block_mask(window, None, None, 16, 16, device="cpu")
    for size, factor in ((3, 1.0), (5, 1.0), (5, 2.0), (16, 0.0)):  # noqa: B007
        out = ours.flex_attention(Q, Q, Q, scaled, block_mask)
        torch.testing.assert_close(out, flexmask.attention(Q, Q, Q, mask=window, score=scaled))
    owner = Sloped()
    first = ours.flex_attention(Q, Q, Q, owner)
    owner.slope = 0.0
    assert not torch.equal(ours.flex_attention(Q, Q, Q, owner), first)


def test_a_functions_own_parts_are_watched():
    def shifted(score, b, h, q_idx, kv_idx, slope=0.5):
        return score + slope * kv_idx

    first = ours.flex_attention(Q, Q, Q, shifted)
    shifted.__defaults__ = (0.0,)
    torch.testing.assert_close(ours.flex_attention(Q, Q, Q, shifted), ours.flex_attention(Q, Q, Q))
    assert not torch.equal(first, ours.flex_attention(Q, Q, Q, shifted))


def test_options_are_told_apart():
    results = [ours.flex_attention(Q, Q, Q, function, scale=scale) for scale in (None, 0.1, 1.0, 0.1)]
    assert torch.equal(results[1], results[3]) and not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def test_only_so_many_are_kept():
    kept, mods = Kept(), [_scaled(float(n)) for n in range(MOST + 5)]
    for mod in mods:
        kept.find(None, mod)
    assert len(kept._found) == MOST and kept.find(None, mods[-1]) is kept.find(None, mods[-1])
    assert kept.find(None, mods[0]).score.function is mods[0]
