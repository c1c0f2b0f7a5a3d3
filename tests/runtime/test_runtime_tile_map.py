"""Tile maps: states are those of the mask written out, in every form, on every path."""

from dataclasses import replace

import pytest
import torch
from runtime_cases import BATCH, HEADS, MASKS, dense_of, facts_of, states_of
from torch.nn.attention.flex_attention import create_block_mask

from flexmask import ShapeError
from flexmask.analysis import Form
from flexmask.ir import Env, evaluate
from flexmask.runtime.classify import UNKNOWN
from flexmask.runtime.grid import EMPTY, FULL, PARTIAL, Grid
from flexmask.runtime.host_map import build
from flexmask.runtime.intervals import ascending
from flexmask.runtime.tile_lists import compacted, pack, unpack
from flexmask.runtime.undecided import evaluate_unknown

LENGTHS = [(1, 1), (37, 91), (128, 128), (150, 33), (299, 300), (0, 5), (5, 0)]
BLOCKS = [(1, 1), (16, 16), (64, 64), (128, 128), (16, 64), (128, 16), (7, 13)]


def built(name, q_len, kv_len, block_q, block_kv, **options):
    facts, (_, tensors, scalars) = options.pop("facts", None) or facts_of(name), MASKS[name]
    sizes = {"q_len": q_len, "kv_len": kv_len, "batch": BATCH, "heads": HEADS, "block_q": block_q, "block_kv": block_kv}
    return build(facts, tensors, scalars, **sizes, **options)


def expanded(states):
    return states.expand(BATCH, HEADS, *states.shape[2:])


@pytest.mark.parametrize("name", MASKS)
def test_states_are_exact_by_rows_and_by_columns(name):
    facts = facts_of(name)
    for q_len, kv_len in LENGTHS:
        dense = dense_of(name, q_len, kv_len)
        for block_q, block_kv in BLOCKS:
            if block_q * block_kv > 1 or q_len * kv_len < 5000:
                want = states_of(dense, block_q, block_kv)
                for axis in ("row", "column"):
                    made = built(name, q_len, kv_len, block_q, block_kv, facts=facts, axis=axis)
                    assert torch.equal(expanded(made.states()), want)


@pytest.mark.parametrize("name", MASKS)
def test_range_form_equals_list_form(name):
    facts, kinds = facts_of(name), set()
    for block_q, block_kv in BLOCKS[1:]:
        maps = [built(name, 150, 131, block_q, block_kv, facts=f) for f in (facts, replace(facts, rows_contiguous=False))]
        kinds.add(maps[0].ranges is not None)
        assert maps[1].ranges is None
        assert torch.equal(maps[0].states(), maps[1].states())
    form = facts.rows
    if isinstance(form, Form) and facts.rows_contiguous and len(form.pieces) == 1 and form.residue is None:
        assert kinds == {all(ascending(MASKS[name][1][n]) for n in form.sorted_tables)}
    else:
        assert kinds == {False}


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("name", MASKS)
def test_lists_hold_what_is_kept_full_tiles_first(name, axis):
    facts = replace(facts_of(name), rows_contiguous=False, columns_contiguous=False)
    made = built(name, 150, 131, 16, 16, facts=facts, axis=axis)
    states = made.states() if axis == "row" else made.states().transpose(-1, -2)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in made.counts.shape[:3])).tolist():
        for kind, count, offset in zip((FULL, PARTIAL), made.counts[*place].tolist(), made.offsets[*place].tolist(), strict=True):
            assert made.index[offset : offset + count].tolist() == torch.where(states[*place] == kind)[0].tolist()
    form = facts.rows if axis == "row" else facts.columns
    exact = isinstance(form, Form) and form.residue is None and all(ascending(MASKS[name][1][n]) for n in form.sorted_tables)
    assert (made.intervals is not None) == exact
    assert len(made.index) == made.counts.sum(), "lists hold what is kept, and nothing else"


