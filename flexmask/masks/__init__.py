"""Ready-made masks, each a few lines over (b, h, q_idx, kv_idx). Combine them with `&`, `|`, `^` and `~`.

`full` and `causal` are masks; the others are functions of sizes and tensors that make one. Numbers and tensors are run-time
values: another window or other documents use the same kernel. Tables must cover every index that occurs.

>>> import torch
>>> from flexmask import masks
>>> m = masks.causal & masks.document(torch.tensor([0, 0, 1, 1])) | masks.sink_window(1, 1)
>>> [k for k in range(4) if m(0, 0, 3, k)]
[0, 2, 3]
"""

from .documents import (
    causal_blockwise,
    document,
    document_ids,
    key_padding,
    offsets,
    packed,
    padding,
    per_document,
    prefix_document,
    prefix_lm,
    qk_sparse,
    random_eviction,
    shared_prefix,
    shared_question,
    transfusion,
)
from .images import flamingo, neighbourhood, sliding_tile, tiled_neighbourhood
from .patterns import ancestors, at_offset, bigbird, block_diffusion, block_sparse, from_dense, random_blocks, tree, vertical_slash
from .windows import (
    block_causal,
    causal,
    causal_lower_right,
    chunked_causal,
    dilated,
    fixed,
    full,
    global_tokens,
    global_window,
    head_window,
    local_window,
    sink_window,
    sliding_window,
    strided,
)

noop = full

__all__ = [
    "ancestors", "at_offset", "bigbird", "block_causal", "block_diffusion", "block_sparse", "causal", "causal_blockwise",
    "causal_lower_right", "chunked_causal", "dilated", "document", "document_ids", "fixed", "flamingo", "from_dense", "full",
    "global_tokens", "global_window", "head_window", "key_padding", "local_window", "neighbourhood", "noop", "offsets", "packed",
    "padding", "per_document", "prefix_document", "prefix_lm", "qk_sparse", "random_blocks", "random_eviction", "shared_prefix",
    "shared_question", "sink_window", "sliding_tile", "sliding_window", "strided", "tiled_neighbourhood", "transfusion", "tree",
    "vertical_slash",
]  # fmt: skip
