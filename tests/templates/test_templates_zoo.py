"""Every zoo mask and score as a kernel: compiled for sm_80 and sm_90 without a GPU and without spills; run by the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zoo

HERE = Path(__file__).parent
NAMES = [f"mask {name}" for name in zoo.MASKS] + [f"score {name}" for name in zoo.SCORES]


def run(script, *arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
    command = [sys.executable, "-W", "ignore", HERE / script, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)


@pytest.fixture(scope="session")
def compiled():
    return {arch: run("zoo_compiled.py", str(arch)) for arch in (80, 90)}


@pytest.fixture(scope="session")
def interpreted():
    return run("zoo_interpreted.py", TRITON_INTERPRET="1")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", NAMES)
def test_no_register_is_spilled(compiled, name, arch):
    assert compiled[arch][name]["spills"] == 0


@pytest.mark.parametrize("name", ["score relative_bias", "score t5_bias"])
def test_scattered_entries_are_not_copied_ahead(compiled, name):
    """Each alone: that took seven times as long as all the rest (docs/benchmarks.md)."""
    assert compiled[90][name]["copies"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_interpreted_kernel_equals_the_reference(interpreted, name):
    assert isinstance(interpreted[name], float), interpreted[name]
    assert interpreted[name] < 2e-5
