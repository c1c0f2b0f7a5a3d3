"""The process that measures may die or hang: the run goes on without whoever was at work."""

import json
import sys
from dataclasses import asdict

import pytest

from benchmarks.figures import Case
from benchmarks.processes import compile_ahead, keep_measuring
from benchmarks.record import Record

CASE = Case("causal", 8192, 2, 32, 32, 128)
# what stands in for the measuring process: it begins with one contestant, and ends well without it
WORKER = """
import json, os, sys, time
path, label, how = sys.argv[1:4]
rows = json.load(open(path))["rows"] if os.path.exists(path) else []
if label in sys.argv[4:] or rows:
    sys.exit(0)
open(path + ".progress", "w").write(json.dumps({"case": json.loads('CASE'), "label": label, "why": "lost" if how == "lost" else ""}))
if how == "hang":
    time.sleep(60)
os.kill(os.getpid(), 9) if how == "killed" else sys.exit(3)
""".replace("CASE", json.dumps(asdict(CASE)))


def command(path, label: str, how: str) -> list[str]:
    return [sys.executable, "-c", WORKER, str(path), label, how]


@pytest.mark.parametrize(
    ("how", "why"), [("lost", "lost"), ("killed", "exit code -9"), ("hang", "no sign of life for 1 s")], ids=["lost", "killed", "hang"]
)
def test_a_rival_that_ends_the_run_is_left_out_of_the_rest(tmp_path, how, why):
    path = tmp_path / "rows.json"
    assert keep_measuring(command(path, "FA4", how), path, patience_s=1)
    record = Record(path)
    assert record.more["left_out"] == {"FA4": f"causal 8192 D128: {why}"} and record.rows == []
    assert not (tmp_path / "rows.json.progress").exists()


def test_a_case_in_which_flexmask_ends_the_run_has_failed(tmp_path):
    path = tmp_path / "rows.json"
    assert keep_measuring(command(path, "flexmask", "lost"), path, patience_s=30)
    (row,) = Record(path).rows
    assert row.case == CASE and row.failures == {"flexmask": "lost"}


def test_a_process_that_dies_before_it_begins_is_not_started_again(tmp_path):
    assert not keep_measuring([sys.executable, "-c", "import sys; sys.exit(1)"], tmp_path / "rows.json", patience_s=30)


def test_cases_are_dealt_out_to_processes_and_failures_told(capsys):
    says = "import sys; print('cases', *sys.argv[1:], 'failed' if '1' in sys.argv else 'compiled')"
    compile_ahead([sys.executable, "-c", says], cases=[0, 1, 2, 3, 4], jobs=2, limit_s=60)
    out = capsys.readouterr().out
    assert "cases 1 3 failed" in out and "cases 0 2 4" not in out


def test_a_process_that_compiles_for_too_long_or_dies_is_told_of(capsys):
    compile_ahead([sys.executable, "-c", "import time; time.sleep(60)"], cases=[7], jobs=4, limit_s=0.5)
    compile_ahead([sys.executable, "-c", "raise SystemExit('out of memory')"], cases=[7], jobs=1, limit_s=60)
    out = capsys.readouterr().out
    assert "cases 7 were not compiled in" in out and "out of memory" in out
