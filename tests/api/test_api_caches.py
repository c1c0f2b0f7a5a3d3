"""Caches: by structure in memory and on disk, maps by tensor version; the disk is shared safely."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexmask
from flexmask import masks
from flexmask.runtime.disk import DiskCache
from flexmask.runtime.store import Store

ROOT = Path(__file__).parent.parent.parent


def delta(before, name):
    return flexmask.cache_info()[name] - before[name]


def test_new_documents_and_windows_build_nothing_new():
    q = torch.randn(1, 2, 40, 16)
    call = lambda doc, w: flexmask.attention(q, q, q, mask=masks.document(doc) & masks.sliding_window(w))
    call(torch.zeros(40, dtype=torch.int32), 3)
    before = flexmask.cache_info()
    call(torch.arange(40, dtype=torch.int32) // 9, 5)
    assert delta(before, "builds") == 0 and delta(before, "disk_hits") == 0 and delta(before, "memory_hits") > 0
    assert delta(before, "maps") == 1


def test_a_map_is_kept_until_its_tensor_changes():
    q = torch.randn(1, 2, 40, 16)
    doc = torch.zeros(40, dtype=torch.int32)
    attn = flexmask.compile(masks.document(doc))
    attn(q, q, q)
    before = flexmask.cache_info()
    attn(q, q, q)
    assert delta(before, "maps") == 0 and delta(before, "traces") == 0
    doc[5:] += 1
    attn(q, q, q)
    assert delta(before, "maps") == 1 and delta(before, "traces") == 0


SCRIPT = """
import torch, flexmask, json, sys
from flexmask import masks, scores
doc = torch.arange(64) // 10
attn = flexmask.compile(masks.causal & masks.document(doc), scores.softcap(5.0))
x = torch.ones(1, 2, 64, 16)
attn(x, x, x)
attn.source()
print(json.dumps(flexmask.cache_info() | {"sympy": "sympy" in sys.modules}))
"""


def test_a_warm_disk_serves_another_process(tmp_path):
    run = lambda: json.loads(
        subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True,
            env={**os.environ, "FLEXMASK_CACHE_DIR": str(tmp_path / "cache")},
        ).stdout
    )  # fmt: skip
    cold, warm = run(), run()
    assert cold["builds"] == 3 and cold["disk_hits"] == 0, "facts, and a kernel for each answer to whether the documents ascend"
    assert warm["builds"] == 0 and warm["disk_hits"] == 3
    assert not warm["sympy"]


@pytest.mark.skipif(os.name != "posix", reason="modes of directories are POSIX")
def test_a_directory_that_others_can_write_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(flexmask.BackendError, match="can be written by other users"):
        DiskCache(str(tmp_path))


def test_a_new_cache_directory_is_private_and_files_arrive_whole(tmp_path):
    cache = DiskCache(str(tmp_path / "new"))
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700
    cache.put("k", ".txt", "text")
    assert cache.get("k", ".txt") == "text" and cache.get("other", ".txt") is None
    assert sorted(p.name for p in cache.directory.iterdir()) == [".lock", "k.txt"]


def test_inference_tensors_have_no_version_so_their_maps_are_not_kept():
    store = Store()
    with torch.inference_mode():
        t = torch.zeros(3)
    made = [store.tile_map(("k",), [t], lambda: object()) for _ in range(2)]
    assert made[0] is not made[1]


def test_a_map_does_not_outlive_its_tensor():
    store = Store()
    first = store.tile_map(("k",), [torch.zeros(3)], lambda: "first")
    second = store.tile_map(("k",), [torch.zeros(3)], lambda: "second")
    assert (first, second) == ("first", "second")
