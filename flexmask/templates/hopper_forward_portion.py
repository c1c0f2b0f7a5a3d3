"""Hopper forward kernels whose tile rows are split: a program takes a portion of a row's walk, and leaves sums that portions.py adds up."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_forward_plan import (
    ALL,
    BITS,
    BLOCK_KV,
    BY_ROW,
    NOTHING,
    OUTPUT,
    PADDED_V_DIM,
    PART,
    SCORE,
    V_HEAD_DIM,
    WIDE,
)
from .hopper_forward_softmax import line_of, query_of


# ---- functions of split plans
@gluon.jit
def portion_of(portion, portions, part, full):
    """(low, last): a portion of a walk begins with its tile `low`, and goes on with the tiles [low, last) after the walk's first one."""
    count = 1 + part + full
    each, rest = count // portions, count % portions
    low = each * portion + rest * portion // portions
    high = each * (portion + 1) + rest * (portion + 1) // portions
    return low, gl.maximum(high - 1, low)


@gluon.jit
def spans(portion, portions, part, full):
    """Which of the PARTIAL tiles after the first and which of the FULL ones a portion of a walk takes, as [first, last) of each."""
    low, last = portion_of(portion, portions, part, full)
    return gl.minimum(low, part), gl.minimum(last, part), gl.maximum(low - part, 0), gl.maximum(last - part, 0)


@gluon.jit
def place_before(portion, portions, part, full):
    """Which tile after the walk's first one a portion begins with, unless it begins with that."""
    return gl.maximum(portion_of(portion, portions, part, full)[0] - 1, 0)


@gluon.jit
def begin_portion(patterns, first, chosen, part_at, part, full, pattern, portion, portions, kv_len):
    """(first tile of a portion, its pattern of bits) from those of the walk; `chosen` is what lies at `place_before`. A tile beyond
    all keys where there is nothing for the portion."""
    low = portion_of(portion, portions, part, full)[0]
    following = portion_of(portion + 1, portions, part, full)[0]
    if BITS:
        before = gl.maximum(low - 1, 0)
        own = gl.load(patterns + part_at + before, mask=(low > 0) & (before < part), other=ALL)
        pattern = gl.where(low > 0, own, pattern)
        pattern = gl.where(low < following, pattern, NOTHING)
    first = gl.where(low > 0, chosen, first)
    return gl.where(low < following, first, gl.cdiv(kv_len, BLOCK_KV)), pattern


@gluon.jit
def leave_sums(left, place, total, peak, scale, row, q_len):
    """Denominators and greatest scores of a portion's rows, to memory from `place` on, where those of the warpgroup's first head are."""
    _, totals, heights = left
    height = peak
    if not SCORE:
        height = peak * scale
    to = place + line_of(row, q_len, BY_ROW)
    gl.store(totals + to, total, mask=row < q_len)
    gl.store(heights + to, height, mask=row < q_len)


@gluon.jit
def leave_columns(left, place, acc, start, q_len, FIRST: gl.constexpr, WIDTH: gl.constexpr):
    """Columns of a portion's output, as sums, to memory."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    row = query_of(start, LAYOUT)
    column = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, OUTPUT))
    to = left[0] + ((place + line_of(row, q_len, LAYOUT)) * V_HEAD_DIM)[:, None] + column[None, :]
    gl.store(to, acc, mask=(row < q_len)[:, None] & (column < V_HEAD_DIM)[None, :])


@gluon.jit
def leave_output(left, place, acc, start, q_len):
    """The sums of a portion's output to memory; of a wide plan, part by part."""
    if WIDE:
        for i in gl.static_range(PADDED_V_DIM // PART):
            leave_columns(left, place, acc[i], start, q_len, i * PART, PART)
    else:
        leave_columns(left, place, acc, start, q_len, 0, PADDED_V_DIM)
