"""Which calls have few queries, and how they are served."""

import pytest
import torch

import flexmask
from flexmask import masks
from flexmask.lowering import HopperPlan, KernelPlan
from flexmask.runtime import few
from flexmask.runtime.checks import Shapes
from flexmask.runtime.choice import Target, choose
from flexmask.runtime.few import MANY, Few, served
from flexmask.runtime.request import Request
from flexmask.runtime.store import Store

BY_HEAD = flexmask.mask(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + h)


def found(mask, batch, heads, kv_heads, q_len, kv_len, dtype=torch.bfloat16, arch=90):
    request = Request(None if mask is None else mask.traced(), None, Shapes(batch, heads, kv_heads, q_len, kv_len, 128, 128))
    return served(Store(), request, dtype, arch, torch.device("cpu"))


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(few, "processors_of", lambda device: 132)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 32, 8, 1, 8192), Few(4, 16, True)),  # decoding
        ((64, 32, 8, 1, 8192), Few(4, 16, False)),  # as many tiles as the GPU has room for
        ((1, 32, 32, 1, 8192), Few(1, 16, True)),
        ((1, 32, 32, 1, 512), Few()),  # too short to be split
        ((1, 40, 8, 1, 8192), Few(8, 16, True)),  # five heads and room for three
        ((1, 64, 1, 1, 8192), Few(64, 64, True)),
        ((1, 256, 1, 1, 8192), Few()),  # more heads than a tile has rows, and as many tiles as processors
        ((1, 8, 2, 32, 8192), Few(4, 128, True)),
        ((1, 8, 2, 128, 8192), Few(1, 128, True)),  # sharing would not halve the tiles
        ((2, 32, 32, 8192, 8192), Few()),
        ((1, 4, 4, 0, 8192), Few()),
        ((1, 4, 4, 8, 0), Few()),
    ],
)
def test_sizes_decide(gpu, sizes, expected):
    assert found(masks.causal, *sizes).plain == found(None, *sizes).plain == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((16, 32, 8, 64, 8192), Few(2, 128, False)),
        ((16, 32, 8, 32, 8192), Few(4, 128, False)),
        ((1, 48, 8, 20, 8192), Few(2, 128, True)),  # six heads
        ((1, 64, 1, 1, 8192), Few(16, 128, True)),
        ((1, 32, 8, 64, 8192), Few(2, 128, True)),
        ((1, 32, 8, 256, 8192), Few(1, 128, True)),  # as many tiles as without sharing
        ((1, 40, 8, 64, 8192), Few(1, 128, True)),  # five heads
        ((1, 32, 8, 192, 8192), Few(2, 128, True)),  # three tiles for two heads instead of four
        ((1, 32, 8, 192, 512), Few(2, 128, False)),
        ((1, 32, 8, 8192, 8192), Few()),
        ((1, 32, 32, 64, 8192), Few(1, 128, True)),
    ],
)
def test_sizes_decide_for_hopper(gpu, sizes, expected):
    assert found(None, *sizes).hopper == expected


def test_what_fills_small_tiles_better_keeps_to_plain_triton(gpu):
    why = "of so few queries up to 4 heads share a tile and rows are split among programs, and its tiles would be half empty"
    assert found(None, 1, 32, 8, 16, 8192).why == found(None, 1, 48, 8, 1, 8192).why.replace("8 heads", "4 heads") == why
    assert all(found(None, 1, 32, *sizes).why == "" for sizes in ((8, 32, 8192), (8, 64, 8192), (8, 8192, 8192), (32, 1, 512)))


def test_heads_with_masks_of_their_own_share_nothing(gpu):
    assert found(BY_HEAD, 1, 32, 8, 1, 8192).plain == Few(1, 16, True)
    assert found(BY_HEAD, 1, 32, 8, 64, 8192).hopper == Few(1, 128, True)


def test_tiles_are_smaller_in_float32_and_on_smaller_gpus(gpu):
    assert found(None, 1, 32, 8, 32, 8192, arch=80).plain == Few(4, 64, True)
    assert found(None, 1, 32, 8, 4, 8192, torch.float32).plain == Few(4, 16, True)
    assert found(None, 1, 32, 8, 16, 8192, torch.float32).plain == Few(1, 16, True)


def test_without_a_gpu_none_are_few():
    assert found(None, 1, 32, 8, 1, 8192) == MANY


def chosen(q_len):
    request = Request(masks.causal.traced(), None, Shapes(1, 32, 8, q_len, 8192, 128, 128))
    few = served(Store(), request, torch.bfloat16, 90, torch.device("cpu"))
    (choice,) = choose(Store(), request, Target(torch.bfloat16, 90, True, few.why, few=few))
    return choice


def test_the_plans_are_those_of_the_kernels_for_few(gpu):
    plain, hopper = chosen(1), chosen(64)
    assert isinstance(plain.plan, KernelPlan) and plain.plan.is_few and plain.plan.queries == 4
    assert plain.passed_over.startswith("of so few queries up to 4 heads share a tile")
    assert isinstance(hopper.plan, HopperPlan) and hopper.plan.is_few and hopper.plan.queries == 64 and hopper.passed_over == ""
