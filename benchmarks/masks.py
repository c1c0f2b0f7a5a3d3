"""The twelve masks of the FlashMask paper's kernel benchmark (arXiv 2410.01359), with its fixed document samples."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import flexmask
from flexmask import masks
from flexmask.mods import Ascending, Mask

DATA = Path(__file__).parent / "data" / "flashmask_samples.json"
N_GLOBAL = 16
UNFLAGGED_SPANS = ((1024, 1562), (2358, 4058))


@dataclass(frozen=True)
class Document:
    """One document of a packed sequence: rows [start, stop), a prefix or question [start, prefix_stop), and the QK-sparse flag."""

    start: int
    prefix_stop: int
    stop: int
    qk_sparse: bool = False


@dataclass(frozen=True)
class Sequence:
    """One packed sequence of `n` tokens on `device`; `batch` and `heads` shape the tables that differ by head (None: one for all).
    `promised` says that the ids are promised to ascend."""

    n: int
    documents: tuple[Document, ...]
    device: torch.device
    batch: int | None = None
    heads: int | None = None
    seed: int = 0
    promised: bool = False

    def per_token(self, value: Callable[[int, Document], int]) -> torch.Tensor:
        """int32 [n] holding value(number, document) at each token of the document; -1 after the last."""
        table = torch.full((self.n,), -1, dtype=torch.int32)
        for i, d in enumerate(self.documents):
            table[d.start : d.stop] = value(i, d)
        return table.to(self.device)

    @property
    def ids(self) -> torch.Tensor | Ascending:
        ids = self.per_token(lambda i, d: i)
        return flexmask.sorted(ids) if self.promised else ids


@cache
def samples(n: int) -> tuple[tuple[Document, ...], ...]:
    """The five samples for a sequence of n tokens: 8192, 32768 or 131072."""
    found = json.loads(DATA.read_text())["samples"].get(str(n))
    if found is None:
        raise ValueError(f"there are samples for 8192, 32768 and 131072 tokens, not for {n}.")
    return tuple(_documents(s["docs"]) for s in found)


def _documents(rows: list[dict[str, int]]) -> tuple[Document, ...]:
    documents, start = [], 0
    for row in rows:
        documents.append(Document(start, start + row["prefix"], start + row["length"], bool(row["qk_sparse"])))
        start += row["length"]
    return tuple(documents)


def shifted(document: Document, by: int) -> Document:
    """The same document further on in a longer sequence."""
    return Document(document.start + by, document.prefix_stop + by, document.stop + by, document.qk_sparse)


def answers(number: int, document: Document) -> list[tuple[int, int]]:
    """The answers to document `number`'s question: 2 to 6 of them, sharing what follows the prefix evenly."""
    count = 2 + number % 5
    length = document.stop - document.prefix_stop
    cuts = [document.prefix_stop + length * i // count for i in range(count + 1)]
    return list(itertools.pairwise(cuts))


def sparse_spans(documents: tuple[Document, ...]) -> tuple[tuple[int, int], ...]:
    """The spans whose own pairs QK-sparse attention drops: the flagged documents, or two fixed spans where none is flagged."""
    flagged = tuple((d.start, d.stop) for d in documents if d.qk_sparse)
    return flagged or UNFLAGGED_SPANS


def _share_question(s: Sequence) -> Mask:
    segment = torch.zeros(s.n, dtype=torch.int32)
    for i, d in enumerate(s.documents):
        for number, (start, stop) in enumerate(answers(i, d), start=1):
            segment[start:stop] = number
    return masks.shared_question(s.ids, segment.to(s.device))


def _qk_sparse(s: Sequence) -> Mask:
    span = torch.full((s.n,), -1, dtype=torch.int32)
    for number, (start, stop) in enumerate(sparse_spans(s.documents)):
        span[start:stop] = number
    return masks.qk_sparse(span.to(s.device))


def _random_eviction(s: Sequence) -> Mask:
    tables = [_evictions(s.n, random.Random(s.seed + i)) for i in range((s.batch or 1) * (s.heads or 1))]
    evict = torch.tensor(tables, dtype=torch.int32, device=s.device)
    return masks.random_eviction(evict[0] if s.heads is None else evict.view(s.batch or 1, s.heads, s.n))


def _evictions(n: int, generator: random.Random) -> list[int]:
    """From row n / 2 on each row evicts, for good, one random live key before it."""
    first = max(1, n // 2)  # row 0 has nothing before it
    evict, live = [n] * n, list(range(first))
    for row in range(first, n):
        chosen = generator.randrange(len(live))
        evict[live[chosen]] = row
        live[chosen] = row  # the row's own key takes the freed place: live from the next row on
    return evict


MASKS: dict[str, Callable[[Sequence], Mask]] = {
    "full": lambda s: masks.full,
    "causal": lambda s: masks.causal,
    "sliding_window": lambda s: masks.sliding_window(max(1, s.n // 16)),
    "causal_document": lambda s: masks.causal & masks.document(s.ids),
    "document": lambda s: masks.document(s.ids),
    "share_question": _share_question,
    "global_sliding": lambda s: masks.global_window(N_GLOBAL, s.n // 16),
    "causal_blockwise": lambda s: masks.causal_blockwise(s.ids, s.documents[-1].start),
    "prefix_lm_causal": lambda s: masks.prefix_lm(s.n // 2),
    "prefix_lm_document": lambda s: masks.prefix_document(s.ids, s.per_token(lambda i, d: d.prefix_stop)),
    "qk_sparse": _qk_sparse,
    "random_eviction": _random_eviction,
}
NAMES = tuple(MASKS)
DOCUMENT_FREE = ("full", "causal", "sliding_window", "global_sliding", "prefix_lm_causal", "random_eviction")  # the same for every sample


def build(
    name: str, n: int, device: torch.device | str, sample: int = 0, batch: int | None = None, heads: int | None = None, seed: int = 0,
    promised: bool = False,
) -> Mask:  # fmt: skip
    """One of `MASKS` for n tokens. `sample` (0 to 4) chooses the documents; n must be 8192, 32768 or 131072 for masks with documents.

    `batch` and `heads` give each head of each batch entry its own evictions ("random_eviction"); without, all share one table.
    With `promised` the ids of documents are promised to ascend (`flexmask.sorted`).

    >>> build("sliding_window", 8192, "cpu")(0, 0, 1000, 489), build("sliding_window", 8192, "cpu")(0, 0, 1000, 488)
    (True, False)
    """
    documents = () if name in DOCUMENT_FREE else samples(n)[sample]
    return MASKS[name](Sequence(n, documents, torch.device(device), batch, heads, seed, promised))
