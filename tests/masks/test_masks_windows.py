"""Masks of positions alone, each as a drawing."""

import pytest
import torch
from drawing import assert_mask

from flexmask import masks, reference


def test_full():
    assert_mask(
        masks.full,
        rows=2,
        columns=3,
        drawn="""
        ###
        ###""",
    )


def test_causal():
    assert_mask(
        masks.causal,
        rows=4,
        columns=4,
        drawn="""
        #...
        ##..
        ###.
        ####""",
    )


def test_causal_with_more_keys():
    assert_mask(
        masks.causal,
        rows=2,
        columns=4,
        drawn="""
        #...
        ##..""",
    )


def test_causal_lower_right():
    assert_mask(
        masks.causal_lower_right(q_len=3, kv_len=5),
        rows=3,
        columns=5,
        drawn="""
        ###..
        ####.
        #####""",
    )


def test_causal_lower_right_with_more_queries():
    assert_mask(
        masks.causal_lower_right(q_len=4, kv_len=2),
        rows=4,
        columns=2,
        drawn="""
        ..
        ..
        #.
        ##""",
    )


def test_sliding_window():
    assert_mask(
        masks.sliding_window(2),
        rows=4,
        columns=4,
        drawn="""
        #...
        ##..
        .##.
        ..##""",
    )


def test_sliding_window_of_a_tensor():
    assert_mask(
        masks.sliding_window(torch.tensor(3)),
        rows=5,
        columns=5,
        drawn="""
        #....
        ##...
        ###..
        .###.
        ..###""",
    )


def test_local_window():
    assert_mask(
        masks.local_window(2, 1),
        rows=5,
        columns=5,
        drawn="""
        ##...
        ###..
        ####.
        .####
        ..###""",
    )


def test_local_window_both_sides_alike():
    assert_mask(
        masks.local_window(1),
        rows=4,
        columns=4,
        drawn="""
        ##..
        ###.
        .###
        ..##""",
    )


def test_dilated():
    assert_mask(
        masks.dilated(4, 2),
        rows=7,
        columns=7,
        drawn="""
        #.#.#..
        .#.#.#.
        #.#.#.#
        .#.#.#.
        #.#.#.#
        .#.#.#.
        ..#.#.#""",
    )


def test_global_window():
    assert_mask(
        masks.global_window(n_global=1, window=1),
        rows=6,
        columns=6,
        drawn="""
        ######
        ###...
        ####..
        #.###.
        #..###
        #...##""",
    )


def test_global_tokens():
    assert_mask(
        masks.global_tokens(torch.tensor([False, False, True, False, False, False]), window=0),
        rows=6,
        columns=6,
        drawn="""
        #.#...
        .##...
        ######
        ..##..
        ..#.#.
        ..#..#""",
    )


def test_sink_window():
    assert_mask(
        masks.sink_window(n_sink=1, window=2),
        rows=6,
        columns=6,
        drawn="""
        #.....
        ##....
        ###...
        #.##..
        #..##.
        #...##""",
    )


def test_block_causal():
    assert_mask(
        masks.block_causal(2),
        rows=6,
        columns=6,
        drawn="""
        ##....
        ##....
        ####..
        ####..
        ######
        ######""",
    )


def test_chunked_causal():
    assert_mask(
        masks.chunked_causal(3),
        rows=6,
        columns=6,
        drawn="""
        #.....
        ##....
        ###...
        ...#..
        ...##.
        ...###""",
    )


def test_strided():
    assert_mask(
        masks.strided(3),
        rows=8,
        columns=8,
        drawn="""
        #.......
        ##......
        ###.....
        ####....
        .####...
        ..####..
        #..####.
        .#..####""",
    )


def test_fixed():
    assert_mask(
        masks.fixed(4, 1),
        rows=8,
        columns=8,
        drawn="""
        #.......
        ##......
        ###.....
        ####....
        ...##...
        ...###..
        ...####.
        ...#####""",
    )


def test_head_window_differs_by_head():
    m = masks.head_window(torch.tensor([1, 3]))
    drawn = """
        #...
        ##..
        ###.
        .###"""
    assert_mask(m, rows=4, columns=4, drawn=drawn, h=1)
    assert torch.equal(reference.dense_mask(m, 1, 2, 4, 4)[0, 0], torch.eye(4).bool())


def test_a_window_tensor_is_read_when_the_mask_is_used():
    size = torch.tensor(1)
    m = masks.sliding_window(size)
    before = reference.dense_mask(m, 1, 1, 4, 4).sum()
    size.fill_(2)
    assert (before, reference.dense_mask(m, 1, 1, 4, 4).sum()) == (4, 7)


def test_noop_is_full():
    assert masks.noop is masks.full


@pytest.mark.parametrize(
    "make",
    [
        lambda: masks.sliding_window(0),
        lambda: masks.dilated(4, 0),
        lambda: masks.sink_window(2, 0),
        lambda: masks.block_causal(0),
        lambda: masks.chunked_causal(-1),
        lambda: masks.strided(0),
        lambda: masks.fixed(0),
    ],
)
def test_sizes_below_one_are_refused(make):
    with pytest.raises(ValueError, match="must be at least 1"):
        make()


def test_wrong_ranks_are_refused():
    with pytest.raises(ValueError, match=r"expected a tensor \[H\]; got shape \[1, 2\]"):
        masks.head_window(torch.ones(1, 2))
