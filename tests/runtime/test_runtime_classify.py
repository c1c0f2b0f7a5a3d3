"""The box test run by torch: summaries of blocks, states of tiles, and what is looked at where it does not tell."""

from __future__ import annotations

import pytest
import torch
from runtime_cases import BATCH, HEADS, MASKS, eq, t

from flexmask.analysis import BoxTest, box_test
from flexmask.ir import FALSE, FLOAT, TRUE, B, Env, H, K, Q, const, evaluate, make, scalar
from flexmask.runtime import classify as module
from flexmask.runtime import undecided
from flexmask.runtime.classify import PARTS, UNKNOWN, classify, classify_parts, summaries
from flexmask.runtime.grid import EMPTY, FULL, PARTIAL, Grid
from flexmask.runtime.undecided import evaluate_unknown

SIZES = [(100, 77, 16, 16), (33, 120, 7, 50), (5, 5, 8, 1), (64, 64, 64, 64)]


def terms(*rows, columns=()):
    """A test of which only the terms matter."""
    return BoxTest(TRUE, FALSE, rows, columns)


# summaries


def test_summaries_of_the_index_are_the_ends_of_blocks():
    lo, hi = summaries(terms(Q), Grid(10, 3, 4, 4))
    assert (lo.tolist(), hi.tolist()) == ([[[0, 4, 8]]], [[[3, 7, 9]]])
    assert lo.dtype == hi.dtype == torch.int64


def test_summaries_are_made_of_valid_places_only():
    """The table is longer than the sequence, and the last block is short."""
    table = torch.tensor([5, 3, 4, 9, 7, 0, 0, 0])
    lo, hi = summaries(terms(columns=(t(0, K),)), Grid(2, 5, 2, 3), (table,))
    assert (lo.tolist(), hi.tolist()) == ([[[3, 7]]], [[[5, 9]]])


@pytest.mark.parametrize(("lead", "shape"), [((), (1, 1)), ((B,), (BATCH, 1)), ((H,), (1, HEADS)), ((B, H), (BATCH, HEADS))])
def test_shapes_follow_what_a_term_depends_on(lead, shape):
    table = torch.randint(-9, 9, (*([BATCH] * (B in lead)), *([HEADS] * (H in lead)), 50))
    lo, hi = summaries(terms(t(0, *lead, Q)), Grid(50, 3, 20, 2, BATCH, HEADS), (table,))
    blocks = table.expand(*shape, 50) if not lead else table.view(*shape, 50)
    for i, (first, last) in enumerate([(0, 20), (20, 40), (40, 50)]):
        assert torch.equal(lo[..., i], blocks[..., first:last].amin(-1)) and torch.equal(hi[..., i], blocks[..., first:last].amax(-1))


def test_bools_are_0_and_1():
    (lo, hi) = summaries(terms(Q < 3), Grid(8, 1, 2, 1))
    assert (lo.tolist(), hi.tolist()) == ([[[1, 0, 0, 0]]], [[[1, 1, 0, 0]]])
    assert lo.dtype == torch.int64


def test_floats_hand_on_nan():
    table = torch.tensor([1.0, float("nan"), 3.0, 2.0, float("inf"), 0.0])
    lo, hi = summaries(terms(t(0, Q, kind=FLOAT)), Grid(6, 1, 2, 1), (table,))
    assert lo.dtype == hi.dtype == torch.float32
    assert lo[0, 0].isnan().tolist() == hi[0, 0].isnan().tolist() == [True, False, False]
    assert (lo[0, 0, 1:].tolist(), hi[0, 0, 1:].tolist()) == ([2.0, 0.0], [3.0, float("inf")])


def test_doubles_are_rounded_outwards():
    table = torch.tensor([0.1, 1 / 3, -0.1, 1e300, -1e300, 0.5], dtype=torch.float64)
    lo, hi = summaries(terms(t(0, Q, kind=FLOAT)), Grid(6, 1, 1, 1), (table,))
    assert (lo.double()[0, 0] <= table).all() and (hi.double()[0, 0] >= table).all()
    assert (hi[0, 0, :3] - lo[0, 0, :3] < 1e-7).all() and lo[0, 0, 5] == hi[0, 0, 5] == 0.5


def test_doubles_prove_nothing_that_floats_would_confuse():
    """0.1 as a double is less than 0.1 as a float, by less than a float can tell."""
    table = torch.tensor([0.1, 0.1], dtype=torch.float64)
    for predicate in (make("lt", (t(0, K, kind=FLOAT), t(1, Q, kind=FLOAT))), make("le", (t(1, Q, kind=FLOAT), t(0, K, kind=FLOAT)))):
        tensors = (table, table.float())
        found = classify(box_test(predicate, 2), Grid(2, 2, 2, 2), tensors)
        env = Env({"q_idx": torch.arange(2).view(-1, 1), "kv_idx": torch.arange(2)}, tensors)
        kept = evaluate(predicate, env)
        assert found.item() == UNKNOWN or (found.item() == FULL) == bool(kept.all())


@pytest.mark.parametrize("positions", [1, 10, 64])
def test_terms_are_evaluated_a_few_blocks_at_a_time(monkeypatch, positions):
    table, grid = torch.randint(-99, 99, (BATCH, 101)), Grid(101, 3, 7, 2, BATCH, 1)
    whole = summaries(terms(t(0, B, Q)), grid, (table,))
    monkeypatch.setattr(module, "POSITIONS", positions)
    assert all(map(torch.equal, whole, summaries(terms(t(0, B, Q)), grid, (table,))))


