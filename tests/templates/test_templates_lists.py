"""The list kernels: what tiles a row lists, from states and from intervals; and how many lines before each one list a block."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lists_cases import CASES

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def interpreted():
    """Every case run once, in a process where Triton interprets kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / "lists_cases.py"], capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_lists_equal_brute_force(interpreted, case):
    assert interpreted[case] == "", interpreted[case]
