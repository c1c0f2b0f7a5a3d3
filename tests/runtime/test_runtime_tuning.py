"""Sizes that were measured: which win, what is kept of it, what is believed of a file, and when nothing is measured at all."""

import json
from dataclasses import asdict

import pytest
import torch

from flexmask import masks
from flexmask.frontend import trace
from flexmask.lowering import KernelPlan, candidates, plan_backward, plan_forward
from flexmask.lowering.tuned import differences
from flexmask.runtime import tuning
from flexmask.runtime.backward_kernels import plan_work
from flexmask.runtime.checks import Shapes
from flexmask.runtime.choice import Target, choose
from flexmask.runtime.disk import DiskCache
from flexmask.runtime.request import Request
from flexmask.runtime.store import Store
from flexmask.runtime.tuning import UNTUNED, Subject, Trial, Tuned

HERE = torch.device("cpu")
PLAN = plan_forward(128, loads="tma", map_form="range", pieces=1)
CHAIN = [PLAN, plan_forward(128, loads="tma", map_form="list", bits=True, runs="hold")]
BACKWARD = plan_backward("dq", 128, loads="tma")


class Clock:
    """A timer of runs that say themselves how long they take."""

    def __init__(self, gpu="GPU of this test", free=True):
        self.gpu, self.free = gpu, free

    def name(self, device):
        return self.gpu

    def is_free(self):
        return self.free

    def milliseconds(self, run):
        return run.milliseconds


class Run:
    def __init__(self, milliseconds, result=1.0):
        self.milliseconds, self.result = milliseconds, result

    def __call__(self):
        return torch.full((40,), self.result), None


class Bench:
    """A pass whose time is `usual`, or `times` by the sizes that differ; counts its attempts."""

    def __init__(self, usual=10.0, times=(), chains=None, turns=None, results=()):
        self.usual, self.times, self.results = usual, dict(times), dict(results)
        self.chains = chains or {"forward": [PLAN]}
        self.turns, self.attempts = turns or dict.fromkeys(self.chains, 0), []

    def attempt(self, store, tuned):
        self.attempts.append((store, tuned))
        sizes = tuned[0].sizes if tuned else ()
        milliseconds = self.times.get(sizes, self.usual + 1) if tuned else self.usual
        if isinstance(milliseconds, Exception):
            raise milliseconds
        return Trial(self.turns, Run(milliseconds, self.results.get(sizes, 1.0)))

    def subject(self, key=("forward",)):
        return Subject(key, lambda: self.chains, self.attempt)


def sizes(number, plan=PLAN):
    """Those of one of the candidates, as they are kept."""
    return tuple(differences(plan, candidates(plan)[number]).items())


def request(q_len=1000, autotune=True, head_dim=64, mask=None):
    return Request(mask, None, Shapes(1, 8, 8, q_len, 1000, head_dim, 64), autotune)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tuning, "TIMER", clock)
    return clock


@pytest.fixture
def store(tmp_path):
    return store_at(tmp_path)


def store_at(folder):
    store = Store()
    store.__dict__["disk"] = DiskCache(str(folder))
    return store


def find(store, bench, asked=None, **key):
    return tuning.find(store, asked or request(), HERE, bench.subject(**key))


def test_the_fastest_sizes_win(store):
    bench = Bench(times={sizes(0): 9.0, sizes(2): 5.0, sizes(3): 7.0})
    (found,) = find(store, bench)
    assert (found.chain, found.number, found.sizes, found.gain) == ("forward", 0, sizes(2), 2.0)
    assert dict(found.times) == {(): 10.0, sizes(0): 9.0, sizes(1): 11.0, sizes(2): 5.0, sizes(3): 7.0, sizes(4): 11.0}
    plan, note = tuning.sized(PLAN, False, (found,), "forward", 0)
    assert plan == candidates(PLAN)[2]
    assert note == "measured on GPU of this test: 64x128 (4 warps) is 2.00 times as fast as 128x128 (8 warps)"


def test_a_gain_that_may_be_chance_is_none(store):
    (found,) = find(store, Bench(times={sizes(1): 9.9}))
    assert (found.sizes, found.gain) == ((), 1.0)
    plan, note = tuning.sized(PLAN, False, (found,), "forward", 0)
    assert plan == PLAN and note == "measured on GPU of this test: 128x128 is the fastest of 6"


