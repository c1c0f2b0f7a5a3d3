"""What a mask can tell of itself: blocks, intervals, pictures, explanations."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import flexmask
from flexmask import masks


def test_block_states_of_causal():
    assert masks.causal.block_mask(512, 512).states()[0, 0].tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]


def test_blocks_agree_with_create_block_mask():
    doc = torch.arange(500) // 70
    m = masks.causal & masks.document(doc)
    theirs = create_block_mask(lambda b, h, q, k: (q >= k) & (doc[q] == doc[k]), None, None, 500, 500, device="cpu")
    ours = m.block_mask(500, 500)
    assert torch.equal(ours.to_dense().int(), theirs.to_dense().int())
    assert torch.equal(ours.to_torch(m).to_dense(), theirs.to_dense())


def test_row_and_column_intervals_are_the_mask():
    m = masks.sliding_window(7)
    for axis in ("row", "column"):
        assert torch.equal(m.intervals(40, 33, axis=axis).to_dense(), m.to_dense(40, 33))


def test_a_mask_without_intervals_says_why_and_where():
    @flexmask.mask
    def odd(q_idx, kv_idx):
        return kv_idx % 2 == 0

    with pytest.raises(flexmask.NotInterval) as error:
        odd.intervals(8, 8, axis="row")
    assert "test_api_mask.py" in str(error.value) and "kv_idx % 2" in str(error.value)


def test_a_mask_that_depends_on_the_batch_wants_to_know_how_many():
    m = masks.padding(torch.tensor([3, 5]))
    with pytest.raises(flexmask.ShapeError, match="pass batch="):
        m.block_mask(8, 8)
    assert m.block_mask(8, 8, batch=2, block_size=1).to_dense().shape == (2, 1, 8, 8)


def test_str_draws_the_mask():
    @flexmask.mask
    def three(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (table[q_idx] == table[kv_idx])

    table = torch.tensor([0, 0, 0, 1, 1])
    assert str(three).endswith("#....\n##...\n###..\n...#.\n...##")


def test_explain_names_the_users_tensors_and_forms():
    documents = torch.arange(64) // 10
    m = masks.causal & masks.document(documents)
    text = m.explain(64, 64, block_size=16)
    assert "q_idx + 1)" in text and "contiguous" in text and "tiles 16 x 16" in text


def test_lint_notes():
    wide = torch.zeros(8, dtype=torch.int64)
    assert "is int64" in flexmask.mask(lambda b, h, q_idx, kv_idx: wide[kv_idx] == 0).explain()
    assert "traced anew at every call" in flexmask.mask(lambda b, h, q_idx, kv_idx: (wide + 1)[kv_idx] == 1).explain()


@pytest.mark.parametrize(
    "level, seen, unseen", [(1, "path cpu", "kept keys"), (2, "kept keys", "as traced"), (3, "as traced", ".py"), (4, ".py", "!")]
)
def test_debug_levels_say_more_and_more(monkeypatch, capsys, level, seen, unseen):
    monkeypatch.setenv("FLEXMASK_DEBUG", str(level))
    x = torch.randn(1, 1, 8, 16)
    flexmask.attention(x, x, x, mask=flexmask.mask(eval("lambda q_idx, kv_idx: q_idx >= kv_idx")))
    text = capsys.readouterr().err
    assert seen in text and unseen not in text


def test_a_debug_level_is_a_number(monkeypatch):
    monkeypatch.setenv("FLEXMASK_DEBUG", "loud")
    with pytest.raises(flexmask.FlexmaskError, match="from 0 to 4"):
        flexmask.compile(masks.causal)
