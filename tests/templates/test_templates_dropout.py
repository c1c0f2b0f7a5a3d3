"""Kernels with dropout keep their hashes in registers; its device functions give the bits of torch's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dropout_compiled import CASES

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SAME_BITS = """
import torch, triton, triton.language as tl
from flexmask.templates.dropout import head_keys, row_keys, survives
from flexmask.runtime import dropout

@triton.jit
def draw(seed, out, h, threshold, ACROSS: tl.constexpr):
    one, other = tl.arange(0, 16), tl.arange(0, 32)
    q, kv = (one[:, None], other[None, :]) if not ACROSS else (one[None, :], other[:, None])
    kept = survives(row_keys(head_keys(seed, tl.program_id(0), h), q + 100), kv + 7000, threshold)
    tl.store(out + tl.program_id(0) * 512 + q * 32 + kv, kept)

for number in (0, 1, -1, 1 << 31, (1 << 63) - 1, -(1 << 63), 123456789012345):
    seed, b, h = torch.tensor([number]), torch.arange(3).view(-1, 1, 1), torch.tensor(70)
    want = ~dropout.dropped(dropout.row_keys(seed, b, h, torch.arange(100, 116)[:, None]), torch.arange(7000, 7032), 5000000)
    for across in (False, True):
        found = torch.zeros(3, 16, 32, dtype=torch.bool)
        draw[(3,)](seed, found, 70, 5000000, across)
        assert torch.equal(found, want), (number, across)
"""


def test_bits_are_those_of_torch_in_tiles_of_both_kinds(tmp_path):
    path = tmp_path / "same_bits.py"
    path.write_text(SAME_BITS)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", path], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def compiled():
    """Every case compiled once, in a process that does not interpret kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, HERE / "dropout_compiled.py"], capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_no_register_is_spilled_where_tiles_are_multiplied(compiled, case):
    assert compiled[case]["loop_spills"] == 0
    assert compiled[case]["spills"] <= 64  # what is put aside while a line of tiles is walked costs nothing
