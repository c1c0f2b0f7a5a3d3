"""A tile map as the CPU walks it: for each block row the runs of keys to multiply with, and the places in them to mask."""

from __future__ import annotations

from dataclasses import dataclass

from .tile_map import TileMap

FULL, BOUNDED, EVALUATED = 0, 1, 2

# (first, last, kind): block columns [first, last) of one kind
Segment = tuple[int, int, int]


@dataclass(frozen=True)
class Span:
    """Keys [first, last), found in the chunk from `offset` on, that the row intervals or (`evaluated`) the predicate must mask."""

    offset: int
    first: int
    last: int
    evaluated: bool


@dataclass(frozen=True)
class Chunk:
    """Kept keys that are handled together: `runs` [first, last) side by side, `width` keys in all, and what to mask in them."""

    runs: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]
    width: int


def segments(tile_map: TileMap, b: int, h: int) -> list[list[Segment]]:
    """For each block row its kept block columns, ascending. `b`, `h` are entries of the map's own batch and head dimension."""
    if tile_map.ranges is not None:
        return [_of_range(*row) for row in tile_map.ranges[b, h].tolist()]
    assert tile_map.counts is not None and tile_map.offsets is not None and tile_map.index is not None
    kinds, rows = (FULL, EVALUATED if tile_map.intervals is None else BOUNDED), []
    for counts, offsets in zip(tile_map.counts[b, h].tolist(), tile_map.offsets[b, h].tolist(), strict=True):
        tiles = [
            (column, kind)
            for kind, count, offset in zip(kinds, counts, offsets, strict=True)
            for column in tile_map.index[offset : offset + count].tolist()
        ]
        rows.append(_joined(_grouped(sorted(tiles))))
    return rows


def _of_range(first: int, first_full: int, last_full: int, last: int) -> list[Segment]:
    if first_full == last_full:
        return [(first, last, BOUNDED)] if first < last else []
    parts = [(first, first_full, BOUNDED), (first_full, last_full, FULL), (last_full, last, BOUNDED)]
    return _joined([part for part in parts if part[0] < part[1]])


def _grouped(tiles: list[tuple[int, int]]) -> list[Segment]:
    found: list[Segment] = []
    for column, kind in tiles:
        if found and found[-1][1] == column and found[-1][2] == kind:
            found[-1] = (found[-1][0], column + 1, kind)
        else:
            found.append((column, column + 1, kind))
    return found


def _joined(row: list[Segment]) -> list[Segment]:
    """A full tile alone between bounded ones is masked with them: one pass over three tiles is cheaper than two over one."""
    found: list[Segment] = []
    for segment in row:
        found.append(segment)
        if len(found) > 2 and [s[2] for s in found[-3:]] == [BOUNDED, FULL, BOUNDED]:
            left, middle, right = found[-3:]
            if left[1] == middle[0] and middle[1] == right[0] and middle[1] - middle[0] == 1:
                found[-3:] = [(left[0], right[1], BOUNDED)]
    return found


def width(row: list[Segment], block_kv: int, kv_len: int) -> int:
    """Keys in the segments of a block row."""
    return sum(min(last * block_kv, kv_len) - first * block_kv for first, last, _ in row)


def cut(row: list[Segment], most: int, block_kv: int, kv_len: int) -> list[Chunk]:
    """The segments in chunks of about equal width, at most `most` keys each."""
    total = width(row, block_kv, kv_len)
    if not total:
        return []
    size = -(-total // -(-total // most))
    chunks, runs, spans, used = [], list[tuple[int, int]](), list[Span](), 0
    for first, last, kind in row:
        key, stop = first * block_kv, min(last * block_kv, kv_len)
        while key < stop:
            take = min(stop - key, size - used)
            if runs and runs[-1][1] == key:
                runs[-1] = (runs[-1][0], key + take)
            else:
                runs.append((key, key + take))
            if kind != FULL:
                spans.append(Span(used, key, key + take, kind == EVALUATED))
            key, used = key + take, used + take
            if used == size:
                chunks.append(Chunk(tuple(runs), tuple(spans), used))
                runs, spans, used = [], [], 0
    return [*chunks, Chunk(tuple(runs), tuple(spans), used)] if used else chunks
