"""Masks of the zoo as people write them: plain functions, closures, tables of every kind, odd arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from zoo_case import Case, entry
from zoo_masks import MASKS

from flexmask import masks
from flexmask.mods import mask


def a_mask(make: Callable[[Case], object]) -> Callable[[Case], object]:
    entry(MASKS, mask, make.__name__, make)
    return make


@a_mask
def anti_causal(c):
    return lambda b, h, q, k: k >= q


@a_mask
def strictly_causal(c):
    """Row 0 keeps nothing."""
    return lambda b, h, q, k: q > k


@a_mask
def nothing(c):
    return lambda b, h, q, k: q < k - k


@a_mask
def empty_rows(c):
    """Every third row and the last column keep nothing."""
    last = c.KV - 1
    return lambda b, h, q_idx, kv_idx: (q_idx % 3 != 1) & (kv_idx < last)


@a_mask
def flipped(c):
    """Reads the sequence from its end: negative numbers under // and %."""
    return lambda b, h, q, k: (k - q) // 4 <= (q - 7) % 3 - 2


@a_mask
def negative_floor_division(c):
    return lambda b, h, q, k: (q - k) // -3 >= -2


@a_mask
def negative_modulo(c):
    return lambda b, h, q, k: ((q - k) % -4 == -1) | (q == k)


@a_mask
def same_bucket_and_modulo(c):
    return lambda b, h, q, k: (q // 5 == k // 5) | (k % 7 == 0)


@a_mask
def steps(c):
    """Rows see a prefix that grows four keys every three rows."""
    return lambda b, h, q, k: k // 4 <= q // 3


@a_mask
def unequal_slopes(c):
    return lambda b, h, q, k: (2 * q - 3 * k < 10) & (5 * k <= 7 * q + 3)


@a_mask
def two_pieces(c):
    return lambda b, h, q, k: (abs(q - k) > 5) & (abs(q - k) <= 11)


@a_mask
def three_pieces(c):
    return lambda b, h, q, k: (k < 2) | ((k >= q - 4) & (k <= q)) | (k == q + 3)


@a_mask
def exclusive_or(c):
    return masks.causal ^ masks.local_window(5)


@a_mask
def complement(c):
    return ~(masks.sliding_window(6) | masks.document(c.documents()))


@a_mask
def composed_deeply(c):
    doc = masks.document(c.documents(c.B))
    return (masks.causal & doc & ~masks.dilated(20, 4)) | (masks.sink_window(2, 3) ^ masks.key_padding(c.bools(c.B, c.KV)))


@a_mask
def chosen_by_where(c):
    size = c.n // 5
    return lambda b, h, q, k: torch.where(q < size, k <= q, q - k < size) & (k <= q)


@a_mask
def chosen_by_head(c):
    """Half the heads look back, half look around."""
    half = c.H // 2
    return lambda b, h, q, k: torch.where(h < half, q >= k, torch.abs(q - k) <= 8)


@a_mask
def bounds_by_table(c):
    """Per row the first and last key."""
    first, last = c.ints(0, c.KV, c.Q), c.ints(0, c.KV, c.Q)
    return lambda b, h, q, k: (k >= first[q]) & (k <= last[q])


@a_mask
def bounds_by_batch_and_head(c):
    left, right = c.ints(0, 9, c.B, c.H, c.Q, dtype=torch.int16), c.ints(0, 9, c.B, c.H, c.Q, dtype=torch.int64)
    return lambda b, h, q, k: (q - k <= left[b, h, q]) & (k - q < right[b, h, q])


@a_mask
def table_of_heads(c):
    window = c.ints(1, 12, c.H, dtype=torch.int64)
    return lambda b, h, q, k: (q >= k) & (q - k < window[h])


@a_mask
def indexed_in_steps(c):
    table = c.bools(c.B, c.H, c.Q, c.KV)
    return lambda b, h, q, k: table[b][h][q, k]


@a_mask
def two_index_table(c):
    """Segment pairs that may see each other."""
    segment, allowed = c.documents(dtype=torch.int64) % 4, c.bools(4, 4, p=0.6)
    return lambda b, h, q, k: allowed[segment[q], segment[k]]


@a_mask
def table_of_table(c):
    doc = c.documents()
    start = torch.searchsorted(doc, torch.arange(int(doc.max()) + 1, dtype=torch.int32, device=c.device))
    return lambda b, h, q, k: (k >= start[doc[q]]) & (k <= q)


@a_mask
def table_by_distance(c):
    """A negative index counts from the end, as in Python."""
    near = c.bools(2 * c.n)
    return lambda b, h, q, k: near[q - k]


@a_mask
def permuted(c):
    """Causal in another order of the tokens."""
    order = torch.randperm(c.n, generator=c.generator).to(c.device)
    return lambda b, h, q, k: order[k] <= order[q]


@a_mask
def small_unsigned_table(c):
    """Differences of uint8 values are negative, never 256 less."""
    kind = c.ints(0, 5, c.n, dtype=torch.uint8)
    return lambda b, h, q, k: kind[q] - kind[k] < 1


@a_mask
def descending_table(c):
    limit = torch.arange(c.n, 0, -1, dtype=torch.int16, device=c.device)
    return lambda b, h, q, k: k < limit[q]


@a_mask
def bool_tables(c):
    rows, columns = c.bools(c.Q), c.bools(c.KV)
    return lambda b, h, q, k: rows[q] | columns[k]


@a_mask
def transposed_table(c):
    """Captured through a transpose and a stride: neither table is contiguous."""
    doc = c.documents(c.B).repeat_interleave(2, dim=1)[:, ::2]
    keep = c.bools(c.KV, c.Q).T
    return lambda b, h, q, k: (doc[b, q] == doc[b, k]) | keep[q, k]


@a_mask
def float_table(c):
    weight, threshold = c.reals(c.n, dtype=torch.float16), 0.25
    return lambda b, h, q, k: (weight[k] > threshold) | (q == k)


@a_mask
def zero_dimensional_captures(c):
    low, high = torch.tensor(-2, device=c.device), torch.tensor(6, dtype=torch.int16, device=c.device)
    return lambda b, h, q, k: (q - k >= low) & (q - k < high)


@a_mask
def partial_function(c):
    def window(b, h, q_idx, kv_idx, size):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < size)

    return functools.partial(window, size=11)


@a_mask
def default_parameters(c):
    def window(q_idx, kv_idx, before=4, after=2):
        return (q_idx - kv_idx <= before) & (kv_idx - q_idx <= after)

    return window


@a_mask
def callable_object(c):
    class Window:
        def __init__(self, size, doc):
            self.size, self.doc = size, doc

        def __call__(self, b, h, q, k):
            return (abs(q - k) < self.size) & (self.doc[q] == self.doc[k])

    return Window(7, c.documents())


@a_mask
def nested_closures(c):
    doc, size = c.documents(), 9

    def same(i, j):
        return doc[i] == doc[j]

    def near(i, j):
        def distance():
            return abs(i - j)

        return distance() < size

    return lambda b, h, q, k: same(q, k) & near(q, k)


@a_mask
def torch_functions(c):
    return lambda b, h, q, k: torch.logical_or(
        torch.logical_and(torch.minimum(q, k) >= 3, torch.maximum(q, k) < 30), torch.clamp(q - k, min=-2, max=2) == 0
    )


@a_mask
def bitwise(c):
    """A butterfly: positions that differ in one bit."""
    return lambda b, h, q, k: ((q ^ k) & ((q ^ k) - 1)) == 0


@a_mask
def true_division(c):
    return lambda b, h, q, k: (k + 1) / (q + 1) <= 0.5
