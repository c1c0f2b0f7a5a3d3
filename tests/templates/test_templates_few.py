"""The kernel for few queries, in Triton's interpreter, and compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flexmask.lowering import candidates, plan_forward
from flexmask.lowering.plan import SHARED_BYTES, KernelPlan
from flexmask.templates.assemble import assemble

HERE = Path(__file__).parent
CAUSAL = {"map_form": "range", "pieces": 1}
PLANS = {
    "one query, heads share a tile": {"head_dim": 128, "arch": 90, "loads": "tma", "pack": 4, "rows": 16, "split": True, **CAUSAL},
    "split only": {"head_dim": 64, "arch": 90, "loads": "tma", "rows": 64, "split": True},
    "not split": {"head_dim": 128, "arch": 80, "pack": 8, "rows": 64, "map_form": "list", "bits": True, "runs": "hold"},
    "wide": {"head_dim": 256, "arch": 80, "pack": 2, "rows": 32, "split": True, "map_form": "list", "pieces": 3},
    "128 rows": {"head_dim": 128, "arch": 90, "loads": "tma", "pack": 4, "rows": 128, "split": True, **CAUSAL},
    "128 rows, bits": {
        "head_dim": 128,
        "arch": 90,
        "loads": "tma",
        "pack": 8,
        "rows": 128,
        "split": True,
        "map_form": "list",
        "bits": True,
    },
    "128 rows, wide": {"head_dim": 256, "arch": 90, "loads": "tma", "pack": 4, "rows": 128, "map_form": "list", "pieces": 2},
    "float32": {"head_dim": 128, "dtype": "float32", "arch": 80, "pack": 4, "rows": 16, "split": True, **CAUSAL},
}


def run(code, *arguments, interpret=False):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
    command = [sys.executable, "-W", "ignore", code, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)


def test_results_are_those_of_the_reference():
    found = run(HERE / "few_interpreted.py", interpret=True)
    assert len(found) > 300 and {case: problem for case, problem in found.items() if problem} == {}


COMPILING = """
import json, sys
from flexmask.lowering.plan import SHARED_BYTES, KernelPlan
from flexmask.runtime.launch import load
from flexmask.templates.offline import compile_offline
plan = KernelPlan.from_json(open(sys.argv[2]).read())
made = compile_offline(load(sys.argv[1]), plan)
print(json.dumps({"spills": made.spills, "shared": made.shared_bytes}))
"""


@pytest.mark.parametrize("name", PLANS)
def test_it_compiles(name, tmp_path):
    plan = plan_forward(**PLANS[name])
    (tmp_path / "kernel.py").write_text(assemble(plan))
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "compile.py").write_text(COMPILING)
    found = run(tmp_path / "compile.py", tmp_path / "kernel.py", tmp_path / "plan.json")
    assert found["spills"] <= 16 and found["shared"] <= SHARED_BYTES[plan.arch]


@pytest.mark.parametrize("name", PLANS)
def test_plans(name):
    plan = plan_forward(**PLANS[name])
    assert plan.is_few and plan.queries == plan.block_q // plan.pack and candidates(plan) == ()
    assert KernelPlan.from_json(plan.to_json()) == plan
    assert ("split" in str(plan)) == plan.split and ("heads a tile" in str(plan)) == (plan.pack > 1)


def test_heads_that_share_a_tile_are_a_power_of_two():
    with pytest.raises(ValueError, match="power of two up to its 16 rows, not 3"):
        plan_forward(64, pack=3, rows=16)


@pytest.mark.parametrize("name", ["split only", "not split"])
def test_files_pass_ruff_and_are_formatted(name):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.py").write_text(assemble(plan_forward(**PLANS[name])))
        for command in (["check"], ["format", "--check", "--diff"]):
            ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "140", "kernel.py"]
            done = subprocess.run(ruff, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout


def test_a_file_has_what_it_needs_and_no_more():
    text = assemble(plan_forward(64, pack=2, rows=16))
    assert "def finish_rows" in text and "def resident_heads" not in text and "def store_rows" not in text
    assert "def attend(" in assemble(plan_forward(64)) and "def finish_rows" not in assemble(plan_forward(64))
