"""Device functions that emitted mods may call; `assemble` copies those that are called.

All floats are float32. These are the meanings of ir.ops where Triton's own operator differs, or has none.
"""

import triton
import triton.language as tl


@triton.jit
def number(packed):
    """An integer as `pack` passed it. 16 * x + 2 is never 1 and never divisible by 16, for which Triton would compile anew."""
    return packed >> 4


@triton.jit
def gather(address, inside, TYPE: tl.constexpr):
    """Entries of a table, each at a place of its own, 0 outside. An ordinary load that a matrix product waits for Triton fetches some tiles
    ahead, by a copy to shared memory of every single entry; this one stays where it is, its entries in flight together."""
    if TYPE.primitive_bitwidth == 64:
        found = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b64 $0, 0; @p ld.global.nc.b64 $0, [$1]; }", "=&l,l,r",
            [address.to(tl.int64), inside.to(tl.int32)], dtype=tl.int64, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }", "=&r,l,r",
            [address.to(tl.int64), inside.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return found.to(TYPE, bitcast=True)


@triton.jit
def count_below(row, stride, size, target, valid, RIGHT: tl.constexpr, TYPE: tl.constexpr):
    """How many entries of an ascending row are below `target` (RIGHT: at or below it), int32, by binary search on entries as TYPE.

    Nothing is read where `valid` is false. The answer lies in [first, first + left] all the time, and `left` is the same for all.
    """
    first = tl.where(valid & (target < 0), 0, 0)
    left = tl.minimum(size, 2147483647).to(tl.int32)
    while left > 0:
        half = left - left // 2
        entry = tl.load(row + (first + (half - 1)).to(tl.int64) * stride, mask=valid, other=0).to(TYPE)
        beyond = entry > target if RIGHT else entry >= target
        first = tl.where(beyond, first, first + half)
        left -= half
    return first


@triton.jit
def floor_div(x, y):
    """x // y rounded down, as in Python (Triton rounds toward zero)."""
    quotient = x // y
    rest = x - quotient * y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), quotient - 1, quotient)


@triton.jit
def floor_mod(x, y):
    """x % y with the sign of y, as in Python (Triton gives it the sign of x)."""
    rest = x % y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@triton.jit
def float_floor_div(x, y):
    """floor(x / y) of float32 numbers; in float64, where the quotient of two float32 never rounds up to an integer."""
    return tl.floor(x.to(tl.float64) / y.to(tl.float64)).to(tl.float32)


@triton.jit
def float_floor_mod(x, y):
    """x - y * floor(x / y), exact before the last rounding."""
    wide_x, wide_y = x.to(tl.float64), y.to(tl.float64)
    return (wide_x - tl.floor(wide_x / wide_y) * wide_y).to(tl.float32)


@triton.jit
def int_pow(x, n):
    """x ** n of integers, modulo 2 ** 64; 0 for negative n unless x is 1 or -1, as in torch."""
    base = x.to(tl.int64)
    left = tl.abs(n.to(tl.int64))
    result = base * 0 + left * 0 + 1
    for _ in tl.static_range(31):
        result = tl.where(left % 2 == 1, result * base, result)
        base = base * base
        left = left // 2
    return tl.where((n < 0) & (tl.abs(x) != 1), 0, result)


