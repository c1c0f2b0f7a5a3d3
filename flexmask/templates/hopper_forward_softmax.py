"""What becomes of a tile's scores in a Hopper forward kernel: the score mod, the mask, the softmax, and its end."""
# (tuples are added up by Gluon's compiler, and long conditional expressions read badly)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper import INFINITY, LN2, LOG2E, LOWEST, cut_or, in_fours, kept_bits, kept_or, load_bound, load_words, low_bits, spread_bits
from .hopper_forward_plan import (
    ALL,
    APART,
    BITS,
    BLOCK_KV,
    BY_KEY,
    BY_ROW,
    CROSSED,
    MEMBERS,
    PIECES,
    QUERIES,
    ROWS,
    SCORE,
    SCORES,
    SPAN,
    STARTS,
    WORDS,
    score_mod,
    score_row,
)


# ---- scores
@gluon.jit
def query_of(start, LAYOUT: gl.constexpr):
    """The query of each row of a warpgroup whose first one is `start`."""
    place = gl.arange(0, ROWS, LAYOUT)
    if MEMBERS > 1:
        place = place % SPAN
    return start + place


@gluon.jit
def head_of(h, LAYOUT: gl.constexpr):
    """The head of each row of a warpgroup whose first one is `h`; where there is no other, just that."""
    head = h
    if MEMBERS > 1:
        head = h + gl.arange(0, ROWS, LAYOUT) // SPAN
    return head


@gluon.jit
def line_of(row, q_len, LAYOUT: gl.constexpr):
    """Where the rows of a warpgroup, `row` being their queries, lie in a tensor [heads, Q], from its first head on."""
    line = row
    if MEMBERS > 1:
        line = row + head_of(0, LAYOUT) * q_len
    return line


@gluon.jit
def fours():
    """Something in the layout that scores have after `in_fours`."""
    return in_fours(gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES))


@gluon.jit
def load_bounds(rows, b, h, start):
    """The row intervals of 64 rows: start and stop of each piece, as `load_bound` gives them. Or where patterns of bits are."""
    row_starts, row_stops, stride_rb, stride_rh, q_len, words = rows
    FOURS: gl.constexpr = fours().type.layout
    at = (b.to(gl.int64) * stride_rb + h.to(gl.int64) * stride_rh + start) * PIECES
    bounds = ()
    if BITS:
        bounds += (words,)
    if PIECES > 0:
        stop = load_bound(row_stops + at, start, q_len, PIECES, ROWS, SPAN, FOURS)
        begin = stop  # not looked at where intervals begin with the first key
        if STARTS:
            begin = load_bound(row_starts + at, start, q_len, PIECES, ROWS, SPAN, FOURS)
        bounds += (begin, stop)
    if PIECES > 1:
        bounds += (load_bound(row_starts + at + 1, start, q_len, PIECES, ROWS, SPAN, FOURS),)
        bounds += (load_bound(row_stops + at + 1, start, q_len, PIECES, ROWS, SPAN, FOURS),)
    if PIECES > 2:
        bounds += (load_bound(row_starts + at + 2, start, q_len, PIECES, ROWS, SPAN, FOURS),)
        bounds += (load_bound(row_stops + at + 2, start, q_len, PIECES, ROWS, SPAN, FOURS),)
    return bounds


@gluon.jit
def load_pattern(bounds, pattern, count, W: gl.constexpr):
    """The words of 64 rows in a pattern of bits, for `spread_bits`; only the first `count` of each row are read."""
    bits = 0
    if BITS:
        source = bounds[0] + (pattern.to(gl.int64) * QUERIES + W * APART) * WORDS
        FOURS: gl.constexpr = fours().type.layout
        bits = load_words(source, count, ROWS, SPAN, WORDS, FOURS)
    return bits


@gluon.jit
def first_bits(bits, pattern, tile, kv_len):
    """The words of `low_bits` for the first tile of a walk."""
    FOURS: gl.constexpr = fours().type.layout
    place = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, FOURS))))[None, None, :, None]
    kept = low_bits(gl.where(pattern == ALL, kv_len, 0) - 2 * place, tile * BLOCK_KV, BLOCK_KV)
    return gl.where(pattern >= 0, spread_bits(bits, FOURS), kept)


