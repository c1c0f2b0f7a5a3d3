"""Maps on a real GPU: exact, without a wait, in bounded memory, and made again inside a CUDA graph."""

import pytest
import torch
import zoo
from device_cases import problems
from test_zoo_through_the_house import states_of

import flexmask
from benchmarks import masks as benchmark
from flexmask import masks, reference
from flexmask.runtime import device_map
from flexmask.runtime.launch import work_order
from flexmask.runtime.maps import Extent, find_device_maps
from flexmask.runtime.store import Store, default_store
from flexmask.runtime.variants import variants

pytestmark = pytest.mark.gpu
STORE = Store()


def device_maps(mask, length, block=128, store=None):
    """All maps that an attention call would build."""
    store = store or default_store()
    traced = mask.traced()
    wanted = tuple((variant, block, block) for variant in variants(store.facts(traced)[1], traced.promised))
    return find_device_maps(store, traced, Extent(length, length, 1, 1, torch.device("cuda")), wanted)


@pytest.mark.parametrize("name", zoo.MASKS)
def test_zoo_maps_are_exact_by_rows_and_by_columns(name):
    sizes = (2, 3, 333, 401)
    assert problems(zoo.MASKS[name](*sizes, device="cuda"), sizes, STORE, "cuda", {"row": (64, 128), "column": (48, 64)}) == []


@pytest.mark.parametrize("name", [n for n in benchmark.NAMES if n != "full"])
def test_benchmark_masks_are_exact_and_nothing_waits(name):
    mask = benchmark.build(name, 8192, "cuda")
    device_maps(mask, 8192)  # loading kernels may wait
    default_store().forget_maps()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = device_maps(mask, 8192)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    holds = len(made.maps) == 1 or int(made.maps[0].broken[0]) == 0
    want = states_of(reference.dense_mask(mask, 1, 1, 8192, 8192, device="cuda"), 128, 128)
    assert torch.equal(made.maps[0 if holds else 1].states(), want)


@pytest.mark.parametrize("name", ["causal", "causal_document", "global_sliding"])
def test_lines_are_ordered_by_their_work(name):
    maps = device_maps(benchmark.build(name, 8192, "cuda"), 8192).maps
    holds = len(maps) == 1 or int(maps[0].broken[0]) == 0
    made = maps[0 if holds else 1]  # the other one's memory is as it was found
    assert torch.equal(work_order(made), made.work_order())


def test_a_gpu_without_a_number_is_the_current_one():
    ids = torch.tensor([0, 0, 1, 1], device="cuda")
    found = masks.document(ids).block_mask(4, 4, block_size=2, device="cuda").states()
    assert found.device == ids.device and found[0, 0].tolist() == [[2, 0], [0, 2]]


@pytest.mark.parametrize("name", ["causal", "causal_document", "global_sliding"])
def test_memory_at_a_million_tokens(name):
    n = 1 << 20
    ids = (torch.arange(n, device="cuda") // 5000).int()
    mask = masks.causal & masks.document(ids) if name == "causal_document" else benchmark.build(name, n, "cuda")
    device_maps(mask, n)
    default_store().forget_maps()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    device_maps(mask, n)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 100e6


@pytest.mark.parametrize("mask", [masks.dilated(300, 3), masks.global_window(2, 100), masks.causal], ids=["dilated", "global", "causal"])
def test_lists_that_do_not_fit_are_slower_but_right(mask, monkeypatch):
    monkeypatch.setattr(device_map, "MOST_ENTRIES", 40)
    default_store().forget_maps()
    q, k, v = (torch.randn(1, 2, 1000, 64, device="cuda") for _ in range(3))
    out = flexmask.attention(q, k, v, mask=mask)
    want = reference.attention(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    default_store().forget_maps()


@pytest.mark.parametrize("patterns", [2, 4096])
@pytest.mark.parametrize("name", ["tree", "from_dense", "composed_deeply"])
def test_bits_hold_or_the_predicate_is_evaluated(name, patterns, monkeypatch):
    monkeypatch.setattr(device_map, "MOST_PATTERNS", patterns)
    default_store().forget_maps()
    mask = zoo.MASKS[name](1, 2, 700, 700, device="cuda")
    q, k, v = (torch.randn(1, 2, 700, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = flexmask.attention(q, k, v, mask=mask)
    want = reference.attention(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(out.double(), want, atol=2.5e-2, rtol=2.5e-2)
    default_store().forget_maps()


def test_a_graph_follows_its_documents():
    n = 1000
    doc = (torch.arange(n, device="cuda") // 300).int()
    attn = flexmask.compile(masks.causal & masks.document(doc))
    q, k, v = (torch.randn(1, 2, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attn(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attn.update_maps()
        out = attn(q, k, v)
    shuffled = torch.randint(0, 4, (n,), device="cuda", dtype=torch.int32)
    for ids in ((torch.arange(n, device="cuda") // 77).int(), shuffled, torch.zeros_like(doc)):
        doc.copy_(ids)
        graph.replay()
        torch.cuda.synchronize()
        want = reference.attention(q.double(), k.double(), v.double(), masks.causal & masks.document(ids))
        torch.testing.assert_close(out.double(), want, atol=2.5e-2, rtol=2.5e-2)


def test_a_map_made_during_a_capture_belongs_to_the_graph():
    n = 500
    doc = (torch.arange(n, device="cuda") // 100).int()
    attn = flexmask.compile(masks.document(doc))
    q, k, v = (torch.randn(1, 1, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.cuda.stream(torch.cuda.Stream()):
        attn(q, k, v)
    torch.cuda.synchronize()
    doc.add_(1)  # the kept map is of an older version
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v)
    doc.copy_((torch.arange(n, device="cuda") // 33).int())
    graph.replay()
    want = reference.attention(q.double(), k.double(), v.double(), masks.document(doc))
    torch.testing.assert_close(out.double(), want, atol=2.5e-2, rtol=2.5e-2)


def test_documents_change_every_step_without_new_kernels_or_traces():
    n = 700
    doc = torch.zeros(n, device="cuda", dtype=torch.int32)
    attn = flexmask.compile(masks.causal & masks.document(doc))
    q, k, v = (torch.randn(1, 2, n, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    attn(q, k, v)
    before = flexmask.cache_info()
    for size in (3, 50, 250, 700):
        doc.copy_((torch.arange(n, device="cuda") // size).int())
        want = reference.attention(q.double(), k.double(), v.double(), attn.mask)
        torch.testing.assert_close(attn(q, k, v).double(), want, atol=2.5e-2, rtol=2.5e-2)
    after = flexmask.cache_info()
    assert (after["traces"], after["builds"]) == (before["traces"], before["builds"])
    assert after["maps"] == before["maps"] + 4
