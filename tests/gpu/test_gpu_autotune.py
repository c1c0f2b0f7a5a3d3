"""Sizes measured on a real GPU: every candidate runs and agrees, the winners are used, and only the first call waits or takes long."""

import pytest
import torch

import flexmask
from flexmask import masks
from flexmask.lowering import candidates
from flexmask.runtime import backward_kernels, forward, tuning
from flexmask.runtime.checks import check_inputs
from flexmask.runtime.choice import Target, arch_of
from flexmask.runtime.disk import DiskCache
from flexmask.runtime.request import Request
from flexmask.runtime.store import default_store

pytestmark = pytest.mark.gpu
LENGTH = 1000


def documents(length, ascending=True):
    ids = torch.arange(length, device="cuda") // 90
    return masks.causal & masks.document(ids if ascending else ids % 5)


def evicted():
    until = torch.arange(LENGTH, device="cuda") + 200
    return flexmask.mask(lambda q_idx, kv_idx: q_idx < until[kv_idx])


CASES = {
    "no mask": lambda: None,
    "causal": lambda: masks.causal,
    "window": lambda: masks.sliding_window(100),
    "two intervals": lambda: masks.global_window(4, 64),
    "documents, first in turn": lambda: documents(LENGTH),
    "documents, second in turn": lambda: documents(LENGTH, ascending=False),
    "intervals of keys": evicted,
}


@pytest.fixture(autouse=True)
def empty(tmp_path):
    """A store without anything measured, and with a directory of its own."""
    store = default_store()
    store.clear()
    before, store.__dict__["disk"] = store.disk, DiskCache(str(tmp_path))
    yield
    store.clear()
    store.__dict__["disk"] = before


@pytest.fixture
def timed(monkeypatch):
    """How many runs were timed."""
    runs, milliseconds = [], tuning.Events.milliseconds
    monkeypatch.setattr(tuning.Events, "milliseconds", lambda self, run: runs.append(run) or milliseconds(self, run))
    return runs


def tensors(dim, dtype=torch.bfloat16, length=LENGTH):
    torch.manual_seed(0)
    return [torch.randn(1, 4, length, dim, device="cuda", dtype=dtype, requires_grad=n < 3) for n in range(4)]


def everything(attn, q, k, v, dout, *more):
    out = attn(q, k, v)
    return [out, *torch.autograd.grad(out, [q, k, v, *more], dout)]


def assert_near(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        assert (x.float() - y.float()).abs().max() <= 0.02 * y.float().abs().max()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_every_candidate_runs_and_agrees(case, dim):
    mask, (q, k, v, dout) = CASES[case](), tensors(dim)
    assert_near(everything(flexmask.compile(mask, autotune=True), q, k, v, dout), everything(flexmask.compile(mask), q, k, v, dout))
    store, found = default_store(), {each.chain: each for some in default_store().tuned.values() for each in some}
    request = Request(None if mask is None else mask.traced(), None, check_inputs(q, k, v, False), True)
    target = Target(q.dtype, arch_of(q.device), True)
    plans = forward.subject(store, request, target, q.device).plans() | backward_kernels.subject(store, request, q, target).plans()
    assert "forward" in found and found.keys() <= plans.keys()
    for chain, each in found.items():
        assert len(each.times) == 1 + len(candidates(plans[chain][each.number])), chain


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_plain_kernels_and_gradients_of_tables(dtype):
    bias = torch.randn(4, 65, device="cuda", requires_grad=True)
    relative = flexmask.score(lambda score, b, h, q_idx, kv_idx: score + bias[h, (q_idx - kv_idx).clamp(0, 64)])
    given = (*tensors(64, dtype, 300), bias)
    found = [everything(flexmask.compile(masks.causal, relative, autotune=tuned), *given) for tuned in (True, False)]
    assert_near(*found)


def test_the_report_names_what_was_measured(timed):
    attn, (q, k, v, _) = flexmask.compile(masks.causal, autotune=True), tensors(128)
    assert "not measured yet" in attn.explain(q, k, v) and not timed
    attn(q, k, v)
    assert f"measured on {torch.cuda.get_device_name()}: " in attn.explain(q, k, v)
    assert "measured on" not in flexmask.compile(masks.causal).explain(q, k, v)


def test_only_the_first_call_measures_and_waits(timed):
    attn, (q, k, v, dout) = flexmask.compile(documents(LENGTH), autotune=True), tensors(128)
    first = everything(attn, q, k, v, dout)
    count, other = len(timed), [x.detach().clone().requires_grad_() for x in (q, k, v)]
    everything(attn, *other, dout)
    again = flexmask.compile(documents(LENGTH), autotune=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = everything(again, q, k, v, dout)  # another mask object over other tensors
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count and len(timed) == count
    assert_near(found, first)


def test_what_is_on_disk_is_read(timed):
    attn, (q, k, v, dout) = flexmask.compile(masks.causal, autotune=True), tensors(128)
    everything(attn, q, k, v, dout)
    count = len(timed)
    default_store().clear()
    everything(attn, q, k, v, dout)
    assert len(timed) == count


def test_nothing_is_measured_while_a_graph_is_captured(timed):
    q, k, v, _ = (x.detach() for x in tensors(128))
    plain, attn = flexmask.compile(masks.causal), flexmask.compile(masks.causal, autotune=True)
    wanted = plain(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v)
    graph.replay()
    torch.testing.assert_close(out, wanted)
    assert not timed
    assert_near([attn(q, k, v)], [wanted])
    assert timed


def test_torch_compile(timed):
    q, k, v, _ = (x.detach() for x in tensors(128))
    run = torch.compile(lambda *x: flexmask.attention(*x, mask=masks.causal, autotune=True), fullgraph=True)
    assert_near([run(q, k, v)], [flexmask.attention(q, k, v, mask=masks.causal)])
    count = len(timed)
    run(q, k, v)
    assert count and len(timed) == count
