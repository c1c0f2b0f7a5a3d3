"""Training through the generated kernels over random masks, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COUNT = 40


def test_random_masks_through_the_kernels_equal_the_reference():
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent.parent)])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", HERE / "random_training_cases.py", str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) >= COUNT
