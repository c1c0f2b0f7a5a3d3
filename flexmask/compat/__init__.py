"""torch.nn.attention.flex_attention's names, over flexmask: change the import line, and a model moves over.

    from flexmask.compat import BlockMask, create_block_mask, flex_attention

Signatures and meaning are torch's; docs/compat.md lists name by name what is more, less or different.
"""

from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, FlexKernelOptions, noop_mask

from .attention import flex_attention
from .block_mask import BlockMask
from .creation import create_block_mask, create_mask, create_nested_block_mask
from .joining import and_masks, or_masks

__all__ = [
    "AuxOutput", "AuxRequest", "BlockMask", "FlexKernelOptions", "and_masks", "create_block_mask", "create_mask",
    "create_nested_block_mask", "flex_attention", "noop_mask", "or_masks",
]  # fmt: skip
