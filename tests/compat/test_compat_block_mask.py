"""A BlockMask made from a function is torch's in every attribute; once its lists are given or changed, they count."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from flex_cases import causal, examples
from torch.nn.attention import flex_attention as theirs

import flexmask
from flexmask import compat as ours
from flexmask.compat.lists import LISTS

MASKS = {name: case for name, case in examples().items() if case.mask_mod is not None}


def both(mask_mod, *sizes, **options):
    return [library.create_block_mask(mask_mod, *sizes, device="cpu", **options) for library in (ours, theirs)]


def assert_same(found, expected):
    for name in LISTS:
        ours_, theirs_ = getattr(found, name), getattr(expected, name, None)
        assert (ours_ is None) == (theirs_ is None), name
        if ours_ is not None:
            assert ours_.dtype == theirs_.dtype and torch.equal(ours_, theirs_), name
    assert found.shape == expected.shape and found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
    assert found.numel() == expected.numel() and found.sparsity() == expected.sparsity()
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert (str(found), found.to_string(grid_size=2, limit=1)) == (str(expected), expected.to_string(grid_size=2, limit=1))
    assert [type(part) for part in found.as_tuple(False)] == [type(part) for part in expected.as_tuple(False)]
    assert len(found.as_tuple()) == len(expected.as_tuple())


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block", [128, 16, (8, 32)])
def test_the_zoo_has_torchs_attributes(name, block):
    case = MASKS[name]
    found, expected = both(case.mask_mod, *case.mask_sizes, case.q_len, case.kv_len, BLOCK_SIZE=block)
    assert_same(found, expected)
    assert repr(found) == repr(expected) and found.mask_mod is case.mask_mod


@pytest.mark.parametrize("sizes", [(2, 3, 40, 24), (None, 3, 33, 65), (2, None, 64, 64), (1, 1, 1, 1)])
def test_sizes_of_batch_and_heads_are_torchs(sizes):
    found, expected = both(causal, *sizes, BLOCK_SIZE=16)
    assert_same(found, expected)


def test_without_full_blocks_of_their_own():
    given = {"B": None, "H": 2, "Q_LEN": 48, "KV_LEN": 48, "device": "cpu", "BLOCK_SIZE": 16}
    found = ours.create_block_mask(causal, **given, separate_full_blocks=False)
    assert found.full_kv_num_blocks is None
    if "separate_full_blocks" in inspect.signature(theirs.create_block_mask).parameters:  # newer than 2.11
        assert_same(found, theirs.create_block_mask(causal, **given, separate_full_blocks=False))


INDICES = {
    "0": 0, "-1": -1, "0, 1": (0, 1), "0:1": slice(0, 1), "all, 1:3": (slice(None), slice(1, 3)),
    "all, all, 2": (slice(None), slice(None), 2),
    "a tensor": (0, slice(None), torch.tensor([1, 2])),
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_slices_are_torchs(name):
    found, expected = both(causal, 2, 3, 64, 64, BLOCK_SIZE=16)
    part = found[INDICES[name]]
    assert isinstance(part, ours.BlockMask)
    assert_same(part, expected[INDICES[name]])
    q = torch.randn(2, 3, 64, 16)
    with pytest.raises(flexmask.ConversionError, match="slice of another"):
        ours.flex_attention(q[:, :1], q[:, :1], q[:, :1], block_mask=part)


def test_decoding_with_one_block_row_of_a_mask_made_once():
    """A slice, its mask mod moved to where the query stands, and its lengths: what torch asks a decoding loop to write."""
    length, q, k, v = 64, *torch.randn(3, 1, 2, 64, 16)
    whole = ours.create_block_mask(causal, 1, 1, length, length, device="cpu", BLOCK_SIZE=16)
    expected = ours.flex_attention(q, k, v, block_mask=whole)
    for position in (0, 15, 16, 63):
        row = whole[:, :, position // 16]
        row.mask_mod = lambda b, h, q_idx, kv_idx, position=position: whole.mask_mod(b, h, q_idx + position, kv_idx)
        row.seq_lengths = (1, length)
        out = ours.flex_attention(q[:, :, position : position + 1], k, v, block_mask=row)
        torch.testing.assert_close(out, expected[:, :, position : position + 1])


def test_lists_that_were_changed_count():
    q = torch.randn(1, 1, 48, 16)
    block_mask = ours.create_block_mask(causal, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    whole = ours.flex_attention(q, q, q, block_mask=block_mask)
    block_mask.full_kv_num_blocks[..., 2] = 0  # in place
    out = ours.flex_attention(q, q, q, block_mask=block_mask)
    assert torch.equal(out[:, :, :32], whole[:, :, :32])
    torch.testing.assert_close(out[:, :, 32:], ours.flex_attention(*[q[:, :, 32:]] * 3, score_mod=_causal_score))
    block_mask.kv_num_blocks = torch.zeros_like(block_mask.kv_num_blocks)  # assigned
    assert not ours.flex_attention(q, q, q, block_mask=block_mask)[:, :, 32:].any()


def _causal_score(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score, -float("inf"))


def test_looking_at_lists_changes_nothing():
    block_mask = ours.create_block_mask(causal, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    mask = block_mask.as_flexmask()
    print(block_mask)
    assert block_mask.as_flexmask() is mask and "kept keys of row q_idx: [0, q_idx + 1)" in mask.explain()


def test_a_new_mask_mod_leaves_the_lists_as_in_torch():
    """torch keeps the blocks of the function that the mask was made with."""
    block_mask = ours.create_block_mask(causal, None, None, 32, 32, device="cpu", BLOCK_SIZE=16)
    block_mask.mask_mod = ours.noop_mask
    kept = block_mask.as_flexmask().to_dense(32, 32)[0, 0]
    assert kept[:16, :16].all() and not kept[:16, 16:].any() and kept[16:].all()


def test_from_kv_blocks_and_the_constructor():
    made = theirs.create_block_mask(causal, 1, 2, 48, 40, device="cpu", BLOCK_SIZE=16)
    parts = (made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
    found = ours.BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(48, 40))
    assert isinstance(found, ours.BlockMask)
    assert_same(found, made)
    rebuilt = ours.BlockMask(
        (48, 40), *parts, made.q_num_blocks, made.q_indices, made.full_q_num_blocks, made.full_q_indices, (16, 16), causal
    )
    assert_same(rebuilt, made)
    assert torch.equal(found.as_flexmask().to_dense(48, 40), flexmask.mask(causal).to_dense(48, 40))
    blocks = ours.BlockMask.from_kv_blocks(*parts[:2], BLOCK_SIZE=16)
    assert blocks.shape == (1, 2, 48, 48) and blocks.mask_mod is theirs.noop_mask


@pytest.mark.parametrize("lengths", [(32, 32), (40, 17), (1, 48), (64, 80)])
def test_other_lengths_of_a_function(lengths):
    block_mask = ours.create_block_mask(causal, None, None, 48, 64, device="cpu", BLOCK_SIZE=16)
    assert_same(block_mask._adjust(*lengths), theirs.create_block_mask(causal, None, None, *lengths, device="cpu", BLOCK_SIZE=16))


def test_other_lengths_of_lists():
    def band(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx).abs() < 9

    block_mask = ours.BlockMask.of_lists(theirs.create_block_mask(band, None, None, 96, 96, device="cpu", BLOCK_SIZE=16))
    smaller = block_mask._adjust(90, 35)
    assert torch.equal(smaller.as_flexmask().to_dense(90, 35), flexmask.mask(band).to_dense(90, 35))
    with pytest.raises(flexmask.ShapeError, match="do not say what is kept beyond"):
        block_mask._adjust(97, 96)


def test_to_another_device_and_copies():
    block_mask = ours.create_block_mask(causal, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    block_mask.as_flexmask()
    moved = block_mask.to("meta")
    assert moved.kv_indices.device.type == moved.device.type == "meta" and block_mask.device.type == "cpu"
    for copied in (block_mask.to("cpu"), copy.deepcopy(block_mask), pickle.loads(pickle.dumps(block_mask)), block_mask[:, :].to("cpu")):
        assert_same(copied, block_mask)
    q = torch.randn(1, 1, 48, 16)
    again = pickle.loads(pickle.dumps(block_mask))
    assert torch.equal(ours.flex_attention(q, q, q, block_mask=again), ours.flex_attention(q, q, q, block_mask=block_mask))


def test_torchs_code_takes_it_for_its_own():
    from torch.distributed.pipelining.microbatch import _split_block_mask

    lengths = torch.tensor([7, 30, 48, 2])
    block_mask = ours.create_block_mask(lambda b, h, q, kv: kv < lengths[b], 4, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    assert isinstance(block_mask, theirs.BlockMask)
    q = torch.randn(4, 1, 48, 16)
    parts = [ours.flex_attention(x, x, x, block_mask=part) for x, part in zip(q.chunk(2), _split_block_mask(block_mask, 2), strict=True)]
    torch.testing.assert_close(torch.cat(parts), ours.flex_attention(q, q, q, block_mask=block_mask))


def test_masks_joined():
    def window(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < 5

    indices = [torch.arange(n).view(shape) for n, shape in zip((1, 1, 20, 20), [(-1, 1, 1, 1), (-1, 1, 1), (-1, 1), (-1,)], strict=True)]
    for join in ("and_masks", "or_masks"):
        found, expected = (getattr(library, join)(causal, window) for library in (ours, theirs))
        assert torch.equal(found(*indices), expected(*indices))
        assert_same(*both(found, None, None, 20, 20, BLOCK_SIZE=8))
    assert ours.and_masks(causal, window).name == "causal & window"
    assert ours.create_mask(ours.and_masks(), 1, 1, 2, 2, device="cpu").all()
    assert not ours.create_mask(ours.or_masks(), 1, 1, 2, 2, device="cpu").any()
    assert ours.create_mask(ours.noop_mask, 2, 1, 2, 2, device="cpu").all()


def test_a_million_tokens_take_no_memory():
    """Lists would be 64 million blocks; the function's own intervals are all that attention needs."""
    block_mask = ours.create_block_mask(causal, None, None, 2**20, 2**20, device="cpu")
    assert block_mask.shape == (1, 1, 2**20, 2**20) and block_mask._lists is None
