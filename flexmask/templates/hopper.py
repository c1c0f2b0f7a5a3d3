"""What the Hopper kernels share: Gluon's names whatever Triton's version, named barriers, and masks as words of bits.

`assemble_hopper` copies the sections into every generated file. An accumulator of wgmma has 64 rows a warpgroup; each thread holds parts of
two of them: in every eight columns the two that begin at twice the thread's place among the four that share its row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# ---- names
# what Triton 3.8 renamed
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
# all threads of a warpgroup meet
join = getattr(gl, "barrier", None) or gl.thread_barrier

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
INFINITY = gl.constexpr(float("inf"))
# minus infinity and zero, as PTX writes them
LOWEST = gl.constexpr("0fFF800000")
ZERO = gl.constexpr("0f00000000")
LEVELS = gl.constexpr(9)  # as many as `lists.order_lines` has


# ---- barriers
@gluon.constexpr_function
def barrier_text(kind, number, threads):
    return f"bar.{kind} {number}, {threads}; mov.b32 $0, $1;"


@gluon.jit
def meet(NUMBER: gl.constexpr, THREADS: gl.constexpr):
    """Wait at named barrier NUMBER (8 to 15: the compiler uses those below) until THREADS have come to it or passed it."""
    TEXT: gl.constexpr = barrier_text("sync", NUMBER, THREADS)
    gl.inline_asm_elementwise(TEXT, "=r,r,~{memory}", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_by(NUMBER: gl.constexpr, THREADS: gl.constexpr):
    """Count as come to named barrier NUMBER, without waiting."""
    TEXT: gl.constexpr = barrier_text("arrive", NUMBER, THREADS)
    gl.inline_asm_elementwise(TEXT, "=r,r,~{memory}", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


# ---- turns
@gluon.jit
def long_lines(order, lines, level, valid):
    """(how many lines are long, of the last how many times the resident heads they go first), from an order of lines and a level of it."""
    long = 0
    late = 0
    if order is not None:
        long = gl.load(order + lines + level, mask=valid, other=0)
        late = gl.load(order + lines + level + LEVELS, mask=valid, other=0)
    return long, late


@gluon.jit
def find_turn(turn, turns, lines, resident, heads):
    """(which line in the order of lines, which head) has this turn: `resident` heads at a time, so that what these read stays in the L2
    cache. But the long lines of the last heads (`turns` is what `long_lines` says) go before all others: begun in their turn, they would
    end after them."""
    long, late = turns
    last = gl.minimum(late * resident, heads)
    first = heads - last
    later = turn - long * last
    is_last = later >= first * lines
    at = gl.maximum(gl.where(is_last, later - first * lines, later), 0)
    span = gl.where(is_last, gl.maximum(lines - long, 1), lines) * resident
    rest = at % span
    line = gl.where(is_last, long, 0) + rest // resident
    head = gl.where(is_last, first, 0) + at // span * resident + rest % resident
    some = gl.maximum(last, 1)
    return gl.where(later < 0, turn // some, line), gl.where(later < 0, first + turn % some, head)


# ---- halves
@gluon.jit
def to_half(x, DTYPE: gl.constexpr):
    """float32 to bfloat16 or float16 in pairs; the compiler's own way takes a permutation more for each pair."""
    if DTYPE == gl.bfloat16:
        half = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        half = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2)
    return half


# ---- bits
@gluon.jit
def in_fours(x):
    """An accumulator [M, N] as [M, N / 8, 4, 2], the third axis being the thread."""
    return gl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def load_bound(source, first, length, step, ROWS: gl.constexpr, SPAN: gl.constexpr, FOURS: gl.constexpr):
    """int32 source[row * step] for rows [0, ROWS), or 0 where first + row >= length, less the place of a thread's first column in
    every eight: [ROWS, 1, 4, 1] in FOURS, the layout of `in_fours`. Rows begin anew with every SPAN-th."""
    place = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, FOURS))))[None, None, :, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, FOURS))))
    if SPAN < ROWS:
        row = row % SPAN
    bound = gl.load(source + row * step, mask=first + row < length, other=0)
    return bound[:, None, None, None] - 2 * place


