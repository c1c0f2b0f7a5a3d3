"""What follows from what was measured: TFLOP/s by both counts, ratios, the share of flexmask's own full rate, and the grid itself."""

import math

import pytest

from benchmarks.figures import Case, Row, in_order, kept_pairs, load, make_case, mean, summary
from benchmarks.record import Record
from benchmarks.show import show
from flexmask import masks, reference


def row(mask: str, ours: float, **rivals: float) -> Row:
    """A case of 2 x 4 heads of 64 at 1024, half of its pairs and three quarters of its blocks kept; backward twice as slow as forward."""
    ms = {"flexmask": ours, **{label.replace("_", " "): x for label, x in rivals.items()}}
    pairs = 1024 * 1024
    made = Row(Case(mask, 1024, 2, 4, 4, 64), pairs // 2, pairs * 3 // 4)
    made.ms = {"forward": ms, "backward": {label: 2 * x for label, x in ms.items()}}
    return made


def test_forward_counts_four_operations_a_kept_pair_and_backward_ten():
    r = row("causal", ours=1.0)
    work = 2 * 4 * 64 * 1024 * 1024 / 2
    assert r.tflops("forward") == pytest.approx(4 * work / 1e-3 / 1e12)
    assert r.tflops("backward") == pytest.approx(10 * work / 2e-3 / 1e12)
    assert r.tflops("forward", blocks=True) == pytest.approx(1.5 * r.tflops("forward"))
    assert math.isnan(r.tflops("forward", "FA3"))


def test_a_ratio_says_how_many_times_as_fast_flexmask_is():
    r = row("document", ours=2.0, FlexAttention=3.0, FlexAttention_FLASH=2.5, FlexAttention_tuned=2.8)
    assert r.ratio("forward", "FlexAttention") == 1.5
    assert r.best_flex("forward") == "FlexAttention FLASH"
    assert math.isnan(r.ratio("forward", "SDPA cuDNN"))
    assert row("document", 1.0).best_flex("forward") == "FlexAttention"


def test_sparse_masks_are_held_against_the_full_rate_at_their_size():
    full = row("full", ours=1.0)
    full.kept_pairs = full.block_pairs = 1024 * 1024
    sparse = row("document", ours=1.0)
    assert sparse.of_full("forward", [sparse, full]) == pytest.approx(0.75)
    assert math.isnan(sparse.of_full("forward", [sparse]))
    longer = Row(make_case("full", 8192), ms=full.ms)
    assert math.isnan(sparse.of_full("forward", [longer]))


def test_the_summary_names_the_worst_case():
    rows = [row("document", 1.0, FlexAttention=2.0), row("qk_sparse", 1.0, FlexAttention=8.0)]
    assert "forward, times as fast as FlexAttention: mean 4.00, least 2.00 (document 1024 D64), of 2" in summary(rows)
    rows[0].ms["forward"]["FlexAttention FLASH"] = 1.2
    assert any("FlexAttention's best backend: mean 3.10, least 1.20 (document" in line for line in summary(rows))
    assert summary([Row(make_case("causal", 8192), failures={"case": "no"})]) == []


def test_means_are_geometric_and_pass_over_what_is_missing():
    assert mean([2.0, 8.0, math.nan]) == pytest.approx(4.0)
    assert math.isnan(mean([]))


def test_the_grid_has_enough_tokens_and_heads():
    assert make_case("causal", 8192) == Case("causal", 8192, 2, 32, 32, 128)
    assert make_case("causal", 8192, head_dim=64) == Case("causal", 8192, 2, 64, 64, 64)
    assert make_case("causal", 32768, group=4) == Case("causal", 32768, 1, 8, 2, 128)
    assert make_case("causal", 131072, head_dim=64).heads == 4


@pytest.mark.parametrize("mask", [masks.causal, masks.sliding_window(100), masks.full])
def test_kept_pairs_are_counted(mask):
    keep = reference.dense_mask(mask, 1, 1, 384, 384)[0, 0]
    blocks = keep.view(3, 128, 3, 128).any(3).any(1).sum()
    assert kept_pairs(mask, 384, chunk=256, device="cpu") == (int(keep.sum()), int(blocks) * 128 * 128)


def test_rows_come_back_from_their_file_in_the_order_of_the_grid(tmp_path):
    record = Record(tmp_path / "rows.json")
    record.more["versions"] = {"gpu": "none"}
    record.rows = [row("document", 1.0), row("causal", 1.0, FA3=2.0)]
    record.save()
    data, rows = load(record.path)
    assert data == {"versions": {"gpu": "none"}} and [r.case.mask for r in rows] == ["causal", "document"]
    assert [r.ms for r in rows] == [r.ms for r in in_order(record.rows)] and math.isnan(rows[0].difference)
    again = Record(record.path)
    assert again.has(record.rows[0].case) and not again.has(make_case("causal", 8192))


def test_a_row_is_shown_with_everything_known_of_it():
    r = row("document", 1.0, FlexAttention=2.0)
    r.error, r.peak_mib, r.maps = {"flexmask": 1e-3}, {"flexmask": 130.0}, {"flexmask": (0.01, 0.1, 2.0)}
    r.failures["FA4"] = "ImportError: no"
    text = show(r, [r])
    for part in ("document 1024 D64", "density 0.7500", "forward", "x2.00", "error flexmask 1.0e-03", "130 MiB", "map", "FA4 FAILED"):
        assert part in text
