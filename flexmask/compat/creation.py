"""Masks made from functions: torch's create_block_mask and create_mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..errors import ConversionError, ShapeError
from ..mods import Mask, Score
from .block_mask import BlockMask
from .joining import as_mask
from .kept import as_score
from .positional import takes_score

Device = torch.device | str | int | None


def create_block_mask(
    mask_mod: Callable[..., Any],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Device = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """The BlockMask of a function of (b, h, q_idx, kv_idx), or of a `flexmask.Mask`; None for B or H stands for 1.

    Nothing is computed until the lists are looked at. A size of 1 holds for every batch entry or head, and the function is then asked
    about each of them. `device` is by default the accelerator, or the CPU where there is none. `BLOCK_SIZE`, of queries and keys, and
    `separate_full_blocks` shape the lists alone. `_compile`, `compute_dq_write_order` and `dq_kv_order` are without effect: there is
    nothing to compile, and dQ is always the same bits. Raises TraceError for a function that takes other parameters, and ShapeError
    for sizes that cannot be.

    >>> from flexmask.compat import create_block_mask
    >>> create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 384, 384, device="cpu").to_dense()[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    block_size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else (BLOCK_SIZE[0], BLOCK_SIZE[1])
    lead = (1 if B is None else B, 1 if H is None else H)
    if min(block_size) < 1 or min(*lead, Q_LEN, KV_LEN) < 0:
        raise ShapeError(f"a block mask of {(*lead, Q_LEN, KV_LEN)} in blocks of {block_size} cannot be: sizes count something.")
    made = BlockMask.of_function(mask_mod, lead, (Q_LEN, KV_LEN), block_size, _device(device), separate_full_blocks)
    if not torch.compiler.is_dynamo_compiling():
        made.as_flexmask()  # refuses what is no mask function
    return made


def create_mask(mod_fn: Callable[..., Any], B: int | None, H: int | None, Q_LEN: int, KV_LEN: int, device: Device = None) -> torch.Tensor:
    """A mask written out, bool [B, H, Q_LEN, KV_LEN], for tests and pictures; of a score mod, where a score of 0 does not become -inf.

    >>> from flexmask.compat import create_mask
    >>> create_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 2, 3, device="cpu").int().tolist()
    [[[[1, 0, 0], [1, 1, 0]]]]
    """
    lead = (1 if B is None else B, 1 if H is None else H)
    mask = _where_finite(mod_fn) if isinstance(mod_fn, Score) or takes_score(mod_fn) else as_mask(mod_fn)
    return mask.to_dense(Q_LEN, KV_LEN, *lead, _device(device)).expand(*lead, Q_LEN, KV_LEN).contiguous()


def create_nested_block_mask(*args: Any, **kwargs: Any) -> NoReturn:
    """Refused with ConversionError: torch has dropped nested tensors from flex_attention."""
    raise ConversionError(
        "create_nested_block_mask is not offered: neither torch's flex_attention nor this one takes nested tensors. Pack the sequences "
        "into one [1, heads, total, head_dim] and write create_block_mask(and_masks(mask_mod, flexmask.masks.packed(offsets)), ...)."
    )


def _where_finite(score_mod: Callable[..., Any]) -> Mask:
    score = as_score(score_mod)
    assert score is not None
    return Mask(lambda b, h, q_idx, kv_idx: score(0.0 * b, b, h, q_idx, kv_idx) != -float("inf"), score.name)


def _device(device: Device) -> torch.device:
    """The device, with its number, as tensors on it say it."""
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    found = torch.device(device)
    return found if found.type == "cpu" or found.index is not None else torch.empty((), device=found).device