@pytest.mark.parametrize("failure", [RuntimeError("out of resources"), torch.OutOfMemoryError("too much")], ids=lambda e: type(e).__name__)
def test_sizes_that_do_not_run_are_left_out(store, failure):
    (found,) = find(store, Bench(times={sizes(0): failure, sizes(1): 5.0}))
    assert found.sizes == sizes(1) and dict(found.times).keys() == {(), *map(sizes, range(1, len(candidates(PLAN))))}


@pytest.mark.parametrize("result", [1.5, float("nan"), float("inf")])
def test_sizes_that_give_other_results_are_left_out(store, result):
    (found,) = find(store, Bench(times={sizes(0): 1.0, sizes(1): 5.0}, results={sizes(0): result, sizes(1): 1.003}))
    assert found.sizes == sizes(1)


def test_a_plan_that_does_not_run_itself_says_so(store):
    def attempt(aside, tuned):
        raise RuntimeError("no such GPU")

    with pytest.raises(RuntimeError, match="no such GPU"):
        tuning.find(store, request(), HERE, Subject(("forward",), lambda: {"forward": [PLAN]}, attempt))


def test_where_memory_is_short_nothing_is_measured(store):
    def attempt(aside, tuned):
        raise torch.OutOfMemoryError("too much")

    assert tuning.find(store, request(), HERE, Subject(("forward",), lambda: {"forward": [PLAN]}, attempt)) == UNTUNED
    assert find(store, Bench(times={sizes(1): 5.0})) != UNTUNED


def test_of_a_chain_the_kernel_that_has_its_turn(store):
    where = {"forward": CHAIN, "other": [BACKWARD]}
    bench = Bench(times={sizes(1, CHAIN[1]): 5.0}, chains=where, turns={"forward": 1, "other": None})
    (found,) = find(store, bench)
    assert (found.chain, found.number, found.sizes) == ("forward", 1, sizes(1, CHAIN[1]))
    assert tuning.sized(CHAIN[0], False, (found,), "forward", 0) == (CHAIN[0], "")
    assert tuning.sized(CHAIN[1], False, (found,), "forward", 1)[0] == candidates(CHAIN[1])[1]


def test_each_chain_by_itself(store):
    bench = Bench(times={sizes(1): 5.0, sizes(0, BACKWARD): 8.0}, chains={"dkdv": [PLAN], "dq": [BACKWARD]})
    assert [(each.chain, each.sizes) for each in find(store, bench)] == [("dkdv", sizes(1)), ("dq", sizes(0, BACKWARD))]


def test_what_is_tried_leaves_nothing_in_the_store(store):
    bench = Bench(times={sizes(1): 5.0})
    find(store, bench)
    assert all(other is not store and other.disk is store.disk for other, _ in bench.attempts)
    assert len({id(other) for other, _ in bench.attempts}) == len(bench.attempts)


def test_measured_once_then_read(store, tmp_path):
    bench = Bench(times={sizes(1): 5.0})
    found = find(store, bench)
    count = len(bench.attempts)
    assert find(store, bench) == find(store_at(tmp_path), bench) == found and len(bench.attempts) == count
    store.clear()
    assert find(store, bench) == found and len(bench.attempts) == count


def causal(q_idx, kv_idx):
    return q_idx >= kv_idx


@pytest.mark.parametrize(
    "other",
    [
        {"asked": request(q_len=1025)}, {"asked": request(head_dim=40)}, {"asked": request(mask=trace(causal, "mask"))},
        {"key": ("backward",)},
    ],
    ids=["longer", "head dim", "mask", "pass"],
)  # fmt: skip
def test_each_kind_is_measured_by_itself(store, other):
    bench = Bench(times={sizes(1): 5.0})
    find(store, bench)
    count = len(bench.attempts)
    find(store, bench, request(q_len=700))  # of the same power of two
    assert len(bench.attempts) == count
    find(store, bench, **other)
    assert len(bench.attempts) > count


def test_another_gpu_or_table_measures_anew(store, clock):
    bench = Bench(times={sizes(1): 5.0})
    find(store, bench)
    for change in (lambda: setattr(clock, "gpu", "another"), lambda: bench.chains.update(forward=[candidates(PLAN)[0]])):
        count = len(bench.attempts)
        change()
        store.clear()
        find(store, bench)
        assert len(bench.attempts) > count


