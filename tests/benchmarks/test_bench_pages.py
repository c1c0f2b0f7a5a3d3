"""A run's file as markdown and as a plot, on made-up figures."""

import json
import sys
from dataclasses import asdict

import pytest

from benchmarks import markdown, plot
from benchmarks.figures import Row, load, make_case


@pytest.fixture
def run(tmp_path):
    """Two masks forward and backward, with a rival for each, something missing and something failed."""
    full = Row(make_case("full", 8192), 8192**2, 8192**2)
    full.ms = {"forward": {"flexmask": 3.2, "FA3": 3.3, "FlexAttention": 5.0}, "backward": {"flexmask": 9.0, "FlexAttention": 14.0}}
    full.error, full.gradient_error, full.difference = {"flexmask": 2e-4}, {"flexmask": 3e-3}, 4e-3
    full.peak_mib = {"flexmask": 134.0, "FlexAttention": 132.0}
    sparse = Row(make_case("causal_document", 8192), 8192**2 // 16, 8192**2 // 8)
    sparse.ms = {"forward": {"flexmask": 0.4, "FlexAttention": 0.6}, "backward": {"flexmask": 1.5}}
    sparse.failures = {"FlexAttention FLASH": "RuntimeError: no"}
    sparse.maps = {"flexmask": (0.014, 0.08, 1.0)}
    wide = Row(make_case("full", 8192, 64, 4), 8192**2, 8192**2, failures={"case": "OutOfMemoryError"})
    first = {
        "mask": "causal",
        "contestant": "flexmask",
        "cold": {"forward": 3.0, "backward": 2.0},
        "warm": {"forward": 0.4, "backward": 0.3},
    }
    data = {
        "versions": {"gpu": "NVIDIA H200", "date": "2026-11-21", "commit": "abc"}, "options": {"sample": 0}, "missing": {"FA4": "no"},
        "left_out": {"SDPA cuDNN": "hung"}, "first_call": [first, {"mask": "full", "contestant": "FlexAttention", "failure": "cold: no"}],
        "rows": [asdict(row) for row in (sparse, wide, full)],
    }  # fmt: skip
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(data))
    return path


def test_markdown_has_a_table_a_part(run):
    text = markdown.page(*load(run))
    assert "| mask | length | block density | ms | exact | block | of full | FA3 | FlexAttention |" in text
    assert "| full | 8192 | 1.0000 | 3.200 | 687 | 687 | 1.00 | 666 (1.03) | 440 (1.56) |" in text
    assert "| causal document | 8192 | 0.1250 | 0.400 | 344 | 687 | 1.00 |  | 229 (1.50) |" in text
    assert "| causal document | 8192 | 0.1250 | 1.500 | 229 | 458 | 0.75 |  |" in text
    assert "| full | 8192 | 2e-04 | 3e-03 | 4e-03 | 134 | 132 |" in text
    assert "| causal | flexmask | 3.00 | 2.00 | 0.40 | 0.30 |" in text and "0.014, 0.08, 1" in text


def test_markdown_holds_flexmask_against_the_best_backend():
    row = Row(make_case("qk_sparse", 8192), 8192**2 // 2, 8192**2 // 2)
    row.ms["forward"] = {"flexmask": 2.0, "FlexAttention": 4.0, "FlexAttention FLASH": 2.5}
    head, _, line = markdown.speeds([row], "forward").splitlines()
    assert head.endswith("| FlexAttention | FlexAttention FLASH | over FlexAttention's best |") and line.endswith("(1.25) | 1.25 |")


def test_markdown_tells_what_is_missing_failed_or_was_left_out(run):
    text = markdown.page(*load(run))
    assert "* not installed: FA4" in text and "SDPA cuDNN (hung)" in text
    assert "* failed: causal_document 8192 D128, FlexAttention FLASH: RuntimeError: no" in text
    assert "* failed: full 8192 D64 GQA4, case: OutOfMemoryError" in text
    assert "forward, times as fast as FA3: mean 1.03" in text


def test_markdown_is_printed_for_each_file(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["markdown", str(run), str(run)])
    markdown.main()
    assert capsys.readouterr().out.count("Forward, D = 128:") == 2


def test_the_plot_has_a_panel_a_part_and_a_bar_a_contestant(run):
    figure = plot.draw(*load(run))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["forward, 8192 D128", "backward, 8192 D128"]
    forward, backward = figure.axes
    assert len(forward.patches) == 5 and len(backward.patches) == 3
    assert [text.get_text() for text in forward.get_legend().get_texts()] == ["flexmask", "FA3", "FlexAttention"]
    assert max(bar.get_height() for bar in forward.patches) == pytest.approx(687, abs=1)


def test_the_plot_is_written_as_svg(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot", str(run), "-o", str(tmp_path / "bars.svg"), "--blocks"])
    plot.main()
    assert "<svg" in (tmp_path / "bars.svg").read_text()


def test_there_is_no_plot_of_failures():
    with pytest.raises(ValueError, match="nothing was timed"):
        plot.draw({}, [Row(make_case("full", 8192), failures={"case": "no"})])
