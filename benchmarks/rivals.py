"""How each contestant is called, with its best settings. Any of them may be missing or fail: who calls reports that."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import flexmask
from benchmarks import masks as zoo
from benchmarks.figures import DENSE, FLEX, OURS, Case

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
RECOMPILES = 64  # a run compiles flex_attention many times, each time on purpose


@dataclass(frozen=True)
class Contestant:
    """`make(case, device)` gives the attention as a function of q, k, v: [B, H, N, D], or [B, N, H, D] where `heads_last`. `needs` names
    the module it comes from; `dense` ones know no masks but full and causal; some cannot train. `slow` ones run when asked for."""

    label: str
    make: Callable[[Case, str], Attend]
    needs: str = ""
    dense: bool = False
    heads_last: bool = False
    trains: bool = True
    slow: bool = False

    def missing(self) -> str:
        """Why it cannot run here, or nothing."""
        try:
            if self.needs:
                importlib.import_module(self.needs)
        except Exception as error:  # a half-installed package raises what it likes
            return f"{type(error).__name__}: {str(error)[:200]}"
        return ""

    def takes(self, case: Case) -> bool:
        return not self.dense or case.mask in DENSE


def build(case: Case, device: str, promised: bool = False) -> flexmask.Mask:
    heads = (case.batch, case.heads) if case.per_head else (None, None)
    return zoo.build(case.mask, case.length, device, case.sample, *heads, promised=promised)


def ours(case: Case, device: str) -> Attend:
    return flexmask.compile(build(case, device, case.promised), enable_gqa=case.heads != case.kv_heads)


def plain(mask: flexmask.Mask) -> Callable[..., Any]:
    """The mask as the bare function that torch.compile traces: the user's functions and their operators, without the Mask objects."""
    inner: Any = mask.function
    if hasattr(inner, "left"):
        left, right = plain(inner.left), plain(inner.right)
        join = {"&": operator.and_, "|": operator.or_, "^": operator.xor}[inner.symbol]
        return lambda b, h, q_idx, kv_idx: join(left(b, h, q_idx, kv_idx), right(b, h, q_idx, kv_idx))
    if hasattr(inner, "inner"):
        negated = plain(inner.inner)
        return lambda b, h, q_idx, kv_idx: torch.logical_not(negated(b, h, q_idx, kv_idx))
    roles = tuple(role for role, _ in mask._binding)
    order = ("b", "h", "q_idx", "kv_idx")
    places = tuple(order.index(role) for role in roles)
    return lambda b, h, q_idx, kv_idx: inner(*((b, h, q_idx, kv_idx)[i] for i in places))


def block_mask(case: Case, device: str, by_torch: bool = False) -> BlockMask | None:
    """The mask for FlexAttention. Unless `by_torch`, its tiles are found by flexmask, which takes no compilation (`benchmarks.maps` checks
    that create_block_mask finds the same, and compares the time). Without a mask there is none."""
    if case.mask == "full":
        return None
    mask = build(case, device)
    batch, heads = (case.batch, case.heads) if case.per_head else (None, None)
    if not by_torch:
        try:
            return mask.block_mask(case.length, case.length, batch, heads, device=device).to_torch(plain(mask))
        except Exception as error:
            print(f"{case.name}: FlexAttention takes create_block_mask, as flexmask found no tiles: {error!r}"[:400], flush=True)
    made: BlockMask = torch.compile(create_block_mask)(plain(mask), batch, heads, case.length, case.length, device=device)
    return made


def flex(case: Case, device: str, mode: str | None = None, kernel_options: dict[str, Any] | None = None, by_torch: bool = False) -> Attend:
    """torch's FlexAttention under torch.compile. max-autotune chooses among its tile sizes by measuring them."""
    import torch._dynamo.config as dynamo_config
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    dynamo_config.recompile_limit = RECOMPILES
    inductor_config.autotune_num_choices_displayed = 0
    functorch_config.donated_buffer = False  # a backward pass is timed again and again over one forward pass
    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
    tiles, grouped = block_mask(case, device, by_torch), case.heads != case.kv_heads
    more: dict[str, Any] = {"block_mask": tiles, "enable_gqa": grouped, "kernel_options": kernel_options}
    return lambda q, k, v: first(compiled(q, k, v, **more))


def sdpa(backend: SDPBackend) -> Callable[[Case, str], Attend]:
    """torch's scaled_dot_product_attention by one of its backends."""

    def make(case: Case, device: str) -> Attend:
        causal, grouped = case.mask == "causal", case.heads != case.kv_heads

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return attend

    return make


def flash_attention(module: str) -> Callable[[Case, str], Attend]:
    """`flash_attn_func` of one of FlashAttention's packages, in the layout [batch, length, heads, head_dim] that they are made for."""

    def make(case: Case, device: str) -> Attend:
        attend, causal = importlib.import_module(module).flash_attn_func, case.mask == "causal"
        return lambda q, k, v: first(attend(q, k, v, causal=causal))

    return make


def first(found: Any) -> torch.Tensor:
    """The output alone, where a rival also gives its lse."""
    out: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return out


FLASH = {"BACKEND": "FLASH"}
CONTESTANTS = {
    c.label: c
    for c in (
        Contestant(OURS, ours),
        Contestant(FLEX, flex),
        Contestant(f"{FLEX} tuned", lambda case, device: flex(case, device, "max-autotune-no-cudagraphs"), slow=True),
        Contestant(f"{FLEX} FLASH", lambda case, device: flex(case, device, None, FLASH), needs="flash_attn.cute"),
        Contestant("SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION), dense=True),
        Contestant("SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION), dense=True),
        Contestant("FA3", flash_attention("fa3_fwd_interface"), needs="fa3_fwd_interface", dense=True, heads_last=True, trains=False),
        Contestant("FA4", flash_attention("flash_attn.cute"), needs="flash_attn.cute", dense=True, heads_last=True),
    )
}
