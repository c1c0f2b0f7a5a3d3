"""Every size that tuning would try for a Hopper kernel gives the right results."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_hopper_kernels_of_all_candidates():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "tuned_on_cpu.py"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) >= 15 and any(name.startswith("backward") for name in found)
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
