"""Intervals: a form evaluated is the mask, tidy, whatever its pieces look like, and exports to FlashMask."""

import pytest
import torch
from runtime_cases import BATCH, HEADS, MASKS, dense_of, facts_of

from flexmask import NotInterval
from flexmask.analysis import Form, Piece
from flexmask.ir import B, K, Q, const, load
from flexmask.runtime.intervals import CHUNK, Intervals, ascending, solve


def solved(name, axis, q_len, kv_len):
    """Intervals of a zoo mask, or None where its form is not known or does not hold."""
    form, (_, tensors, scalars) = getattr(facts_of(name), f"{axis}s"), MASKS[name]
    if not isinstance(form, Form) or form.residue is not None or not all(ascending(tensors[n]) for n in form.sorted_tables):
        return None
    return solve(form, tensors, scalars, q_len=q_len, kv_len=kv_len, batch=BATCH, heads=HEADS)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("name", MASKS)
def test_intervals_are_the_mask(name, axis):
    for q_len, kv_len in ((1, 1), (33, 47), (150, 131), (7, 300)):
        found = solved(name, axis, q_len, kv_len)
        if found is not None:
            assert torch.equal(found.to_dense().expand(BATCH, HEADS, q_len, kv_len), dense_of(name, q_len, kv_len))
            assert_tidy(found)


def assert_tidy(found):
    starts, ends = found.starts.long(), found.ends.long()
    empty = starts >= ends
    assert starts.dtype == ends.dtype and found.starts.dtype == torch.int32
    assert (starts >= 0).all() and (ends <= found.length).all()
    assert not starts[empty].any() and not ends[empty].any()
    assert not (empty[..., :-1] & ~empty[..., 1:]).any(), "empty pieces come last"
    assert ((starts[..., 1:] > ends[..., :-1]) | empty[..., 1:]).all(), "pieces ascend and do not touch"


def row_form(*pieces):
    return Form("row", tuple(Piece(*(const(x) if isinstance(x, int) else x for x in pair)) for pair in pieces))


@pytest.mark.parametrize(
    ("pieces", "starts", "ends"),
    [
        ([(2, 4)], [2], [4]),
        ([(-5, 99)], [0], [10]),
        ([(6, 3)], [0], [0]),
        ([(6, 8), (1, 3)], [1, 6], [3, 8]),
        ([(1, 3), (3, 8)], [1, 0], [8, 0]),
        ([(5, 5), (1, 3), (9, 2)], [1, 0, 0], [3, 0, 0]),
        ([(4, 9), (0, 2), (1, 5)], [0, 0, 0], [9, 0, 0]),
        ([(0, 1), (8, 99), (1, 2)], [0, 8, 0], [2, 10, 0]),
    ],
)
def test_pieces_are_clipped_sorted_and_joined(pieces, starts, ends):
    found = solve(row_form(*pieces), (), (), q_len=1, kv_len=10)
    assert found.starts.flatten().tolist() == starts and found.ends.flatten().tolist() == ends


def test_random_pieces():
    table = torch.randint(-3, 14, (6, 200), generator=torch.Generator().manual_seed(0))
    form = row_form(*((load(2 * i, "int", Q), load(2 * i + 1, "int", Q)) for i in range(3)))
    found = solve(form, tuple(table), (), q_len=200, kv_len=11)
    keys = torch.arange(11)
    want = sum((keys >= table[2 * i, :, None]) & (keys < table[2 * i + 1, :, None]) for i in range(3)).bool()
    assert torch.equal(found.to_dense()[0, 0], want)
    assert_tidy(found)


def test_dimensions_stay_1_where_nothing_depends_on_them():
    found = solve(row_form((load(0, "int", B), Q + 1)), (torch.tensor([1, 4]),), (), q_len=6, kv_len=6, batch=2, heads=5)
    assert found.starts.shape == (2, 1, 6, 1)


def test_long_rows_are_solved_in_parts():
    q_len = 2 * CHUNK + 17
    found = solve(row_form((Q - 3, Q + 1)), (), (), q_len=q_len, kv_len=q_len)
    assert torch.equal(found.ends.flatten(), torch.arange(1, q_len + 1, dtype=torch.int32))
    assert torch.equal(found.starts.flatten(), (found.ends.flatten() - 4).clamp(min=0))


def test_empty_lengths():
    assert solve(row_form((0, Q)), (), (), q_len=0, kv_len=5).starts.shape == (1, 1, 0, 1)
    assert solve(row_form((0, Q)), (), (), q_len=3, kv_len=0).to_dense().shape == (1, 1, 3, 0)


def test_ascending():
    assert ascending(torch.tensor([1, 1, 2])) is True
    assert ascending(torch.tensor([[1, 2], [2, 1]])) is False
    assert ascending(torch.tensor([0.0, float("nan"), 1.0])) is False
    assert all(ascending(x) is True for x in (torch.tensor(3), torch.tensor([]), torch.tensor([5])))


def unmasked(table, q_len, causal):
    """The mask that FlashMask's startend_row_indices mean, from its definition."""
    *_, kv_len, width = table.shape
    rows, table = torch.arange(q_len).view(-1, 1), table[..., None, :, :]
    run = lambda a, z: (rows >= table[..., a]) & (rows < (table[..., z] if z is not None else q_len))
    if causal:
        return ~(run(0, 1 if width == 2 else None) | (rows < torch.arange(kv_len)))
    return ~((run(0, None) | (rows < table[..., 1])) if width == 2 else (run(0, 1) | run(2, 3)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_flashmask_means_the_same(name, causal):
    found = solved(name, "column", 90, 90)
    if found is None:
        return
    try:
        table = found.to_flashmask(causal)
    except NotInterval as error:
        dense = found.to_dense()
        runs = torch.nn.functional.pad(~dense, (0, 0, 1, 0)).int().diff(dim=-2).gt(0).sum(-2).max()
        assert "above the diagonal" in str(error) or runs > (1 if causal else 2)
    else:
        assert table.dtype == torch.int32 and table.shape[-1] in ((1, 2) if causal else (2, 4))
        assert torch.equal(unmasked(table, 90, causal), found.to_dense())


def test_flashmask_by_hand():
    causal = Form("column", (Piece(K, const(99)),))
    columns = solve(causal, (), (), q_len=3, kv_len=3)
    assert columns.to_flashmask().tolist() == [[[[3, 0], [3, 1], [3, 2]]]]
    assert columns.to_flashmask(causal=True).tolist() == [[[[3], [3], [3]]]]


def test_flashmask_refuses_rows_and_three_runs():
    with pytest.raises(NotInterval, match='axis="column"'):
        solve(row_form((0, 1)), (), (), q_len=2, kv_len=2).to_flashmask()
    two = Intervals(torch.tensor([[[[1, 5]]]], dtype=torch.int32), torch.tensor([[[[3, 7]]]], dtype=torch.int32), 9, "column")
    with pytest.raises(NotInterval, match="more than two masked runs"):
        two.to_flashmask()