@gluon.jit
def masked_scores(s, bounds, cuts, tile, kv_len, W: gl.constexpr):
    """Scores with -inf where they are not kept; of a kernel that reads bits, `bounds` are the words."""
    if BITS:
        s = kept_or(s, bounds, LOWEST)
    elif CROSSED:
        s = cut_or(s, cuts.load(BY_KEY), query_of(W * APART, BY_ROW).to(gl.float32), LOWEST)
    elif PIECES > 0:
        s = kept_or(s, kept_bits(bounds, tile * BLOCK_KV, BLOCK_KV, PIECES, STARTS), LOWEST)
    else:
        s = gl.where((tile * BLOCK_KV + gl.arange(0, BLOCK_KV, BY_KEY))[None, :] < kv_len, s, -INFINITY)
    return s


@gluon.jit
def score_context(score_mods, b, h, row, scale):
    """What the score mod is given besides scores and keys, and what depends on the rows only."""
    tables, numbers = score_mods
    context = ()
    if SCORE:
        q_idx, head = row[:, None], h
        if MEMBERS > 1:
            head = head_of(h, BY_ROW)[:, None]
        context = (tables, numbers, score_row(tables, numbers, b, head, q_idx), b, head, q_idx, scale)
    return context


@gluon.jit
def changed_scores(s, score, tile):
    """Scores in base 2 after the score mod, which takes them in base e."""
    tables, numbers, row, b, h, q_idx, scale = score
    kv_idx = (tile * BLOCK_KV + gl.arange(0, BLOCK_KV, BY_KEY))[None, :]
    changed = score_mod(tables, numbers, row, s * scale, b, h, q_idx, kv_idx) * LOG2E
    return gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES) + changed  # a score mod may give a number for all keys


@gluon.jit
def softmax(s, peak, scale, MASKED: gl.constexpr):
    """(probabilities, the new greatest score by row, what sums so far are multiplied by); -inf - -inf would be NaN."""
    new_peak = gl.maximum(peak, gl.max(s, axis=1))
    base = new_peak
    if MASKED or SCORE:
        base = gl.where(new_peak == -INFINITY, 0.0, new_peak)
    if SCORE:
        p = gl.exp2(s - base[:, None])
        shrink = gl.exp2(peak - base)
    else:
        base = base * scale
        p = gl.exp2(s * scale - base[:, None])
        shrink = gl.exp2(peak * scale - base)
    return p, new_peak, shrink


@gluon.jit
def row_sums(p):
    """What each thread holds of a row, added: [64, 4]. The four meet once, at the end of the row."""
    return gl.sum(gl.sum(in_fours(p), axis=3), axis=1)


@gluon.jit
def finish(total, peak, scale, sinks, peaks, lse, head, h, row, q_len):
    """Store log-sum-exp and greatest score of the rows; what their output is multiplied by."""
    height = peak
    if not SCORE:
        height = peak * scale
    to = head.to(gl.int64) * q_len + line_of(row, q_len, BY_ROW)
    if peaks is not None:
        # no NaN is greatest, but it is in the sum
        certain = (total >= 0.0) | (height == INFINITY)
        gl.store(peaks + to, gl.where(certain, height * LN2, total), mask=row < q_len)
    shrink = gl.full([ROWS], 1.0, gl.float32, BY_ROW)
    if sinks is not None:  # a logit more in the denominator
        sink = gl.load(sinks + head_of(h, BY_ROW)).to(gl.float32) * LOG2E
        top = gl.maximum(height, sink)
        base = gl.where(top == -INFINITY, 0.0, top)
        shrink = gl.exp2(height - base)
        total = total * shrink + gl.exp2(sink - base)
        height = base
    # not `total > 0`: a NaN must come out as NaN
    empty = total == 0.0
    gl.store(lse + to, gl.where(empty, -INFINITY, (height + gl.log2(total)) * LN2), mask=row < q_len)
    return shrink / gl.where(empty, 1.0, total)
