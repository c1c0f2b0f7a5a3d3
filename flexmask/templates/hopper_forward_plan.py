"""What a Hopper forward kernel takes from its plan, and its mods: `assemble_hopper` replaces these constants and functions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# ---- constants of the plan
HEAD_DIM = gl.constexpr(64)
V_HEAD_DIM = gl.constexpr(64)
# tiles are that wide, zero beyond the head dim
PADDED_DIM = gl.constexpr(64)
PADDED_V_DIM = gl.constexpr(64)
DTYPE = gl.constexpr(gl.bfloat16)
BLOCK_Q = gl.constexpr(128)
BLOCK_KV = gl.constexpr(128)
# tiles of keys and values in flight, and of queries
STAGES = gl.constexpr(2)
Q_STAGES = gl.constexpr(2)
# "grid": a program a tile; "stride": every so many-th tile; "queue": the next that nobody has taken
SCHEDULE = gl.constexpr("queue")
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)
# "none": every tile is full; "range": four numbers a tile row; "list": a list of tiles a tile row
MAP_FORM = gl.constexpr("none")
# PARTIAL tiles compare with so many row intervals, or-ed
PIECES = gl.constexpr(0)
# or with one interval of queries for each key
CROSSED = gl.constexpr(False)
# or are masked by bits, a pattern of them for each PARTIAL tile of a list
BITS = gl.constexpr(False)
# whether intervals may begin after the first key (or query)
STARTS = gl.constexpr(True)
# "always"; or only where the map's flag on the device says that its intervals "hold", or that they "fail"
RUNS = gl.constexpr("always")
SCORE = gl.constexpr(False)
# of few queries: how many heads of a group share a tile, half of them a warpgroup; and whether a tile row's keys are split among programs
PACK = gl.constexpr(1)
SPLIT = gl.constexpr(False)
# ---- constants of wide plans
# a head dim beyond 128: tiles lie in parts of so many columns, and the output leaves from where the queries lay
WIDE = gl.constexpr(False)
PART = gl.constexpr(64)
# ---- kernel

ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(BLOCK_Q.value // ROWS.value)
WORDS = gl.constexpr(BLOCK_KV.value // 32)
# heads of a warpgroup, and queries of each; queries of a tile; how many queries, or heads, the rows of its warpgroups are apart
MEMBERS = gl.constexpr(max(1, PACK.value // CONSUMERS.value))
SPAN = gl.constexpr(ROWS.value // MEMBERS.value)
QUERIES = gl.constexpr(BLOCK_Q.value // PACK.value)
APART = gl.constexpr(ROWS.value if PACK.value == 1 else 0)
HEADS_APART = gl.constexpr(0 if PACK.value == 1 else MEMBERS.value)
# numbers of a record
FIELDS = gl.constexpr(16 if BITS.value or SPLIT.value else 8)
# instead of a pattern's number, where the first tile of a walk has none: it is FULL; or stands for the tiles of a row that keeps nothing
ALL = gl.constexpr(-1)
NOTHING = gl.constexpr(-2)
# layouts of scores and output in a warpgroup, of the probabilities that it multiplies values with, and of a number for each row
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KV.value, 16]))
if WIDE:
    OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART.value, 16]))
else:
    OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_V_DIM.value, 16]))
FACTOR = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=OUTPUT.value, k_width=2))
BY_ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))
BY_KEY = gl.constexpr(gl.SliceLayout(0, SCORES.value))


# ---- mods
@gluon.jit
def score_row(tables, numbers, b, h, q_idx):
    """What the score mod needs of a query row: nothing, as there is none."""
    return ()


@gluon.jit
def score_mod(tables, numbers, row, score, b, h, q_idx, kv_idx):
    """The changed score, float32; not called, as there is no score mod."""
    return score
