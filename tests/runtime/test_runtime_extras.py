"""Sinks, dropout and greatest scores, on the CPU and in generated kernels, against autograd through the reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extras_cases import CASES, problems

from flexmask.runtime import cpu, cpu_backward
from flexmask.runtime.dropout import dropped, row_keys
from flexmask.runtime.extras import Extras

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="session")
def interpreted():
    """Every case run once, in a process where Triton interprets kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / "extras_cases.py"], capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_on_the_cpu(case):
    # numbers written in a score are float32
    assert problems(CASES[case], "cpu", torch.float64, 1e-10 if CASES[case].score is None else 1e-6) == []


@pytest.mark.parametrize("case", ["everything, with a score", "everything, several tiles"])
def test_on_the_cpu_in_float32(case):
    assert problems(CASES[case], "cpu", torch.float32, 2e-5) == []


@pytest.mark.parametrize("case", CASES)
def test_in_kernels(interpreted, case):
    assert interpreted[case] == [], interpreted[case]


def test_a_nan_shows_in_the_greatest_score_of_its_row_alone():
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    q[0, 1, 4] = torch.nan
    peaks = cpu.forward(q, k, v, scale=0.3, extras=Extras(peaks=True))[2]
    assert peaks.isnan().nonzero().tolist() == [[0, 1, 4]]


def test_an_infinite_value_reaches_the_rows_that_do_not_drop_it():
    q, k, v = torch.randn(3, 1, 1, 40, 8, generator=torch.Generator().manual_seed(0))
    v[0, 0, 7] = torch.inf
    extras = Extras(dropout_p=0.5, seed=torch.tensor([3]))
    out = cpu.forward(q, k, v, scale=0.3, extras=extras)[0]
    rows = torch.arange(40)[:, None]
    gone = dropped(row_keys(extras.seed, torch.tensor(0), torch.tensor(0), rows), torch.arange(40), extras.threshold)
    assert torch.equal(out.isfinite().all(-1)[0, 0], gone[:, 7])
    assert not out.isnan().any()


def test_a_sink_of_minus_infinity_is_none():
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    nothing = torch.full((2,), -torch.inf)
    assert torch.equal(cpu.forward(q, k, v, scale=0.3, extras=Extras(nothing))[0], cpu.forward(q, k, v, scale=0.3)[0])
    out, lse, _ = cpu.forward(q, k[:, :, :0], v[:, :, :0], scale=0.3, extras=Extras(nothing))
    assert not out.any() and bool((lse == -torch.inf).all())
    grads = cpu_backward.backward(q, k[:, :, :0], v[:, :, :0], out, lse, torch.ones_like(out), scale=0.3, extras=Extras(nothing))
    assert grads.sinks.tolist() == [0.0, 0.0]


def test_results_do_not_depend_on_how_the_cpu_goes_through_keys(monkeypatch):
    case = CASES["everything, several tiles"]
    for module in (cpu, cpu_backward):
        monkeypatch.setattr(module, "SCORES", 1000)
        monkeypatch.setattr(module, "FEWEST_KEYS", 13)
    assert problems(case, "cpu", torch.float64, 1e-10) == []
