"""Forms of masks with many bounds: every combination of atoms that have a form has one too, whatever the order of the bounds."""

from __future__ import annotations

import random

import pytest
import torch
from analysis_cases import Instance, check_forms, random_text, read, runs

from flexmask.analysis import MOST_PIECES, MOST_RUNS, Form, derive


def rows(mask: str) -> Form:
    form = derive(read(mask)).rows
    assert isinstance(form, Form) and form.residue is None
    return form


def window(at: str) -> str:
    return f"(({at} <= kv_idx) & (kv_idx < {at} + 3))"


def test_bounds_in_unknown_order_take_a_piece_each():
    """Where the two windows lie to each other is known at run time only; they may touch, overlap or leave a gap."""
    form = rows(f"{window('s1')} ^ {window('s2')} ^ (kv_idx < q_idx)")
    assert MOST_PIECES < len(form.pieces) <= MOST_RUNS and not form.certain


def test_more_bounds_than_pieces_are_chained():
    """The first runs of each row one after the other: one more than is kept at run time, so that too many are noticed."""
    mask = " | ".join(window(f"{n} * q_idx + {3 * n}") for n in range(1, 12))
    form = rows(mask)
    assert len(form.pieces) == MOST_PIECES + 1
    instance = Instance(14, 20)
    keep, kept = instance.keep(read(mask)), instance.kept_by(form)
    few = runs(keep) <= MOST_PIECES
    assert few.any() and not few.all()
    assert torch.equal(kept[few], keep[few]) and (runs(kept)[~few] > MOST_PIECES).all()


def test_the_hull_reaches_from_the_first_kept_position_to_the_last():
    """Nine windows are too many for bounds that are a piece each."""
    mask = read(" | ".join(window(f"{n} * q_idx + {n}") for n in range(2, 11)))
    (bound,) = derive(mask).row_bounds
    instance = Instance(5, 20)
    keep, hull = instance.keep(mask), instance.kept_by(bound)
    assert len(bound.pieces) == 1 and (hull | ~keep).all()
    assert torch.equal(hull.int().argmax(-1), keep.int().argmax(-1))
    assert torch.equal(hull.flip(-1).int().argmax(-1), keep.flip(-1).int().argmax(-1))


@pytest.mark.parametrize("seed", range(25))
def test_deep_combinations(seed):
    draw = random.Random(seed)
    mask = " ^ ".join(random_text(draw, 2, 0.05) for _ in range(3))
    facts = derive(read(mask))
    for n in range(3):
        check_forms(facts, Instance(draw.randint(1, 20), draw.randint(1, 20), 10 * seed + n))
