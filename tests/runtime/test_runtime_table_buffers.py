"""Gradients of captured tables: sums whose bits no order changes, on generated kernels and on the CPU."""

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from deterministic_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import flexmask
from flexmask import masks
from flexmask.runtime.table_buffers import FixedBuffers, FloatBuffers

HERE = Path(__file__).parent
TESTS = HERE.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def interpreted():
    """Every case run once, in a process where Triton interprets kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-W", "ignore", HERE / "deterministic_cases.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_right_and_their_bits_the_same_in_any_order(interpreted, case):
    assert interpreted[case] == [], "\n".join(interpreted[case])


# what the two launches leave, and what becomes of it


def filled(values: list[float], most: int) -> FixedBuffers:
    """Buffers of a table of one entry as the kernels would fill them with `values`, in exact arithmetic."""
    buffers = FixedBuffers.zeros({0: torch.empty(1)}, CPU, {0: most})
    bits = torch.tensor(values).abs().view(torch.int32)
    buffers.peaks[0].fill_(bits.max())
    if math.isfinite(sum(values)):
        exponent = max(int(bits.max()) >> 23, 1) - 126
        units = [Fraction(v) * int(buffers.limits[0]) / Fraction(2) ** exponent for v in torch.tensor(values).tolist()]
        buffers.sums[0].fill_(sum(math.floor(u + Fraction(1, 2)) for u in units))
    return buffers


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200)
@given(st.lists(finite, min_size=1, max_size=50), st.integers(0, 40))
def test_a_sum_is_the_exact_one_but_for_its_units_and_one_rounding(values, room):
    """Subnormal numbers, sums that overflow float32 and numbers of any size among them."""
    most = max(len(values), 2**room)
    found = filled(values, most).result([0])[0].item()
    exact, peak = sum(map(Fraction, values)), max(abs(v) for v in values)
    units = Fraction(max(peak, 2.0**-126)) * len(values) / 2 ** (61 - most.bit_length())
    if abs(exact) > 3.4e38:
        assert abs(found) > 3.39e38
    else:
        assert abs(Fraction(found) - exact) <= units + abs(exact) / 2**23 + Fraction(2) ** -149


def test_no_sum_overflows():
    for most in (1, 2, 3, 1000, 2**20 + 1, 2**45):
        limit = FixedBuffers.zeros({0: torch.empty(1)}, CPU, {0: most}).limits[0]
        assert most * limit <= 2**62 < 2 * most * limit * (1 if most & (most - 1) == 0 else 2)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_an_entry_that_receives_no_finite_number_is_nan(poison):
    assert filled([1.0, poison], 2).result([0])[0].isnan().all()


def test_entries_keep_their_places_in_tables_of_any_shape():
    tables = {1: torch.empty(3, 2).T, 4: torch.empty(()), 5: torch.empty(0, 3)}
    fixed, floats = FixedBuffers.zeros(tables, CPU, dict.fromkeys(tables, 8)), FloatBuffers.zeros(tables, CPU)
    assert [x.dtype for x in fixed.grads[:6]] == [torch.int64] * 3 + [torch.int32] * 3
    assert [x.dtype for x in floats.grads] == [torch.float32] * 3
    for table, peaks in zip(fixed.sums.values(), fixed.peaks.values(), strict=True):
        peaks.fill_(torch.tensor(1.5).view(torch.int32).item())  # 2.0 is the least power of two above
        table.copy_(torch.arange(table.numel()).view(table.shape) * int(fixed.limits[0]) // 2)
    found = fixed.result([1, 4, 5])
    assert found[1].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] and found[4].item() == 0.0 and found[5].shape == (0, 3)
    assert fixed.result([4]).keys() == floats.result([4]).keys() == {4}


# the CPU backend adds everything in one order, whatever the threads


def cpu_gradients(threads: int) -> list[torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, h, 300, 16, generator=g, requires_grad=True) for h in (4, 2, 2))
        slope, table, bias = (torch.randn(*s, generator=g, requires_grad=True) for s in ((4,), (5, 9), (300, 300)))

        @flexmask.score
        def several(score, h, q_idx, kv_idx):
            return score * slope[h] + table[h, torch.clamp(q_idx - kv_idx, 0, 8)] + bias[q_idx, kv_idx] * slope[0]

        out = flexmask.attention(q, k, v, mask=masks.causal, score=several, enable_gqa=True, backend="cpu")
        return list(torch.autograd.grad(out.square().sum(), (q, k, v, slope, table, bias)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_gradients_on_the_cpu_have_the_same_bits_at_every_run(threads):
    first = cpu_gradients(threads)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, cpu_gradients(threads), strict=True))
