"""The command line: which cases and contestants a run has, and that it goes on where it stopped."""

import importlib
import math

import pytest

from benchmarks import figures, kernels, versions
from benchmarks.figures import Row, load
from benchmarks.kernels import arguments, grid, main, wanted
from benchmarks.record import Record


@pytest.fixture
def tiny(monkeypatch):
    """Cases that a CPU bears."""
    monkeypatch.setattr(figures, "TOKENS", 128)
    monkeypatch.setattr(figures, "OTHER_HEADS", 2)


def asked(*words: str):
    return [c.label for c in wanted(arguments(list(words)))[0]]


def test_the_grid_is_every_mask_at_every_size_the_full_one_first():
    cases = grid(arguments(["--lengths", "8192", "32768", "--head-dim", "128", "64", "--gqa", "1", "4"]))
    assert len(cases) == len(set(cases)) == 12 * 2 * 2 * 2
    assert cases[0].name == "full 8192 D128" and cases[12].name == "full 32768 D128" and cases[24].name == "full 8192 D128 GQA4"
    assert [c.mask for c in grid(arguments(["--masks", "qk_sparse", "full"]))[:2]] == ["full", "qk_sparse"]


def test_only_random_eviction_differs_by_head():
    cases = grid(arguments(["--per-head", "--promised", "--sample", "3"]))
    assert {c.mask for c in cases if c.per_head} == {"random_eviction"}
    assert all(c.promised and c.sample == 3 for c in cases)


def test_rivals_are_all_but_the_slow_or_those_named():
    assert asked()[:2] == ["flexmask", "FlexAttention"] and "FlexAttention tuned" not in asked()
    assert "FlexAttention tuned" in asked("--best")
    assert asked("--rivals", "SDPA cuDNN") == ["flexmask", "SDPA cuDNN"]
    assert asked("--rivals") == ["flexmask"]
    assert "FlexAttention" not in asked("--without", "FlexAttention")


def test_a_rival_that_is_not_installed_is_reported():
    contestants, missing = wanted(arguments([]))
    assert {"FA3", "FA4", "FlexAttention FLASH"} <= missing.keys() | {c.label for c in contestants}
    assert all("Error" in why for why in missing.values())


def test_a_run_measures_what_its_file_does_not_have_yet(tiny, tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = ["--device", "cpu", "--lengths", "128", "--masks", "full", "causal", "sliding_window", "--head-dim", "16", "--worker"]
    words += ["--rivals", "SDPA flash", "--rounds", "1", "--least", "1", "--json", str(path)]
    record = Record(path)
    record.rows = [Row(grid(arguments(words))[1], failures={"flexmask": "known already"})]
    record.save()
    assert main(words) == 0
    data, rows = load(path)
    assert [r.case.mask for r in rows] == ["full", "causal", "sliding_window"]
    assert rows[1].failures == {"flexmask": "known already"} and not rows[0].failures
    assert rows[0].ratio("backward", "SDPA flash") > 0 and math.isnan(rows[2].ratio("forward", "SDPA flash"))
    assert {"gpu", "date", "commit", "torch"} <= data["versions"].keys() and data["options"]["rounds"] == 1
    assert "causal 128" not in capsys.readouterr().out


def test_a_mask_that_fails_does_not_end_the_run(tiny, tmp_path):
    path = tmp_path / "rows.json"
    words = ["--device", "cpu", "--lengths", "128", "--masks", "document", "causal", "--head-dim", "16", "--worker"]
    assert main([*words, "--rivals", "--rounds", "1", "--least", "1", "--json", str(path)]) == 0
    causal, document = load(path)[1]
    assert "there are samples for 8192" in document.failures["case"] and causal.ms["forward"]["flexmask"] > 0


def test_no_case_is_begun_after_the_deadline(tiny, tmp_path, capsys):
    words = ["--device", "cpu", "--lengths", "128", "--masks", "full", "causal", "--head-dim", "16", "--worker", "--deadline", "1"]
    assert main([*words, "--json", str(tmp_path / "rows.json")]) == 0
    assert "no time left for 2 cases" in capsys.readouterr().out and not (tmp_path / "rows.json").exists()


def test_compiling_ahead_reports_and_goes_on(tiny, capsys):
    words = ["--device", "cpu", "--lengths", "128", "--masks", "document", "causal", "--head-dim", "16", "--rivals", "--ahead", "0", "1"]
    assert main(words) == 0
    assert "document 128 D16: flexmask failed: ValueError" in capsys.readouterr().out


def test_versions_are_found_without_git(monkeypatch):
    def nothing(*command, **how):
        raise FileNotFoundError("git")

    monkeypatch.setattr(versions.subprocess, "run", nothing)
    found = versions.versions.__wrapped__()
    assert found["commit"] == "" and found["torch"] and found["gpu"]


@pytest.mark.parametrize("name", ["densities", "first_call", "host", "kernels", "maps", "markdown", "plot", "training"])
def test_every_script_can_be_loaded_without_a_gpu(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


def test_other_benchmarks_find_what_they_share():
    assert kernels.HEADS[8192] == 32 and all(callable(getattr(kernels, name)) for name in ("bench", "check", "kept_pairs"))
