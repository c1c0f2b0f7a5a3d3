"""torch's BlockMask taken over as a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConversionError
from ..mods import Mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def from_torch(block_mask: BlockMask) -> Mask:
    """torch's BlockMask as a mask that keeps just what flex_attention keeps with it, at the lengths it was made for.

    A block of the full list is kept whole, one of the other list where `block_mask.mask_mod` says so (whole without one), the rest is
    dropped: the lists count, whatever the function says. B or H of 1 stands for every batch entry or head. The lists are read here,
    on their device and without waiting for it, into a bool for each block, [B, H, Q blocks, KV blocks]: later changes in them are
    not seen. `mask_mod` is traced like any mask function, and what it closes over may change as ever.

    Raises ConversionError for what is no BlockMask, and for a slice of one, whose function torch has taken away.

    >>> import flexmask
    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> theirs = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 256, 256, device="cpu")
    >>> flexmask.from_torch(theirs).block_mask(256, 256).states()[0, 0].tolist()
    [[1, 0], [2, 1]]
    """
    condition, name = _condition(block_mask)
    block_q, block_kv = block_mask.BLOCK_SIZE
    columns = max(-(-block_mask.seq_lengths[1] // block_kv), block_mask.kv_indices.shape[-1])
    partial_blocks = _marked(block_mask.kv_num_blocks, block_mask.kv_indices, columns)
    full_blocks = None
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full_blocks = _marked(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, columns)
    listed = partial_blocks if full_blocks is None else partial_blocks | full_blocks
    by_batch, by_head = (size > 1 for size in listed.shape[:2])
    row_keys, column_queries = _hull(listed, block_kv), _hull(listed.mT, block_q)

    def kept(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        row, column = q_idx // block_q, kv_idx // block_kv
        entry = b if by_batch else 0, h if by_head else 0
        # follows from the lists, and tells the analysis where to look
        in_row = (kv_idx >= row_keys[*entry, row, 0]) & (kv_idx < row_keys[*entry, row, 1])
        in_column = (q_idx >= column_queries[*entry, column, 0]) & (q_idx < column_queries[*entry, column, 1])
        keep = partial_blocks[*entry, row, column] & condition(b, h, q_idx, kv_idx)
        return in_row & in_column & (keep if full_blocks is None else full_blocks[*entry, row, column] | keep)

    return Mask(kept, f"from_torch({name})")


def _condition(block_mask: Any) -> tuple[Callable[..., Any], str]:
    """What decides in blocks that are not kept whole, and what the user calls it."""
    from torch.nn.attention.flex_attention import BlockMask, noop_mask  # takes long to import; who has a BlockMask has it

    if not isinstance(block_mask, BlockMask):
        remedy = "Pass what `create_block_mask` returned; for a function write `flexmask.mask(function)`, for a matrix `masks.from_dense`."
        raise ConversionError(f"from_torch takes torch's BlockMask, got {type(block_mask).__name__}. {remedy}")
    condition = block_mask.mask_mod
    if condition is None or condition is noop_mask:
        return lambda b, h, q_idx, kv_idx: True, "blocks"
    name = getattr(condition, "name", None) or getattr(condition, "__name__", None) or type(condition).__name__
    if name == "_sliced_mask_mod_error":
        raise ConversionError(
            "this BlockMask is a slice of another, and torch has taken its mask_mod away. Set it first, with the offset of the slice: "
            "`sliced.mask_mod = lambda b, h, q_idx, kv_idx: whole.mask_mod(b, h, q_idx + offset, kv_idx)`."
        )
    return condition, "lambda" if name == "<lambda>" else str(name)


def _marked(counts: torch.Tensor, indices: torch.Tensor, columns: int) -> torch.Tensor:
    """Lists of block columns, the first `counts` [B, H, rows] of `indices` [B, H, rows, any] -> bool [B, H, rows, columns]."""
    place = torch.arange(indices.shape[-1], device=indices.device)
    valid = (place < counts[..., None]) & (indices >= 0) & (indices < columns)
    target = torch.where(valid, indices, columns).long()  # the rest goes to a column of its own, dropped at the end
    marked = torch.zeros(*target.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    return marked.scatter_(-1, target, True)[..., :columns].contiguous()


def _hull(listed: torch.Tensor, size: int) -> torch.Tensor:
    """Listed blocks, bool [.., n, m] -> where the first begins and the last ends, int32 [.., n, 2]; 0 and 0 where there is none."""
    listed = torch.nn.functional.pad(listed, (0, 1))  # never without an element
    first = listed.int().argmax(-1)
    end = listed.shape[-1] - listed.flip(-1).int().argmax(-1)
    places = torch.where(listed.any(-1, keepdim=True), torch.stack([first, end], -1) * size, 0)
    return places.clamp(max=2**31 - 1).int()
