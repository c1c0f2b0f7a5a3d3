"""Forward attention for Hopper: warpgroups that multiply, fed through rings of shared memory by one warp that loads.

`assemble_hopper` joins this module with those it imports from, puts the plan's constants and the mods in place of `hopper_forward_plan`'s,
and leaves one branch only of each `if WIDE` (a head dim beyond 128) and `if SPLIT` (a tile row's keys are split among programs).
The loading warp (`hopper_forward_load`) takes tiles of queries (from a queue, or by stride), writes what there is to do into a *record*,
and brings queries, keys and values by TMA; each multiplying warpgroup takes 64 rows, whose output and softmax stay in its registers. A
step has two products in flight: Q K^T of its own tile of keys, and P V of the tile before, behind which the softmax hides; warpgroups take
turns at issuing (*ping-pong*), so that it hides behind the products of another too. The first tile of keys is always masked; then come
PARTIAL and then FULL ones.
The order of statements in `step` decides whether the compiler keeps the products asynchronous, and the registers free of spills.
"""
# ruff: noqa: RUF005, SIM102, SIM108
# (Triton specialises an `if`, long conditional expressions read badly, and shapes are added up by Gluon's compiler)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper import (
    INFINITY,
    LOG2E,
    meet,
    pass_by,
    spread_bits,
    tma_store,
    to_half,
)
from .hopper_forward_load import fetch, full_tile, masked_tile, produce
from .hopper_forward_plan import (
    APART,
    BITS,
    BLOCK_KV,
    BY_ROW,
    CONSUMER_REGISTERS,
    CONSUMERS,
    CROSSED,
    DTYPE,
    FACTOR,
    FIELDS,
    HEADS_APART,
    MAP_FORM,
    OUTPUT,
    PACK,
    PADDED_DIM,
    PADDED_V_DIM,
    PRODUCER_REGISTERS,
    Q_STAGES,
    QUERIES,
    ROWS,
    RUNS,
    SCORE,
    SCORES,
    SPLIT,
    STAGES,
    WIDE,
    WORDS,
)
from .hopper_forward_portion import leave_output, leave_sums, spans
from .hopper_forward_softmax import (
    changed_scores,
    finish,
    first_bits,
    fours,
    load_bounds,
    load_pattern,
    masked_scores,
    query_of,
    row_sums,
    score_context,
    softmax,
)
from .hopper_forward_wide import PARTS, Q_PARTS, V_PARTS, begin_output, begin_scores, end_output, no_output, store_parts, times


# ---- functions
@gluon.jit
def before_waiting(x):
    """`x`, which is not negative, such that all it is made of is computed before the next wait for products: a store that never happens
    stands between, as the assembler would move the wait up past arithmetic, but moves nothing past a store."""
    NEVER: gl.constexpr = "{.reg .pred p; .reg .b32 a; setp.lt.f32 p, $1, 0f00000000; mov.b32 a, 0; @p st.shared.f32 [a], $1;"
    return gl.inline_asm_elementwise(NEVER + " mov.b32 $0, $1;}", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def unlike(x):
    """`x`, the same in all threads, such that the assembler does not know this. That of CUDA 12.8 merges what two loops compute from one
    number before they begin, into the place before the first of them, which is not passed where that loop has nothing to do."""
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def step(q, rings, bars, p, acc, total, peak, at, tile, pattern, bounds, kv_len, score, scale, W: gl.constexpr, MASKED: gl.constexpr):
    """A tile of keys: Q K^T, together with P V of the tile before, at whose ends stand the softmax and the new P."""
    k_ring, v_ring, cut_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    slot = at % STAGES
    phase = (at // STAGES) & 1
    before = (at - 1) % STAGES
    phase_before = ((at - 1) // STAGES) & 1
    if MASKED:
        bits = load_pattern(bounds, pattern, WORDS, W)  # they come while the product is made
    mbarrier.wait(k_full.index(slot), phase)
    meet(8 + W, 256)
    if WIDE:
        s_flying = begin_scores(q, k_ring, slot)
        mbarrier.wait(v_full.index(before), phase_before)
        acc_flying = begin_output(p, v_ring, before, acc)
    else:
        zeros = gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES)
        k = k_ring.index(slot).reshape([BLOCK_KV, PADDED_DIM]).permute((1, 0))
        s_flying = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), phase_before)
        acc_flying = warpgroup_mma(p, v_ring.index(before).reshape([BLOCK_KV, PADDED_V_DIM]), acc, is_async=True)
    pass_by(8 + (W + 1) % CONSUMERS, 256)
    if WIDE:
        s = warpgroup_mma_wait(V_PARTS, deps=[s_flying])
    else:
        s = warpgroup_mma_wait(1, deps=[s_flying])
    if not (CROSSED and MASKED):
        mbarrier.arrive(k_empty.index(slot))
    if SCORE:
        s = changed_scores(s, score, tile)
    if MASKED:
        if BITS:
            FOURS: gl.constexpr = fours().type.layout
            bounds = spread_bits(bits, FOURS)
        s = masked_scores(s, bounds, cut_ring.index(slot), tile, kv_len, W)
    if CROSSED and MASKED:  # the cuts have been read
        mbarrier.arrive(k_empty.index(slot))
    new_p, peak, shrink = softmax(s, peak, scale, MASKED)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + row_sums(new_p)
    if CONSUMERS == 2 and not MASKED:  # three have not the registers to hide the softmax behind P V; masks cost more than that brings
        total = before_waiting(total)
    if WIDE:
        acc = end_output(acc_flying)
    else:
        acc = warpgroup_mma_wait(0, deps=[acc_flying])
    mbarrier.arrive(v_empty.index(before))
    p = gl.convert_layout(to_half(new_p, DTYPE), FACTOR)
    if WIDE:
        acc = times(acc, shrink)
    else:
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
    return p, acc, total, peak


