"""Masks read from tables, block diffusion and masks at an offset, each as a drawing."""

import pytest
import torch
from drawing import assert_mask

from flexmask import masks, reference


def test_from_dense():
    assert_mask(
        masks.from_dense(torch.tensor([[True, False, True], [False, True, True]])),
        rows=2,
        columns=3,
        drawn="""
        #.#
        .##""",
    )


def test_block_sparse():
    assert_mask(
        masks.block_sparse(torch.tensor([[True, False], [False, True]]), block=2),
        rows=4,
        columns=4,
        drawn="""
        ##..
        ##..
        ..##
        ..##""",
    )


def test_bigbird():
    assert_mask(
        masks.bigbird(2, n_global=1, n_window=0, random=torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0]]).bool()),
        rows=6,
        columns=6,
        drawn="""
        ######
        ######
        ######
        ######
        ##..##
        ##..##""",
    )


def test_vertical_slash():
    assert_mask(
        masks.vertical_slash(torch.tensor([[0, 1, 0, 0, 0]]).bool(), torch.tensor([[1, 0, 0, 1, 0]]).bool()),
        rows=5,
        columns=5,
        drawn="""
        #....
        .#...
        .##..
        ##.#.
        .#..#""",
    )


def test_tree():
    assert_mask(
        masks.tree(masks.ancestors(torch.tensor([-1, 0, 0, 1, 2])), prefix=2),
        rows=5,
        columns=7,
        drawn="""
        ###....
        ####...
        ###.#..
        ####.#.
        ###.#.#""",
    )


def test_block_diffusion():
    assert_mask(
        masks.block_diffusion(4, 2),
        rows=8,
        columns=8,
        drawn="""
        ##......
        ##......
        ..####..
        ..####..
        ....##..
        ....##..
        ....####
        ....####""",
    )


def test_at_offset():
    assert_mask(
        masks.at_offset(masks.sliding_window(3), q_offset=4),
        rows=2,
        columns=7,
        drawn="""
        ..###..
        ...###.""",
    )


def test_at_offset_of_the_keys():
    assert_mask(
        masks.at_offset(masks.causal, q_offset=3, kv_offset=2),
        rows=3,
        columns=5,
        drawn="""
        ##...
        ###..
        ####.""",
    )


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (1, 4, 5), (2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 4, 5), (1, 1, 4, 5)])
def test_from_dense_broadcasts_batch_and_heads(shape):
    keep = torch.rand(shape) < 0.5
    assert torch.equal(reference.dense_mask(masks.from_dense(keep), 2, 3, 4, 5), keep.expand(2, 3, 4, 5))


def test_tree_with_a_prefix_for_each_batch_entry():
    """Columns behind a shorter sequence's drafted tokens are not kept."""
    m = masks.tree(masks.ancestors(torch.tensor([-1, 0])), prefix=torch.tensor([2, 0]))
    assert_mask(m, rows=2, columns=4, drawn="###.\n####")
    assert_mask(m, rows=2, columns=4, drawn="#...\n##..", b=1)


def test_tree_with_a_table_for_each_batch_entry():
    keep = torch.stack([torch.eye(2).bool(), torch.ones(2, 2).bool()])
    assert_mask(masks.tree(keep, prefix=1), rows=2, columns=3, drawn="##.\n#.#")
    assert_mask(masks.tree(keep, prefix=1), rows=2, columns=3, drawn="###\n###", b=1)


def test_a_parent_comes_first():
    with pytest.raises(ValueError, match="node 1 has parent 2"):
        masks.ancestors(torch.tensor([-1, 2, 0]))


def test_random_blocks_are_the_generators():
    draws = [masks.random_blocks(6, 2, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert (draws[0].sum(dim=1) == 2).all()


@pytest.mark.parametrize("offset", [0, 3, 7, torch.tensor(5)])
def test_at_offset_is_a_slice_of_the_whole_mask(offset):
    whole = masks.causal & masks.document(torch.tensor([0] * 4 + [1] * 8)) | masks.dilated(6, 3)
    sliced = reference.dense_mask(masks.at_offset(whole, q_offset=offset), 1, 1, 4, 12)
    assert torch.equal(sliced, reference.dense_mask(whole, 1, 1, 12, 12)[:, :, int(offset) : int(offset) + 4])


def test_at_offset_differs_by_batch_entry():
    m = masks.at_offset(masks.causal, q_offset=torch.tensor([0, 2]))
    assert_mask(m, rows=1, columns=4, drawn="#...")
    assert_mask(m, rows=1, columns=4, drawn="###.", b=1)
