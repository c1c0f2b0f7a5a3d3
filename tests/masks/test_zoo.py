"""The zoo keeps its promises: enough entries, valid at every size, the same for the same seed, and covering every ready-made mod."""

import pytest
import torch
import zoo

from flexmask import masks, reference, scores

SIZES = [(1, 1, 1, 1), (1, 2, 1, 7), (2, 1, 7, 1), (2, 3, 19, 33), (1, 2, 65, 40)]
HELPERS = {"ancestors", "document_ids", "offsets", "random_blocks", "noop", "alibi_slopes", "t5_buckets"}


def test_there_are_enough():
    assert len(zoo.MASKS) >= 40 and len(zoo.SCORES) >= 25


def test_every_ready_made_mod_is_in_it():
    names = {"score_at_offset"} | set(zoo.MASKS) | set(zoo.SCORES)
    for made in (set(masks.__all__) | set(scores.__all__)) - HELPERS:
        assert any(name.startswith(made) for name in names), f"{made} is missing from the zoo"


@pytest.mark.parametrize("name", zoo.MASKS)
def test_masks_work_at_every_size_and_repeat(name):
    for sizes in SIZES:
        first, again = (reference.dense_mask(zoo.MASKS[name](*sizes, seed=3), *sizes) for _ in range(2))
        assert first.shape == sizes and torch.equal(first, again)


@pytest.mark.parametrize("name", zoo.SCORES)
def test_scores_work_at_every_size(name):
    for B, H, Q, KV in SIZES:
        q, k = torch.randn(B, H, Q, 4), torch.randn(B, H, KV, 4)
        assert reference.attention(q, k, k, score=zoo.SCORES[name](B, H, Q, KV)).isfinite().all()
