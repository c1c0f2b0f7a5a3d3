"""Plans of the Hopper backward kernel: what they say, whom they serve, and why not others."""

from dataclasses import replace

import pytest

from flexmask.lowering.plan import SHARED_BYTES
from flexmask.lowering.plan_hopper_backward import HopperBackwardPlan, plan_hopper_backward

SERVED = [
    {"head_dim": 128},
    {"head_dim": 64, "map_form": "range", "pieces": 1, "starts": False},
    {"head_dim": 96, "v_head_dim": 128, "dtype": "float16", "map_form": "list", "pieces": 3, "runs": "hold"},
    {"head_dim": 8, "map_form": "list", "crossed": True, "runs": "fail"},
    {"head_dim": 64, "map_form": "list", "bits": True, "runs": "hold"},
    {"head_dim": 128, "map_form": "list", "bits": True},
    {"head_dim": 128, "map_form": "range", "pieces": 1, "score": True},
    {"head_dim": 64, "heavy": True},
]


@pytest.mark.parametrize("wanted", SERVED)
def test_a_plan_survives_json_and_fits(wanted):
    plan = plan_hopper_backward(**wanted)
    assert HopperBackwardPlan.from_json(plan.to_json()) == plan
    assert hash(HopperBackwardPlan.from_json(plan.to_json())) == hash(plan)
    assert plan.shared_bytes() <= SHARED_BYTES[90]
    assert plan.template == "hopper" and plan.axis == "column" and not plan.evaluated


@pytest.mark.parametrize(("dim", "padded", "block_q"), [(8, 64, 128), (64, 64, 128), (72, 128, 64), (128, 128, 64)])
def test_tiles_follow_the_padded_head_dim(dim, padded, block_q):
    plan = plan_hopper_backward(dim)
    assert (plan.padded_dim, plan.padded_v_dim, plan.block_q, plan.block_kv) == (padded, padded, block_q, 128)
    assert 128 % plan.block_q == 0, "the terms of the rows are padded to multiples of 128"


def test_registers_fit_a_multiprocessor():
    """Warps come in groups of four: two groups that multiply, and one that fetches."""
    plan = plan_hopper_backward(128)
    assert 128 * (2 * plan.consumer_registers + plan.producer_registers) <= 65536


def test_a_plan_says_what_its_kernel_does():
    plan = plan_hopper_backward(96, 72, dtype="float16", map_form="list", pieces=2, runs="hold")
    shown = "hopper backward D96/72 float16 sm_90, list map, 2 intervals a column, where the intervals hold, tiles 64x128, 2 stages"
    assert str(plan) == shown
    assert "1 interval a row from the first place" in str(plan_hopper_backward(64, map_form="list", crossed=True, starts=False))
    assert "list map, bits of partial tiles, tiles" in str(plan_hopper_backward(64, map_form="list", bits=True))
    assert "no mask" in str(plan_hopper_backward(64))
    assert "no mask, score mod, tiles" in str(plan_hopper_backward(64, score=True))


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"head_dim": 128, "arch": 80}, "8.0"),
        ({"head_dim": 128, "arch": 100}, "10.0"),
        ({"head_dim": 128, "dtype": "float32"}, "float32"),
        ({"head_dim": 192}, "up to 128"),
        ({"head_dim": 128, "v_head_dim": 64}, "two different widths"),
        ({"head_dim": 100}, "multiples of 8"),
        ({"head_dim": 128, "score": True, "heavy": True}, "reads a table at (query, key)"),
        ({"head_dim": 128, "map_form": "list"}, "predicate"),
        ({"head_dim": 128, "map_form": "list", "pieces": 1, "evaluated": True}, "predicate"),
        ({"head_dim": 128, "map_form": "list", "bits": True, "evaluated": True}, "predicate"),
    ],
)
def test_a_refusal_gives_its_reason(wanted, reason):
    refused = plan_hopper_backward(**wanted)
    assert isinstance(refused, str) and reason in refused


@pytest.mark.parametrize(
    "change",
    [{"map_form": "tree"}, {"map_form": "none"}, {"pieces": 0}, {"pieces": 4}, {"crossed": True}, {"runs": "sometimes"}, {"block_q": 32},
     {"v_head_dim": 64}, {"stages": 1}, {"dtype": "float32"}, {"map_form": "range", "pieces": 0, "crossed": True},
     {"bits": True}, {"pieces": 0, "bits": True, "crossed": True}, {"pieces": 0, "bits": True, "map_form": "range"}],
)  # fmt: skip
def test_contradictory_plans_are_refused(change):
    with pytest.raises(ValueError):
        replace(plan_hopper_backward(128, map_form="list", pieces=1), **change)