@pytest.mark.parametrize("name", ["causal", "sink and window", "causal shuffled documents", "documents by batch", "window by head"])
@pytest.mark.parametrize(("q_len", "kv_len", "blocks"), [(256, 256, (128, 128)), (150, 131, (16, 64)), (300, 40, (64, 16))])
def test_to_torch_equals_create_block_mask(name, q_len, kv_len, blocks):
    predicate, tensors, scalars = MASKS[name]

    def mask_mod(b, h, q, k):
        return evaluate(predicate, Env({"b": b, "h": h, "q_idx": q, "kv_idx": k, "q_len": q_len, "kv_len": kv_len}, tensors, scalars))

    made, facts = built(name, q_len, kv_len, *blocks), facts_of(name)
    batch, heads = BATCH if facts.uses_b else None, HEADS if facts.uses_h else None
    want = create_block_mask(mask_mod, batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=blocks)
    found = made.to_torch(mask_mod)
    assert found.shape == want.shape and found.BLOCK_SIZE == want.BLOCK_SIZE and found.mask_mod is mask_mod
    lists = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices", "full_q_num_blocks")
    for part in lists:
        assert torch.equal(getattr(found, part), getattr(want, part)), part


def test_the_map_describes_itself():
    made = built("causal", 256, 256, 128, 128)
    assert repr(made) == "TileMap(256 x 256, tiles 128 x 128, range form)"
    assert made.statistics() == {"tiles": 4, "full": 1, "partial": 2, "empty": 1, "density": 0.75}
    assert made.to_dense().tolist() == [[[[True, False], [True, True]]]]


def test_lines_by_their_work():
    """Four lines of 1 to 4 tiles, of 10 in all: how many have more than 10 / 256, .. 10 / 4, 10 / 2, 10, and the reach of the longest."""
    order = built("causal", 64, 64, 16, 16).work_order().tolist()
    assert order[:4] == [3, 2, 1, 0]
    assert order[4:13] == [4, 4, 4, 4, 4, 3, 2, 0, 0]
    assert order[13:] == [127, 63, 31, 15, 7, 3, 1, 0, 0]


def test_a_promise_is_believed():
    name = "sorted documents"
    assert built(name, 100, 100, 16, 16, promised=frozenset({0})).ranges is not None
    assert built("causal shuffled documents", 100, 100, 16, 16).ranges is None


def test_bad_blocks_are_refused():
    with pytest.raises(ShapeError, match=r"block size \(0, 16\)"):
        built("causal", 8, 8, 0, 16)
    with pytest.raises(ShapeError, match="larger blocks"):
        Grid(1 << 20, 1 << 20, 1, 1)


def test_a_million_tokens_in_range_form():
    n = 1 << 20
    made = built("window", n, n, 128, 128)
    assert made.ranges.shape == (1, 1, n // 128, 4)
    assert made.ranges[0, 0, -1].tolist() == [n // 128 - 2, n // 128, n // 128, n // 128], "a window of 40 fills no tile"


def test_only_unknown_tiles_are_evaluated():
    predicate, tensors, scalars = MASKS["causal"]
    states = torch.tensor([[[[UNKNOWN, UNKNOWN], [EMPTY, UNKNOWN]]]], dtype=torch.int8)
    found = evaluate_unknown(states, predicate, Grid(40, 40, 20, 20), tensors, scalars)
    assert found.tolist() == [[[[PARTIAL, EMPTY], [EMPTY, PARTIAL]]]]


def test_lists_and_states_say_the_same():
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 4, 0), (1, 1, 0, 3)):
        states = torch.randint(0, 3, shape, generator=generator).to(torch.int8)
        counts, offsets, index = pack(states)
        assert torch.equal(unpack(counts, offsets, index, shape[-1]), states)
        assert offsets.shape == counts.shape == (*shape[:3], 2)
        assert index.dtype == offsets.dtype == counts.dtype == torch.int32


def test_lists_with_room_between_are_compacted():
    counts = torch.tensor([[[[2, 1], [0, 2]]]], dtype=torch.int32)
    offsets = torch.tensor([[[[0, 4], [5, 8]]]], dtype=torch.int32)
    index = torch.tensor([0, 3, -1, -1, 2, -1, -1, -1, 3, 1], dtype=torch.int32)  # the last list is stored backwards
    states = unpack(counts, offsets, index, 4)
    assert states.tolist() == [[[[2, 0, 1, 2], [0, 1, 0, 1]]]]
    counts, offsets, index = compacted(counts, offsets, index)
    assert index.tolist() == [0, 3, 2, 1, 3]
    assert torch.equal(unpack(counts, offsets, index, 4), states)
