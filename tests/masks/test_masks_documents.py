"""Masks of documents, prefixes, padding and evictions, each as a drawing."""

import pytest
import torch
from drawing import assert_mask

from flexmask import masks, reference


def test_document():
    assert_mask(
        masks.document(torch.tensor([0, 0, 1, 1, 1])),
        rows=5,
        columns=5,
        drawn="""
        ##...
        ##...
        ..###
        ..###
        ..###""",
    )


def test_document_ids_in_any_order():
    assert_mask(
        masks.document(torch.tensor([0, 1, 0, 2, 1])),
        rows=5,
        columns=5,
        drawn="""
        #.#..
        .#..#
        #.#..
        ...#.
        .#..#""",
    )


def test_packed():
    assert_mask(
        masks.packed(torch.tensor([0, 2, 2, 5])),
        rows=5,
        columns=5,
        drawn="""
        ##...
        ##...
        ..###
        ..###
        ..###""",
    )


def test_packed_with_room_behind():
    assert_mask(
        masks.packed(torch.tensor([0, 2, 3]), length=5),
        rows=5,
        columns=5,
        drawn="""
        ##...
        ##...
        ..#..
        ...##
        ...##""",
    )


def test_per_document():
    assert_mask(
        masks.per_document(masks.prefix_lm(2), torch.tensor([0, 3, 7])),
        rows=7,
        columns=7,
        drawn="""
        ##.....
        ##.....
        ###....
        ...##..
        ...##..
        ...###.
        ...####""",
    )


def test_prefix_lm():
    assert_mask(
        masks.prefix_lm(2),
        rows=4,
        columns=4,
        drawn="""
        ##..
        ##..
        ###.
        ####""",
    )


def test_prefix_document():
    assert_mask(
        masks.prefix_document(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([2, 2, 2, 4, 4, 4])),
        rows=6,
        columns=6,
        drawn="""
        ##....
        ##....
        ###...
        ...#..
        ...##.
        ...###""",
    )


def test_shared_question():
    assert_mask(
        masks.shared_question(torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 2, 0, 1, 2])),
        rows=7,
        columns=7,
        drawn="""
        #......
        ##.....
        ###....
        ##.#...
        ....#..
        ....##.
        ....#.#""",
    )


def test_shared_prefix():
    assert_mask(
        masks.shared_prefix(2, torch.tensor([9, 9, 0, 0, 1, 1])),
        rows=6,
        columns=6,
        drawn="""
        #.....
        ##....
        ###...
        ####..
        ##..#.
        ##..##""",
    )


def test_causal_blockwise():
    assert_mask(
        masks.causal_blockwise(torch.tensor([0, 0, 1, 1, 2, 2]), test_start=4),
        rows=6,
        columns=6,
        drawn="""
        #.....
        ##....
        ..#...
        ..##..
        #####.
        ######""",
    )


def test_qk_sparse():
    assert_mask(
        masks.qk_sparse(torch.tensor([-1, 0, 0, -1, 1, 1, -1])),
        rows=7,
        columns=7,
        drawn="""
        #......
        ##.....
        #.#....
        ####...
        #####..
        ####.#.
        #######""",
    )


def test_transfusion():
    assert_mask(
        masks.transfusion(torch.tensor([-1, 0, 0, -1, 1, 1, 1])),
        rows=7,
        columns=7,
        drawn="""
        #......
        ###....
        ###....
        ####...
        #######
        #######
        #######""",
    )


def test_random_eviction():
    assert_mask(
        masks.random_eviction(torch.tensor([3, 6, 4, 6, 5, 6])),
        rows=6,
        columns=6,
        drawn="""
        #.....
        ##....
        ###...
        .###..
        .#.##.
        .#.#.#""",
    )


def test_document_differs_by_batch_entry():
    m = masks.document(torch.tensor([[0, 0, 0], [7, 7, 2]]))
    assert_mask(m, rows=3, columns=3, drawn="###\n###\n###")
    assert_mask(m, rows=3, columns=3, drawn="##.\n##.\n..#", b=1)


def test_document_with_strides_and_narrow_ids():
    doc = torch.tensor([[0, 9, 0, 9, 5], [9, 9, 9, 9, 9]], dtype=torch.uint8).T  # [5, 2]
    assert_mask(masks.document(doc[:, 0]), rows=5, columns=5, drawn="#.#..\n.#.#.\n#.#..\n.#.#.\n....#")


def test_prefix_lm_differs_by_batch_entry():
    m = masks.prefix_lm(torch.tensor([0, 3]))
    assert_mask(m, rows=3, columns=3, drawn="#..\n##.\n###")
    assert_mask(m, rows=3, columns=3, drawn="###\n###\n###", b=1)


def test_padding_of_batch_entries():
    m = masks.padding(torch.tensor([3, 0]))
    assert_mask(m, rows=2, columns=4, drawn="###.\n###.")
    assert_mask(m, rows=2, columns=4, drawn="....\n....", b=1)


def test_key_padding_on_the_left():
    m = masks.causal & masks.key_padding(torch.tensor([[True, True, True], [False, True, True]]))
    assert_mask(m, rows=3, columns=3, drawn="#..\n##.\n###")
    assert_mask(m, rows=3, columns=3, drawn="...\n.#.\n.##", b=1)


def test_random_eviction_differs_by_head():
    m = masks.random_eviction(torch.tensor([[[1, 3, 3], [3, 2, 3]]]))
    assert_mask(m, rows=3, columns=3, drawn="#..\n.#.\n.##", h=0)
    assert_mask(m, rows=3, columns=3, drawn="#..\n##.\n#.#", h=1)


def test_offsets_and_ids_of_packed_documents():
    offsets = masks.offsets(torch.tensor([2, 0, 3]))
    assert (offsets.tolist(), offsets.dtype) == ([0, 2, 2, 5], torch.int32)
    assert masks.document_ids(offsets).tolist() == [0, 0, 2, 2, 2]
    assert masks.document_ids(offsets[:1], length=2).tolist() == [0, 0]


def test_packed_is_document_by_document():
    """Packed attention equals attention over each document alone."""
    lengths = [5, 0, 1, 7]
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 4, dtype=torch.float64)
    whole = reference.attention(q, k, v, mask=masks.packed(masks.offsets(torch.tensor(lengths))))
    parts = [reference.attention(*qkv) for qkv in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=2))


@pytest.mark.parametrize("make", [masks.document, masks.key_padding, lambda x: masks.qk_sparse(x)])
def test_ids_of_other_ranks_are_refused(make):
    with pytest.raises(ValueError, match=r"\[N\] or \[B, N\]; got shape \[1, 2, 3\]"):
        make(torch.zeros(1, 2, 3))
