"""What a Hopper backward kernel takes from its plan, and its mods: `assemble_hopper_backward` replaces these constants and functions."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# ---- constants of the plan
HEAD_DIM = tl.constexpr(128)
V_HEAD_DIM = tl.constexpr(128)
# both 64 or both 128: tiles are that wide, zero beyond the head dim
PADDED_DIM = tl.constexpr(128)
PADDED_V_DIM = tl.constexpr(128)
BLOCK_Q = tl.constexpr(64)
BLOCK_KV = tl.constexpr(128)
STAGES = tl.constexpr(2)
CONSUMER_REGISTERS = tl.constexpr(240)
PRODUCER_REGISTERS = tl.constexpr(24)
# "none": every tile is full; "range": four numbers a block column; "list": a list of block rows a block column
MAP_FORM = tl.constexpr("none")
# PARTIAL tiles compare with so many intervals of each key's queries, or-ed; or, CROSSED, with one interval of each query's keys
PIECES = tl.constexpr(0)
CROSSED = tl.constexpr(False)
# or they read their bits from the map
BITS = tl.constexpr(False)
# whether intervals may begin after the first place
STARTS = tl.constexpr(True)
# "always"; or only where the map's flag on the device says that its intervals "hold", or that they "fail"
RUNS = tl.constexpr("always")
SCORE = tl.constexpr(False)
# columns add to dq one after the other, in the same order at every run
DETERMINISTIC = tl.constexpr(False)
# ---- kernel

# what a record says of its block row
FULL = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
NO_MORE = tl.constexpr(2)
# numbers of patterns that do not exist, for which TMA gives zeros: nothing is kept, or all
NOTHING = tl.constexpr(1 << 29)
ALL = tl.constexpr((1 << 29) + 1)
# numbers of a record
FIELDS = tl.constexpr(8 if SCORE.value or DETERMINISTIC.value else 4)
# the layout of 32 columns of scores, as many as are changed at a time
PART = tl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))


# ---- mods
@gluon.jit
def score_column(tables, numbers, b, h, kv_idx):
    """What the score mod needs of keys: nothing, as there is none."""
    return ()


@gluon.jit
def score_row(tables, numbers, b, h, q_idx):
    """What the score mod needs of queries: nothing, as there is none."""
    return ()


@gluon.jit
def score_pair(tables, numbers, column, row, score, b, h, q_idx, kv_idx):
    """The changed score and its derivative, float32; not called, as there is no score mod."""
    return score, score