@triton.jit
def float_pow(x, y):
    """x ** y by way of float64, where the logarithm keeps enough digits."""
    wide_y = y.to(tl.float64)
    size = tl.exp2(wide_y * tl.log2(tl.abs(x).to(tl.float64)))
    whole = tl.floor(wide_y) == wide_y
    odd = whole & (tl.floor(wide_y * 0.5) * 2.0 != wide_y)
    signed = tl.where(whole, tl.where(odd, -size, size), float("nan"))
    result = tl.where(x < 0.0, signed, size)
    certain = tl.where(y == 0.0, 1.0, result)
    return tl.where(x == 1.0, 1.0, certain).to(tl.float32)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, relative error below 1e-6: a polynomial near 0, where 1 - exp(-2x) would cancel; no overflow."""
    square = x * x
    near = x * (1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * (-0.0539682540 + square * 0.0218694885))))
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp's overflow gives 0."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def sine(x):
    """sin(x), by quarter turns taken off in float64 (libdevice's own reduction of great arguments keeps a table in local memory)."""
    wide = x.to(tl.float64)
    turns = tl.floor(wide * 0.6366197723675814 + 0.5)
    r = (wide - turns * 1.5707963267948966).to(tl.float32)
    quarter = turns.to(tl.int64) & 3
    square = r * r
    sin = r + r * square * (-0.16666666667 + square * (0.00833333333 + square * (-0.000198412698 + square * 0.00000275573192)))
    cos = 1.0 + square * (
        -0.5 + square * (0.04166666667 + square * (-0.00138888889 + square * (0.0000248015873 - square * 0.000000275573)))
    )
    value = tl.where((quarter & 1) == 0, sin, cos)
    return tl.where(quarter >= 2, -value, value)


@triton.jit
def cosine(x):
    """cos(x) = sin(x + a quarter turn), as in `sine`."""
    wide = x.to(tl.float64)
    turns = tl.floor(wide * 0.6366197723675814 + 0.5)
    r = (wide - turns * 1.5707963267948966).to(tl.float32)
    quarter = (turns.to(tl.int64) + 1) & 3
    square = r * r
    sin = r + r * square * (-0.16666666667 + square * (0.00833333333 + square * (-0.000198412698 + square * 0.00000275573192)))
    cos = 1.0 + square * (
        -0.5 + square * (0.04166666667 + square * (-0.00138888889 + square * (0.0000248015873 - square * 0.000000275573)))
    )
    value = tl.where((quarter & 1) == 0, sin, cos)
    return tl.where(quarter >= 2, -value, value)


@triton.jit
def truncate(x):
    """Rounded toward zero."""
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_even(x):
    """The nearest integer, halves to the even one."""
    down = tl.floor(x)
    half = down * 0.5
    up = (x - down > 0.5) | ((x - down == 0.5) & (half != tl.floor(half)))
    return tl.where(up, down + 1.0, down)


@triton.jit
def round_bfloat16(x):
    """The nearest bfloat16, halves to even, as float32; on the bits, as Triton's interpreter truncates."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def magnitude(x):
    """The bits of |x|, int32, which are ordered as the numbers are; those of NaN come last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def fixed_point(x, peak, limit):
    """x as an integer, int64, in units of which `limit` (a power of two) make the least power of two above the number with the bits
    `peak`. No result exceeds the limit, even if x is above its peak (where that was found by another kernel, which rounds differently)."""
    shift = 126 - tl.maximum(peak >> 23, 1)
    some = shift >> 1  # in two steps, as 2 ** shift may be no float32
    scaled = tl.where(peak < 0x7F800000, x, 0.0) * ((some + 127) << 23).to(tl.float32, bitcast=True)
    scaled *= ((shift - some + 127) << 23).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(scaled, -1.0), 1.0) * limit
    down = tl.floor(scaled)
    return down.to(tl.int64) + (scaled - down >= 0.5).to(tl.int64)


@triton.jit
def skew(x):
    """x [M, N], N a power of two, with row i turned left by i: a diagonal of x, broken in pieces of N, becomes a column."""
    row = tl.arange(0, x.shape[0])[:, None]
    column = tl.arange(0, x.shape[1])[None, :]
    return tl.gather(x, (row + column) & (x.shape[1] - 1), axis=1)


@triton.jit
def diagonal_sums(skewed, turn):
    """Sums [1, N] along those pieces of diagonals that `skew` has turned round `turn` times."""
    row = tl.arange(0, skewed.shape[0])[:, None]
    column = tl.arange(0, skewed.shape[1])[None, :]
    return tl.sum(tl.where((row + column) // skewed.shape[1] == turn, skewed, 0.0), 0, keep_dims=True)


@triton.jit
def diagonal_ends(q_idx, kv_idx, skewed, turn):
    """A query and keys [1, N] on the diagonals of `diagonal_sums`: moved along them to where no index is negative."""
    reach = skewed.shape[0] + skewed.shape[1]
    return tl.min(q_idx) + reach, kv_idx + (reach - turn * skewed.shape[1])
