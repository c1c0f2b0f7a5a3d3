"""First calls are timed in processes of their own, whose caches nobody else sees."""

import json
import subprocess

from benchmarks import first_call
from benchmarks.figures import Case


def answer(environments):
    """Stands in for subprocess.run: the second process of a contestant is four times as fast; FlexAttention fails."""

    def run(command, env, **kwargs):
        if "FlexAttention" in command:
            raise subprocess.CalledProcessError(1, command, stderr="no compiler")
        environments.append({name: env[name] for name in first_call.CACHES})
        seconds = {"forward": 4.0 / 4 ** (len(environments) - 1), "backward": 1.0}
        return subprocess.CompletedProcess(command, 0, stdout="a warning\n" + json.dumps(seconds))

    return run


def test_the_second_process_finds_the_caches_of_the_first(monkeypatch, capsys):
    environments = []
    monkeypatch.setattr(first_call.subprocess, "run", answer(environments))
    ours, rival = first_call.table(["causal"], 8192, 128)
    assert ours["cold"]["forward"] == 4.0 and ours["warm"]["forward"] == 1.0
    assert environments[0] == environments[1] and len(set(environments[0].values())) == 3
    assert rival["failure"] == "cold: no compiler" and "warm" not in rival
    assert "cold 4.00 + 1.00 s, warm 1.00 + 1.00 s" in capsys.readouterr().out


def test_a_first_call_is_forward_and_backward():
    found = first_call.first_call("flexmask", Case("causal", 128, 1, 2, 2, 16), "cpu")
    assert found["forward"] > 0 and found["backward"] > 0
