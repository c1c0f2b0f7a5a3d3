"""torch's BlockMask there and back: from_torch keeps what flex_attention's kernel keeps, to_torch makes what create_block_mask makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, noop_mask, or_masks
from zoo import MASKS

import flexmask
from flexmask import masks

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def by_head(b, h, q_idx, kv_idx):
    return (q_idx + kv_idx + h + b) % 3 != 0


def kept_by_torch(block_mask: BlockMask, batch: int, heads: int) -> torch.Tensor:
    """What the kernel of flex_attention keeps, read off the lists one by one: bool [batch, heads, q_len, kv_len]."""
    (q_len, kv_len), (block_q, block_kv) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    mod = noop_mask if block_mask.mask_mod is None else block_mask.mask_mod
    asked = create_mask(mod, batch, heads, q_len, kv_len, device="cpu")
    keep = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    groups = [(block_mask.kv_num_blocks, block_mask.kv_indices, False), (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True)]
    for counts, indices, whole in groups:
        for b, h, row in torch.cartesian_prod(*map(torch.arange, (batch, heads, -(-q_len // block_q)))).tolist():
            for place in range(0 if counts is None else int(counts[b % counts.shape[0], h % counts.shape[1], row])):
                column = int(indices[b % counts.shape[0], h % counts.shape[1], row, place])
                tile = (b, h, slice(row * block_q, (row + 1) * block_q), slice(column * block_kv, (column + 1) * block_kv))
                keep[tile] |= True if whole else asked[tile]
    return keep


@pytest.mark.parametrize("name", MASKS)
def test_the_zoo_goes_to_torch_and_back(name):
    sizes = (2, 2, 77, 83)
    mask = MASKS[name](*sizes)
    theirs = create_block_mask(mask, *sizes, device="cpu", BLOCK_SIZE=(16, 32))
    ours = mask.block_mask(*sizes[2:], *sizes[:2], block_size=(16, 32)).to_torch(mask)
    for part in LISTS:
        expected = getattr(theirs, part)
        assert torch.equal(getattr(ours, part).expand_as(expected), expected), part
    assert (ours.shape[2:], ours.BLOCK_SIZE, ours.mask_mod) == (theirs.shape[2:], theirs.BLOCK_SIZE, mask)
    back = flexmask.from_torch(theirs).to_dense(*sizes[2:], *sizes[:2])
    assert torch.equal(back, mask.to_dense(*sizes[2:], *sizes[:2]))


BENCHMARKS = ["causal", "sliding_window", "document", "prefix_lm", "key_padding", "dilated", "bigbird", "tree", "from_dense", "fixed"]


@pytest.mark.parametrize("name", [n for n in BENCHMARKS if n in MASKS])
@pytest.mark.parametrize("q_len, kv_len, block", [(1, 1, 128), (130, 129, 128), (64, 33, 1), (65, 40, (8, 64)), (31, 200, (128, 32))])
def test_to_torch_is_create_block_mask_at_any_size(name, q_len, kv_len, block):
    mask = MASKS[name](1, 2, q_len, kv_len)
    theirs = create_block_mask(mask, 1, 2, q_len, kv_len, device="cpu", BLOCK_SIZE=block)
    ours = mask.block_mask(q_len, kv_len, 1, 2, block_size=block).to_torch(mask)
    for part in LISTS:
        expected = getattr(theirs, part)
        assert torch.equal(getattr(ours, part).expand_as(expected), expected), part


@st.composite
def block_masks(draw) -> tuple[BlockMask, int, int]:
    """Arbitrary lists, as somebody may edit them: also blocks that the function knows nothing of, or none at all."""
    batch, heads = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]))
    block = draw(st.sampled_from([(4, 4), (8, 2), (3, 5)]))
    rows, columns, width = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(0, 2))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kinds = torch.randint(0, 3, (batch, heads, rows, columns), generator=seed)
    order = torch.rand(batch, heads, rows, columns, generator=seed).argsort(-1).int()
    lists = []
    for kind in (1, 2):
        chosen = kinds.gather(-1, order.long()) == kind
        first = (~chosen).int().argsort(dim=-1, stable=True)
        junk = torch.randint(-9, 99, (batch, heads, rows, width), generator=seed, dtype=torch.int32)
        lists += [chosen.sum(-1, dtype=torch.int32), torch.cat([order.gather(-1, first), junk], -1)]
    if draw(st.booleans()):
        lists[2:] = [None, None]
    lengths = (rows * block[0] - draw(st.integers(0, block[0] - 1)), columns * block[1] - draw(st.integers(0, block[1] - 1)))
    mod = draw(st.sampled_from([causal, by_head, noop_mask, None, and_masks(causal, by_head), masks.causal]))
    made = BlockMask(lengths, *lists, None, None, None, None, block, mod)
    return made, draw(st.sampled_from([1, 2])) if batch == 1 else batch, 3 if heads == 3 else draw(st.sampled_from([1, 3]))


@settings(max_examples=80)
@given(block_masks())
def test_from_torch_keeps_what_the_lists_say(case):
    theirs, batch, heads = case
    mask, expected = flexmask.from_torch(theirs), kept_by_torch(*case)
    assert torch.equal(mask.to_dense(*theirs.seq_lengths, batch, heads), expected)
    blocks = mask.block_mask(*theirs.seq_lengths, batch, heads, block_size=(4, 3))
    rows, columns = (-(-n // size) for n, size in zip(theirs.seq_lengths, (4, 3), strict=True))
    padded = torch.zeros(batch, heads, rows * 4, columns * 3, dtype=torch.bool)
    padded[..., : expected.shape[2], : expected.shape[3]] = expected
    kept = padded.view(batch, heads, rows, 4, columns, 3).any(-1).any(3)
    assert torch.equal(blocks.to_dense().expand_as(kept), kept)


def test_attention_with_torchs_mask():
    theirs = create_block_mask(causal, None, None, 200, 200, device="cpu", BLOCK_SIZE=64)
    theirs.kv_num_blocks[..., 2] = 0  # somebody drops the diagonal block of the third row
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    mask = flexmask.from_torch(theirs)
    out = flexmask.attention(q, k, v, mask=mask)
    keep = kept_by_torch(theirs, 1, 1)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    assert torch.allclose(out, dense, atol=1e-5)


def test_a_picture_is_as_large_as_the_lists():
    mask = flexmask.from_torch(create_block_mask(causal, None, None, 6, 6, device="cpu", BLOCK_SIZE=2))
    assert str(mask).endswith("6 x 6\n#.....\n##....\n###...\n####..\n#####.\n######")


@pytest.mark.parametrize("q_len, kv_len", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_no_queries_or_no_keys(q_len, kv_len):
    theirs = create_block_mask(causal, None, None, q_len, kv_len, device="cpu", BLOCK_SIZE=4)
    assert flexmask.from_torch(theirs).to_dense(q_len, kv_len).shape == (1, 1, q_len, kv_len)


def test_it_composes_and_is_named_after_the_function():
    theirs = create_block_mask(causal, None, None, 96, 96, device="cpu", BLOCK_SIZE=32)
    mask = flexmask.from_torch(theirs)
    assert mask.name == "from_torch(causal)" and {"full_blocks", "partial_blocks"} < set(mask.traced().tensor_names)
    both = ~mask | masks.sliding_window(5)
    row, column = torch.arange(96)[:, None], torch.arange(96)
    assert torch.equal(both.to_dense(96, 96)[0, 0], (row < column) | ((row >= column) & (row - column < 5)))


def test_the_analysis_sees_where_the_lists_reach():
    """Rows and columns are bounded by their first and last listed block, so the rest is never looked at."""
    theirs = create_block_mask(lambda b, h, q, k: (q - k).abs() < 40, None, None, 320, 320, device="cpu", BLOCK_SIZE=32)
    text = flexmask.from_torch(theirs).explain()
    assert "kept keys of row q_idx: [row_keys[0, 0, q_idx // 32, 0], row_keys[0, 0, q_idx // 32, 1])" in text
    assert "kept queries of column kv_idx: [column_queries[0, 0, kv_idx // 32, 0], column_queries[0, 0, kv_idx // 32, 1])" in text
    assert "ascend" not in text


def test_the_mask_function_is_traced_with_its_captures():
    """A number inside torch's `or_masks` is a run-time scalar like any other, and a rebound one is seen."""
    size = 4

    def window(b, h, q, k):
        return q - k < size

    theirs = create_block_mask(or_masks(and_masks(causal, window), by_head), 1, 1, 50, 50, device="cpu", BLOCK_SIZE=16)
    mask = flexmask.from_torch(theirs)
    assert "size" in mask.traced().scalar_names
    size = 9
    assert 9 in mask.traced().scalars


