"""The last call is repeated for tensors of the same strides as long as nothing that it depends on has changed, and not otherwise."""

from types import SimpleNamespace

import pytest
import torch

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


def test_tensors_of_the_same_strides_repeat_it(world):
    others = (torch.randn(2, 3), torch.randn(4, 5))
    assert world.run(inputs=others) == (others, NO_STANDING)
    assert world.run(world.requested(world.ids, world.bias)) is not None, "mods written anew over the same tables"


def test_other_strides_do_not(world):
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


def test_on_the_cpu_there_is_no_stream():
    assert steady._place(torch.device("cpu")) is None
