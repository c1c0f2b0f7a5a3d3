"""Random predicates: traced and evaluated, against plain Python on every index."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from strategies import Predicate, Sizes, predicates

from flexmask import ir
from flexmask.frontend import trace

SIZES = Sizes(2, 2, 5, 6)


@given(predicates(sizes=SIZES, depth=3))
@settings(max_examples=60, deadline=None)
def test_random_predicates(predicate: Predicate):
    mask = predicate.mask()
    traced = trace(mask, "mask")
    axes = [torch.arange(n) for n in (SIZES.B, SIZES.H, SIZES.Q, SIZES.KV)]
    indices = dict(zip(("b", "h", "q_idx", "kv_idx"), torch.meshgrid(*axes, indexing="ij"), strict=True))
    value = ir.evaluate(traced.expr, ir.Env(indices, traced.tensors, traced.scalars))
    value = torch.as_tensor(value).expand(SIZES.B, SIZES.H, SIZES.Q, SIZES.KV)
    for index in itertools.product(*map(range, value.shape)):
        assert bool(value[index]) == bool(mask(*map(torch.tensor, index))), index
    assert traced.is_fresh()
