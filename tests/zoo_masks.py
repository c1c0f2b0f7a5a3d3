"""Ready-made masks of the zoo, with sizes that make each of them interesting from a dozen tokens on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from zoo_case import Case, entry

from benchmarks import masks as benchmark
from flexmask import masks
from flexmask.mods import Mask, mask

MASKS: dict[str, Callable[..., Mask]] = {}

READY_MADE: dict[str, Callable[[Case], Mask]] = {
    "full": lambda c: masks.full,
    "causal": lambda c: masks.causal,
    "causal_lower_right": lambda c: masks.causal_lower_right(c.Q, c.KV),
    "sliding_window": lambda c: masks.sliding_window(1 + c.n // 7),
    "sliding_window_of_one": lambda c: masks.sliding_window(1),
    "sliding_window_by_tensor": lambda c: masks.sliding_window(torch.tensor(5, device=c.device)),
    "local_window": lambda c: masks.local_window(c.n // 9, 3),
    "symmetric_window": lambda c: masks.local_window(4),
    "head_window": lambda c: masks.head_window(c.ints(1, 20, c.H)),
    "dilated": lambda c: masks.dilated(12, 3),
    "dilated_causal": lambda c: masks.dilated(12, 3) & masks.causal,
    "global_window": lambda c: masks.global_window(3, 5),
    "global_tokens": lambda c: masks.global_tokens(c.bools(c.B, c.n, p=0.1), 4),
    "sink_window": lambda c: masks.sink_window(4, 9),
    "block_causal": lambda c: masks.block_causal(8),
    "chunked_causal": lambda c: masks.chunked_causal(13),
    "strided": lambda c: masks.strided(6),
    "fixed": lambda c: masks.fixed(8, 2),
    "document": lambda c: masks.document(c.documents()),
    "document_batch": lambda c: masks.document(c.documents(c.B)),
    "document_unsorted": lambda c: masks.document(c.ints(0, 5, c.n)),
    "document_unsorted_batch": lambda c: masks.document(c.ints(-3, 4, c.B, c.n)),
    "causal_document": lambda c: masks.causal & masks.document(c.documents()),
    "packed": lambda c: masks.packed(masks.offsets(c.lengths()), c.n),
    "per_document": lambda c: masks.per_document(masks.prefix_lm(2) & masks.local_window(6), masks.offsets(c.lengths()), c.n),
    "prefix_lm": lambda c: masks.prefix_lm(c.n // 3),
    "prefix_lm_batch": lambda c: masks.prefix_lm(c.ints(0, c.n, c.B)),
    "prefix_document": lambda c: _prefix_document(c),
    "padding": lambda c: masks.padding(c.ints(0, c.KV + 1, c.B)),
    "padding_causal": lambda c: masks.padding(c.ints(1, c.KV + 1, c.B)) & masks.causal,
    "key_padding": lambda c: masks.key_padding(c.bools(c.B, c.KV, p=0.7)),
    "shared_question": lambda c: masks.shared_question(c.documents(), c.ints(0, 3, c.n)),
    "shared_prefix": lambda c: masks.shared_prefix(c.n // 4, c.documents()),
    "causal_blockwise": lambda c: masks.causal_blockwise(c.documents(), c.n - c.n // 4),
    "qk_sparse": lambda c: masks.qk_sparse(c.ints(-1, 2, c.n).sort().values),
    "transfusion": lambda c: masks.transfusion(torch.where(c.bools(1, c.n), c.documents(c.B), -1)),
    "random_eviction": lambda c: masks.random_eviction(c.ints(0, c.n + 1, c.KV)),
    "random_eviction_heads": lambda c: masks.random_eviction(c.ints(0, c.n + 1, c.B, c.H, c.KV)),
    "neighbourhood": lambda c: masks.neighbourhood(math.ceil(c.n / 7) + 3, 7, (3, 5)),
    "tiled_neighbourhood": lambda c: masks.tiled_neighbourhood(2 * (math.ceil(c.n / 16) + 2), 8, (5, 3), (2, 4)),
    "sliding_tile": lambda c: masks.sliding_tile(2 * (math.ceil(c.n / 16) + 3), 8, (3, 1), (2, 4)),
    "flamingo": lambda c: _flamingo(c),
    "from_dense": lambda c: masks.from_dense(c.bools(c.B, c.H, c.Q, c.KV, p=0.3)),
    "from_dense_plane": lambda c: masks.from_dense(c.bools(c.Q, c.KV, p=0.3)),
    "block_sparse": lambda c: masks.block_sparse(c.bools(c.H, math.ceil(c.Q / 16), math.ceil(c.KV / 16)), 16),
    "bigbird": lambda c: masks.bigbird(8, 1, 1, masks.random_blocks(math.ceil(c.n / 8), 1, c.generator).to(c.device)),
    "vertical_slash": lambda c: masks.vertical_slash(c.bools(c.H, c.KV, p=0.1), c.bools(c.H, c.Q, p=0.1)),
    "tree": lambda c: masks.tree(c.bools(c.Q, max(1, c.Q), p=0.3), prefix=max(0, c.KV - c.Q)),
    "tree_of_parents": lambda c: masks.tree(_chain_of_drafts(c), c.ints(0, c.KV + 1, c.B)),
    "block_diffusion": lambda c: masks.block_diffusion(math.ceil(c.n / 2), 6),
    "at_offset": lambda c: masks.at_offset(masks.sliding_window(9), q_offset=max(0, c.KV - c.Q)),
    "at_offset_batch": lambda c: masks.at_offset(masks.causal, c.ints(-5, 20, c.B), kv_offset=torch.tensor(3, device=c.device)),
}


def _prefix_document(c: Case) -> Mask:
    doc = c.documents()
    first = torch.searchsorted(doc, doc)  # where each token's document starts
    return masks.prefix_document(doc, (first + 4).to(torch.int32))


def _flamingo(c: Case) -> Mask:
    images = math.ceil(c.KV / 5)
    edges = c.ints(0, c.Q + 1, images, 2).sort(dim=1).values
    return masks.flamingo(edges, image_length=5)


def _chain_of_drafts(c: Case) -> torch.Tensor:
    parents = torch.tensor([-1, *(int(torch.randint(-1, i, (), generator=c.generator)) for i in range(1, c.Q))])
    return masks.ancestors(parents).to(c.device)


def _benchmark(name: str) -> Callable[[Case], Mask]:
    def make(c: Case) -> Mask:
        sequence = benchmark.Sequence(c.n, c.packed(), torch.device(c.device), c.B, c.H, c.seed)
        return benchmark.MASKS[name](sequence)

    return make


for _name, _make in READY_MADE.items():
    entry(MASKS, mask, _name, _make)
for _name in benchmark.NAMES:
    entry(MASKS, mask, f"benchmark_{_name}", _benchmark(_name))
