"""The benchmark's twelve masks keep what its protocol says, and their blocks are as dense as published."""

import itertools

import numpy as np
import pytest
import torch

from benchmarks import masks as benchmark
from flexmask import reference

SMALL = (
    benchmark.Document(0, 5, 19),
    benchmark.Document(19, 23, 41, qk_sparse=True),
    benchmark.Document(41, 45, 50),
    benchmark.Document(50, 61, 77, qk_sparse=True),
    benchmark.Document(77, 80, 96),
)
PUBLISHED = {  # share of 128 x 128 blocks with a kept pair, mean over the samples, at 8192 tokens
    "sliding_window": 0.0757,
    "causal_document": 0.1375,
    "document": 0.2595,
    "global_sliding": 0.1646,
    "causal_blockwise": 0.3268,
    "prefix_lm_document": 0.1438,
    "qk_sparse": 0.4800,
}


def row_runs(name: str, n: int, documents: tuple[benchmark.Document, ...]) -> list[list[tuple[int, int]]]:
    """The kept key runs [start, stop) of each query row, written down from the protocol by hand."""
    of_row = {row: (i, d) for i, d in enumerate(documents) for row in range(d.start, d.stop)}
    spans = benchmark.sparse_spans(documents) if name == "qk_sparse" else ()
    window = n // 16

    def runs(q: int) -> list[tuple[int, int]]:
        i, d = of_row.get(q, (0, benchmark.Document(0, 0, 0)))
        if name == "share_question":
            own = next((a for a in benchmark.answers(i, d) if a[0] <= q < a[1]), (d.start, d.start))
            return [(d.start, min(q + 1, d.prefix_stop)), (own[0], q + 1 if own[1] > d.start else own[0])]
        return {
            "full": [(0, n)],
            "causal": [(0, q + 1)],
            "sliding_window": [(max(0, q + 1 - window), q + 1)],
            "causal_document": [(d.start, q + 1)],
            "document": [(d.start, d.stop)],
            "global_sliding": [(0, n)] if q < 16 else [(0, 16), (max(0, q - window), min(n, q + window + 1))],
            "causal_blockwise": [(0 if documents and d is documents[-1] else d.start, q + 1)],
            "prefix_lm_causal": [(0, max(q + 1, n // 2))],
            "prefix_lm_document": [(d.start, max(q + 1, d.prefix_stop))],
            "qk_sparse": [(0, next((start for start, stop in spans if start <= q < stop), q)), (q, q + 1)],
        }[name]

    return [runs(q) for q in range(n)]


def block_density(rows: list[list[tuple[int, int]]], n: int, block: int = 128) -> float:
    blocks = n // block
    edges = np.zeros((blocks, blocks + 1), dtype=np.int64)
    for q, runs in enumerate(rows):
        for start, stop in runs:
            if start < stop:
                edges[q // block, start // block] += 1
                edges[q // block, (stop - 1) // block + 1] -= 1
    return float((edges.cumsum(axis=1)[:, :-1] > 0).mean())


RUN_MASKS = [name for name in benchmark.NAMES if name != "random_eviction"]


@pytest.mark.parametrize("name", RUN_MASKS)
def test_the_mask_keeps_the_protocols_runs(name):
    expected = torch.zeros(96, 96, dtype=torch.bool)
    for q, runs in enumerate(row_runs(name, 96, SMALL)):
        for start, stop in runs:
            expected[q, start:stop] = True
    mask = benchmark.MASKS[name](benchmark.Sequence(96, SMALL, torch.device("cpu")))
    assert torch.equal(reference.dense_mask(mask, 1, 1, 96, 96)[0, 0], expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_block_densities_are_the_published_ones(name):
    cases = [()] if name in benchmark.DOCUMENT_FREE else benchmark.samples(8192)
    densities = [block_density(row_runs(name, 8192, documents), 8192) for documents in cases]
    assert sum(densities) / len(densities) == pytest.approx(PUBLISHED[name], abs=6e-5)


@pytest.mark.parametrize("name", ["causal_document", "share_question", "qk_sparse", "global_sliding"])
def test_build_agrees_with_the_runs_on_sampled_rows(name):
    sample = 1
    expected = row_runs(name, 8192, benchmark.samples(8192)[sample])
    rows = torch.arange(17, 8192, 487)
    keep = reference.dense_mask(benchmark.build(name, 8192, "cpu", sample), 1, 1, 8192, 8192, rows=rows)[0, 0]
    for row, found in zip(rows.tolist(), keep, strict=True):
        kept = {k for start, stop in expected[row] for k in range(start, stop)}
        assert set(found.nonzero().flatten().tolist()) == kept


def test_random_eviction_loses_one_key_a_row_from_the_middle_on():
    m = benchmark.MASKS["random_eviction"](benchmark.Sequence(64, (), torch.device("cpu"), batch=2, heads=3))
    keep = reference.dense_mask(m, 2, 3, 64, 64)
    rows = torch.arange(64)
    assert torch.equal(keep.sum(dim=-1), (rows + 1 - (rows - 31).clamp(min=0)).expand(2, 3, 64))
    assert not torch.equal(keep[0, 0], keep[0, 1]) and not torch.equal(keep[0, 0], keep[1, 0])
    gone = ~keep & (rows[:, None] >= rows)
    assert not (gone[..., :-1, :] & keep[..., 1:, :]).any(), "an evicted key came back"


def test_samples_fill_their_sequences():
    for n in (8192, 32768, 131072):
        for documents in benchmark.samples(n):
            assert documents[-1].stop == n and all(a.stop == b.start for a, b in itertools.pairwise(documents))
    with pytest.raises(ValueError, match="not for 4096"):
        benchmark.samples(4096)