@pytest.mark.parametrize("case", ["not asked for", "no GPU", "a graph is captured", "only looked up"])
def test_nothing_is_measured(store, clock, case):
    bench = Bench(times={sizes(1): 5.0})
    asked, clock.gpu, clock.free = request(autotune=case != "not asked for"), "" if case == "no GPU" else "a", case != "a graph is captured"
    subject = bench.subject()
    if case == "only looked up":
        subject = Subject(subject.key, subject.plans)
    assert tuning.find(store, asked, HERE, subject) == UNTUNED and not bench.attempts
    clock.gpu, clock.free = "a", True
    assert find(store, bench) and bench.attempts  # that nothing was measured is not kept


def test_a_graph_is_captured_with_what_was_found_before(store, clock):
    bench = Bench(times={sizes(1): 5.0})
    found, clock.free = find(store, bench), False
    assert find(store, bench) == found


def test_what_was_measured_is_not_read_where_it_is_not_asked_for(store):
    bench = Bench(times={sizes(1): 5.0})
    find(store, bench)
    assert find(store, bench, request(autotune=False)) == UNTUNED


DOC = torch.arange(1000) // 90
PLANNED_FOR = Target(torch.bfloat16, 90, True)


def asked(function, score=None, head_dim=128):
    mods = trace(function, "mask"), None if score is None else trace(score, "score")
    return Request(*mods, Shapes(1, 8, 8, 1000, 1000, head_dim, head_dim), True)


def documents(q_idx, kv_idx):
    return (q_idx >= kv_idx) & (DOC[q_idx] == DOC[kv_idx])


def test_each_kernel_of_a_chain_is_planned_with_its_own_sizes(store):
    usual = choose(store, asked(documents), PLANNED_FOR)
    assert [choice.variant.runs for choice in usual] == ["hold", "hold", "fail"]
    for number, choice in enumerate(usual):
        tuned = (Tuned("forward", number, "a GPU", sizes(0, choice.plan)),)
        found = choose(store, asked(documents), PLANNED_FOR, tuned=tuned)
        assert found[number].plan == candidates(choice.plan)[0] and found[number].sizes.startswith("measured on a GPU: ")
        assert all(other == choice for n, (other, choice) in enumerate(zip(found, usual, strict=True)) if n != number)


def test_sizes_from_the_table_say_so(store):
    (bits,) = [choice for choice in choose(store, asked(documents), PLANNED_FOR) if getattr(choice.plan, "bits", False)]
    assert (bits.plan.block_q, bits.plan.block_kv) == (128, 64)
    assert bits.sizes.startswith("from the table (NVIDIA H200, 2026-11-21")


def test_bits_have_small_tiles_only_where_rows_keep_little(store):
    spans = torch.tensor([-1] * 100 + [0] * 50 + [-1] * 100, dtype=torch.int32)
    mostly_full = choose(store, asked(masks.qk_sparse(spans).function), PLANNED_FOR)
    (bits,) = [choice for choice in mostly_full if getattr(choice.plan, "bits", False)]
    assert (bits.plan.block_q, bits.plan.block_kv) == (128, 128) and bits.sizes == ""


def test_the_chains_of_a_backward_pass(store):
    request = asked(documents)
    usual = plan_work(store, request, torch.device("cuda"), PLANNED_FOR)
    assert {chain: [each.variant.runs for each in some] for chain, some in usual.items()} == {
        "fused": ["hold", "hold"], "dq": ["hold", "fail"], "dkdv": ["fail"]
    }  # fmt: skip
    for chain, some in usual.items():
        tuned = (Tuned(chain, 0, "a GPU", sizes(0, some[0].plan)),)
        found = plan_work(store, request, torch.device("cuda"), PLANNED_FOR, tuned=tuned)
        assert found[chain][0].plan == candidates(some[0].plan)[0]
        assert all(found[other] == usual[other] for other in usual if other != chain) and found[chain][1:] == some[1:]


def test_the_passes_of_sums_in_fixed_point_keep_one_size(store):
    table = torch.randn(1000)
    request = asked(lambda q_idx, kv_idx: q_idx >= kv_idx, lambda score, q_idx, kv_idx: score + table[q_idx] * table[kv_idx])
    usual = plan_work(store, request, torch.device("cuda"), PLANNED_FOR, "fixed")
    assert usual.keys() == {"dq", "dkdv", "peak"}
    tuned = (Tuned("dq", 0, "a GPU", (("block_kv", 16),)),)
    assert plan_work(store, request, torch.device("cuda"), PLANNED_FOR, "fixed", tuned=tuned)["dq"][0].plan == usual["dq"][0].plan