# states


def truth_of(name, grid):
    predicate, tensors, scalars = MASKS[name]
    states = torch.full(grid.shape, UNKNOWN, dtype=torch.int8)
    return evaluate_unknown(states, predicate, grid, tensors, scalars)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", SIZES)
def test_states_are_true_and_are_completed(name, sizes):
    predicate, tensors, scalars = MASKS[name]
    grid, test = Grid(*sizes, BATCH, HEADS), box_test(predicate, len(tensors))
    found, truth = classify(test, grid, tensors, scalars), truth_of(name, grid)
    assert found.dtype == torch.int8 and found.shape == grid.shape
    assert torch.equal(torch.where(found == UNKNOWN, truth, found), truth)
    assert torch.equal(evaluate_unknown(found, predicate, grid, tensors, scalars, test), truth)


def test_slabs_are_the_whole(monkeypatch):
    predicate, tensors, scalars = MASKS["by batch and head"]
    grid, test = Grid(200, 300, 9, 11, BATCH, HEADS), box_test(predicate, len(tensors))
    whole = classify(test, grid, tensors, scalars)
    monkeypatch.setattr(module, "_PER_TILE", 1 << 16)
    assert len(grid.spans(1 << 16)) > 3
    assert torch.equal(classify(test, grid, tensors, scalars), whole)


def test_no_tiles():
    assert classify(box_test(K <= Q, 0), Grid(0, 7, 4, 4)).shape == (1, 1, 0, 2)
    assert classify(box_test(K <= Q, 0), Grid(7, 0, 4, 4)).shape == (1, 1, 2, 0)


def test_constants():
    assert classify(box_test(TRUE, 0), Grid(9, 9, 4, 4)).eq(FULL).all()
    assert classify(box_test(FALSE, 0), Grid(9, 9, 4, 4)).eq(EMPTY).all()


def test_lengths_and_scalars_are_those_of_the_call():
    test = box_test(Q - K < scalar(0, "int"), 0)
    last_rows = [classify(test, Grid(6, 6, 2, 2), (), (window,))[0, 0, 2].tolist() for window in (-9, 0, 3, 9)]
    assert last_rows == [[0, 0, 0], [0, 0, 3], [0, 3, 2], [2, 2, 2]]


# parts of tiles


def test_parts_tell_what_a_tile_does_not():
    """Cells of 4 x 4 under tiles of 16 x 16: a tile covers four cells along each axis, its parts one."""
    cells = torch.zeros(16, 16, dtype=torch.bool)
    cells[4:8, 4:8], cells[8, 0] = True, True
    test, grid = box_test(t(0, Q // 4, K // 4, kind="bool"), 1), Grid(64, 64, 16, 16)
    assert classify(test, grid, (cells,)).eq(UNKNOWN).all()
    where = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 2, 0], [0, 0, 3, 3]])
    assert classify_parts(where, test, grid, (cells,)).tolist() == [EMPTY, FULL, PARTIAL, EMPTY]


def test_parts_of_short_tiles_end_with_the_lengths():
    test, grid = box_test(K * Q < 65 * 65, 0), Grid(66, 70, PARTS * 4, PARTS * 4)
    where = torch.tensor([[0, 0, i, j] for i in range(grid.rows) for j in range(grid.columns)])
    found = classify_parts(where, test, grid).view(grid.rows, grid.columns)
    env = Env({"q_idx": torch.arange(66).view(-1, 1), "kv_idx": torch.arange(70)})
    kept = evaluate(K * Q < 65 * 65, env)
    for i in range(grid.rows):
        for j in range(grid.columns):
            tile = kept[i * 32 : i * 32 + 32, j * 32 : j * 32 + 32]
            true = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
            assert found[i, j] in (UNKNOWN, true)


def test_no_tile_is_left_for_parts():
    assert classify_parts(torch.empty(0, 4, dtype=torch.int64), box_test(K <= Q, 0), Grid(64, 64, 16, 16)).tolist() == []


@pytest.mark.parametrize("period", [2, 3, 6, 7, 18, 127])
def test_a_period_hides_from_no_samples(monkeypatch, period):
    """Samples in regular steps would meet only the kept rows, and all places of such tiles would be evaluated."""
    predicate, grid = make("ne", (Q % period, const(1))), Grid(512, 512, 128, 128)
    monkeypatch.setattr(undecided, "MANY_SAMPLES", undecided.MANY_SAMPLES[:1])
    states = evaluate_unknown(torch.full(grid.shape, UNKNOWN, dtype=torch.int8), predicate, grid, (), ())
    assert states.eq(PARTIAL).all()


def test_a_million_tiles_in_a_blink():
    """Causal documents over 131072 tokens: little is left to be looked at."""
    ids = (torch.arange(131072) // 3000).int()
    predicate = (K <= Q) & eq(t(0, Q), t(0, K))
    grid, test = Grid(131072, 131072, 128, 128), box_test(predicate, 1)
    states = classify(test, grid, (ids,))
    assert states.shape == (1, 1, 1024, 1024) and (states == UNKNOWN).sum() < 3000
    assert evaluate_unknown(states, predicate, grid, (ids,), (), test).ne(UNKNOWN).all()
