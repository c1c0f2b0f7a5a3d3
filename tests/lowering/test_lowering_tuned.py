"""Other sizes for planned kernels: those of the table of measurements, and those worth one."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product

import pytest

from flexmask.lowering import candidates, from_table, plan_backward, plan_forward, plan_hopper, plan_hopper_backward, tuned
from flexmask.lowering.plan import SHARED_BYTES
from flexmask.lowering.tuned import MOST_CANDIDATES, SIZES, Entry, changed, differences, entry_key, mask_class, table

RANGE = {"map_form": "range", "pieces": 1}
MAPS = {
    "none": {}, "range 1": RANGE, "list 2": {"map_form": "list", "pieces": 2}, "list bits": {"map_form": "list", "bits": True},
    "list crossed": {"map_form": "list", "crossed": True}, "list evaluated": {"map_form": "list"},
}  # fmt: skip
GPUS = [{"arch": 80}, {"arch": 86}, {"arch": 90}, {"arch": 90, "loads": "tma"}, {"arch": 120, "loads": "tma"}]
DIMS = (16, 64, 80, 128, 192, 256)


def without(given, *names):
    return {name: value for name, value in given.items() if name not in names}


def plain_plans():
    for head_dim, gpu, form, dtype, score in product(DIMS, GPUS, MAPS, ("bfloat16", "float32"), (False, True)):
        if form != "list crossed":
            yield plan_forward(head_dim, dtype=dtype, score=score, **gpu, **MAPS[form])
        if form not in ("list crossed", "list bits"):
            for part in ("dq", "dkdv"):
                yield plan_backward(part, head_dim, dtype=dtype, score=score, **gpu, **MAPS[form])


def hopper_plans():
    for head_dim, form, score in product((16, 64, 80, 128), MAPS, (False, True)):
        yield plan_hopper(head_dim, score=score, evaluated=form == "list evaluated", **MAPS[form])
        yield plan_hopper_backward(head_dim, score=score, evaluated=form == "list evaluated", **MAPS[form])


PLANS = [*plain_plans(), *(plan for plan in hopper_plans() if not isinstance(plan, str))]


def test_candidates_are_a_few_plans_that_differ_in_sizes_alone_and_fit():
    for plan in PLANS:
        found = candidates(plan)
        assert len(found) == len(set(found)) <= MOST_CANDIDATES and plan not in found
        for other in found:
            assert without(asdict(other), *SIZES) == without(asdict(plan), *SIZES)
            assert other.shared_bytes() <= SHARED_BYTES.get(plan.arch, 99 * 1024)
            assert changed(plan, differences(plan, other)) == other


def test_nearly_every_kernel_has_some():
    """But for those whose shared memory is full."""
    without_any = {(*entry_key(plan, False)[:4], getattr(plan, "bits", False)) for plan in PLANS if not candidates(plan)}
    full = {("triton", "dq", "float32", 256), ("triton", "dkdv", "float32", 256), ("hopper", "fused", "bfloat16", 64)}
    with_bits = {("hopper", "fused", "bfloat16", dim) for dim in (64, 128)}
    assert without_any == {(*key, False) for key in full} | {(*key, True) for key in with_bits}


def test_those_for_128_are_the_tiles_that_were_measured():
    plan = plan_forward(128, loads="tma", **RANGE)
    tiles = {(p.block_q, p.block_kv, p.num_warps, p.num_stages) for p in (plan, *candidates(plan))}
    assert {(128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4)} <= tiles


def test_what_cannot_be_pipelined_stays_at_one_stage():
    for part in ("forward", "dq", "dkdv"):
        given = {"score": True, "heavy": True, "pipelined": False, "loads": "tma"}
        plan = plan_forward(64, **given) if part == "forward" else plan_backward(part, 64, **given)
        assert candidates(plan) and all(other.num_stages == 1 for other in candidates(plan))


@pytest.mark.parametrize("scatter", ["peak", "fixed"])
def test_sums_in_fixed_point_keep_their_tiles(scatter):
    plan = plan_backward("dq", 128, score=True, scatter=scatter)
    assert candidates(plan) == () and changed(plan, {"block_kv": 16}) is None


def test_hopper_tiles_of_192_queries_are_for_ranges_at_head_dim_64():
    def heights(plan):
        return {other.block_q: (other.consumer_registers, other.producer_registers) for other in (plan, *candidates(plan))}

    assert heights(plan_hopper(64, **RANGE)) == {128: (232, 40), 192: (160, 32)}
    for plan in (plan_hopper(128, **RANGE), plan_hopper(64, **MAPS["list 2"]), plan_hopper(64, score=True, **RANGE)):
        assert heights(plan) == {128: (232, 40)}


@pytest.mark.parametrize(
    "sizes",
    [{"arch": 80}, {"schedule": 1}, {"block_q": 64}, {"stages": 9}, {"num_warps": 4}, {"stages": 0}],
    ids=lambda sizes: next(iter(sizes)),
)
def test_there_is_no_plan_with_other_fields_or_too_much_memory(sizes):
    assert changed(plan_hopper(128), sizes) is None


@pytest.mark.parametrize("form", MAPS)
def test_classes_of_masks(form):
    plan = plan_forward(64, **MAPS[form]) if form == "list evaluated" else plan_hopper(64, **MAPS[form])
    assert mask_class(plan, narrow=False) == form
    assert mask_class(plan, narrow=True) == (f"{form} narrow" if form in ("range 1", "list bits") else form)


def test_scores_are_classes_of_their_own():
    assert mask_class(plan_forward(64, score=True), False) == "none, score"
    assert mask_class(plan_backward("dq", 64, score=True, scatter="float", **RANGE), True) == "range 1 narrow, score, scatter float"


def test_each_entry_of_the_table_is_a_candidate_for_plans_of_its_kind():
    keys = [(entry.gpu, *without(asdict(entry), "plan", "measured").values()) for entry in table()]
    assert len(set(keys)) == len(keys)
    for entry in table():
        of_its_kind = [(plan, narrow) for plan in PLANS for narrow in (False, True) if tuned._key(entry) == entry_key(plan, narrow)]
        assert of_its_kind, entry
        assert any(changed(plan, entry.plan) in candidates(plan) for plan, _ in of_its_kind), entry
        assert entry.measured and ("fixed" not in entry.mask)


@pytest.fixture
def entries(monkeypatch):
    def given(*entries):
        monkeypatch.setattr(tuned, "table", lambda: entries)

    return given


def entry(gpu, sizes, measured="once", mask="range 1"):
    return Entry(gpu, "hopper", "forward", "bfloat16", 128, mask, sizes, measured)


def test_the_table_changes_plans_of_its_kind(entries):
    entries(entry("sm_90", {"block_kv": 64, "stages": 3}))
    plan, measured = from_table(plan_hopper(96, **RANGE), narrow=False)
    assert (plan.block_kv, plan.stages, measured) == (64, 3, "once")
    others = [(plan_hopper(96, **RANGE), True), (plan_hopper(64, **RANGE), False), (plan_hopper(96), False)]
    others += [
        (plan_hopper(96, dtype="float16", **RANGE), False),
        (plan_forward(96, **RANGE), False),
        (plan_hopper_backward(96, **RANGE), False),
    ]
    for other, narrow in others:
        assert from_table(other, narrow) == (other, "")


def test_a_gpus_name_goes_before_its_capability(entries):
    entries(entry("sm_90", {"stages": 3, "block_kv": 64}), entry("NVIDIA H200", {"stages": 4, "block_kv": 64}, "twice"))
    plan = plan_hopper(128, **RANGE)
    assert from_table(plan, False, "NVIDIA H200")[1] == "twice" and from_table(plan, False, "NVIDIA H100")[1] == "once"


def test_an_entry_that_does_not_fit_is_passed_over(entries):
    entries(entry("sm_90", {"stages": 9}))
    assert from_table(plan_hopper(128, **RANGE), False) == (plan_hopper(128, **RANGE), "")


def test_an_entry_that_changes_nothing_is_not_named(entries):
    plan = plan_hopper(128, **RANGE)
    entries(entry("sm_90", {"block_kv": plan.block_kv, "stages": plan.stages}))
    assert from_table(plan, False) == (plan, "")