def kept(folder):
    (file,) = folder.glob("*.tuned.json")
    return file


def damaged(change):
    """Texts that no measurement leaves, made from one that it did."""
    return lambda text: json.dumps([{**json.loads(text)[0], **change}])


DAMAGE = {
    "half a file": lambda text: text[: len(text) // 2],
    "no text": lambda text: "\udcff",
    "another value": lambda text: '"block_q"',
    "no entry": lambda text: "[3]",
    "fields missing": lambda text: "[{}]",
    "no such chain": damaged({"chain": "sideways"}),
    "no such kernel": damaged({"number": 7}),
    "counted from the end": damaged({"number": -1}),
    "no candidate": damaged({"sizes": [["block_kv", 128], ["num_stages", 7]]}),
    "too large": damaged({"sizes": [["num_stages", 1 << 40]]}),
    "no number": damaged({"sizes": [["block_kv", "64; import os"]]}),
    "a number that is none": damaged({"sizes": [["block_kv", 64.0]]}),
    "another field": damaged({"sizes": [["loads", 4]]}),
    "no field": damaged({"sizes": [["__class__", 4]]}),
    "no pairs": damaged({"sizes": [1]}),
    "a gain that is none": damaged({"gain": float("nan")}),
    "a gain in words": damaged({"gain": "twice"}),
    "a time that is none": damaged({"times": [[[], float("inf")]]}),
    "a time beyond all": lambda text: text.replace("10.0", "1" + "0" * 400),
    "too deep": lambda text: "[" * 100000,
    "times in words": damaged({"times": [["soon", "later"]]}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_measured_anew(store, tmp_path, case):
    bench = Bench(times={sizes(1): 5.0})
    found, file = find(store, bench), kept(tmp_path)
    file.write_text(DAMAGE[case](file.read_text()), encoding="utf-8", errors="surrogateescape")
    count = len(bench.attempts)
    assert find(store_at(tmp_path), bench) == found and len(bench.attempts) > count
    assert json.loads(file.read_text()) == json.loads(json.dumps([asdict(each) for each in found]))


def test_the_file_holds_names_and_numbers(store, tmp_path):
    find(store, Bench(times={sizes(2): 5.0}))
    (entry,) = json.loads(kept(tmp_path).read_text())
    times = entry.pop("times")
    assert times[0] == [[], 10.0] and len(times) == 1 + len(candidates(PLAN))
    wanted = {"chain": "forward", "number": 0, "gain": 2.0, "gpu": "GPU of this test"}
    assert entry == {**wanted, "sizes": [["block_q", 64], ["num_warps", 4]]}


class Module:
    def __init__(self, runs):
        self.RUNS = type("", (), {"value": runs})


@pytest.mark.parametrize(("flags", "turn"), [((0, 2), 0), ((1, 0), 1), ((1, 1), 2)])
def test_whose_turn_it_is(flags, turn):
    first, second = (torch.tensor([flag, 1], dtype=torch.int32) for flag in flags)
    chain = [(Module("hold"), {"broken": first}), (Module("hold"), {"broken": second}), (Module("fail"), {"broken": second})]
    assert tuning.turn_of(chain) == turn
    assert tuning.turn_of(chain[:2]) == (None if turn == 2 else turn)
    assert tuning.turn_of([(Module("always"), {})]) == 0


def test_results_are_compared_by_a_sample():
    x = torch.randn(1 << 12, 1 << 10)
    y = x * 1.001
    assert tuning.agree((x, None), (y, None))
    assert not tuning.agree((x, None), (y, x)) and not tuning.agree((x,), (y[:-1],)) and not tuning.agree((x,), (y.roll(1, 0),))
    lse = torch.tensor([0.5, -torch.inf])
    assert tuning.agree((lse,), (lse.clone(),)) and not tuning.agree((lse.neg(),), (lse,))
    assert tuning.agree((torch.empty(0),), (torch.empty(0),))


def test_plans_of_sizes_are_the_same_but_for_sizes():
    fixed = {name: value for name, value in asdict(PLAN).items() if name not in differences(PLAN, candidates(PLAN)[0])}
    plan = tuning.sized(PLAN, False, (Tuned("forward", 0, "", sizes(0)),), "forward", 0)[0]
    assert isinstance(plan, KernelPlan) and fixed.items() <= asdict(plan).items()
