"""BlockMask: torch's class, made from the mask function, with lists of blocks only for who asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import flex_attention as torchs

from ..errors import ShapeError
from ..masks.torch_blocks import from_torch
from ..mods import Mask
from .joining import as_mask
from .kept import Kept
from .lists import LISTS, cropped, lists_of, versions

Index = int | slice | torch.Tensor
Sizes = tuple[int, int]


def _list(name: str) -> property:
    def read(self: BlockMask) -> torch.Tensor | None:
        return self._found()[name]

    def write(self: BlockMask, value: torch.Tensor | None) -> None:
        self._give(self._found() | {name: value})

    return property(read, write)


class BlockMask(torchs.BlockMask):
    """A mask over B x H x Q_LEN x KV_LEN, as `create_block_mask` makes it: torch's BlockMask in every attribute and method.

    It holds the function; attention is compiled from that. The lists of blocks (`kv_num_blocks` int32 [B, H, Q blocks], `kv_indices`
    int32 [B, H, Q blocks, KV blocks], `full_*`, `q_*`) and what reads them (`to_dense`, `sparsity`, `to_string`, printing,
    `as_tuple`) are computed when first looked at. Once lists are given (`from_kv_blocks`, slices), assigned or changed in place, they
    count as in `flexmask.from_torch`: listed partial blocks are kept where `mask_mod` says so, full ones whole, others not at all.

    >>> from flexmask.compat import create_block_mask
    >>> block_mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 256, 256, device="cpu")
    >>> block_mask.shape, block_mask.sparsity()
    ((1, 1, 256, 256), 25.0)
    >>> block_mask.kv_num_blocks.tolist(), block_mask.full_kv_num_blocks.tolist()
    ([[[1, 1]]], [[[0, 1]]])
    """

    # of a mask that is a function: B and H, where its lists are made, and whether full blocks get lists of their own
    _lead: Sizes
    _device: torch.device
    _split: bool

    def __init__(
        self,
        seq_lengths: Sizes,
        kv_num_blocks: torch.Tensor,
        kv_indices: torch.Tensor,
        full_kv_num_blocks: torch.Tensor | None,
        full_kv_indices: torch.Tensor | None,
        q_num_blocks: torch.Tensor | None,
        q_indices: torch.Tensor | None,
        full_q_num_blocks: torch.Tensor | None,
        full_q_indices: torch.Tensor | None,
        BLOCK_SIZE: Sizes = (128, 128),
        mask_mod: Callable[..., Any] = torchs.noop_mask,
        **order: Any,
    ) -> None:
        self._begin(mask_mod)
        self._give(dict.fromkeys(LISTS))
        by_rows = kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices
        by_columns = q_num_blocks, q_indices, full_q_num_blocks, full_q_indices
        super().__init__(seq_lengths, *by_rows, *by_columns, BLOCK_SIZE, mask_mod, **order)

    def _begin(self, mask_mod: Callable[..., Any]) -> None:
        self._mask_mod = mask_mod
        self._lists: dict[str, torch.Tensor | None] | None = None
        self._versions: tuple[int, ...] = ()  # of the lists when the mask was made of them, or they of the mask
        self._given = False  # whether the lists count, rather than the function alone
        self._mask: Mask | None = None
        self._kept = Kept()

    @classmethod
    def of_function(
        cls, mask_mod: Callable[..., Any], lead: Sizes, seq_lengths: Sizes, block_size: Sizes, device: torch.device, split: bool
    ) -> BlockMask:
        """The mask of a function over `lead` (B, H) and `seq_lengths`; `split`: full blocks get lists of their own."""
        made = cls.__new__(cls)
        made._begin(mask_mod)
        made._lead, made.seq_lengths, made.BLOCK_SIZE, made._device, made._split = lead, seq_lengths, block_size, device, split
        made.dq_kv_order_spt = None
        return made

    @classmethod
    def of_lists(cls, theirs: torchs.BlockMask) -> BlockMask:
        """The mask of another BlockMask's lists, lengths and function."""
        made = cls.__new__(cls)
        made._begin(theirs.mask_mod)
        made.seq_lengths, made.BLOCK_SIZE = theirs.seq_lengths, theirs.BLOCK_SIZE
        made.dq_kv_order_spt = getattr(theirs, "dq_kv_order_spt", None)
        made._give({name: getattr(theirs, name, None) for name in LISTS})
        return made

    # lists

    kv_num_blocks, kv_indices = _list("kv_num_blocks"), _list("kv_indices")
    full_kv_num_blocks, full_kv_indices = _list("full_kv_num_blocks"), _list("full_kv_indices")
    q_num_blocks, q_indices = _list("q_num_blocks"), _list("q_indices")
    full_q_num_blocks, full_q_indices = _list("full_q_num_blocks"), _list("full_q_indices")
    dq_write_order, dq_write_order_full, dq_kv_order = _list("dq_write_order"), _list("dq_write_order_full"), _list("dq_kv_order")

    def _found(self) -> dict[str, torch.Tensor | None]:
        """The lists; of a function they are made now, the first time."""
        if self._lists is None:
            self._lists = lists_of(as_mask(self._mask_mod), self._lead, self.seq_lengths, self.BLOCK_SIZE, self._device, self._split)
            self._versions = versions(self._lists)
        return self._lists

    def _give(self, lists: dict[str, torch.Tensor | None]) -> None:
        self._lists, self._given, self._mask = lists, True, None

    # what attention is compiled from

    @property
    def mask_mod(self) -> Callable[..., Any]:
        """The function of (b, h, q_idx, kv_idx) that decides in partial blocks. A new one leaves the lists as they are, as in torch."""
        return self._mask_mod

    @mask_mod.setter
    def mask_mod(self, mask_mod: Callable[..., Any]) -> None:
        if mask_mod is not self._mask_mod:
            self._give(self._found())
            self._mask_mod = mask_mod

    def as_flexmask(self) -> Mask:
        """What is kept, as a `flexmask.Mask`: to combine with others, to explain, or for `flexmask.compile`.

        Within torch.compile a change in place is seen in lists that count already, but not in those of a function.
        """
        if torch.compiler.is_dynamo_compiling():  # knows no versions, and what it makes must not stay here
            return from_torch(self) if self._given else as_mask(self._mask_mod)
        if self._lists is not None and self._versions != (now := versions(self._lists)):
            self._given, self._mask, self._versions = True, None, now
        if self._mask is None:
            self._mask = from_torch(self) if self._given else as_mask(self._mask_mod)
            self._kept = Kept()
        return self._mask

    def is_same_as(self, theirs: torchs.BlockMask) -> bool:
        """Whether nothing of a BlockMask that this one was made of (`of_lists`) has been replaced since."""
        lists = self._found()
        same = all(getattr(theirs, name, None) is lists[name] for name in LISTS)
        return same and theirs.mask_mod is self._mask_mod and theirs.seq_lengths == self.seq_lengths

    # torch's methods that need the lists only when they count

    @property
    def device(self) -> torch.device:
        """Where attention under this mask runs."""
        return self.kv_num_blocks.device if self._given else self._device

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, Q_LEN, KV_LEN); a slice may have fewer leading sizes."""
        lead = tuple(self.kv_indices.shape[:-2]) if self._given else self._lead
        return (*lead, *self.seq_lengths)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> BlockMask:
        """The lists of some batch entries, heads or block rows. Its `mask_mod` must be set anew, and `seq_lengths` if rows were taken."""
        return self.of_lists(super().__getitem__(index))

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The mask at other lengths. Raises ShapeError where lists would have to grow; a function's mask may."""
        lengths = (new_q_len, new_kv_len)
        if not self._given:
            return self.of_function(self._mask_mod, self._lead, lengths, self.BLOCK_SIZE, self._device, self._split)
        if new_q_len > self.seq_lengths[0] or new_kv_len > self.seq_lengths[1]:
            raise ShapeError(
                f"lists of blocks for lengths {self.seq_lengths} do not say what is kept beyond them, at {lengths}. "
                "Make the BlockMask anew with create_block_mask."
            )
        return self.of_lists(cropped(self, lengths))

    def to(self, device: torch.device | str) -> BlockMask:
        """A copy whose lists are on `device`; what the function captures stays where it is."""
        wanted = torch.device(device)
        if self._given:
            return self.of_lists(super().to(wanted))
        moved = self.of_function(self._mask_mod, self._lead, self.seq_lengths, self.BLOCK_SIZE, wanted, self._split)
        moved._lists = {name: None if t is None else t.to(wanted) for name, t in self._found().items()}
        moved._versions = versions(moved._lists)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """Without what was compiled, which a copy makes anew."""
        return vars(self) | {"_mask": None, "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _kept=Kept())
