"""flex_attention, as torch calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, FlexKernelOptions

from ..api import Attention, compile
from ..errors import ConversionError, FlexmaskError, ShapeError
from ..mods import Mask, Score
from .block_mask import BlockMask
from .kept import Kept
from .options import read_kernel_options

_UNMASKED = Kept()


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: torchs.BlockMask | Mask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: FlexKernelOptions | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """Attention of query [B, Hq, Q, D], key [B, Hkv, KV, D] and value [B, Hkv, KV, Dv] -> [B, Hq, Q, Dv], as torch's flex_attention
    (Dong et al., arXiv 2412.05496), compiled at the first call; torch.compile around it is allowed and not needed.

    `score_mod` is a function of (score, b, h, q_idx, kv_idx) or a `flexmask.Score`; `block_mask` a BlockMask of flexmask.compat or of
    torch, or a `flexmask.Mask`. `scale` is by default D ** -0.5; `enable_gqa` allows Hkv to divide Hq. With `return_aux` it returns
    (out, AuxOutput(lse, max_scores)), each float32 [B, Hq, Q] (float64 for float64 inputs) or None where it was not asked for; with
    `return_lse` (out, lse), without a warning. `kernel_options`: of torch's keys "BACKEND" is followed ("AUTO", "TRITON"); those that
    only tune torch's kernels are without effect, and others are refused. Gradients flow on the CPU too, and to what score_mod captures.

    Raises ShapeError where tensors or the block mask do not fit together, TraceError for a function that cannot be compiled,
    ConversionError for what is no block mask, BackendError for kernel options that cannot be followed.

    >>> import torch
    >>> from flexmask.compat import AuxRequest, create_block_mask, flex_attention
    >>> block_mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 5, 5, device="cpu")
    >>> x = torch.randn(1, 2, 5, 16)
    >>> out, aux = flex_attention(x, x, x, block_mask=block_mask, return_aux=AuxRequest(lse=True))
    >>> out.shape, aux.lse.shape, aux.max_scores
    (torch.Size([1, 2, 5, 16]), torch.Size([1, 2, 5]), None)
    """
    if return_lse and return_aux is not None:
        raise FlexmaskError("return_lse and return_aux exclude each other. Write `return_aux=AuxRequest(lse=True)`.")
    _check_layout(query, key, value, block_mask)
    options = {"scale": scale, "enable_gqa": enable_gqa, "backend": read_kernel_options(kernel_options)}
    attention = _find(query, key, score_mod, block_mask, options)
    wanted = AuxRequest(lse=return_lse) if return_aux is None else return_aux
    found = attention(query, key, value, return_lse=wanted.lse, return_max_scores=wanted.max_scores)
    if return_aux is None:
        return found
    if not (wanted.lse or wanted.max_scores):
        return found, AuxOutput()
    return found[0], AuxOutput(found[1] if wanted.lse else None, found[-1] if wanted.max_scores else None)


def _find(
    query: torch.Tensor, key: torch.Tensor, score_mod: Callable[..., Any] | None, block_mask: Any, options: dict[str, Any]
) -> Attention:
    """The attention compiled for this mask, score mod and options before, or else now."""
    if block_mask is None:
        mask, kept = None, _UNMASKED
    elif isinstance(block_mask, Mask):
        dynamo = torch.compiler.is_dynamo_compiling()
        return compile(block_mask, score_mod if dynamo else _UNMASKED.find(None, score_mod, **options).score, **options)
    elif isinstance(block_mask, torchs.BlockMask):
        ours = block_mask if isinstance(block_mask, BlockMask) else _taken_over(block_mask)
        mask, kept = ours.as_flexmask(), ours._kept  # first of all, what a slice has lost
        _check_fits(ours, query, key)
    else:
        raise _no_block_mask(block_mask)
    if torch.compiler.is_dynamo_compiling():
        return compile(mask, score_mod, **options)
    return kept.find(mask, score_mod, **options)


def _taken_over(theirs: torchs.BlockMask) -> BlockMask:
    """torch's BlockMask as ours, which stays with it as long as it is the same."""
    if torch.compiler.is_dynamo_compiling():
        return BlockMask.of_lists(theirs)
    ours: BlockMask | None = getattr(theirs, "_flexmask", None)
    if ours is None or not ours.is_same_as(theirs):
        ours = theirs._flexmask = BlockMask.of_lists(theirs)  # type: ignore[attr-defined]
    return ours


def _no_block_mask(given: Any) -> ConversionError:
    remedy = "Pass what create_block_mask returned, or a flexmask.Mask."
    if isinstance(given, torch.Tensor):
        remedy = "Write `flexmask.masks.from_dense(tensor)` for a bool matrix; add a bias in score_mod."
    elif callable(given) and not isinstance(given, Score):
        remedy = "Write `create_block_mask(function, B, H, Q_LEN, KV_LEN)` or `flexmask.mask(function)`."
    return ConversionError(f"block_mask is a {type(given).__name__}. {remedy}")


def _check_layout(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_mask: Any) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, torch.Tensor) and x.is_nested:
            remedy = "Pack the sequences into one [1, heads, total, head_dim] and mask with `flexmask.masks.packed(offsets)`."
            raise ShapeError(f"{name} is a nested tensor, which flex_attention does not take. {remedy}")
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            found = f"has shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"is a {type(x).__name__}"
            raise ShapeError(f"{name} {found}; flex_attention takes [batch, heads, length, head_dim].")
    if query.shape[0] != key.shape[0] and not _may_share_keys(query.shape[0], block_mask):
        raise ShapeError(
            f"query has batch {query.shape[0]} and key {key.shape[0]}. Keys may be shared by the batch if a block mask with "
            f"B={query.shape[0]} says what each entry sees of them; else expand key and value."
        )


def _may_share_keys(batch: int, block_mask: Any) -> bool:
    """torch allows one batch entry of keys for all queries only under a mask that is made for each of them."""
    if isinstance(block_mask, torchs.BlockMask):
        return len(block_mask.shape) == 4 and bool(block_mask.shape[0] == batch)
    return block_mask is not None


def _check_fits(block_mask: BlockMask, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raise ShapeError where a block mask was made for other lengths, batch, heads or another device."""
    lengths, wanted = tuple(block_mask.seq_lengths), (query.shape[2], key.shape[2])
    if lengths != wanted:
        raise ShapeError(
            f"block_mask was made for q_len {lengths[0]} and kv_len {lengths[1]}, but the tensors have {wanted[0]} and {wanted[1]}. "
            f"Make one for these lengths with create_block_mask, or take the corner of this one: "
            f"`block_mask._adjust({wanted[0]}, {wanted[1]})`."
        )
    for size, found, word in zip(block_mask.shape[:-2], tuple(query.shape), ("batch", "heads"), strict=False):
        if size not in (1, found):
            raise ShapeError(f"block_mask was made for {word} {size}, but query has {found}. Make it for these, or for 1.")
    if block_mask.device != query.device:
        raise ShapeError(f"block_mask is on {block_mask.device}, but query on {query.device}. Pass device=query.device when making it.")
