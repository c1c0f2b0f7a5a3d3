"""Linear normal form, and the prover over it."""

from __future__ import annotations

import pytest
import torch
from analysis_cases import BATCH, HEADS, Instance, read
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis_ranges import integers

from flexmask.analysis.linear import linear, normal
from flexmask.analysis.prove import Prover, negation
from flexmask.ir import evaluate, show


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_idx - kv_idx + 3 - q_idx", "3 - kv_idx"),
        ("2 * (q_idx - 1) - 2", "2 * q_idx - 4"),
        ("-kv_idx", "-kv_idx"),
        ("(64 * q_idx + 70) // 64", "q_idx + 6 // 64 + 1"),
        ("(4 * q_idx + kv_idx + 9) // 4", "q_idx + (kv_idx + 1) // 4 + 2"),
        ("q_idx // 4 // 2", "q_idx // 8"),
        ("(q_idx // 4 + 1) // 2", "(q_idx + 4) // 8"),
        ("q_idx // -2", "-q_idx // 2"),
        ("(q_idx + 8 * kv_idx + 9) % 8", "(q_idx + 1) % 8"),
        ("q_idx << 3", "8 * q_idx"),
        ("q_idx >> 3", "q_idx // 8"),
        ("~q_idx", "-q_idx - 1"),
        ("(q_idx + 1) * (s0 - 1)", "q_idx * s0 - q_idx + s0 - 1"),
        ("max(kv_idx + 1 - 1, q_idx)", "max(q_idx, kv_idx)"),
        ("int64(q_idx) + kv_idx * 0", "q_idx"),
    ],
)
def test_normal_form(text, expected):
    shown = show(normal(read(text)))
    assert linear(read(shown)) == linear(read(text))
    assert linear(read(expected)) == linear(read(text))


def everywhere(text: str, instance: Instance) -> torch.Tensor:
    env = instance.env(4, b=(-1, 1, 1, 1), h=(-1, 1, 1), q_idx=(-1, 1), kv_idx=(-1,))
    value = torch.as_tensor(evaluate(read(text), env))
    return value.expand(BATCH, HEADS, instance.q_len, instance.kv_len)


@settings(max_examples=200)
@given(integers(), integers(), st.integers(0, 5))
def test_normal_form_and_proofs_are_true(x, y, seed):
    instance = Instance(7, 9, seed)
    assert torch.equal(everywhere(show(normal(read(x))), instance), everywhere(x, instance))
    if Prover(instance.signs).le(read(x), read(y)):
        assert (everywhere(x, instance) <= everywhere(y, instance)).all()


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ("0", "q_idx"), ("q_idx", "q_len - 1"), ("kv_idx + 1", "kv_len"), ("q_idx - s0", "q_idx - 1"), ("s4", "-1"), ("s3", "0"),
        ("4 * (q_idx // 4)", "q_idx"), ("q_idx", "4 * (q_idx // 4) + 3"), ("q_idx // 4", "(q_idx + 3) // 4"), ("q_idx % 8", "7"),
        ("min(q_idx, s1)", "q_idx"), ("q_idx", "max(kv_idx, q_idx)"), ("max(q_idx - 3, 0)", "q_idx"),
        ("q_idx - 2", "min(q_idx + s0, q_idx)"),
        ("where(t3[b, q_idx], q_idx - 1, 0)", "q_idx"), ("where(q_idx < 5, q_idx, 5)", "5"), ("left(t0, q_idx)", "right(t0, q_idx + 1)"),
        ("right(t0, q_idx)", "left(t0, q_idx + 1)"), ("0", "left(t2, b, 3)"), ("0", "abs(t1[q_idx])"), ("t1[q_idx]", "t1[q_idx] + s0"),
        ("0", "q_idx * s0"), ("q_idx // s0", "(q_idx + 1) // s0"), ("q_idx % s0", "s0 - 1"),
    ],
)  # fmt: skip
def test_what_the_prover_sees(x, y):
    signs = (1, 0, 0, 0, -1)
    assert Prover(signs).le(read(x), read(y))
    assert not Prover(signs).le(read(y) + 1, read(x))


@pytest.mark.parametrize(
    ("x", "y"), [("q_idx", "kv_idx"), ("s1", "0"), ("t1[q_idx]", "t1[kv_idx]"), ("q_idx", "q_len - 2"), ("left(t0, 3)", "left(t0, 2)")]
)
def test_what_is_not_so_is_not_proved(x, y):
    assert not Prover().le(read(x), read(y))


def test_facts_help():
    assert Prover().le(read("q_idx"), read("s1 + 1"), (read("q_idx < s1 + 2"),))
    assert Prover().exclusive(read("q_idx < s1"), read("s1 <= q_idx"))
    assert Prover().exclusive(read("q_idx < 3"), read("7 <= q_idx"))
    assert not Prover().exclusive(read("q_idx < s1"), read("s2 <= q_idx"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(q_idx < 3) & t3[b, q_idx]", "(3 <= q_idx) | ~t3[b, q_idx]"),
        ("(q_idx < 3) | (kv_idx == 1)", "(3 <= q_idx) & (kv_idx != 1)"),
        ("t7[q_idx] < 0.5", "~(t7[q_idx] < 0.5)"),
        ("(q_idx < 3) == t3[b, q_idx]", "(q_idx < 3) ^ t3[b, q_idx]"),
    ],
)
def test_negation_goes_to_the_leaves(text, expected):
    assert show(negation(read(text))) == expected
