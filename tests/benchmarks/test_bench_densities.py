"""flexmask's maps find the masks of the benchmark as dense as the paper that they are from states."""

from pathlib import Path

import pytest

from benchmarks.densities import LENGTHS, PUBLISHED, densities, rows


@pytest.mark.parametrize("length", [*LENGTHS[:2], pytest.param(LENGTHS[2], marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_mean_block_densities_are_the_published_ones(name, length):
    found = densities(name, length)
    assert sum(found) / len(found) == pytest.approx(PUBLISHED[name][LENGTHS.index(length)], abs=6e-5)


def test_the_documented_densities_are_of_these_masks():
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for cells in rows(PUBLISHED, [8192]):
        assert f"| {' | '.join(cells)} |" in text


def test_a_single_sample_is_not_the_mean():
    assert rows(["causal_document"], [8192]) == [["causal document", "8192", "0.1880", "0.1375", "0.1375"]]
    assert rows(["causal"], [8192]) == [["causal", "8192", "0.5078", "", ""]]
