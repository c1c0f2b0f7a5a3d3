"""Masks of pictures: neighbourhoods on a grid of tokens, and text that looks at pictures."""

from __future__ import annotations

from typing import Any

import torch

from ..mods import Mask, mask
from .tables import expect, positive

Pair = int | tuple[int, int]


def neighbourhood(height: int, width: int, window: Pair) -> Mask:
    """Each token of a picture and its neighbourhood, a window clamped to the picture (NATTEN, arXiv 2204.07143).

    Tokens lie row by row, q_len = kv_len = height * width. `window` is odd and fits: one number, or (rows, columns). The window's
    centre is the query, moved inwards at the edges so that every query keeps rows * columns keys.

    >>> from flexmask import masks, reference
    >>> near = reference.dense_mask(masks.neighbourhood(4, 5, 3), 1, 1, 20, 20)[0, 0]
    >>> near.sum(dim=1).unique().tolist(), near[0].nonzero().flatten().tolist()
    ([9], [0, 1, 2, 5, 6, 7, 10, 11, 12])
    """
    rows, columns = _window(height, width, window)
    up, left = rows // 2, columns // 2
    lowest, rightmost = height - 1 - up, width - 1 - left

    @mask
    def neighbourhood(q_idx: Any, kv_idx: Any) -> Any:
        row = torch.clamp(q_idx // width, up, lowest)
        column = torch.clamp(q_idx % width, left, rightmost)
        return (abs(row - kv_idx // width) <= up) & (abs(column - kv_idx % width) <= left)

    return neighbourhood


def tiled_neighbourhood(height: int, width: int, window: Pair, tile: Pair) -> Mask:
    """`neighbourhood` for tokens that lie tile by tile, so that near tokens are near in the sequence; the mask has fewer partial tiles.

    `tile`: one number or (rows, columns), dividing (height, width). Tiles lie row by row, and so do the tokens in each.

    >>> from flexmask import masks, reference
    >>> near = reference.dense_mask(masks.tiled_neighbourhood(4, 4, 3, 2), 1, 1, 16, 16)[0, 0]
    >>> near[0].nonzero().flatten().tolist()
    [0, 1, 2, 3, 4, 6, 8, 9, 12]
    """
    rows, columns = _window(height, width, window)
    up, left = rows // 2, columns // 2
    lowest, rightmost = height - 1 - up, width - 1 - left
    tile_height, tile_width = _tile(height, width, tile)
    tile_size, tiles_across = tile_height * tile_width, width // tile_width

    def row_of(i: Any) -> Any:
        return i // tile_size // tiles_across * tile_height + i % tile_size // tile_width

    def column_of(i: Any) -> Any:
        return i // tile_size % tiles_across * tile_width + i % tile_size % tile_width

    @mask
    def tiled_neighbourhood(q_idx: Any, kv_idx: Any) -> Any:
        row = torch.clamp(row_of(q_idx), up, lowest)
        column = torch.clamp(column_of(q_idx), left, rightmost)
        return (abs(row - row_of(kv_idx)) <= up) & (abs(column - column_of(kv_idx)) <= left)

    return tiled_neighbourhood


def sliding_tile(height: int, width: int, window: Pair, tile: Pair) -> Mask:
    """Sliding tile attention (STA, arXiv 2502.04507): whole tiles attend to whole tiles, so no tile is partial.

    `window` counts tiles, odd, and fits into the picture's tiles; otherwise as `tiled_neighbourhood`.

    >>> from flexmask import masks, reference
    >>> near = reference.dense_mask(masks.sliding_tile(8, 8, 3, 2), 1, 1, 64, 64)[0, 0]
    >>> near.sum(dim=1).unique().tolist()
    [36]
    """
    tile_height, tile_width = _tile(height, width, tile)
    tile_size, across, down = tile_height * tile_width, width // tile_width, height // tile_height
    rows, columns = _window(down, across, window)
    up, left = rows // 2, columns // 2
    lowest, rightmost = down - 1 - up, across - 1 - left

    @mask
    def sliding_tile(q_idx: Any, kv_idx: Any) -> Any:
        q_tile, kv_tile = q_idx // tile_size, kv_idx // tile_size
        row = torch.clamp(q_tile // across, up, lowest)
        column = torch.clamp(q_tile % across, left, rightmost)
        return (abs(row - kv_tile // across) <= up) & (abs(column - kv_tile % across) <= left)

    return sliding_tile


def flamingo(intervals: torch.Tensor, image_length: int) -> Mask:
    """Text that looks at pictures by cross-attention (Flamingo, arXiv 2204.14198): queries are text, keys the pictures' tokens.

    Picture i has keys [i * image_length, (i + 1) * image_length) and is seen by the queries in [intervals[i, 0], intervals[i, 1]).
    `intervals`: int [images, 2] or [B, images, 2]. Text before the first picture keeps nothing.

    >>> import torch
    >>> from flexmask import masks
    >>> m = masks.flamingo(torch.tensor([[0, 4], [2, 4]]), image_length=2)
    >>> [k for k in range(4) if m(0, 0, 1, k)], [k for k in range(4) if m(0, 0, 3, k)]
    ([0, 1], [0, 1, 2, 3])
    """
    positive(image_length=image_length)
    if expect(intervals, (2, 3), "a tensor [images, 2] or [B, images, 2]") == 3:

        @mask
        def batch_flamingo(b: Any, q_idx: Any, kv_idx: Any) -> Any:
            image = kv_idx // image_length
            return (q_idx >= intervals[b, image, 0]) & (q_idx < intervals[b, image, 1])

        return batch_flamingo

    @mask
    def flamingo(q_idx: Any, kv_idx: Any) -> Any:
        image = kv_idx // image_length
        return (q_idx >= intervals[image, 0]) & (q_idx < intervals[image, 1])

    return flamingo


def _window(height: int, width: int, window: Pair) -> tuple[int, int]:
    rows, columns = (window, window) if isinstance(window, int) else window
    if rows % 2 == 0 or columns % 2 == 0 or not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"the window must be odd and fit into {height} x {width}; got {rows} x {columns}.")
    return rows, columns


def _tile(height: int, width: int, tile: Pair) -> tuple[int, int]:
    rows, columns = (tile, tile) if isinstance(tile, int) else tile
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise ValueError(f"the tile must divide {height} x {width}; got {rows} x {columns}.")
    return rows, columns
