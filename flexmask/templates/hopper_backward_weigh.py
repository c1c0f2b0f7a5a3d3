"""What becomes of a tile's scores in a Hopper backward kernel: the score mod with its derivative, and the mask."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper import LOG2E, ZERO, cut_or, in_fours, kept_bits, kept_or, load_bound, low_bits, spread_bits, to_half
from .hopper_backward_load import field
from .hopper_backward_plan import ALL, BITS, BLOCK_Q, CROSSED, PART, PIECES, STARTS, score_column, score_pair, score_row

# ---- probabilities

# what Triton 3.9 renamed
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def piece_of_keys(keys_of, at, kv0, PIECE: gl.constexpr, FOURS: gl.constexpr):
    """(start, stop) of one interval of 64 keys, which begin at row `at` of the tables; keys beyond the last keep nothing."""
    kv_len, starts, stops = keys_of[0], keys_of[3], keys_of[4]
    stop = load_bound(stops + at * PIECES + PIECE, kv0, kv_len, PIECES, 64, 64, FOURS)
    start = stop
    if STARTS or PIECE > 0:
        start = load_bound(starts + at * PIECES + PIECE, kv0, kv_len, PIECES, 64, 64, FOURS)
    return start, stop


@gluon.jit
def bounds_of_keys(keys_of, lead, kv0, FOURS: gl.constexpr):
    """Start and stop of each interval of 64 keys."""
    at = lead.to(gl.int64) * keys_of[0] + kv0
    bounds = piece_of_keys(keys_of, at, kv0, 0, FOURS)
    if PIECES > 1:
        second = piece_of_keys(keys_of, at, kv0, 1, FOURS)
        bounds = (bounds[0], bounds[1], second[0], second[1])
    if PIECES > 2:
        third = piece_of_keys(keys_of, at, kv0, 2, FOURS)
        bounds = (bounds[0], bounds[1], bounds[2], bounds[3], third[0], third[1])
    return bounds


@gluon.jit
def afresh(x):
    """`x`, an int32, such that nothing that depends on it is computed before it is needed, and then held in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bits_of_keys(words_s, slot, pattern, kv0, kv_len, WG: gl.constexpr, FOURS: gl.constexpr):
    """The words of 64 keys as `kept_or` takes them; of a FULL tile those of all keys that exist."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, FOURS)))
    words = reinterpret(words_s.index(afresh(slot)), gl.int32, [2, 64, BLOCK_Q // 32], FLAT).index(WG)
    word = spread_bits(words.load(gl.SliceLayout(1, gl.SliceLayout(2, FOURS))), FOURS)
    exists = gl.where(kv0 + gl.arange(0, 64, ROW) < kv_len, -1, 0)[:, None, None, None]
    return gl.where(pattern == ALL, exists, word)


@gluon.jit
def mask_tile(p, bufs, slot, keys_of, lead, start, kv0, WG: gl.constexpr, S_LAYOUT: gl.constexpr):
    """The probabilities of a PARTIAL tile, 0 where a pair is not kept or a key does not exist."""
    kv0 = afresh(kv0)
    if BITS or PIECES > 0:
        FOURS: gl.constexpr = in_fours(p).type.layout
        if BITS:
            words = bits_of_keys(bufs[9], slot, lead, kv0, keys_of[0], WG, FOURS)
        else:
            words = kept_bits(bounds_of_keys(keys_of, lead, kv0, FOURS), start, BLOCK_Q, PIECES, STARTS)
        p = kept_or(p, words, ZERO)
    elif CROSSED:
        p = cut_or(p, bufs[5].index(slot).load(gl.SliceLayout(0, S_LAYOUT)), row_of_keys(WG, S_LAYOUT), ZERO)
    else:
        p = gl.where(kv0 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))[:, None] < keys_of[0], p, 0.0)
    return p


@gluon.jit
def row_of_keys(WG: gl.constexpr, S_LAYOUT: gl.constexpr):
    """The place in the block column of each of 64 keys."""
    return (afresh(gl.to_tensor(WG * 64)) + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))).to(gl.float32)


@gluon.jit
def left_and_right(x):
    """The halves of an accumulator [64, N], for which no number changes its place."""
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x.shape[1] // 2, 16])
    left, right = gl.split(gl.permute(gl.reshape(x, [64, 2, x.shape[1] // 2]), (0, 2, 1)))
    return gl.convert_layout(left, HALF), gl.convert_layout(right, HALF)


@gluon.jit
def side_by_side(left, right, LAYOUT: gl.constexpr):
    """The accumulator of which these are the halves."""
    return gl.convert_layout(gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [64, 2 * left.shape[1]]), LAYOUT)


@gluon.jit
def crossed_words(bufs, slot, WG: gl.constexpr, S_LAYOUT: gl.constexpr):
    """The words of 64 keys, as `kept_or` takes them, from the one interval of each query: a bit a pair, added up in each thread."""
    COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    ones = gl.full([64, BLOCK_Q], 1.0, gl.float32, S_LAYOUT)
    kept = cut_or(ones, bufs[5].index(slot).load(COL), row_of_keys(WG, S_LAYOUT), ZERO)
    place = gl.arange(0, BLOCK_Q, COL)[None, :]
    bits = gl.where(kept > 0.0, gl.full([1, 1], 1, gl.int32, S_LAYOUT) << ((place // 8) * 2 + place % 2), 0)
    return gl.sum(gl.sum(in_fours(bits), axis=3), axis=1)[:, None, :, None]


@gluon.jit
def kept_words(bufs, slot, keys_of, lead, start, kv0, WG: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Which pairs of a PARTIAL tile are kept and exist, in words of 64 keys as `kept_or` takes them."""
    kv0 = afresh(kv0)
    FOURS: gl.constexpr = in_fours(gl.full([64, BLOCK_Q], 0, gl.int32, S_LAYOUT)).type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, FOURS)))
    if PIECES > 0:
        words = kept_bits(bounds_of_keys(keys_of, lead, kv0, FOURS), start, BLOCK_Q, PIECES, STARTS)
    elif CROSSED:
        words = crossed_words(bufs, slot, WG, S_LAYOUT)
    else:
        place = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, FOURS))))[None, None, :, None]
        words = low_bits(keys_of[5] - 2 * place, start, BLOCK_Q)
        if BITS:
            words = words & bits_of_keys(bufs[9], slot, lead, kv0, keys_of[0], WG, FOURS)
        else:
            words = words & gl.where(kv0 + gl.arange(0, 64, ROW) < keys_of[0], -1, 0)[:, None, None, None]
    return words


