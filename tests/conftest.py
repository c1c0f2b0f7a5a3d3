"""For all tests: helper modules on the path, GPU tests skipped where there is none, hypothesis without deadlines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
for folder in (HERE, HERE / "runtime", HERE.parent):  # zoo, strategies, drawing; cases of maps; benchmarks
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

# workers that run side by side have a core each, and so have the processes they start
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# the first example compiles or traces, so time says nothing about an example
settings.register_profile("flexmask", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("flexmask")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
