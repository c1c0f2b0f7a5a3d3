"""`autotune=True`: sizes are measured at the first call, and by it alone; what it says of itself, and where it is without effect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexmask
from flexmask import masks
from flexmask.runtime import tuning

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CANDIDATES = 1  # that autotune_cases.py allows for each kernel
# a planned kernel and its candidate, each timed once and then twice beside each other
TIMED = 3 * (1 + CANDIDATES)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What autotune_cases.py found in an interpreter, with a cache of its own."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["FLEXMASK_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, "-W", "ignore", HERE / "autotune_cases.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


TUNED = ["window", "bias"]


def sizes_of(lines, kernel):
    (line,) = [line for line in lines if line.startswith(kernel)]
    return line.split("tiles ")[1].split(",")[0]


@pytest.mark.parametrize("case", TUNED)
def test_the_winners_are_used_and_named(cases, case):
    before, after = cases[case]["before"], cases[case]["after"]
    assert "tiles not measured yet: the next call does" in before
    assert (sizes_of(before, "kernel"), sizes_of(after, "kernel")) == ("32x32", "64x32")
    assert "tiles measured on an interpreter: 64x32 is 2.00 times as fast as 32x32" in after


def test_the_first_backward_pass_measures_its_kernels(cases):
    after = cases["window"]["after"]
    assert sizes_of(after, "gradients backward dq") == sizes_of(after, "gradients backward dkdv") == "32x16"
    assert after.count("tiles measured on an interpreter: the pass is 2.00 times as fast with 32x16 as with 32x32") == 2
    assert cases["window"]["timed"] == 3 * TIMED  # forward, dq, dk and dv


@pytest.mark.parametrize("case", TUNED)
def test_other_sizes_are_no_other_results(cases, case):
    assert cases[case]["apart"] < 1e-5


@pytest.mark.parametrize("case", TUNED)
def test_later_calls_and_processes_read(cases, case):
    assert cases[case]["timed again"] == 0 and cases[case]["same"]
    assert cases[case]["read"] == cases[case]["after"]


@pytest.mark.parametrize("case", TUNED)
def test_calls_that_do_not_ask_are_as_before(cases, case):
    assert cases[case]["still plain"] == cases[case]["plain"]
    assert not any("measured" in line for line in cases[case]["plain"])


def test_deterministic_gradients_turn_it_off(cases):
    found = cases["deterministic"]
    assert found["timed"] == 0 and found["apart"] == 0
    assert found["after"][:-1] == found["plain"]
    assert found["after"][-1] == "tiles not measured, as deterministic gradients were asked for"


@pytest.fixture
def unused(monkeypatch):
    """Nothing may be timed."""

    def milliseconds(self, run):
        raise AssertionError("something was timed")

    monkeypatch.setattr(tuning.Events, "milliseconds", milliseconds)


def rows():
    torch.manual_seed(0)
    return [torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_without_effect_on_the_cpu(unused, backend):
    q, k, v = rows()
    attn, plain = (flexmask.compile(masks.causal, backend=backend, autotune=tuned) for tuned in (True, False))
    out = attn(q, k, v)
    assert torch.equal(out, plain(q, k, v))
    out.sum().backward()
    (line,) = [line for line in attn.explain(q, k, v).splitlines() if "measured" in line]
    assert " ".join(line.split()) == f'tiles not measured, as the "{backend or "cpu"}" backend has no sizes to choose'
    assert "measured" not in plain.explain(q, k, v)


def test_in_one_step(unused):
    q, k, v = rows()
    assert torch.equal(flexmask.attention(q, k, v, mask=masks.causal, autotune=True), flexmask.attention(q, k, v, mask=masks.causal))


def test_torch_compile_takes_it_along(unused, monkeypatch):
    asked = []
    find = flexmask.runtime.differentiable.Call.forward
    monkeypatch.setattr(
        flexmask.runtime.differentiable.Call, "forward", lambda self, *x: asked.append(self.request.autotune) or find(self, *x)
    )
    q, k, v = (x.detach() for x in rows())
    for tuned in (True, False):
        out = torch.compile(lambda *x, t=tuned: flexmask.attention(*x, mask=masks.causal, autotune=t), backend="eager", fullgraph=True)(
            q, k, v
        )
        torch.testing.assert_close(out, flexmask.attention(q, k, v, mask=masks.causal))
    assert asked[0] is True and asked[2] is False


def test_torch_func_takes_it_along():
    q, k, v = (x.detach() for x in rows())
    found = torch.func.grad(lambda q: flexmask.attention(q, k, v, mask=masks.causal, autotune=True).square().sum())(q)
    wanted = torch.func.grad(lambda q: flexmask.attention(q, k, v, mask=masks.causal).square().sum())(q)
    torch.testing.assert_close(found, wanted)
