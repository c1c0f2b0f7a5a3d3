"""How long a contestant is timed."""

import pytest
import torch
import triton

from benchmarks.timing import LEAST_RUNS, RUN_MS, bench


class Clock:
    """Stands in for a CUDA event: a run takes 20 ms."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 20.0


@pytest.mark.parametrize(("run_ms", "least", "expected"), [(RUN_MS, LEAST_RUNS, 260), (500, 13, 500), (60, 5, 100)])
def test_long_runs_are_repeated_often_enough(monkeypatch, run_ms, least, expected):
    asked = {}
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **how: asked.update(how) or 7.0)
    assert bench(lambda: None, "cuda", run_ms, least) == 7.0
    assert asked["rep"] == expected and asked["return_mode"] == "median"


def test_on_the_cpu_the_clock_is_looked_at():
    calls = []
    assert bench(lambda: calls.append(1), "cpu", least=3) >= 0 and len(calls) == 4
