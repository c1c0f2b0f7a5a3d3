"""Rows whose keys are split among programs: what these leave in memory, and the kernel that adds it up.

`assemble` and `assemble_hopper` copy the sections into the files of plans that split rows.
"""

import torch
import triton
import triton.language as tl

from .backward import is_idle
from .forward import LN2, LOG2E, V_HEAD_DIM, add_sink


# ---- portions
@triton.jit
def finish_rows(acc, total, height, row, head, exists, to, lse, sinks, peaks, seed, factor, WIDTH: tl.constexpr):
    """Stores output, log-sum-exp and greatest score of rows; `to` points at their places in the output."""
    if peaks is not None:
        # no NaN is greatest, but it is in the sum
        certain = (total >= 0.0) | (height == float("inf"))
        tl.store(peaks + row, tl.where(certain, height * LN2, total), mask=exists)
    if sinks is not None:
        acc, total, height = add_sink(acc, total, height, tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32) * LOG2E)
    # not `total > 0`: a NaN must come out as NaN
    empty = total == 0.0
    share = 1.0 / tl.where(empty, 1.0, total)
    if seed is not None:
        share = share * factor
    tl.store(lse + row, tl.where(empty, float("-inf"), (height + tl.log2(total)) * LN2), mask=exists)
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(to[:, None] + column, (acc * share[:, None]).to(to.dtype.element_ty), mask=exists[:, None] & (column < V_HEAD_DIM))


# lengths and counts are not specialised on: another length must not compile another kernel
@triton.jit(do_not_specialize=["rows", "q_len", "heads", "portions"])
def join_portions(
    portion_sums, portion_totals, portion_heights,  # float32 [portions, B, Hq, Q, Dv], and twice [portions, B, Hq, Q]
    out, lse, rows, q_len, heads, portions, stride_ob, stride_oh, stride_on, broken, sinks, peaks, seed, factor,
    TOGETHER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A row of the output, of `rows` in all, from what the portions have left of it, TOGETHER of these at a time."""
    if is_idle(broken):
        return
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([1, WIDTH], tl.float32)
    total = tl.zeros([1], tl.float32)
    height = tl.full([1], float("-inf"), tl.float32)
    for first in range(0, portions, TOGETHER):
        portion = first + tl.arange(0, TOGETHER)
        there = portion < portions
        at = portion.to(tl.int64) * rows + row
        found = tl.load(portion_heights + at, mask=there, other=float("-inf"))
        totals = tl.load(portion_totals + at, mask=there, other=0.0)
        sums = tl.load(portion_sums + at[:, None] * V_HEAD_DIM + column, mask=there[:, None] & (column < V_HEAD_DIM), other=0.0)
        top = tl.maximum(height, tl.max(found, axis=0))
        base = tl.where(top == float("-inf"), 0.0, top)
        before, now = tl.exp2(height - base), tl.exp2(found - base)
        acc = acc * before[:, None] + tl.sum(sums * now[:, None], axis=0, keep_dims=True)
        total = total * before + tl.sum(totals * now, axis=0)
        height = top
    line = row + tl.arange(0, 1)
    b, head, query = line // q_len // heads, line // q_len % heads, line % q_len
    to = out + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + query.to(tl.int64) * stride_on
    finish_rows(acc, total, height, line, head, line < rows, to, lse, sinks, peaks, seed, factor, WIDTH)


# ---- functions
def split_among(tiles, columns, programs):
    """Among how many programs to split the keys of each tile row, of `columns` tiles, so that the last one is done early. A portion takes
    as long as about two tiles of keys more."""
    most = max(1, min(columns // 4, programs))
    return min(range(1, most + 1), key=lambda portions: -(-tiles * portions // programs) * (columns / portions + 2))


def portion_memory(out, portions):
    """Room for what each portion leaves: its sums, denominators and greatest scores."""
    sums = torch.empty(portions, *out.shape, dtype=torch.float32, device=out.device)
    totals = torch.empty(portions, *out.shape[:3], dtype=torch.float32, device=out.device)
    return sums, totals, torch.empty(portions, *out.shape[:3], dtype=torch.float32, device=out.device)


def add_portions(memory, out, lse, broken, sinks, peaks, seed=None, factor=1.0):
    """Fills out, lse and, if wanted, the greatest scores from what `portion_memory` made room for."""
    heads, q_len, width = out.shape[1:]
    portions, rows = memory[1].shape[0], lse.numel()
    together = 16 if portions > 4 and rows <= 1024 else 4  # of few rows, memory is waited for less often
    join_portions[(rows,)](
        *memory, out, lse, rows, q_len, heads, portions, *out.stride()[:3], broken, sinks, peaks, seed, factor,
        TOGETHER=together, WIDTH=triton.next_power_of_2(width), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
