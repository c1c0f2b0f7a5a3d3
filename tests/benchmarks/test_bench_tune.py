"""What measured sizes say of the table: the best of a class of masks, if it makes none of them slower."""

from benchmarks import tune
from benchmarks.tune import Row, best, entries
from flexmask.lowering import plan_hopper
from flexmask.lowering.tuned import Entry, entry_key, from_table

PLAN = plan_hopper(128, map_form="range", pieces=1)
KEY = entry_key(PLAN, False)
SMALL, SMALLER = (("block_kv", 64), ("stages", 3)), (("block_kv", 64), ("stages", 4))


def row(planned, small, smaller, mask="causal", plan=PLAN):
    times = {(): planned, SMALL: small, SMALLER: smaller}
    return Row(mask, 8192, entry_key(plan, False), plan, {sizes: ms for sizes, ms in times.items() if ms})


def test_the_best_by_the_mean():
    assert best([row(10, 9, 8), row(10, 5, 9)]) == SMALL
    assert best([row(10, 9.9, 9.95)]) == ()


def test_none_may_be_slower():
    assert best([row(10, 5, 9), row(10, 11, 9)]) == SMALLER


def test_what_failed_somewhere_is_out():
    assert best([row(10, 5, 9), row(10, None, 9)]) == SMALLER


def test_an_entry_serves_the_plans_it_was_measured_for(monkeypatch):
    other = plan_hopper(128, map_form="list", crossed=True)
    (found,) = entries([row(10, 5, 9), row(12, 8, 9, "full"), row(10, 10, 10, "random_eviction", other)], "NVIDIA H200")
    assert found.plan == dict(SMALL) and (found.gpu, found.mask) == ("sm_90", "range 1")
    assert found.measured.startswith("NVIDIA H200, ") and found.measured.endswith("causal 8192 2.00, full 8192 1.50")
    monkeypatch.setattr("flexmask.lowering.tuned.table", lambda: (found,))
    assert from_table(PLAN, False)[0].block_kv == 64 and from_table(other, False) == (other, "")


def test_a_new_entry_keeps_what_it_was_measured_on_top_of(monkeypatch):
    old = Entry("sm_90", *KEY, {"block_kv": 64, "stages": 3}, "before")
    monkeypatch.setattr(tune, "table", lambda: (old,))
    (found,) = entries([Row("causal", 8192, KEY, PLAN, {(): 10.0, (("stages", 4),): 9.0})], "NVIDIA H200")
    assert found.plan == {"block_kv": 64, "stages": 4}
