"""Plans of the backward kernels: what is chosen for which GPU, and that it fits."""

from dataclasses import replace

import pytest

from flexmask.errors import BackendError
from flexmask.lowering.plan import SHARED_BYTES
from flexmask.lowering.plan_backward import BackwardPlan, plan_backward, shrink_backward

PARTS = ["dq", "dkdv"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dims", [(16, 16), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("busy", [False, True])
def test_every_plan_fits_its_gpu(part, arch, dtype, dims, busy):
    plan = plan_backward(part, *dims, dtype=dtype, arch=arch, score=busy)
    assert plan.shared_bytes() <= SHARED_BYTES[arch]
    assert plan.block_q >= 16 and plan.block_kv >= 16
    assert 128 % plan.block_q == 0, "the terms of the rows are padded to multiples of 128"


@pytest.mark.parametrize("part", PARTS)
def test_a_plan_survives_json(part):
    scatter = "fixed" if part == "dq" else ""
    plan = plan_backward(part, 96, 64, dtype="float16", map_form="list", pieces=2, runs="hold", score=True, scatter=scatter)
    assert BackwardPlan.from_json(plan.to_json()) == plan
    assert hash(BackwardPlan.from_json(plan.to_json())) == hash(plan)


@pytest.mark.parametrize("part", PARTS)
def test_shrinking_ends(part):
    plan, seen = plan_backward(part, 256, loads="tma"), []
    while plan is not None:
        seen.append(plan.shared_bytes())
        plan = shrink_backward(plan)
    assert seen == sorted(seen, reverse=True)
    assert len(seen) > 3


def test_a_plan_says_what_its_kernel_does():
    plan = plan_backward("dq", 64, map_form="list", runs="fail", score=True, scatter="float", arch=80)
    assert str(plan).startswith("backward dq D64 bfloat16 sm_80, list map, where the intervals fail, predicate evaluated, score mod, table")
    assert [plan_backward(part, 64).axis for part in PARTS] == ["row", "column"]


@pytest.mark.parametrize("loads", ["pointer", "tma"])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("form", [{}, {"map_form": "range", "pieces": 1}, {"map_form": "list"}])
def test_both_launches_of_sums_in_fixed_point_have_the_same_tiles(loads, dim, form):
    """They sum over tiles before they compare or add, so other tiles would have other peaks."""
    peak, fixed = (plan_backward("dq", dim, loads=loads, score=True, scatter=scatter, **form) for scatter in ("peak", "fixed"))
    assert replace(peak, scatter="fixed") == fixed
    assert "peaks of table gradients" in str(peak) and "table gradients in fixed point" in str(fixed)


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
        plan_backward("dkdv", **wanted)


@pytest.mark.parametrize(
    "change",
    [{"map_form": "tree"}, {"pieces": 4}, {"map_form": "none"}, {"runs": "sometimes"}, {"part": "dv"}, {"scatter": "float"},
     {"part": "dq", "scatter": "twice"}],
)  # fmt: skip
def test_contradictory_plans_are_refused(change):
    plan = plan_backward("dkdv", 64, map_form="list", pieces=1, score=True)
    with pytest.raises(ValueError):
        replace(plan, **change)
