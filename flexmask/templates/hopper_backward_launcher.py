"""The host side of the Hopper backward kernel: prepares what calls bring and starts the kernel. Copied by `assemble_hopper_backward` into
generated files."""

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_backward import attention_backward, gather_queries
from .hopper_backward_plan import BITS, BLOCK_KV, BLOCK_Q, CROSSED, DETERMINISTIC, PADDED_DIM
from .hopper_turns import long_level, processors
from .launcher import MAX_INDEX, fits_tma, resident_heads, strides

# ---- functions


def swizzled(x, rows):
    """A TMA descriptor of [1, 1, rows, PADDED_DIM] tiles of `x` [.., .., length, head dim], laid out in shared memory as wgmma reads them;
    reads outside give 0. Of a copy, where `x` is not such that TMA can read it."""
    if not fits_tma(x):
        x = x.clone(memory_format=torch.contiguous_format)
    unit = 16 // x.element_size()
    apart = [stride if length > 1 else unit for stride, length in zip(x.stride()[:3], x.shape[:3], strict=True)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*apart, 1], [1, 1, rows, PADDED_DIM.value], layout)


def described_bits(words):
    """A TMA descriptor of int32 [pool, BLOCK_KV, BLOCK_Q / 32], by which a pattern comes as it lies in memory, in lines of 256 words."""
    wanted = (BLOCK_KV.value, BLOCK_Q.value // 32)
    if words is None or words.shape[1:] != wanted:
        found = "none" if words is None else str(list(words.shape))
        raise ValueError(f"this kernel reads the bits of partial tiles, int32 [pool, {wanted[0]}, {wanted[1]}]; got {found}")
    lines = words.view(1, 1, -1, 256)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, 1, wanted[0] * wanted[1] // 256, 256], layout)


def zeroed_sums(terms):
    """Room for dq in float32, in the order in which threads hold it."""
    return torch.zeros(terms[0].numel() * PADDED_DIM.value, dtype=torch.float32, device=terms[0].device)


def described_sums(sums):
    """A TMA descriptor of them, by which 4096 come as they lie in memory, in lines of 256."""
    lines = sums.view(-1, 256)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [16, 256], layout)


def turns(terms):
    """How many programs have begun, and how many have added to each tile of dq: none."""
    return torch.zeros(1 + terms[0].numel() // BLOCK_Q.value, dtype=torch.int32, device=terms[0].device)


def in_step(heads, resident, programs):
    """How many heads to walk together where columns take turns: with many columns of a head at a time, some would wait, the more the fewer
    steps they have. Those that run share what they read, as they follow one another closely. (Fastest on an H200: 8, or 16 where steps
    are long.)"""
    least = min(heads, max(resident, programs * BLOCK_Q.value // 1024))
    return next(n for n in range(least, heads + 1) if heads % n == 0)


def backward(q, k, v, dout, terms, scale, mask_captures=((), ()), score_captures=((), ()), starts=None, stops=None,
             ranges=None, counts=None, offsets=None, index=None, broken=None, into=None, row_starts=None, row_stops=None,
             order=None, patterns=None, words=None, sums=None, ranks=None):  # fmt: skip
    """(dq [B, Hq, Q, D], dk [B or 1, Hkv, KV, D], dv [B or 1, Hkv, KV, Dv]) of out = attention(q, k, v), given dout [B, Hq, Q, Dv] and
    `terms` from `row_terms`.

    The map is by columns: starts and stops are int32 [B or 1, Hq or 1, KV, PIECES], the queries that keep each key, or, for a plan with
    crossed intervals, row_starts and row_stops [.., .., Q, 1], the keys that each query keeps; `ranges` int32 [B or 1, Hq or 1, block
    columns, 4], or `counts` and `offsets` int32 [.., .., block columns, 2] with `index`, name block rows. All are contiguous. With bits,
    `patterns` (int32, as long as `index`) numbers those of PARTIAL tiles in `words` int32 [pool, BLOCK_KV, BLOCK_Q / 32]: bit query % 32
    of word query // 32 of a key. `order` is what `lists.order_lines` says of the block columns, or,
    of a deterministic kernel, `ranks` what `ranks.rank_lines` says. `broken` is the flag that
    a kernel looks at which does not always run; `into` the (dq, dk, dv) that its partner has filled where this one returns, and `sums`
    the `zeroed_sums` that both use. The mask's captures are not used.
    """
    batch, q_heads, q_len, head_dim = q.shape
    entries, heads, kv_len, _ = k.shape
    if max(batch, q_heads, q_len, kv_len) > MAX_INDEX:
        raise ValueError(f"sizes beyond {MAX_INDEX} are not supported; got q {tuple(q.shape)}, k {tuple(k.shape)}")
    dq, dk, dv = into or tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    if not (fits_tma(dk) and fits_tma(dv)):
        raise ValueError(f"TMA needs rows of a multiple of 16 bytes; got gradients of {tuple(dk.shape)}, {tuple(dv.shape)} to be filled")
    terms_len = terms[0].shape[2]
    sums = zeroed_sums(terms) if sums is None else sums
    columns, group = triton.cdiv(kv_len, BLOCK_KV.value), q_heads // heads
    low, high, lines = (row_starts, row_stops, q_len) if CROSSED.value else (starts, stops, kv_len)
    numbers = turns(terms) if DETERMINISTIC.value else None
    resident = resident_heads(entries * heads, q_len, (head_dim + v.shape[3]) * q.element_size() + 4 * PADDED_DIM.value)
    if DETERMINISTIC.value:
        resident = in_step(entries * heads, resident, processors(q.device))
    attention_backward[(columns * entries * heads,)](
        swizzled(q, BLOCK_Q.value), swizzled(k, 64), swizzled(v, 64), swizzled(dout, BLOCK_Q.value), swizzled(dk, 64), swizzled(dv, 64),
        sums if DETERMINISTIC.value else described_sums(sums), *terms,
        float(scale), q_len, kv_len, terms_len, columns, heads, group, group * (batch // entries), resident,
        *score_captures,
        low, high, *(apart // lines for apart in strides(high, lines)),
        ranges, counts, offsets, index, *strides(counts if ranges is None else ranges, columns),
        patterns, described_bits(words) if BITS.value else None,
        order, long_level(resident, processors(q.device)), broken,
        ranks, numbers,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    blocks = triton.cdiv(q_len, BLOCK_Q.value)
    gather_queries[(blocks * batch * q_heads,)](sums, dq, float(scale), q_len, terms_len, broken, num_warps=4, enable_fp_fusion=True)
    return dq, dk, dv
