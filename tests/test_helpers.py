"""The test helpers themselves: drawings read back, and random predicates are programs."""

import inspect

import drawing
import pytest
import torch
from hypothesis import given, settings
from strategies import Predicate, Sizes, layouts, lengths, predicates

from flexmask import masks, reference


def test_a_drawing_reads_back():
    keep = torch.rand(5, 7) < 0.5
    assert torch.equal(drawing.parse(drawing.draw(keep)), keep)


def test_a_wrong_drawing_shows_both():
    with pytest.raises(AssertionError, match=r"found\n    #\.\n    ##\nbut drawn\n    ##\n    ##"):
        drawing.assert_mask(masks.causal, rows=2, columns=2, drawn="##\n##")


@pytest.mark.parametrize("drawn", ["#.\n#", "#o"])
def test_what_is_no_drawing_is_refused(drawn):
    with pytest.raises(ValueError, match="not a drawing"):
        drawing.parse(drawn)


@given(predicates())
@settings(max_examples=100)
def test_a_predicate_prints_as_the_program_it_is(predicate):
    s = predicate.sizes
    names = {"torch": torch, "Sizes": Sizes}
    *captures, function = [line for line in repr(predicate).splitlines() if line and not line.startswith("#")]
    for line in captures:
        exec(line, names)
    printed = eval(function, names)
    assert torch.equal(
        reference.dense_mask(printed, s.B, s.H, s.Q, s.KV),
        reference.dense_mask(predicate.mask(), s.B, s.H, s.Q, s.KV),
    )


def test_a_predicates_source_is_found():
    predicate = Predicate("q_idx >= kv_idx + s0", {"s0": 3}, Sizes(1, 1, 4, 4))
    assert "return q_idx >= kv_idx + s0" in inspect.getsource(predicate.function())


@given(lengths(50), layouts(largest=50))
def test_layouts_are_valid(length, layout):
    assert 1 <= length <= 50
    q, k, v = layout.tensors(torch.float64)
    out = reference.attention(q, k, v, enable_gqa=layout.enable_gqa)
    assert out.shape == (*q.shape[:3], layout.Dv) and out.isfinite().all()
