"""Maps made by generated kernels, in Triton's interpreter: those of the mask written out, for the whole zoo, by rows and by columns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zoo

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def wrong():
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])}
    command = [sys.executable, "-W", "ignore", HERE / "device_cases.py"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)


@pytest.mark.parametrize("name", zoo.MASKS)
def test_maps_are_exact(wrong, name):
    assert wrong[name] == []