def test_a_function_of_its_own_for_each_batch_entry_and_head():
    theirs = create_block_mask(by_head, 2, 3, 40, 24, device="cpu", BLOCK_SIZE=8)
    mask = flexmask.from_torch(theirs)
    assert torch.equal(mask.to_dense(40, 24, 2, 3), create_mask(by_head, 2, 3, 40, 24, device="cpu"))
    with pytest.raises(flexmask.ShapeError):
        mask.to_dense(40, 24, 5, 3)  # made for two batch entries


# fmt: off
WRONG = {
    "a function": (causal, "got function. Pass what `create_block_mask` returned; for a function write `flexmask.mask"),
    "a matrix": (torch.ones(4, 4, dtype=torch.bool), "got Tensor.*masks.from_dense"),
    "our own": (masks.causal, "got Mask"),
    "a slice": (create_block_mask(causal, None, None, 256, 256, device="cpu")[:, :, 1:], "sliced.mask_mod = lambda"),
}
# fmt: on


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_block_mask_is_refused(name):
    value, message = WRONG[name]
    with pytest.raises(flexmask.ConversionError, match=message):
        flexmask.from_torch(value)


def test_a_slice_works_once_it_has_its_function_back():
    whole = create_block_mask(causal, None, None, 256, 256, device="cpu", BLOCK_SIZE=64)
    sliced = whole[:, :, 2:]
    sliced.mask_mod = lambda b, h, q_idx, kv_idx: whole.mask_mod(b, h, q_idx + 128, kv_idx)
    mask = flexmask.from_torch(sliced)
    assert torch.equal(mask.to_dense(128, 256), masks.causal.to_dense(256, 256)[:, :, 128:])
