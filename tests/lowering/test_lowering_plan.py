"""Kernel plans: what is chosen for which GPU, and that it fits."""

from dataclasses import replace

import pytest

from flexmask.errors import BackendError
from flexmask.lowering import KernelPlan, plan_forward, shrink
from flexmask.lowering.plan import SHARED_BYTES, padded


def test_hopper_takes_large_tiles_through_tma():
    plan = plan_forward(128, arch=90, loads="tma", map_form="range", pieces=1)
    assert str(plan) == "forward D128 bfloat16 sm_90, range map, 1 interval a row, tiles 128x128, 8 warps, 3 stages, tma loads"


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dims", [(16, 16), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("busy", [False, True])
def test_every_plan_fits_its_gpu(arch, dtype, dims, busy):
    plan = plan_forward(*dims, dtype=dtype, arch=arch, score=busy)
    assert plan.shared_bytes() <= SHARED_BYTES[arch]
    assert plan.block_q >= 16 and plan.block_kv >= 16


def test_a_plan_survives_json():
    plan = plan_forward(96, 64, dtype="float16", map_form="list", pieces=2, runs="hold", score=True)
    assert KernelPlan.from_json(plan.to_json()) == plan
    assert hash(KernelPlan.from_json(plan.to_json())) == hash(plan)


def test_shrinking_ends():
    plan, seen = plan_forward(256, loads="tma"), []
    while plan is not None:
        seen.append(plan.shared_bytes())
        plan = shrink(plan)
    assert seen == sorted(seen, reverse=True)
    assert len(seen) > 3


def test_head_dims_are_padded_to_powers_of_two():
    assert [padded(d) for d in (1, 16, 17, 80, 128, 192)] == [16, 16, 32, 128, 128, 256]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"head_dim": 128, "dtype": "float64"}, "float64"),
        ({"head_dim": 300}, "300"),
        ({"head_dim": 128, "arch": 75}, "7.5"),
        ({"head_dim": 128, "arch": 80, "loads": "tma"}, "TMA"),
    ],
)
def test_what_no_kernel_is_made_for_is_refused(wanted, message):
    with pytest.raises(BackendError, match=message):
        plan_forward(**wanted)


@pytest.mark.parametrize("change", [{"map_form": "tree"}, {"pieces": 4}, {"map_form": "none"}, {"runs": "sometimes"}])
def test_contradictory_plans_are_refused(change):
    plan = plan_forward(64, map_form="list", pieces=1)
    with pytest.raises(ValueError):
        replace(plan, **change)


def test_a_table_read_by_score_is_not_fetched_ahead():
    assert plan_forward(128, score=True, heavy=True, pipelined=False, loads="tma").num_stages == 1