@gluon.jit
def set_aside(values):
    """Shared memory that holds values of queries, of which each thread has found one or two, and will need a quarter."""
    row_s = ()
    for i in gl.static_range(len(values)):
        row_s += (gl.allocate_shared_memory(values[i].dtype, [BLOCK_Q], gl.SwizzledSharedLayout(1, 1, 1, [0]), values[i]),)
    return row_s


@gluon.jit
def fetched(row_s, first):
    """The values of 32 queries of a tile, from query `first` of it on."""
    row = ()
    for i in gl.static_range(len(row_s)):
        row += (row_s[i].slice(first, 32).load(gl.SliceLayout(0, PART))[None, :],)
    return row


@gluon.jit
def look_ahead(record, mods, kv0, REC: gl.constexpr):
    """What the score mod is given besides scores and queries, and what it needs of either, found while products are made."""
    tables, numbers = mods[0], mods[1]
    b = field(record, 4, REC)
    h = field(record, 5, REC)
    kv_idx = afresh(kv0) + gl.arange(0, 64, gl.SliceLayout(1, PART))[:, None]
    q_idx = field(record, 0, REC) + gl.arange(0, BLOCK_Q, gl.BlockedLayout([1], [32], [4], [0]))
    row_s = set_aside(score_row(tables, numbers, b, h, q_idx))
    return b, h, kv_idx, score_column(tables, numbers, b, h, kv_idx), row_s


@gluon.jit
def weigh_part(s, words, lse_s, start, mods, ahead, FIRST: gl.constexpr, DTYPE: gl.constexpr):
    """`weigh` of 32 columns, from column FIRST of the tile on."""
    tables, numbers, scale = mods
    b, h, kv_idx, column, row_s = ahead
    COL: gl.constexpr = gl.SliceLayout(0, PART)
    q_idx = (start + FIRST + gl.arange(0, 32, COL))[None, :]
    changed, slope = score_pair(tables, numbers, column, fetched(row_s, FIRST), s * scale, b, h, q_idx, kv_idx)
    # a score mod may give a number for all pairs of a query or a key
    height = gl.full([64, 32], 0.0, gl.float32, PART) + changed * LOG2E
    p = gl.exp2(height - lse_s.slice(FIRST, 32).load(COL)[None, :])
    kept = words >> (FIRST // 4)
    return to_half(kept_or(p, kept, ZERO), DTYPE), kept_or(p * slope, kept, ZERO)


@gluon.jit
def weigh(s, words, lse_s, start, mods, ahead, FIRST: gl.constexpr, DTYPE: gl.constexpr):
    """(probabilities, in 16 bits; the same times the score mod's derivative) of the tile's columns from FIRST on, from s = k q^T; 0 where
    a pair is not kept, whatever its score is. A part after the other, as all at once would need more registers than there are."""
    if s.shape[1] == 32:
        p, weight = weigh_part(s, words, lse_s, start, mods, ahead, FIRST, DTYPE)
    else:
        LAYOUT: gl.constexpr = s.type.layout
        left, right = left_and_right(s)
        p_left, w_left = weigh(left, words, lse_s, start, mods, ahead, FIRST, DTYPE)
        p_right, w_right = weigh(right, words, lse_s, start, mods, ahead, FIRST + s.shape[1] // 2, DTYPE)
        p = side_by_side(p_left, p_right, LAYOUT)
        weight = side_by_side(w_left, w_right, LAYOUT)
    return p, weight
