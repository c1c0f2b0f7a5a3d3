"""A case on the CPU: who fails is written down, who is wrong is seen, and the others are measured."""

import math

import pytest
import torch

from benchmarks import contest
from benchmarks.checks import Expected, difference
from benchmarks.contest import DeviceLost, Settings, inputs, measure, run_once, written_down
from benchmarks.figures import Case
from benchmarks.rivals import CONTESTANTS, Contestant, block_mask, build, plain
from flexmask import masks, reference

TINY = Case("causal", 128, 2, 4, 4, 16)
GROUPED = Case("causal", 128, 1, 4, 2, 16)
CPU = Settings(device="cpu", rounds=1, least=1)


def refuse(case, device):
    raise RuntimeError("no kernel\n  for this")


def without_mask(case, device):
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def heads_last(case, device):
    attend = CONTESTANTS["SDPA flash"].make(case, device)
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def measured(case, settings, *rivals):
    return measure(case, [CONTESTANTS["flexmask"], *rivals], settings, lambda label: None)


@pytest.mark.parametrize("case", [TINY, GROUPED], ids=["plain", "grouped"])
def test_every_contestant_is_checked_and_timed(case):
    row = measured(case, CPU, CONTESTANTS["SDPA flash"], Contestant("turned", heads_last, heads_last=True))
    assert not row.failures
    for label in ("flexmask", "SDPA flash", "turned"):
        assert row.error[label] < 2e-2 and row.gradient_error[label] < 2e-2
        assert row.ms["forward"][label] > 0 and row.ms["backward"][label] > 0
    assert row.kept_pairs == 128 * 129 // 2 and row.block_pairs == 128 * 128


def test_a_failing_rival_is_written_down_and_a_wrong_one_is_seen():
    row = measured(TINY, CPU, Contestant("broken", refuse), Contestant("wrong", without_mask))
    assert row.failures == {"broken": "RuntimeError: no kernel for this"}
    assert row.error["wrong"] > 0.1 > row.error["flexmask"] and row.gradient_error["wrong"] > 0.1
    assert "broken" not in row.ms["forward"] and "flexmask" in row.ms["backward"]


def test_forward_alone_asks_for_no_gradients():
    row = measured(TINY, Settings(("forward",), "cpu", 1, least=1), CONTESTANTS["SDPA flash"])
    assert row.ms["backward"] == {} and row.gradient_error == {} and row.error["flexmask"] < 2e-2


def test_a_rival_that_cannot_train_is_timed_forward():
    row = measured(TINY, CPU, Contestant("frozen", heads_last, heads_last=True, trains=False))
    assert "frozen" in row.ms["forward"] and "frozen" not in row.ms["backward"] and not row.failures


def test_gradients_are_compared_with_flexattentions(monkeypatch):
    row = measured(TINY, CPU, Contestant("FlexAttention", CONTESTANTS["SDPA flash"].make))
    assert 0 < row.difference < 2e-2


def test_timing_goes_on_without_a_reference(monkeypatch):
    def too_large(*args, **kwargs):
        raise MemoryError("the reference does not fit")

    monkeypatch.setattr(contest, "kept_pairs", too_large)
    row = measured(TINY, CPU)
    assert "MemoryError" in row.failures["reference"] and "flexmask" in row.ms["backward"] and math.isnan(row.difference)


def test_compiling_ahead_meets_every_contestant():
    heard = []
    rivals = [Contestant("broken", refuse), CONTESTANTS["flexmask"]]
    assert list(run_once(TINY, rivals, CPU, heard.append)) == ["broken"] and heard == ["broken", "flexmask"]


def test_a_broken_context_is_not_gone_on_with(monkeypatch):
    def dead():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    failures = {}
    with pytest.raises(DeviceLost, match="FA4: RuntimeError: an illegal"), written_down(failures, "FA4", "cuda"):
        pass
    assert "FA4" in failures


def test_gradients_of_sampled_rows_are_the_references():
    (q, k, v), dout = inputs(GROUPED, CPU)
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = Expected(q, k, v, dout, masks.causal)
    out = reference.attention(q, k, v, masks.causal, enable_gqa=True)
    found = torch.autograd.grad(out, (q, k, v), expected.sampled(dout).double())
    assert expected.error(out) < 1e-12 and expected.gradient_error(found) < 1e-12
    assert expected.gradient_error((found[0], found[1] * 1.5, found[2])) == pytest.approx(0.5)


def test_a_difference_that_is_not_a_number_is_not_hidden():
    one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
    assert math.isnan(difference((one, nan, one), (one, one, one)))
    assert math.isnan(difference((nan, 3 * one), (one, one)))


@pytest.mark.parametrize("name", ["causal", "sliding_window", "global_sliding", "prefix_lm_causal"])
def test_rivals_are_given_the_same_mask_and_tiles(name):
    case = Case(name, 512, 1, 1, 1, 16)
    mask, tiles = build(case, "cpu"), block_mask(case, "cpu")
    assert tiles is not None
    at = torch.arange(512)
    function = torch.vmap(torch.vmap(lambda q, k: plain(mask)(0, 0, q, k), (None, 0)), (0, None))
    assert torch.equal(function(at, at), reference.dense_mask(mask, 1, 1, 512, 512)[0, 0])
    states = mask.block_mask(512, 512).states()[0, 0]
    assert torch.equal(tiles.to_dense()[0, 0].bool(), states > 0)


def test_no_mask_is_no_block_mask():
    assert block_mask(Case("full", 512, 1, 1, 1, 16), "cpu") is None
