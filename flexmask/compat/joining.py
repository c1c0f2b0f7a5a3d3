"""Masks joined, as torch joins them: functions in, a mask out."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import and_, or_
from typing import Any

import torch

from ..errors import TraceError
from ..masks import full
from ..mods import Mask
from .positional import check_order


def and_masks(*mask_mods: Callable[..., Any]) -> Mask:
    """The intersection of masks or mask functions, as a `flexmask.Mask`; everything where there are none.

    Raises TraceError for what cannot be called.

    >>> from flexmask.compat import and_masks
    >>> band = and_masks(lambda b, h, q, kv: q >= kv, lambda b, h, q, kv: q - kv < 2)
    >>> [band(0, 0, 3, kv) for kv in range(5)]
    [False, False, True, True, False]
    """
    return reduce(and_, _masks(mask_mods)) if mask_mods else full


def or_masks(*mask_mods: Callable[..., Any]) -> Mask:
    """The union of masks or mask functions, as a `flexmask.Mask`; nothing where there are none.

    Raises TraceError for what cannot be called.

    >>> from flexmask.compat import or_masks
    >>> either = or_masks(lambda b, h, q, kv: q == kv, lambda b, h, q, kv: kv < 2)
    >>> [either(0, 0, 3, kv) for kv in range(5)]
    [True, True, False, True, False]
    """
    return reduce(or_, _masks(mask_mods)) if mask_mods else ~full


def as_mask(mask_mod: Callable[..., Any]) -> Mask:
    """A mask function of torch's kind as a mask; a mask is itself."""
    if isinstance(mask_mod, Mask):
        return mask_mod
    if not torch.compiler.is_dynamo_compiling():
        check_order(mask_mod, "mask")
    return Mask(mask_mod)


def _masks(mask_mods: tuple[Callable[..., Any], ...]) -> list[Mask]:
    for number, mask_mod in enumerate(mask_mods):
        if not callable(mask_mod):
            raise TraceError(f"argument {number} is a {type(mask_mod).__name__}; masks are joined from functions of (b, h, q_idx, kv_idx).")
    return [as_mask(mask_mod) for mask_mod in mask_mods]
