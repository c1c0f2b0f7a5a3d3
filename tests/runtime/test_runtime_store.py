"""What a call in a steady state finds by identity: its kernels with their maps, as long as nothing they depend on has changed."""

import gc

import torch

from flexmask.frontend import from_text, to_text, trace
from flexmask.runtime.store import KEPT_LAUNCHES, KEPT_MAPS, Store


def document(ids):
    return trace(lambda q_idx, kv_idx: ids[q_idx] == ids[kv_idx], "mask")


class Made:
    """Counts how often it was made."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return [self.times]


def test_the_same_mods_find_the_same_launches():
    store, made, mask = Store(), Made(), document(torch.tensor([0, 0, 1]))
    assert store.launches(("forward",), mask, None, made) is store.launches(("forward",), mask, None, made)
    store.launches(("backward",), mask, None, made)
    store.launches(("forward",), document(torch.tensor([0, 0, 1])), None, made)
    assert made.times == 3


def test_a_mask_written_anew_finds_what_was_made_for_another_like_it():
    ids, store, made = torch.tensor([0, 0, 1]), Store(), Made()
    first = store.launches(("forward",), document(ids), None, made)
    gc.collect()
    assert store.launches(("forward",), document(ids), None, made) is first
    as_text = from_text(to_text(document(ids))).over([ids], [])
    assert store.launches(("forward",), as_text, None, made) is first


def test_other_numbers_and_other_scores_are_others():
    store, made = Store(), Made()
    window = lambda size: trace(lambda q_idx, kv_idx: q_idx - kv_idx < size, "mask")
    bias = torch.ones(3)
    score = lambda table: trace(lambda score, kv_idx: score + table[kv_idx], "score")
    for mask, mod in ((window(2), None), (window(3), None), (None, score(bias)), (None, score(torch.ones(3))), (None, score(bias))):
        store.launches(("forward",), mask, mod, made)
    assert made.times == 4
    bias.add_(1)  # an optimiser's step, which no map depends on
    store.launches(("forward",), None, score(bias), made)
    assert made.times == 4


def test_a_change_in_place_makes_them_anew():
    ids = torch.tensor([0, 0, 1])
    store, made, mask = Store(), Made(), document(ids)
    store.launches(("forward",), mask, None, made)
    ids[1] = 1
    store.launches(("forward",), mask, None, made)
    assert made.times == 2


def test_tensors_without_a_version_are_looked_at_each_time():
    with torch.inference_mode():
        ids = torch.tensor([0, 0, 1])
    store, made, mask = Store(), Made(), document(ids)
    for _ in range(2):
        store.launches(("forward",), mask, None, made)
    assert made.times == 2


def test_another_function_at_the_same_address_is_another():
    store, made = Store(), Made()
    for _ in range(5):
        mask = document(torch.tensor([0, 0, 1]))
        store.launches(("forward",), mask, None, made)
        del mask
        gc.collect()
    assert made.times == 5


def test_launches_go_with_maps_that_are_no_longer_kept():
    store, made, mask = Store(), Made(), document(torch.tensor([0, 0, 1]))
    store.launches(("forward",), mask, None, made)
    for n in range(KEPT_MAPS + 1):
        store.tile_map(("map", n), mask.tensors, list)
    store.launches(("forward",), mask, None, made)
    assert made.times == 2


def test_launches_stay_as_maps_go_that_nobody_can_ask_for():
    store, made, mask = Store(), Made(), trace(lambda q_idx, kv_idx: q_idx >= kv_idx, "mask")
    store.launches(("forward",), mask, None, made)
    for _ in range(3 * KEPT_MAPS):
        ids = document(torch.tensor([0, 0, 1]))
        store.tile_map(("map",), ids.tensors, list)
        store.launches(("forward",), ids, None, list)
        del ids
    store.launches(("forward",), mask, None, made)
    assert made.times == 1 and len(store._launches) <= KEPT_MAPS + 1


def test_only_so_many_are_kept():
    store, mask = Store(), document(torch.tensor([0, 0, 1]))
    for n in range(2 * KEPT_LAUNCHES):
        store.launches(("forward", n), mask, None, list)
    assert len(store._launches) == KEPT_LAUNCHES
