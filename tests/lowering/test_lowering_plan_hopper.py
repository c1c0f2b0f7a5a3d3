"""HopperPlan: what it refuses, what it says, and that it travels as text."""

from dataclasses import replace

import pytest

from flexmask.lowering.plan_hopper import SHARED_BYTES, HopperPlan, plan_hopper

REFUSED = {
    "another GPU": ({"head_dim": 64, "arch": 80}, "compute capability 9.0, and this GPU has 8.0"),
    "a later GPU": ({"head_dim": 64, "arch": 100}, "this GPU has 10.0"),
    "float32": ({"head_dim": 64, "dtype": "float32"}, "not float32"),
    "great head dims": ({"head_dim": 192, "v_head_dim": 128}, "beyond 128"),
    "odd head dims": ({"head_dim": 100}, "multiples of 8"),
    "different widths": ({"head_dim": 128, "v_head_dim": 64}, "different widths"),
    "a predicate": ({"head_dim": 64, "map_form": "list", "evaluated": True}, "the predicate itself"),
    "a table at (query, key)": ({"head_dim": 64, "score": True, "heavy": True}, "table at (query, key)"),
}
MADE = [
    {"head_dim": 128},
    {"head_dim": 64, "dtype": "float16", "schedule": "grid"},
    {"head_dim": 72, "v_head_dim": 128, "map_form": "range", "pieces": 1, "starts": False},
    {"head_dim": 128, "map_form": "list", "pieces": 3, "runs": "hold", "score": True},
    {"head_dim": 40, "map_form": "list", "crossed": True, "schedule": "stride"},
    {"head_dim": 128, "map_form": "list", "bits": True, "runs": "hold", "score": True},
]


@pytest.mark.parametrize("wanted", REFUSED)
def test_what_it_does_not_serve_comes_with_the_reason(wanted):
    given, reason = REFUSED[wanted]
    assert reason in plan_hopper(**given)


@pytest.mark.parametrize("wanted", MADE, ids=str)
def test_plans_fit_the_gpu_and_travel_as_text(wanted):
    plan = plan_hopper(**wanted)
    assert plan.shared_bytes() <= SHARED_BYTES
    assert plan.template == "hopper" and not plan.evaluated
    assert HopperPlan.from_json(plan.to_json()) == plan and hash(plan) == hash(HopperPlan.from_json(plan.to_json()))


def test_a_plan_reads_as_a_sentence():
    plan = plan_hopper(128, map_form="list", pieces=2, runs="hold", score=True)
    assert str(plan) == (
        "hopper forward D128 bfloat16 sm_90, list map, 2 intervals a row, where the map's flag says hold, score mod, "
        "tiles 128x128, 2 stages, queue, 232/40 registers"
    )
    crossed = plan_hopper(40, map_form="list", crossed=True, starts=False)
    assert "D40 " in str(crossed) and "1 interval a key from the first row" in str(crossed)
    assert "list map, bits of partial tiles, tiles 128x128" in str(plan_hopper(128, map_form="list", bits=True))


def test_narrow_heads_are_padded_to_what_tma_swizzles():
    plan = plan_hopper(40, 8)
    assert (plan.padded_dim, plan.padded_v_dim) == (64, 64)
    assert plan_hopper(72, 128).padded_dim == 128


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_q": 64}, "block_q is one of 128, 192, not 64"),
        ({"schedule": "random"}, "schedule is one of"),
        ({"map_form": "none"}, "without a map every tile is full"),
        ({"pieces": 0}, "a range map comes from row intervals"),
        ({"bits": True}, "a range map comes from row intervals"),
        ({"map_form": "none", "pieces": 0, "bits": True}, "no intervals and no bits"),
        ({"map_form": "list", "bits": True}, "or read bits"),
        ({"map_form": "list", "crossed": True}, "either with intervals of the rows"),
        ({"stages": 9}, "use fewer stages or smaller tiles"),
        ({"v_head_dim": 64}, "both up to 64, or both above"),
    ],
)
def test_impossible_plans_are_not_made(change, message):
    with pytest.raises(ValueError, match=message):
        replace(plan_hopper(128, map_form="range", pieces=1), **change)