@gluon.jit
def low_bits(bound, first, COLUMNS: gl.constexpr):
    """A word for each row and thread: bit 2a + c says whether column first + 8a + c (+ 2 * place) lies below the bound of `load_bound`."""
    below = gl.minimum(gl.maximum(bound - first, 0), COLUMNS)
    bits = ((below >> 3) << 1) + gl.minimum(below & 7, 2)
    one = gl.full([1, 1, 1, 1], 1, gl.int32, below.type.layout)
    return gl.where(bits > 31, -1, (one << (bits & 31)) - 1)


@gluon.jit
def kept_bits(bounds, first, COLUMNS: gl.constexpr, PIECES: gl.constexpr, STARTS: gl.constexpr):
    """The words of columns within any of a row's intervals: `bounds` = start, stop of each, from `load_bound`."""
    word = low_bits(bounds[1], first, COLUMNS)
    if STARTS:
        word = word & ~low_bits(bounds[0], first, COLUMNS)
    if PIECES > 1:
        word = word | (low_bits(bounds[3], first, COLUMNS) & ~low_bits(bounds[2], first, COLUMNS))
    if PIECES > 2:
        word = word | (low_bits(bounds[5], first, COLUMNS) & ~low_bits(bounds[4], first, COLUMNS))
    return word


@gluon.jit
def load_words(source, count, ROWS: gl.constexpr, SPAN: gl.constexpr, WORDS: gl.constexpr, FOURS: gl.constexpr):
    """int32 source[row * WORDS + word] for rows [0, ROWS), or 0 where word >= count, as `spread_bits` takes them. Rows
    begin anew with every SPAN-th."""
    THREADS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, FOURS))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, THREADS))[:, None]
    if SPAN < ROWS:
        row = row % SPAN
    word = gl.arange(0, WORDS, gl.SliceLayout(0, THREADS))[None, :]
    return gl.load(source + (row * WORDS + word), mask=word < count, other=0)


@gluon.jit
def eight_bits(word, FOURS: gl.constexpr):
    """Of a word of 32 neighbouring columns the eight bits that each thread needs, as the high byte: [ROWS, 1, 4, 1] from [ROWS]."""
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, FOURS)))
    place = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, FOURS))))[None, None, :, None]
    word = gl.convert_layout(word, ROW)[:, None, None, None]
    # the product moves two bits of each byte to the high one, where nothing else comes to lie
    return ((word >> (2 * place)) & 0x03030303) * 0x01041040


@gluon.jit
def spread_bits(words, FOURS: gl.constexpr):
    """The words of `kept_bits` from those of a map: int32 [ROWS, 2 or 4] in SliceLayout(1, SliceLayout(2, FOURS)), bit i % 32 of word
    i // 32 being column i of 64 or 128."""
    ROWS: gl.constexpr = words.shape[0]
    if words.shape[1] == 2:
        first, second = gl.split(words)
        low, high = eight_bits(first, FOURS), eight_bits(second, FOURS)
        word = ((low >> 24) & 0xFF) | ((high >> 16) & 0xFF00)
    else:
        even, odd = gl.split(gl.reshape(words, [ROWS, 2, 2]))
        first, third = gl.split(even)
        second, fourth = gl.split(odd)
        word = ((eight_bits(first, FOURS) >> 24) & 0xFF) | ((eight_bits(second, FOURS) >> 16) & 0xFF00)
        word = word | ((eight_bits(third, FOURS) >> 8) & 0xFF0000) | (eight_bits(fourth, FOURS) & -0x1000000)
    return word


