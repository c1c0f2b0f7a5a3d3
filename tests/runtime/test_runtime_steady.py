"""The last call is repeated for tensors of the same layout as long as nothing that it depends on has changed, and not otherwise."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flexmask.errors import ShapeError
from flexmask.frontend import trace
from flexmask.runtime import steady
from flexmask.runtime.checks import Shapes
from flexmask.runtime.replay import NO_STANDING
from flexmask.runtime.request import Request
from flexmask.runtime.store import Store

SHAPES = Shapes(1, 1, 1, 3, 3, 8, 8)


class World:
    """A store, tables, a request of them, and a call that has been kept."""

    def __init__(self):
        self.store, self.ids, self.bias = Store(), torch.tensor([0, 0, 1]), torch.ones(3)
        self.request = self.requested(self.ids, self.bias)
        self.inputs = (torch.randn(2, 3), torch.randn(4, 5))
        self.steady = steady.Steady()
        self.steady.keep(self.store, self.request, self.inputs, SimpleNamespace(run=lambda *given: given), NO_STANDING)

    def requested(self, ids, bias):
        mask = trace(lambda q_idx, kv_idx: ids[q_idx] == ids[kv_idx], "mask")
        return Request(mask, trace(lambda score, kv_idx: score + bias[kv_idx], "score"), SHAPES)

    def run(self, request=None, inputs=None):
        return self.steady.run(self.store, request or self.request, inputs or self.inputs)


@pytest.fixture
def place(monkeypatch):
    """Where launches go, as if there were a GPU."""
    found = {"now": (0, 7)}
    monkeypatch.setattr(steady, "_place", lambda device: found["now"])
    return found


@pytest.fixture
def world(place):
    return World()


def test_tensors_of_the_same_layout_repeat_it(world):
    others = (torch.randn(2, 3), torch.randn(4, 5))
    assert world.run(inputs=others) == (others, NO_STANDING)
    assert world.run(world.requested(world.ids, world.bias)) is not None, "mods written anew over the same tables"


def test_another_layout_does_not(world):
    x, y = world.inputs
    assert world.run(inputs=(x.double(), y)) is None
    assert world.run(inputs=(x[:1], y)) is None, "keys of one batch entry for all have the strides of those of several"
    assert world.run(inputs=(torch.randn(3, 2).t(), torch.randn(4, 5))) is None
    assert world.run(inputs=(*world.inputs, torch.randn(2))) is None


def test_a_table_of_the_mask_that_was_changed(world):
    world.ids[0] = 1
    assert world.run() is None


def test_a_table_of_the_score_may_change(world):
    world.bias.add_(1)
    assert world.run() is not None


@pytest.mark.parametrize("which", ["ids", "bias"])
def test_another_table_at_the_same_address(world, which):
    tables = {"ids": world.ids, "bias": world.bias}
    tables[which] = tables[which].view(3)
    assert world.run(world.requested(**tables)) is None


@pytest.mark.parametrize("which", ["ids", "bias"])
def test_a_table_that_was_moved(world, which):
    table = getattr(world, which)
    table.data = table.clone()
    assert world.run() is None


def test_maps_that_the_store_let_go(world):
    world.store.forget_maps()
    assert world.run() is None


@pytest.mark.parametrize("now", [(0, 8), (1, 7), None])
def test_another_stream_another_device_and_a_graph_that_is_captured(world, place, now):
    place["now"] = now
    assert world.run() is None


def test_nothing_is_kept_where_nothing_repeats_or_could_be_said_of_a_table(place):
    world = World()
    world.steady.keep(world.store, world.request, world.inputs, None, NO_STANDING)
    assert world.run() is None
    with torch.inference_mode():
        ids = torch.tensor([0, 0, 1])
    request = world.requested(ids, world.bias)
    world.steady.keep(world.store, request, world.inputs, SimpleNamespace(run=lambda *given: given), NO_STANDING)
    assert world.run(request) is None


def test_a_map_that_the_store_dropped_is_not_held(place):
    world, standing = World(), replace(NO_STANDING)
    world.steady.keep(world.store, world.request, world.inputs, SimpleNamespace(run=lambda *given: given), standing)
    assert world.run() == (world.inputs, standing)
    del standing
    gc.collect()
    assert world.run() is None


def found(request, scale=1.0, q=None):
    return steady.find_steady(STORE, request, torch.zeros(1) if q is None else q, scale)


STORE = Store()


def test_calls_that_differ_have_places_of_their_own():
    window = lambda size: Request(trace(lambda q_idx, kv_idx: q_idx - kv_idx < size, "mask"), None, SHAPES)
    scaled = lambda factor: Request(None, trace(lambda score: score * factor, "score"), SHAPES)
    ids, bias = torch.tensor([0, 0, 1]), torch.ones(3)
    calls = [
        found(window(2)), found(window(3)), found(window(2), scale=2.0), found(window(2), q=torch.zeros(1).half()), found(scaled(0.0)),
        found(scaled(-0.0)), found(World.requested(None, ids, bias)), found(World.requested(None, ids.clone(), bias)),
        found(replace(window(2), shapes=replace(SHAPES, q_len=4))),
    ]  # fmt: skip
    assert len({id(call) for call in calls}) == len(calls)
    assert found(window(2)) is calls[0] and found(World.requested(None, ids, bias)) is calls[6]


def test_what_does_not_fit_a_call_is_said_each_time():
    short = torch.ones(2)
    request = Request(trace(lambda q_idx, kv_idx: short[q_idx] > 0, "mask"), None, SHAPES)
    for _ in range(2):
        with pytest.raises(ShapeError, match="has 2 entries"):
            found(request)


def test_on_the_cpu_there_is_no_stream():
    assert steady._place(torch.device("cpu")) is None