@gluon.jit
def begin_tile(m, b, h, pattern, q_ring, k_ring, q_full, k_full, number, at, rows, W: gl.constexpr):
    """(what masks the rows of tile `number`, the words of its first tile of keys, Q K^T of that in flight). Where there is no such tile,
    the product is of no use, and nothing is waited for."""
    bounds = load_bounds(rows, b, h, gl.maximum(m, 0) * QUERIES + W * APART)
    bits = load_pattern(bounds, pattern, gl.where(pattern >= 0, WORDS, 0), W)
    buffer = (number % Q_STAGES) * CONSUMERS + W
    slot = at % STAGES
    mbarrier.wait(q_full.index(buffer), (number // Q_STAGES) & 1, pred=m >= 0)
    mbarrier.wait(k_full.index(slot), (at // STAGES) & 1, pred=m >= 0)
    meet(8 + W, 256)
    if WIDE:
        flying = begin_scores((q_ring, buffer * Q_PARTS), k_ring, slot)
    else:
        q = q_ring.index(buffer).reshape([ROWS, PADDED_DIM])
        k = k_ring.index(slot).reshape([BLOCK_KV, PADDED_DIM]).permute((1, 0))
        zeros = gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES)
        flying = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    pass_by(8 + (W + 1) % CONSUMERS, 256)
    return bounds, bits, flying


@gluon.jit
def consume(
    W: gl.constexpr, out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found
):
    """A warpgroup that multiplies: rows [64 W, 64 W + 64) of every tile of queries, or those of its own heads."""
    k_ring, v_ring, cut_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    q_full, q_empty = q_bars
    heads, q_len, kv_len = lengths
    lse, sinks, peaks, left, portions, all_rows = found
    at = 0
    number = 0
    if W == CONSUMERS - 1:
        pass_by(8, 256)  # the first warpgroup begins
    m, b, h, first, part_at, part, full_at, full, pattern, portion = fetch(records, record_bars[0], record_bars[1], number)
    if not WIDE:
        bounds, bits, s_flying = begin_tile(m, b, h, pattern, q_ring, k_ring, q_full, k_full, number, at, rows, W)
        s = warpgroup_mma_wait(0, deps=[s_flying])
    while m >= 0:
        start = m * QUERIES + W * APART
        row = query_of(start, BY_ROW)
        h += W * HEADS_APART
        score = score_context(score_mods, b, h, row, scale)
        if SPLIT:
            first_part, last_part, first_full, last_full = spans(portion, portions, part, full)
        else:
            first_part, last_part, first_full, last_full = 0, part, 0, full
        following, next_pattern = masked_tile(tile_map, first_part, part_at, part, full_at, full)
        buffer = (number % Q_STAGES) * CONSUMERS + W
        slot = at % STAGES
        if WIDE:
            q = (q_ring, buffer * Q_PARTS)
            bounds, bits, s_flying = begin_tile(m, b, h, pattern, q_ring, k_ring, q_full, k_full, number, at, rows, W)
            s = warpgroup_mma_wait(0, deps=[s_flying])
        else:
            q = q_ring.index(buffer).reshape([ROWS, PADDED_DIM])
        if SCORE:
            s = changed_scores(s, score, first)
        kept = bounds
        if BITS:
            kept = first_bits(bits, pattern, first, kv_len)
        s = masked_scores(s, kept, cut_ring.index(slot), first, kv_len, W)
        mbarrier.arrive(k_empty.index(slot))
        peak = gl.full([ROWS], -INFINITY, gl.float32, BY_ROW)
        new_p, peak, _ = softmax(s, peak, scale, True)
        total = row_sums(new_p)
        p = gl.convert_layout(to_half(new_p, DTYPE), FACTOR)
        if WIDE:
            acc = no_output()
        else:
            acc = gl.full([ROWS, PADDED_V_DIM], 0.0, gl.float32, OUTPUT)
        at += 1

        if MAP_FORM != "none":
            for i in range(first_part, last_part):
                tile, pattern = following, next_pattern
                following, next_pattern = masked_tile(tile_map, i + 1, part_at, part, full_at, full)
                p, acc, total, peak = step(q, rings, bars, p, acc, total, peak, at, tile, pattern, bounds, kv_len, score, scale, W, True)
                at += 1
        if not WIDE:
            q = q_ring.index(unlike(buffer)).reshape([ROWS, PADDED_DIM])
        for i in range(first_full, last_full):
            tile = 0
            if SCORE:
                tile = full_tile(tile_map, i, full_at, full)
            p, acc, total, peak = step(q, rings, bars, p, acc, total, peak, at, tile, 0, bounds, kv_len, score, scale, W, False)
            at += 1

        if not WIDE:
            mbarrier.arrive(q_empty.index(buffer))
        before = (at - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
        if WIDE:
            acc_flying = begin_output(p, v_ring, before, acc)
        else:
            acc_flying = warpgroup_mma(p, v_ring.index(before).reshape([BLOCK_KV, PADDED_V_DIM]), acc, is_async=True)
        number += 1
        if SPLIT:
            place = portion.to(gl.int64) * all_rows + (b * heads + h).to(gl.int64) * q_len
        else:
            last_b, last_h = b, h
        if not WIDE:  # the first product of the next tile is made while this one is stored
            m, b, h, first, part_at, part, full_at, full, pattern, portion = fetch(records, record_bars[0], record_bars[1], number)
            bounds, bits, s_flying = begin_tile(m, b, h, pattern, q_ring, k_ring, q_full, k_full, number, at, rows, W)
        sums = gl.convert_layout(gl.sum(total, axis=1), BY_ROW)
        if SPLIT:
            leave_sums(left, place, sums, peak, scale, row, q_len)
        else:
            share = finish(sums, peak, scale, sinks, peaks, lse, last_b * heads + last_h, last_h, row, q_len)
        if WIDE:
            acc = end_output(acc_flying)
            mbarrier.arrive(v_empty.index(before))
            if SPLIT:
                leave_output(left, place, acc, start, q_len)
            else:
                store_parts(out, last_b, last_h, start, times(acc, share), out_ring, buffer * Q_PARTS)
            mbarrier.arrive(q_empty.index(buffer))
            m, b, h, first, part_at, part, full_at, full, pattern, portion = fetch(records, record_bars[0], record_bars[1], number)
        else:
            if not SPLIT:
                tma.store_wait(0)  # the output of the tile before has left
            acc = warpgroup_mma_wait(1, deps=[acc_flying])
            mbarrier.arrive(v_empty.index(before))
            if SPLIT:
                leave_output(left, place, acc, start, q_len)
            else:
                acc = acc * gl.convert_layout(share, gl.SliceLayout(1, OUTPUT))[:, None]
                tile_out = out_ring.index(W)
                tile_out.reshape([ROWS, PADDED_V_DIM]).store(to_half(acc, DTYPE))
                fence_async_shared()
                tma_store(out, [last_b, last_h, start, 0], tile_out)
            s = warpgroup_mma_wait(0, deps=[s_flying])
    if not WIDE:
        tma.store_wait(0)
    if W == 0:
        meet(8, 256)  # the last warpgroup has passed once more


@gluon.jit
def consume_0(out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found):
    consume(0, out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found)


@gluon.jit
def consume_1(out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found):
    consume(1, out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found)


@gluon.jit
def consume_2(out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found):
    consume(2, out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, rows, lengths, scale, score_mods, found)


@gluon.jit
def barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """So many barriers in shared memory, each of which waits for COUNT arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=COUNT)
    return made


# lengths, counts and strides are not specialised on: another length must not compile another kernel
@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "tiles", "rows", "resident", "heads", "group", "kv_batch",
        "stride_rb", "stride_rh", "stride_mb", "stride_mh", "stride_cb", "stride_ch", "level", "portions", "all_rows",
    ]
)  # fmt: skip
def attention_forward(
    q, k, v, out, lse,  # TMA descriptors; lse float32 [B, Hq, Q]
    scale, q_len, kv_len, tiles, rows, resident, heads, group, kv_batch,  # `rows` tile rows; `group` query heads share a key head
    score_tables, score_numbers,  # tuples: see `pack`
    row_starts, row_stops, stride_rb, stride_rh,  # row intervals int32 [.., .., Q, PIECES], strides in rows
    column_starts, column_stops, stride_cb, stride_ch,  # intervals of queries int32 [.., .., KV, 1], strides in keys
    ranges, counts, offsets, index, stride_mb, stride_mh,  # the tile map, strides in tile rows
    patterns, words,  # the numbers of PARTIAL tiles' bits, beside `index`, and the bits, int32 [.., QUERIES, WORDS]
    order, level,  # as `lists.order_lines` gives it, and which of its levels says how many tile rows are long; or None
    queue,  # int32 [1], 0; or None
    broken,  # int32: 0 where the map's intervals, or bits, hold; 1 where they fail, and no kernel before has done the work
    sinks, peaks,  # [Hq], a logit of each head that has no value; float32 [B, Hq, Q], for the greatest scores; either may be None
    portion_sums, portion_totals, portion_heights,  # SPLIT: float32 [portions, B, Hq, Q, Dv], and twice [portions, B, Hq, Q]; or None
    portions, all_rows,  # and among how many programs tile rows are split, and B * Hq * Q
):  # fmt: skip
    """Tile rows of the output: as many as the schedule gives this program."""
    if RUNS == "hold":
        if gl.load(broken) != 0:
            tiles = 0
    if RUNS == "fail":
        if gl.load(broken) != 1:
            tiles = 0
    if not SCORE:
        scale = scale * LOG2E
    if WIDE:
        q_ring = gl.allocate_shared_memory(q.dtype, [CONSUMERS * Q_STAGES * Q_PARTS] + q.block_type.shape, q.layout)
        out_ring = q_ring
        k_ring = gl.allocate_shared_memory(k.dtype, [STAGES * PARTS] + k.block_type.shape, k.layout)
        v_ring = gl.allocate_shared_memory(v.dtype, [STAGES * V_PARTS] + v.block_type.shape, v.layout)
    else:
        q_ring = gl.allocate_shared_memory(q.dtype, [CONSUMERS * Q_STAGES] + q.block_type.shape, q.layout)
        out_ring = gl.allocate_shared_memory(out.dtype, [CONSUMERS] + out.block_type.shape, out.layout)
        k_ring = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
        v_ring = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    cut_ring = k_ring
    if CROSSED:
        cut_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_KV], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    records = gl.allocate_shared_memory(gl.int32, [2, FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_bars = (barriers(CONSUMERS * Q_STAGES, 1), barriers(CONSUMERS * Q_STAGES, 1))
    record_bars = (barriers(2, 1), barriers(2, CONSUMERS))
    # keys are there when TMA has brought them, and the loading warp their cuts
    bars = (barriers(STAGES, 1 + CROSSED), barriers(STAGES, CONSUMERS), barriers(STAGES, 1), barriers(STAGES, CONSUMERS))
    fence_async_shared()
    rings = (k_ring, v_ring, cut_ring)
    tile_map = (ranges, counts, offsets, index, stride_mb, stride_mh, patterns)
    bounds = (row_starts, row_stops, stride_rb, stride_rh, q_len, words)
    work = (
        out, rings, q_ring, out_ring, records, bars, q_bars, record_bars, tile_map, bounds,
        (heads, q_len, kv_len), scale, (score_tables, score_numbers),
        (lse, sinks, peaks, (portion_sums, portion_totals, portion_heights), portions, all_rows),
    )  # fmt: skip
    loading = (
        (q, k, v), rings, q_ring, records, bars, q_bars, record_bars,
        (tiles, rows, resident, heads // PACK, kv_len, order, level, portions), tile_map,
        (column_starts, column_stops, stride_cb, stride_ch, kv_len), group, kv_batch, queue,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([(consume_0, work), (consume_1, work), (produce, loading)], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize(
            [(consume_0, work), (consume_1, work), (consume_2, work), (produce, loading)],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
