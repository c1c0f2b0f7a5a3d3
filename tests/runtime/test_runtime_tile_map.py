"""Tile maps: states are those of the mask written out, in every form, on every path."""

from dataclasses import replace

import pytest
import torch
from runtime_cases import BATCH, HEADS, MASKS, dense_of, facts_of, states_of
from torch.nn.attention.flex_attention import create_block_mask

from flexmask import ShapeError
from flexmask.analysis import UNKNOWN, Form
from flexmask.ir import Env, evaluate
from flexmask.runtime import tile_map
from flexmask.runtime.grid import EMPTY, FULL, PARTIAL, Grid
from flexmask.runtime.intervals import ascending
from flexmask.runtime.tile_lists import pack, unpack
from flexmask.runtime.undecided import evaluate_all, evaluate_unknown

LENGTHS = [(1, 1), (37, 91), (128, 128), (150, 33), (299, 300), (0, 5), (5, 0)]
BLOCKS = [(1, 1), (16, 16), (64, 64), (128, 128), (16, 64), (128, 16), (7, 13)]


def built(name, q_len, kv_len, block_q, block_kv, **options):
    facts, (_, tensors, scalars) = options.pop("facts", None) or facts_of(name), MASKS[name]
    sizes = {"q_len": q_len, "kv_len": kv_len, "batch": BATCH, "heads": HEADS, "block_q": block_q, "block_kv": block_kv}
    return tile_map.build(facts, tensors, scalars, **sizes, **options)


def expanded(states):
    return states.expand(BATCH, HEADS, *states.shape[2:])


@pytest.mark.parametrize("name", MASKS)
def test_states_are_exact(name):
    facts = facts_of(name)
    for q_len, kv_len in LENGTHS:
        dense = dense_of(name, q_len, kv_len)
        for block_q, block_kv in BLOCKS:
            if block_q * block_kv > 1 or q_len * kv_len < 5000:
                made = built(name, q_len, kv_len, block_q, block_kv, facts=facts)
                assert torch.equal(expanded(made.states()), states_of(dense, block_q, block_kv))


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


@pytest.mark.parametrize("name", MASKS)
def test_lists_hold_full_then_bounded_then_evaluated_tiles(name):
    made = built(name, 150, 131, 16, 16, facts=replace(facts_of(name), rows_contiguous=False))
    states = made.states()
    for place in torch.cartesian_prod(*(torch.arange(n) for n in made.counts.shape[:3])).tolist():
        counts, offset, row = made.counts[*place].tolist(), made.offsets[*place].item(), states[*place]
        columns = made.index[offset : offset + sum(counts)].split(counts)
        assert [c.tolist() for c in columns] == [sorted(c.tolist()) for c in columns]
        assert set(columns[0].tolist()) == set(torch.where(row == FULL)[0].tolist())
        assert set(columns[1].tolist()) | set(columns[2].tolist()) == set(torch.where(row == PARTIAL)[0].tolist())
    form = facts_of(name).rows
    by_rows = isinstance(form, Form) and form.residue is None and all(ascending(MASKS[name][1][n]) for n in form.sorted_tables)
    assert not made.counts[..., 2 if by_rows else 1].any()
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


# What a GPU runs, on the CPU: nothing there may depend on values on the host.


@pytest.mark.parametrize("name", MASKS)
def test_evaluating_all_tiles_without_a_sync(name):
    (predicate, tensors, scalars), facts = MASKS[name], facts_of(name)
    for q_len, kv_len in LENGTHS[1:]:
        grid = Grid(q_len, kv_len, 16, 64, BATCH if facts.uses_b else 1, HEADS if facts.uses_h else 1)
        states = evaluate_all(predicate, grid, tensors, scalars, torch.device("cpu"))
        assert torch.equal(expanded(states), states_of(dense_of(name, q_len, kv_len), 16, 64))


def test_only_unknown_tiles_are_evaluated():
    predicate, tensors, scalars = MASKS["causal"]
    states = torch.tensor([[[[UNKNOWN, UNKNOWN], [EMPTY, UNKNOWN]]]], dtype=torch.int8)
    found = evaluate_unknown(states, predicate, Grid(40, 40, 20, 20), tensors, scalars)
    assert found.tolist() == [[[[PARTIAL, EMPTY], [EMPTY, PARTIAL]]]]


@pytest.mark.parametrize("exact", [True, False])
def test_lists_and_states_say_the_same(exact):
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 4, 0), (1, 1, 0, 3)):
        group = torch.randint(0, 4, shape, generator=generator).to(torch.int8)
        counts, offsets, index = pack(group, exact)
        want = torch.tensor([FULL, PARTIAL, PARTIAL, EMPTY], dtype=torch.int8)[group.long()]
        assert torch.equal(unpack(counts, index, shape[-1]), want)
        assert offsets.shape == shape[:3] and counts.shape == (*shape[:3], 3)
        assert index.dtype == offsets.dtype == counts.dtype == torch.int32


def test_undecided_tiles_go_to_the_given_function():
    predicate, tensors, scalars = MASKS["causal, every third"]
    seen = []

    def decide(states):
        seen.append((states == UNKNOWN).sum().item())
        return evaluate_unknown(states, predicate, Grid(64, 64, 16, 16), tensors, scalars)

    made = built("causal, every third", 64, 64, 16, 16, evaluate_undecided=decide)
    assert seen == [10], "above the diagonal nothing is undecided"
    assert torch.equal(expanded(made.states()), states_of(dense_of("causal, every third", 64, 64), 16, 16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("name", MASKS)
def test_maps_on_a_gpu_without_a_sync(name):
    _, tensors, scalars = MASKS[name]
    tensors = tuple(x.cuda() for x in tensors)
    sizes = {"q_len": 150, "kv_len": 131, "batch": BATCH, "heads": HEADS, "block_q": 16, "block_kv": 64, "device": "cuda"}
    for facts in (facts_of(name), replace(facts_of(name), rows_contiguous=False)):
        tile_map.build(facts, tensors, scalars, **sizes)  # loading kernels may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = tile_map.build(facts, tensors, scalars, **sizes)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(expanded(made.states()).cpu(), states_of(dense_of(name, 150, 131), 16, 64))
