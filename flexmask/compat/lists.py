"""The lists of blocks that torch's BlockMask consists of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.attention.flex_attention import BlockMask

from ..mods import Mask
from ..runtime.tile_lists import ordered

LISTS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
    "dq_write_order", "dq_write_order_full", "dq_kv_order",
)  # fmt: skip
Lists = Mapping[str, torch.Tensor | None]


def lists_of(
    mask: Mask, lead: tuple[int, int], lengths: tuple[int, int], block_size: tuple[int, int], device: torch.device, split: bool
) -> dict[str, torch.Tensor | None]:
    """The lists that `create_block_mask` would make over `lead` (B, H) and `lengths`, from the mask's tile map: no N x N memory."""
    with torch.inference_mode(False), torch.no_grad():  # so that they have versions, by which changes in place are seen
        tiles = mask.block_mask(*lengths, *lead, block_size, device)
        made = tiles.to_torch() if split else BlockMask.from_kv_blocks(*ordered(tiles.to_dense()), BLOCK_SIZE=block_size)
        found = {name: getattr(made, name, None) for name in LISTS}
        return {name: None if t is None else t.expand(*lead, *t.shape[2:]).contiguous() for name, t in found.items()}


def versions(lists: Lists) -> tuple[int, ...]:
    """How often each list was changed in place; inference tensors do not tell."""
    return tuple([0 if t is None or t.is_inference() else t._version for t in lists.values()])


def cropped(block_mask: BlockMask, lengths: tuple[int, int]) -> BlockMask:
    """The upper left corner of a mask made of lists."""
    rows, columns = (-(-n // size) for n, size in zip(lengths, block_mask.BLOCK_SIZE, strict=True))

    def corner(counts: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alone = BlockMask.from_kv_blocks(counts, indices, compute_q_blocks=False)
        return ordered(alone.to_dense()[..., :rows, :columns] != 0)

    lists: tuple[torch.Tensor, ...] = corner(block_mask.kv_num_blocks, block_mask.kv_indices)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        lists += corner(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    return BlockMask.from_kv_blocks(
        **dict(zip(names, lists, strict=False)), BLOCK_SIZE=block_mask.BLOCK_SIZE, mask_mod=block_mask.mask_mod, seq_lengths=lengths,
        compute_q_blocks=block_mask.q_indices is not None,
    )  # fmt: skip
