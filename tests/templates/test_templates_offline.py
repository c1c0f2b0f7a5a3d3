"""Kernels compile for sm_80 and sm_90 on any machine, spill no register, and use what the GPU is good at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_cases import CASES

from flexmask.lowering import plan_forward
from flexmask.lowering.plan import SHARED_BYTES

HERE = Path(__file__).parent


ROOT = HERE.parent.parent
# the installed triton, and the newer one that `make test` puts beside it
TRITONS = ["", *(str(path) for path in [ROOT / ".triton-next"] if (path / "triton").is_dir())]


@pytest.fixture(scope="session", params=TRITONS, ids=lambda path: Path(path).name or "installed")
def compiled(request):
    """Every case compiled once, in a process that does not interpret kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([request.param, str(ROOT)] if request.param else [str(ROOT)])
    done = subprocess.run([sys.executable, HERE / "compiled_cases.py"], capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_no_register_is_spilled(compiled, case):
    assert compiled[case]["spills"] == 0


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_before_it_is_written(compiled, case):
    assert compiled[case]["undefined"] == []


@pytest.mark.parametrize("case", CASES)
def test_shared_memory_is_as_estimated(compiled, case):
    plan = plan_forward(**CASES[case])
    assert compiled[case]["shared_bytes"] <= min(plan.shared_bytes() * 1.2 + 8192, SHARED_BYTES[plan.arch] + 1024 * 4)


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c]["arch"] == 90])
def test_hopper_kernels_use_wgmma_and_tma(compiled, case):
    opcodes = compiled[case]["opcodes"]
    assert opcodes["HGMMA"] > 0
    assert ("UTMALDG" in opcodes) == (CASES[case].get("loads") == "tma")


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c]["arch"] == 80])
def test_ampere_kernels_use_tensor_cores_and_asynchronous_copies(compiled, case):
    assert compiled[case]["opcodes"]["HMMA"] > 0
    assert compiled[case]["opcodes"]["LDGSTS"] > 0
