"""flexmask.sorted: a promise travels with the tensor into any mask, changes nothing of its meaning, and can be checked."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

import flexmask
from flexmask import masks, reference
from flexmask.frontend import check_promises, trace
from flexmask.runtime.store import structure_key

doc = torch.tensor([[0, 0, 1, 1, 1], [0, 3, 3, 7, 7]])
promised = flexmask.sorted(doc)


class Holder:
    def __init__(self, table):
        self.table = table

    def __call__(self, b, h, q_idx, kv_idx):
        return self.table[b, q_idx] == self.table[b, kv_idx]


class Slots:
    __slots__ = ("table",)


def in_slots():
    holder = Slots()
    holder.table = promised
    return lambda b, h, q, k: holder.table[b, q] == holder.table[b, k]


def in_closure(ids):
    return lambda b, h, q, k: ids[b, q] == ids[b, k]


# fmt: off
WAYS = {
    "global": lambda b, h, q, k: promised[b, q] == promised[b, k],
    "closure": in_closure(promised),
    "default": lambda b, h, q_idx, kv_idx, ids=promised: ids[b, q_idx] == ids[b, kv_idx],
    "partial": functools.partial(lambda ids, b, h, q, k: ids[b, q] == ids[b, k], promised),
    "attribute": Holder(promised),
    "slot": in_slots(),
    "in a dict": (lambda box: lambda b, h, q, k: box["ids"][b, q] == box["ids"][b, k])({"ids": promised}),
    "in a list": (lambda box: lambda b, h, q, k: box[0][b, q] == box[0][b, k])([promised]),
    "in steps": lambda b, h, q, k: promised[b][q] == promised[b][k],
    "promised inside": lambda b, h, q, k: flexmask.sorted(doc)[b, q] == doc[b, k],
    "promised once, plain once": lambda b, h, q, k: promised[b, q] == doc[b, k],
}
# fmt: on


@pytest.mark.parametrize("way", WAYS)
def test_a_promise_is_seen_and_the_tensor_itself_captured(way):
    traced = trace(WAYS[way], "mask")
    assert repr(traced.expr) == "t0[b, q_idx] == t0[b, kv_idx]"
    assert traced.promised == {0} and traced.tensors == (doc,) and traced.tensors[0] is doc and not traced.volatile


def test_without_a_promise_there_is_none():
    assert trace(in_closure(doc), "mask").promised == frozenset()


def test_a_promise_belongs_to_the_structure():
    keys = {structure_key(trace(in_closure(ids), "mask")) for ids in (doc, promised, flexmask.sorted(doc.clone()))}
    assert len(keys) == 2


def test_only_the_promised_one_of_several():
    other = torch.zeros(5, dtype=torch.int32)
    traced = trace(lambda b, h, q, k: (other[q] == other[k]) & (promised[b, q] == promised[b, k]), "mask")
    assert traced.promised == {1} and traced.tensors[1] is doc


def test_a_promise_in_one_of_two_composed_masks_counts_for_the_table():
    plain, sure = flexmask.mask(lambda b, q_idx, kv_idx: doc[b, q_idx] > 0), masks.document(promised)
    for composed in (plain & sure, sure | plain, ~(plain ^ sure)):
        traced = composed.traced()
        assert len(traced.tensors) == 1 and traced.promised == {0}


def test_a_score_may_read_a_promised_tensor():
    traced = flexmask.score(lambda score, b, q_idx: score + promised[b, q_idx]).traced()
    assert traced.tensors[0] is doc and traced.promised == {0}


# fmt: off
READY_MADE = {
    "document": lambda ids: masks.document(ids), "prefix_document": lambda ids: masks.prefix_document(ids, ids),
    "shared_question": lambda ids: masks.shared_question(ids, ids), "shared_prefix": lambda ids: masks.shared_prefix(2, ids),
    "causal_blockwise": lambda ids: masks.causal_blockwise(ids, 3), "qk_sparse": masks.qk_sparse, "transfusion": masks.transfusion,
    "packed": lambda ids: masks.packed(flexmask.sorted(torch.tensor([0, 2, 5]))), "padding": lambda ids: masks.padding(ids[:, -1]),
    "per_document": lambda ids: masks.per_document(masks.causal, flexmask.sorted(torch.tensor([0, 2, 5]))),
}
# fmt: on


@pytest.mark.parametrize("name", READY_MADE)
def test_ready_made_masks_take_promised_tables_and_mean_the_same(name):
    sure, plain = READY_MADE[name](promised), READY_MADE[name](doc)
    expected = reference.dense_mask(plain, 2, 1, 5, 5)
    assert torch.equal(sure.to_dense(5, 5, 2, 1), expected)
    assert torch.equal(reference.dense_mask(sure, 2, 1, 5, 5), expected)
    assert sure.block_mask(5, 5, 2, 1, block_size=2).states().tolist() == plain.block_mask(5, 5, 2, 1, block_size=2).states().tolist()
    assert bool(sure(1, 0, 3, 2)) == bool(expected[1, 0, 3, 2])


def test_packed_documents_ascend_by_construction():
    assert masks.packed(torch.tensor([0, 2, 5])).traced().promised == {0}


def test_torch_evaluates_a_mask_of_promised_tensors():
    mask, plain = masks.document(promised), masks.document(doc)
    ours, theirs = (create_block_mask(m, 2, 1, 5, 5, device="cpu", BLOCK_SIZE=2) for m in (mask, plain))
    assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_it_stands_for_the_tensor():
    assert (promised.shape, promised.dtype, promised.device, len(promised)) == (doc.shape, doc.dtype, doc.device, 2)
    assert promised[1, 2] == 3 and torch.equal(promised[:, 1:], doc[:, 1:])
    assert torch.equal(torch.searchsorted(promised, doc), torch.searchsorted(doc, doc)) and promised.dim() == doc.dim()
    assert torch.equal(promised + 1, doc + 1) and torch.equal(promised == promised, doc == doc) and torch.equal(1 - promised, 1 - doc)
    assert [row.tolist() for row in promised] == doc.tolist() and "flexmask.sorted(tensor(" in repr(promised)
    assert flexmask.sorted(promised) is promised and copy.deepcopy(promised).tensor is not doc
    narrow = promised.to(torch.int32)
    assert narrow.dtype == torch.int32 and trace(in_closure(narrow), "mask").promised == {0}
    assert promised.to("cpu").tensor is doc and isinstance(promised.to(torch.float32), torch.Tensor)
    with pytest.raises(flexmask.PromiseError, match="cannot be set"):
        promised.tensor = doc


def test_the_tensor_may_change_under_its_promise():
    ids = torch.zeros(6, dtype=torch.int32)
    mask = masks.document(flexmask.sorted(ids))
    before = mask.block_mask(6, 6, block_size=2).states()
    ids[3:] = 1
    assert mask.block_mask(6, 6, block_size=2).states().tolist() != before.tolist()
    assert torch.equal(mask.to_dense(6, 6)[0, 0], ids[:, None] == ids)


# fmt: off
WRONG = {
    "floats": (torch.ones(3), r"this tensor is torch.float32. Convert it: `flexmask.sorted\(tensor.to\(torch.int32\)\)`"),
    "bools": (torch.ones(3, dtype=torch.bool), "takes integers, and this tensor is torch.bool"),
    "one number": (torch.tensor(3), r"with an axis to ascend along, \[N\] or \[B, N\]"),
    "a list": ([1, 2], r"a tensor of integers, got list. Write `flexmask.sorted\(torch.tensor"),
    "a mask": (masks.causal, "got Mask"),
}
# fmt: on


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_promised(name):
    value, message = WRONG[name]
    with pytest.raises(flexmask.PromiseError, match=message):
        flexmask.sorted(value)


def test_an_index_cannot_be_promised():
    with pytest.raises(flexmask.PromiseError, match="got Symbol"):
        trace(lambda b, h, q, k: flexmask.sorted(q) == k, "mask")


def test_a_broken_promise_is_found_at_the_users_line():
    ids = torch.tensor([[0, 1, 2, 2], [4, 5, 3, 9]])
    sure = flexmask.sorted(ids)
    traced = trace(lambda b, h, q, k: sure[b, q] == sure[b, k], "mask")
    with pytest.raises(flexmask.PromiseError, match=r"`sure`, captured by .*sure\[1, 1\] = 5 comes before sure\[1, 2\] = 3") as error:
        check_promises(traced)
    assert error.value.at is not None and error.value.at.file == __file__ and "sure[b, q]" in error.value.at.text


@given(st.lists(st.integers(-3, 3), max_size=6), st.sampled_from([torch.int8, torch.int32, torch.int64]))
def test_a_promise_is_kept_where_neighbours_do_not_descend(values, dtype):
    ids = flexmask.sorted(torch.tensor(values, dtype=dtype))
    traced = trace(lambda b, h, q, k: ids[q] == ids[k], "mask")
    if all(x <= y for x, y in itertools.pairwise(values)):
        check_promises(traced)
    else:
        with pytest.raises(flexmask.PromiseError):
            check_promises(traced)
