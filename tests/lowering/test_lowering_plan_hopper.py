"""HopperPlan: what it refuses, what it says, and that it travels as text."""

from dataclasses import replace

import pytest

from flexmask.lowering.plan_hopper import SHARED_BYTES, HopperPlan, plan_hopper

REFUSED = {
    "another GPU": ({"head_dim": 64, "arch": 80}, "compute capability 9.0, and this GPU has 8.0"),
    "a later GPU": ({"head_dim": 64, "arch": 100}, "this GPU has 10.0"),
    "float32": ({"head_dim": 64, "dtype": "float32"}, "not float32"),
    "great head dims": ({"head_dim": 192, "v_head_dim": 264}, "up to 256, not 264"),
    "odd head dims": ({"head_dim": 100}, "multiples of 8"),
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
    {"head_dim": 64, "map_form": "range", "pieces": 3},
    {"head_dim": 256, "map_form": "list", "crossed": True},
    {"head_dim": 192, "v_head_dim": 128, "map_form": "range", "pieces": 1, "score": True},
    *({"head_dim": d, "v_head_dim": v, "score": True} for d in (64, 128, 192, 256) for v in (64, 128, 192, 256)),
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


def test_heads_are_padded_to_what_tma_swizzles():
    plan = plan_hopper(40, 8)
    assert (plan.padded_dim, plan.padded_v_dim) == (64, 64)
    assert plan_hopper(72, 128).padded_dim == 128
    assert plan_hopper(136, 200).padded_dim == 192 and plan_hopper(136, 200).padded_v_dim == 256


@pytest.mark.parametrize(
    "dims, parts, tiles",
    [((256, 256), (1, 1), "128x64"), ((192, 192), (3, 3), "128x64"), ((192, 128), (3, 2), "128x128"), ((128, 256), (1, 2), "128x64")],
)
def test_wide_heads_are_multiplied_in_parts_and_nothing_is_padded_to_a_power_of_two(dims, parts, tiles):
    plan = plan_hopper(*dims)
    assert plan.wide and (plan.padded_dim, plan.padded_v_dim) == dims
    assert (plan.padded_dim // plan.part, plan.padded_v_dim // plan.part) == parts
    assert f"tiles {tiles}" in str(plan) and plan.q_stages == 1


def test_tiles_of_keys_are_as_many_as_fit():
    assert plan_hopper(128, 64).stages == 3 and not plan_hopper(128, 64).wide
    assert plan_hopper(256, 128).stages == 3
    with pytest.raises(ValueError, match="use fewer stages"):
        replace(plan_hopper(256, 128), stages=4)


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
        ({"v_head_dim": 256, "stages": 1}, "about 264 registers a thread are needed of 232: use smaller tiles of keys"),
        ({"block_q": 192, "stages": 1, "q_stages": 1}, "the warpgroups would take 94208 registers of 65536"),
        ({"block_q": 192, "stages": 1, "q_stages": 1, "consumer_registers": 160, "producer_registers": 32}, "about 192 registers"),
        ({"producer_registers": 44}, "24 to 248 registers in steps of 8, not 232 or 44"),
        ({"head_dim": 264}, "head dims from 1 to 256, not 264"),
    ],
)
def test_impossible_plans_are_not_made(change, message):
    with pytest.raises(ValueError, match=message):
        replace(plan_hopper(128, map_form="range", pieces=1), **change)
