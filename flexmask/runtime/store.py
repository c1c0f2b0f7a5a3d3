"""What is kept between calls: facts by structure, kernels by plan, tile maps by the tensors they were built from; and counters."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from ..analysis import Facts, derive
from ..frontend import Traced
from ..ir import Expr, digest, walk
from ..options import read_options
from .disk import DiskCache
from .recent import Recent

KEPT_MAPS = 64
KEPT_LAUNCHES = 256


@dataclass
class Counters:
    """What happened since the process started (or since `cache_clear`)."""

    traces: int = 0
    builds: int = 0
    memory_hits: int = 0
    disk_hits: int = 0
    maps: int = 0
    map_hits: int = 0


class Store:
    """The caches of one process. Disk entries outlive it."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.generation = 0  # counts how often maps were let go
        self.tuned: dict[tuple[Any, ...], Any] = {}  # what was measured, by what it was measured of
        self._facts: dict[str, Facts] = {}
        self._kernels: dict[tuple[Any, ...], Any] = {}
        self._keys: weakref.WeakKeyDictionary[Traced, str] = weakref.WeakKeyDictionary()
        self._maps: OrderedDict[tuple[Any, ...], tuple[Any, tuple[weakref.ref[torch.Tensor], ...]]] = OrderedDict()
        self._launches: Recent[tuple[Any, tuple[weakref.ref[torch.Tensor], ...]]] = Recent(KEPT_LAUNCHES)
        self.checked: Recent[Any] = Recent(KEPT_LAUNCHES)  # what was found of calls that were found good, by all that was looked at

    @cached_property
    def disk(self) -> DiskCache:
        return DiskCache(read_options().cache_dir)

    def clear(self) -> None:
        """Forget what is in memory (not on disk) and start counting anew."""
        self.counters = Counters()
        self.tuned.clear()
        self._facts.clear()
        self._kernels.clear()
        self.forget_maps()

    def aside(self) -> Store:
        """A store with the same facts and files, for kernels and maps that are tried out: they go when it goes."""
        other = Store()
        other.__dict__["disk"] = self.disk
        other._facts, other._keys = self._facts, self._keys
        return other

    def forget_maps(self) -> None:
        """Drop the tile maps alone, so that the next call builds its own."""
        self._maps.clear()
        self._let_go()

    def _let_go(self) -> None:
        """None may hold a map that is no longer kept, as that is not refilled."""
        self._launches.clear()
        self.generation += 1

    def key_of(self, traced: Traced) -> str:
        """The structure's key, computed once for each traced function."""
        if traced not in self._keys:
            self._keys[traced] = structure_key(traced)
        return self._keys[traced]

    def facts(self, traced: Traced) -> tuple[str, Facts]:
        """The structure's key and what was derived from it: from memory, else from disk, else derived now."""
        key = self.key_of(traced)
        if key in self._facts:
            self.counters.memory_hits += 1
            return key, self._facts[key]
        facts = self._facts_on_disk(key, traced)
        if facts is not None:
            self.counters.disk_hits += 1
        else:
            self.counters.builds += 1
            facts = derive(traced.expr, signs(traced))
            self.disk.put(key, ".facts.json", json.dumps(facts.to_json()))
        self._facts[key] = facts
        return key, facts

    def _facts_on_disk(self, key: str, traced: Traced) -> Facts | None:
        """The facts another process left; None where there are none, or where the file is damaged."""
        text = self.disk.get(key, ".facts.json")
        try:
            return None if text is None else Facts.from_json(json.loads(text), *_kinds(traced))
        except (ValueError, KeyError, TypeError):
            return None

    def kernel(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The kernel for `key`, made at most once in this process."""
        if key in self._kernels:
            self.counters.memory_hits += 1
        else:
            self._kernels[key] = make()
        return self._kernels[key]

    def kernel_file(self, key: str, write: Callable[[], str]) -> Path:
        """The file with the kernel's source; written first where no process has yet."""
        path = self.disk.path(key, ".py")
        if path.is_file():
            self.counters.disk_hits += 1
            return path
        self.counters.builds += 1
        return self.disk.put(key, ".py", write())

    def tile_map(self, key: tuple[Any, ...], tensors: Sequence[torch.Tensor], build: Callable[[], Any]) -> Any:
        """The map for `key` and these tensors in their present versions, built now if need be.

        Inference tensors keep no version, so a map that reads one is built at every call. What is built while a CUDA graph is
        captured belongs to the graph, which makes it anew at each replay: it is not kept here.
        """
        if any(t.is_inference() for t in tensors):
            self.counters.maps += 1
            return build()
        full = (*key, *((id(t), t._version, t.data_ptr()) for t in tensors))
        found = self._maps.get(full)
        if found is not None and all(ref() is t for ref, t in zip(found[1], tensors, strict=True)):
            self._maps.move_to_end(full)
            self.counters.map_hits += 1
            return found[0]
        self.counters.maps += 1
        made = build()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return made
        self._maps[full] = (made, tuple(weakref.ref(t) for t in tensors))
        if len(self._maps) > KEPT_MAPS:
            _, (_, refs) = self._maps.popitem(last=False)
            if all(ref() is not None for ref in refs):
                self._let_go()
            else:  # nobody can ask for what was made of a tensor that is gone
                self._launches.drop(lambda entry: any(ref() is None for ref in entry[1]))
        return made

    def launches(self, key: tuple[Any, ...], mask: Traced | None, score: Traced | None, make: Callable[[], Any]) -> Any:
        """The kernels with their maps that `key` starts for this mask and score mod, which is most of what a call in a steady state has
        to look at: as long as they are the same expressions over the same numbers and tensors, and those that the mask captures keep
        their version. So a mask that is written anew, or comes through an operator as text, finds what was made for another like it."""
        if mask is not None and any(t.is_inference() for t in mask.tensors):
            return make()
        full, tensors = (*key, *_identity(mask, versions=True), *_identity(score)), _tensors_of(mask, score)
        found = self._launches.get(full)
        if found is not None and all(ref() is t for ref, t in zip(found[1], tensors, strict=True)):
            self.counters.map_hits += 1
            return found[0]
        made = make()
        if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            self._launches.put(full, (made, tuple([weakref.ref(t) for t in tensors])))
        return made

    def maps_of(self, key: str, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The maps kept of the mask with structure `key` over just these tensors, oldest first, whatever their versions."""
        found = [entry for full, entry in self._maps.items() if full[0] == key and len(entry[1]) == len(tensors)]
        return [made for made, refs in found if all(ref() is t for ref, t in zip(refs, tensors, strict=True))]


def _identity(traced: Traced | None, versions: bool = False) -> tuple[Any, ...]:
    """What tells a mask or score mod from any other: its expression (of which there is one each), numbers and tensors."""
    if traced is None:
        return (None,)
    tensors = [(id(t), t.data_ptr(), t._version if versions else 0) for t in traced.tensors]
    return traced.expr, traced.promised, traced.scalars, *tensors


def _tensors_of(*mods: Traced | None) -> list[torch.Tensor]:
    return [t for mod in mods if mod is not None for t in mod.tensors]


@lru_cache(maxsize=1)
def default_store() -> Store:
    return Store()


def cache_info() -> dict[str, int]:
    """Named counters: traces, builds, memory_hits, disk_hits, maps (built) and map_hits.

    >>> import flexmask
    >>> sorted(flexmask.cache_info())
    ['builds', 'disk_hits', 'map_hits', 'maps', 'memory_hits', 'traces']
    """
    return asdict(default_store().counters)


def signs(traced: Traced) -> tuple[int, ...]:
    """Signs of the run-time scalars: known on the host, and what proofs about windows and offsets need."""
    return tuple((s > 0) - (s < 0) if isinstance(s, int) else 0 for s in traced.scalars)


def _kinds(traced: Traced) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kinds = {(n.op, n.value): n.kind for n in walk(traced.expr)}
    tensors = tuple(kinds["load", i] for i in range(len(traced.tensors)))
    return tensors, tuple(kinds["scalar", i] for i in range(len(traced.scalars)))


def structure_key(traced: Traced) -> str:
    """sha256 of the expression, the captures' ranks, dtypes and promises, the scalars' signs and flexmask's own code."""
    shapes = tuple([f"{t.dim()}{t.dtype}" for t in traced.tensors])
    return _structure_key(traced.kind, traced.expr, shapes, tuple(sorted(traced.promised)), signs(traced))


@lru_cache(maxsize=1024)
def _structure_key(kind: str, expr: Expr, shapes: tuple[str, ...], promised: tuple[int, ...], signs: tuple[int, ...]) -> str:
    """Mods that are written anew at each step have the key of those before them."""
    return digest(expr, f"{kind} {list(shapes)} {list(promised)} {signs} {code_fingerprint()}")


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """Changes whenever a file of flexmask does, so that a cache never serves an older compiler's work."""
    root = Path(__file__).parent.parent
    files = sorted(root.rglob("*.py"))
    listing = "\n".join(f"{f.relative_to(root)} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]
