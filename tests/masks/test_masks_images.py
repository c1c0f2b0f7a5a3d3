"""Masks of pictures, each as a drawing; a token's row and column are its place in the picture."""

import pytest
import torch
from drawing import assert_mask

from flexmask import masks, reference


def test_neighbourhood():
    assert_mask(
        masks.neighbourhood(4, 3, 3),
        rows=12,
        columns=12,
        drawn="""
        #########...
        #########...
        #########...
        #########...
        #########...
        #########...
        ...#########
        ...#########
        ...#########
        ...#########
        ...#########
        ...#########""",
    )


def test_neighbourhood_of_rows():
    assert_mask(
        masks.neighbourhood(1, 6, (1, 3)),
        rows=6,
        columns=6,
        drawn="""
        ###...
        ###...
        .###..
        ..###.
        ...###
        ...###""",
    )


def test_neighbourhood_of_a_wide_picture():
    assert_mask(
        masks.neighbourhood(3, 4, (1, 3)),
        rows=12,
        columns=12,
        drawn="""
        ###.........
        ###.........
        .###........
        .###........
        ....###.....
        ....###.....
        .....###....
        .....###....
        ........###.
        ........###.
        .........###
        .........###""",
    )


def test_tiled_neighbourhood():
    assert_mask(
        masks.tiled_neighbourhood(2, 4, (1, 3), tile=2),
        rows=8,
        columns=8,
        drawn="""
        ##..#...
        ##..#...
        ..##..#.
        ..##..#.
        .#..##..
        .#..##..
        ...#..##
        ...#..##""",
    )


def test_sliding_tile():
    assert_mask(
        masks.sliding_tile(2, 8, (1, 3), tile=2),
        rows=16,
        columns=16,
        drawn="""
        ############....
        ############....
        ############....
        ############....
        ############....
        ############....
        ############....
        ############....
        ....############
        ....############
        ....############
        ....############
        ....############
        ....############
        ....############
        ....############""",
    )


def test_flamingo():
    assert_mask(
        masks.flamingo(torch.tensor([[0, 4], [1, 4], [4, 6]]), image_length=2),
        rows=7,
        columns=6,
        drawn="""
        ##....
        ####..
        ####..
        ####..
        ....##
        ....##
        ......""",
    )


@pytest.mark.parametrize(("height", "width", "window"), [(5, 7, 3), (6, 4, (5, 3)), (1, 1, 1), (9, 9, 9)])
def test_neighbourhood_is_the_nearest_window_in_the_picture(height, width, window):
    rows, columns = (window, window) if isinstance(window, int) else window
    expected = torch.zeros(height, width, height, width, dtype=torch.bool)
    for i in range(height):
        for j in range(width):
            top, left = min(max(i - rows // 2, 0), height - rows), min(max(j - columns // 2, 0), width - columns)
            expected[i, j, top : top + rows, left : left + columns] = True
    n = height * width
    found = reference.dense_mask(masks.neighbourhood(height, width, window), 1, 1, n, n)[0, 0]
    assert torch.equal(found, expected.view(n, n))


@pytest.mark.parametrize("tile", [1, 2, (2, 4), (6, 8)])
def test_tiled_neighbourhood_is_the_neighbourhood_with_tokens_reordered(tile):
    height, width, window = 6, 8, (3, 5)
    tile_height, tile_width = (tile, tile) if isinstance(tile, int) else tile
    places = torch.arange(height * width).view(height // tile_height, tile_height, width // tile_width, tile_width)
    order = places.transpose(1, 2).flatten()  # the token at each place of the tiled sequence
    plain = reference.dense_mask(masks.neighbourhood(height, width, window), 1, 1, 48, 48)[0, 0]
    tiled = reference.dense_mask(masks.tiled_neighbourhood(height, width, window, tile), 1, 1, 48, 48)[0, 0]
    assert torch.equal(tiled, plain[order][:, order])


def test_flamingo_differs_by_batch_entry():
    m = masks.flamingo(torch.tensor([[[0, 2]], [[1, 2]]]), image_length=2)
    assert_mask(m, rows=2, columns=2, drawn="##\n##")
    assert_mask(m, rows=2, columns=2, drawn="..\n##", b=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.neighbourhood(4, 4, 2), "odd and fit into 4 x 4; got 2 x 2"),
        (lambda: masks.neighbourhood(4, 4, (3, 5)), "odd and fit into 4 x 4; got 3 x 5"),
        (lambda: masks.tiled_neighbourhood(4, 6, 3, (2, 4)), "tile must divide 4 x 6; got 2 x 4"),
        (lambda: masks.sliding_tile(4, 4, 3, 2), "odd and fit into 2 x 2; got 3 x 3"),
    ],
)
def test_windows_and_tiles_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
