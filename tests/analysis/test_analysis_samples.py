"""Points that refute a claim: they refute nothing that can be proved, and are those of the claim's assumptions."""

import pytest
from analysis_cases import read
from hypothesis import given, settings
from strategies import predicates

from flexmask.analysis.linear import linear
from flexmask.analysis.prove import Prover, inequalities
from flexmask.analysis.samples import POINTS, Samples
from flexmask.ir import KV_LEN, Q_LEN, K, Q, simplify, walk
from flexmask.runtime.store import signs


def test_points_lie_in_the_index_space():
    samples = Samples((1, -1, 0))
    for index, length in ((Q, Q_LEN), (K, KV_LEN)):
        assert all(0 <= i < n for i, n in zip(samples.values(index), samples.values(length), strict=True))
    scalars = [samples.values(read(f"s{n}")) for n in range(3)]
    assert min(scalars[0]) > 0 > max(scalars[1]) and scalars[2] == (0,) * POINTS


@pytest.mark.parametrize("text", ["t0[q_idx]", "q_idx // s1", "pow(q_idx, kv_idx)"])
def test_what_cannot_be_known_refutes_nothing(text):
    assert not Samples(()).refute(linear(read(text)).shifted(-(10**6)), ())


@settings(max_examples=150)
@given(predicates())
def test_nothing_that_is_proved_is_refuted(predicate):
    traced = predicate.mask().traced()
    samples, prover = Samples(signs(traced)), Prover(signs(traced))
    for node in walk(simplify(traced.expr)):
        for claim in inequalities(node) if node.kind == "bool" else ():
            if prover._search(claim, (), 3):
                assert not samples.refute(claim, ())