@gluon.constexpr_function
def kept_text(number, otherwise):
    """Assembly for `kept_or`, of `number` registers: a row's bits one after the other, for which the assembler has one instruction for
    seven of them."""
    text = ""
    for row in (0, 2):
        for bit in range(number // 2):
            at = bit // 2 * 4 + row + bit % 2
            text += f"and.b32 t, ${2 * number + row}, {1 << bit}; setp.ne.b32 p, t, 0; "
            text += f"selp.f32 ${at}, ${number + at}, {otherwise}, p; "
    return "{ .reg .pred p; .reg .b32 t; " + text + "}"


@gluon.constexpr_function
def cut_text(number, otherwise):
    """Assembly for `cut_or`, of `number` registers."""
    text = ""
    for at in range(0, number, 4):
        for row in (0, 2):
            text += f"sub.f16x2 t, ${2 * number + at}, ${3 * number + row}; abs.f16x2 t, t; setp.lt.f16x2 p|q, t, ${2 * number + at + 1}; "
            text += f"selp.f32 ${at + row}, ${number + at + row}, {otherwise}, p; "
            text += f"selp.f32 ${at + row + 1}, ${number + at + row + 1}, {otherwise}, q; "
    return "{ .reg .pred p, q; .reg .b32 t; " + text + "}"


@gluon.constexpr_function
def operands(number, kinds):
    """Constraints of `number` registers of floats that come out, and of so many of each kind that go in."""
    return ",".join(["=f"] * number + [kind for kind in kinds for _ in range(number)])


@gluon.jit
def kept_or(x, words, OTHERWISE: gl.constexpr):
    """An accumulator where the words of `kept_bits` have a bit, else a number, as PTX writes it. In assembly, as the compiler packs
    what comes of many comparisons into words of its own, and takes these apart again."""
    FOURS: gl.constexpr = words.type.layout
    LAYOUT: gl.constexpr = x.type.layout
    words = words + gl.full([1, x.shape[1] // 8, 1, 2], 0, gl.int32, FOURS)
    words = gl.convert_layout(gl.reshape(words, [x.shape[0], x.shape[1]]), LAYOUT)
    NUMBER: gl.constexpr = x.shape[1] // 2
    TEXT: gl.constexpr = kept_text(NUMBER, OTHERWISE)
    OPERANDS: gl.constexpr = operands(NUMBER, "fr")
    return gl.inline_asm_elementwise(TEXT, OPERANDS, [x, words], dtype=gl.float32, is_pure=True, pack=NUMBER)


# ---- cuts
@gluon.jit
def two_halves(low, high):
    """Two float32 as float16, in one word."""
    return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def every_other_cut(starts, stops, exist, base, last, LENGTH: gl.constexpr, ODD: gl.constexpr, BLOCK: gl.constexpr, STARTS: gl.constexpr):
    """(middle, half of the length) of every second one of LENGTH intervals."""
    at = ODD + 2 * gl.arange(0, LENGTH // 2, gl.BlockedLayout([LENGTH // 64], [32], [1], [0]))
    stop = gl.load(stops + at, mask=at < exist, other=0)
    stop = gl.minimum(gl.maximum(gl.minimum(stop, last) - base, 0), BLOCK)
    start = gl.full([LENGTH // 2], 0, gl.int32, stop.type.layout)
    if STARTS:
        start = gl.load(starts + at, mask=at < exist, other=0)
        start = gl.minimum(gl.maximum(start - base, 0), BLOCK)
    return (start + stop - 1).to(gl.float32) * 0.5, (stop - start).to(gl.float32) * 0.5


@gluon.jit
def cuts_of(starts, stops, exist, base, last, LENGTH: gl.constexpr, BLOCK: gl.constexpr, STARTS: gl.constexpr):
    """For `cut_or`: intervals [starts[i], stops[i]) of rows, of LENGTH columns, as two words for two columns: their middles, and half of
    their lengths, which float16 holds exactly. Rows are counted from `base` on, BLOCK of them, those from `last` on not being kept, nor
    columns from `exist` on."""
    middle, half = every_other_cut(starts, stops, exist, base, last, LENGTH, 0, BLOCK, STARTS)
    next_middle, next_half = every_other_cut(starts, stops, exist, base, last, LENGTH, 1, BLOCK, STARTS)
    return gl.reshape(gl.join(two_halves(middle, next_middle), two_halves(half, next_half)), [LENGTH])


@gluon.jit
def cut_or(x, cuts, row, OTHERWISE: gl.constexpr):
    """An accumulator where the row, `row` in float32, lies within the column's cut, else a number, as PTX writes it."""
    NUMBER: gl.constexpr = x.shape[1] // 2
    TEXT: gl.constexpr = cut_text(NUMBER, OTHERWISE)
    OPERANDS: gl.constexpr = operands(NUMBER, "frr")
    rows = two_halves(row, row)[:, None]
    return gl.inline_asm_elementwise(TEXT, OPERANDS, [x, cuts[None, :], rows], dtype=gl.float32, is_pure=True, pack=NUMBER)


# ---- numbers
@gluon.jit
def number_of(x, DTYPE: gl.constexpr):
    """A constant as a number of this type."""
    return gl.to_tensor(x).to(DTYPE)
