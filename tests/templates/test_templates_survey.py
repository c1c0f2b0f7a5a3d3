"""The survey kernel: what it writes (in Triton's interpreter, against torch), what it compiles to, and its text."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import survey_cases
from survey_cases import BY_BATCH, CASES, CAUSAL, DOCUMENT, Terms
from survey_compiled import COMPILED

from flexmask import analysis
from flexmask.ir import K, Q
from flexmask.lowering import CaptureSpec, TensorSpec
from flexmask.runtime.launch import load
from flexmask.templates.assemble_survey import MOST_PIECES, assemble_survey

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# the installed triton, and the newer one that `make test` puts beside it
TRITONS = ["", *(str(path) for path in [ROOT / ".triton-next"] if (path / "triton").is_dir())]
DOC = CaptureSpec((TensorSpec("doc", 2, "int32"),))
PLAIN = {"axis": "row", "block_q": 128, "block_kv": 64, "bounds": (), "box": None, "captures": CaptureSpec(), "tables": ()}


def run(script, paths=(), **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    env["PYTHONPATH"] = os.pathsep.join([*paths, str(HERE.parent), str(ROOT)])
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def interpreted():
    """Every case run once, in a process where Triton interprets kernels."""
    return run("survey_cases.py", TRITON_INTERPRET="1")


@pytest.fixture(scope="session", params=TRITONS, ids=lambda path: Path(path).name or "installed")
def compiled(request):
    return run("survey_compiled.py", [request.param] if request.param else [])


@pytest.mark.parametrize("case", CASES)
def test_a_survey_says_what_torch_says(interpreted, case):
    assert interpreted[case] == "", interpreted[case]


@pytest.mark.parametrize("case", survey_cases.zoo_cases())
def test_surveys_of_the_zoo(interpreted, case):
    assert interpreted[f"zoo {case}"] == "", interpreted[f"zoo {case}"]


def test_surveys_of_random_masks(interpreted):
    assert interpreted["random masks"] == "", interpreted["random masks"]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", COMPILED)
def test_no_register_is_spilled_and_many_programs_fit(compiled, case, arch):
    found = compiled[f"{case}, sm_{arch}"]
    assert found["spills"] == 0
    assert found["registers"] * found["warps"] * 32 <= 65536 // 2


def test_another_length_or_number_is_the_same_kernel(compiled):
    assert compiled["kernels"] == 1


@pytest.mark.parametrize("name", ["causal", "documents by batch", "all at once", "order of many tables", "eight runs as a bound"])
def test_files_pass_ruff_and_are_formatted(name, tmp_path):
    (tmp_path / "survey.py").write_text(CASES[name].source())
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--isolated"], ["format", "--isolated", "--line-length", "140", "--check", "--diff"]):
        done = subprocess.run([*ruff, *command, "survey.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_only_what_is_asked_for_is_computed():
    text = assemble_survey(**PLAIN, form=CAUSAL, ranges=True, header=["mask causal @ user.py:3"])
    assert text.startswith("# mask causal @ user.py:3\n# survey of blocks of 128 queries and 64 keys, by row\n")
    assert "return (tl.full((), 0, tl.int32), q_idx + 1)" in text
    assert "def count_below" not in text
    assert "RUNS = tl.constexpr(1)" in text and "HULLS = tl.constexpr(0)" in text and "OTHER_TERMS = tl.constexpr(0)" in text


def test_a_form_that_is_a_bound_as_well_is_searched_for_once():
    text = assemble_survey(**PLAIN | {"captures": DOC, "tables": (0,), "bounds": (BY_BATCH,)}, form=BY_BATCH, ranges=True)
    assert text.count("= count_below(") == 2
    assert "return (place, place_2, place, place_2)" in text


def test_owners_are_queries_or_keys():
    box = Terms(rows=(Q,), columns=(K, K + 1))
    text = assemble_survey(**PLAIN | {"axis": "column", "box": box}, form=None, ranges=False)
    assert "COLUMNS = tl.constexpr(True)" in text and "OWNER_BLOCK = tl.constexpr(64)" in text
    assert "OWNER_TERMS = tl.constexpr(2)" in text and "FIRST_OWNER_TERM = tl.constexpr(1)" in text
    assert "return (kv_idx, kv_idx + 1)" in text


def test_as_many_pieces_are_kept_as_a_map_holds():
    assert MOST_PIECES == analysis.MOST_PIECES


def test_lengths_that_indices_do_not_reach_are_refused(tmp_path):
    (tmp_path / "survey.py").write_text(CASES["causal"].source())
    module = load(tmp_path / "survey.py")
    with pytest.raises(ValueError, match="beyond 16777216"):
        module.survey(((), ()), 100, (1 << 24) + 1, 1, 1)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="'row' or 'column'"):
        assemble_survey(**PLAIN | {"axis": "key"}, form=None, ranges=False)
    two = SimpleNamespace(pieces=DOCUMENT.pieces * 2, sorted_tables=())
    for form in (None, two):
        with pytest.raises(ValueError, match="one piece"):
            assemble_survey(**PLAIN, form=form, ranges=True)
