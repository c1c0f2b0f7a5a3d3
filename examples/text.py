"""Real text for the examples: the Python language reference, packed as bytes into sequences of several documents.

The text is that of `help("comparisons")` and its kin. It comes with every Python (module `pydoc_data.topics`, Python Software
Foundation License version 2), so nothing is downloaded. One section of it is one document.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

IGNORED = -100  # the target that torch's cross_entropy leaves out


def sections() -> list[bytes]:
    """About 200 documents of 20 bytes to 25 KB, 465 KB in all."""
    from pydoc_data import topics

    return [section.strip().encode() for text in topics.topics.values() for section in text.split("\n\n\n") if section.strip()]


@dataclass(frozen=True)
class Batch:
    """Packed sequences [batch, length]: documents one after another, the last one cut where its sequence ends.

    `tokens` int64 (bytes), `targets` int64 (the document's next byte, IGNORED after its last one), `documents` int32 (ids that ascend
    along a sequence), `positions` int64 (counted from the document's start).
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in _fields(self)))


def pack(documents: list[bytes], length: int) -> Batch:
    """One sequence of `length` bytes, as a Batch of one; the documents must fill it."""
    text = torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8).long()
    if len(text) < length:
        raise ValueError(f"{len(documents)} documents of {len(text)} bytes do not fill a sequence of {length}.")
    sizes = torch.tensor([len(document) for document in documents])
    ends = sizes.cumsum(0)
    ids = torch.repeat_interleave(torch.arange(len(documents)), sizes)
    positions = torch.arange(len(text)) - (ends - sizes)[ids]
    targets = text.roll(-1)
    targets[ends - 1] = IGNORED
    targets[length - 1] = IGNORED
    return Batch(*(tensor[None, :length] for tensor in (text, targets, ids.int(), positions)))


def batches(count: int, batch: int, length: int, seed: int = 0, longest: int = 1024) -> Iterator[Batch]:
    """`count` batches of documents drawn at random, the same ones for the same seed: sections from some paragraph on, up to some
    length between an eighth of `longest` and `longest` bytes."""
    found, draw = sections(), random.Random(seed)
    for _ in range(count):
        yield _join([pack(_enough(found, length, longest, draw), length) for _ in range(batch)])


def _enough(found: list[bytes], length: int, longest: int, draw: random.Random) -> list[bytes]:
    chosen: list[bytes] = []
    while sum(map(len, chosen)) < length:
        paragraphs = draw.choice(found).split(b"\n\n")
        first, size = draw.randrange(len(paragraphs)), draw.randint(longest // 8 + 1, longest)
        chosen.append(b"\n\n".join(paragraphs[first:])[:size])
    return chosen


def _join(sequences: list[Batch]) -> Batch:
    return Batch(*(torch.cat(tensors) for tensors in zip(*map(_fields, sequences), strict=True)))


def _fields(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.tokens, batch.targets, batch.documents, batch.positions
