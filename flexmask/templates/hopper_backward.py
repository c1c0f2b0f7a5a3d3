"""Backward attention on Hopper GPUs, in Gluon: all three gradients in one kernel, one program a block column of BLOCK_KV keys.

Two warpgroups hold the dk and dv of 64 keys each; one warp more fetches, by TMA into a ring of STAGES slots, the block rows of queries and
of dout that the column keeps, with their two numbers from `row_terms`; one barrier says that all of a slot is there. For each of them a
warpgroup computes, keys down and queries across,
    s = k q^T, p = exp2(s - lse), dp = v dout^T - delta, ds = p * dp, dv += p dout, dk += ds q
(a score mod changes s, and ds by its derivative, which p is multiplied by as soon as its copy for dv is made)
with p and ds as operands in registers, hands its ds to the other through shared memory, and computes its half of dq = ds^T k. Another warp
adds that to a float32 buffer (`hopper_backward_add`), which lies in the order of the registers, and `gather_queries` reads it back as rows.
So runs may differ in the last bits of dq, but for DETERMINISTIC kernels, where columns wait for their turn to add
(`hopper_backward_turns`).

Whoever fetches (`hopper_backward_load`) walks the map and leaves a record beside each block row: where it begins, which tile of the buffer
its dq is added to, what to do with it, and which entry of the tables of intervals, or which pattern of bits, is meant. Every program takes
at least one step, as products that may be skipped are not made side by side: a column that keeps nothing masks one block row away. Bits
come by TMA too.
`assemble_hopper_backward` joins this module with those it imports from, and puts the plan's constants and the mods in place of
`hopper_backward_plan`'s.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .backward import is_idle
from .hopper import LOG2E, find_turn, in_fours, join, long_lines, meet, tma_store, to_half
from .hopper_backward_add import add_dq, add_shares, await_last, hand_over
from .hopper_backward_load import draw_number, field, produce
from .hopper_backward_plan import (
    BITS,
    BLOCK_KV,
    BLOCK_Q,
    CONSUMER_REGISTERS,
    CROSSED,
    DETERMINISTIC,
    FIELDS,
    HEAD_DIM,
    MAP_FORM,
    NO_MORE,
    PADDED_DIM,
    PARTIAL,
    PIECES,
    PRODUCER_REGISTERS,
    RUNS,
    SCORE,
    STAGES,
)
from .hopper_backward_weigh import kept_words, look_ahead, mask_tile, weigh

# ---- the warpgroups that multiply


@gluon.jit
def issue_scores(k_w, q_s, slot, S_LAYOUT: gl.constexpr):
    """s = k q^T of 64 keys, not waited for."""
    zero = gl.full([64, BLOCK_Q], 0.0, gl.float32, S_LAYOUT)
    queries = q_s.index(slot).reshape([BLOCK_Q, PADDED_DIM]).permute((1, 0))
    return warpgroup_mma(k_w, queries, zero, use_acc=False, is_async=True)


@gluon.jit
def issue_dq(ds_s, ds_slot, k_s, WG: gl.constexpr, DQ_LAYOUT: gl.constexpr):
    """This warpgroup's half of dq = ds^T k over the keys of both, not waited for: half of the columns, or of the rows where there are
    but 64 columns."""
    zero = gl.full([64, 64], 0.0, gl.float32, DQ_LAYOUT)
    if PADDED_DIM == 128:
        a0 = ds_s.index(ds_slot * 2).permute((1, 0))
        a1 = ds_s.index(ds_slot * 2 + 1).permute((1, 0))
        b0 = k_s.index(0).reshape([64, PADDED_DIM]).slice(WG * 64, 64, dim=1)
        b1 = k_s.index(1).reshape([64, PADDED_DIM]).slice(WG * 64, 64, dim=1)
    else:
        a0 = ds_s.index(ds_slot * 2).slice(WG * 64, 64, dim=1).permute((1, 0))
        a1 = ds_s.index(ds_slot * 2 + 1).slice(WG * 64, 64, dim=1).permute((1, 0))
        b0 = k_s.index(0).reshape([64, PADDED_DIM])
        b1 = k_s.index(1).reshape([64, PADDED_DIM])
    half = warpgroup_mma(a0, b0, zero, use_acc=False, is_async=True)
    return warpgroup_mma(a1, b1, half, is_async=True)


@gluon.jit
def begin_weights(shift_s, slot, S_LAYOUT: gl.constexpr):
    """What dp begins with, so that delta needs no registers later."""
    shift = shift_s.index(slot).load(gl.SliceLayout(0, S_LAYOUT))
    begun, _ = gl.broadcast(shift[None, :], gl.full([64, BLOCK_Q], 0.0, gl.float32, S_LAYOUT))
    return begun


@gluon.jit
def apart(x):
    """`x`, each element in a register of its own, written here: where registers that a product begins with are written while another one is
    in flight, the assembler waits for that first."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def take_step(dk, dv, it, k_w, v_w, kv0, bufs, bars, scale_log2, mods, keys_of, sums, WG: gl.constexpr,
              S_LAYOUT: gl.constexpr, A_LAYOUT: gl.constexpr, DQ_LAYOUT: gl.constexpr):  # fmt: skip
    """One block row's share of dk (but for the scale) and dv, and this column's share of the block row's dq (likewise)."""
    q_s, do_s, lse_s, shift_s, rec_s, _, k_s, _, ds_s, _, _ = bufs
    _, _, empty, turn_come, turn_taken = bars
    COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    REC: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [4], [0])
    slot = it % STAGES
    if SCORE:
        ahead = look_ahead(rec_s.index(slot).load(REC), mods, kv0, REC)
    EARLY: gl.constexpr = CROSSED or PIECES > 1  # for these it pays to have both products in flight; else the wait was shorter
    if EARLY:
        shift = apart(begin_weights(shift_s, slot, S_LAYOUT))
    s_sent = issue_scores(k_w, q_s, slot, S_LAYOUT)
    if not EARLY:
        shift = begin_weights(shift_s, slot, S_LAYOUT)
    do_w = do_s.index(slot).reshape([BLOCK_Q, PADDED_DIM])
    dp_sent = warpgroup_mma(v_w, do_w.permute((1, 0)), shift, use_acc=True, is_async=True)
    lse = lse_s.index(slot).load(COL)
    record = rec_s.index(slot).load(REC)
    start = field(record, 0, REC)
    if DETERMINISTIC:
        tile = field(record, 1, REC)
    state = field(record, 2, REC)
    lead = field(record, 3, REC)
    if SCORE:
        words = gl.full([64, 1, 4, 1], -1, gl.int32, in_fours(shift).type.layout)
        if state == PARTIAL:
            words = kept_words(bufs, slot, keys_of, lead, start, kv0, WG, S_LAYOUT)
    s = warpgroup_mma_wait(1, deps=[s_sent])
    if SCORE:
        half, weight = weigh(s, words, lse_s.index(slot), start, mods, ahead, 0, q_s.dtype)
    else:
        weight = gl.exp2(s * scale_log2 - lse[None, :])
        if state == PARTIAL:
            weight = mask_tile(weight, bufs, slot, keys_of, lead, start, kv0, WG, S_LAYOUT)
        half = to_half(weight, q_s.dtype)
    p_op = gl.convert_layout(half, A_LAYOUT)
    dv_sent = warpgroup_mma(p_op, do_w, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp_sent])
    ds = to_half(weight * dp, q_s.dtype)
    ds_slot = it & 1
    ds_s.index(ds_slot * 2 + WG).store(ds)
    fence_async_shared()
    meet(8, 256)
    dq_sent = issue_dq(ds_s, ds_slot, k_s, WG, DQ_LAYOUT)
    dk_sent = warpgroup_mma(gl.convert_layout(ds, A_LAYOUT), q_s.index(slot).reshape([BLOCK_Q, PADDED_DIM]), dk, is_async=True)
    dv, dq = warpgroup_mma_wait(1, deps=[dv_sent, dq_sent])
    if DETERMINISTIC:
        mbarrier.wait(turn_come.index(slot), (it // STAGES) & 1)
        add_dq(dq, tile, sums, WG)
        join()
        mbarrier.arrive(turn_taken.index(slot))
    else:
        hand_over(dq, bufs[10].index(WG), WG)
    dk = warpgroup_mma_wait(0, deps=[dk_sent])
    mbarrier.arrive(empty.index(slot))
    return dk, dv


@gluon.jit
def consume(WG: gl.constexpr, descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    """The dk and dv of 64 keys: steps until a record says that there are no more."""
    dk_desc, dv_desc = descs[4], descs[5]
    rec_s, k_s, v_s = bufs[4], bufs[6], bufs[7]
    kv_full, full = bars[0], bars[1]
    n, kv_b, kv_h = place[0], place[1], place[2]
    dq_sums, _, scale_log2, scale, score_tables, score_numbers = sums
    mods = (score_tables, score_numbers, scale)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PADDED_DIM, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    REC: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [4], [0])
    kv0 = n * BLOCK_KV + WG * 64
    k_w = k_s.index(WG).reshape([64, PADDED_DIM])
    v_w = v_s.index(WG).reshape([64, PADDED_DIM])
    dv = gl.full([64, PADDED_DIM], 0.0, gl.float32, ACC)
    dk = gl.full([64, PADDED_DIM], 0.0, gl.float32, ACC)
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(full.index(0), 0)
    it = 0
    going = 1
    while going > 0:
        dk, dv = take_step(dk, dv, it, k_w, v_w, kv0, bufs, bars, scale_log2, mods, keys_of, dq_sums, WG, S_LAYOUT, A_LAYOUT, DQ_LAYOUT)
        it += 1
        mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
        going = NO_MORE - field(rec_s.index(it % STAGES).load(REC), 2, REC)
    if not DETERMINISTIC:
        await_last(WG)
    meet(8, 256)  # nobody reads the keys any more: their room takes dk, that of the values dv
    v_w.store(to_half(dv, k_s.dtype))
    k_w.store(to_half(dk * scale, k_s.dtype))
    fence_async_shared()
    tma_store(dv_desc, [kv_b, kv_h, kv0, 0], v_s.index(WG))
    tma_store(dk_desc, [kv_b, kv_h, kv0, 0], k_s.index(WG))
    tma.store_wait(0)


@gluon.jit
def consume_first(descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    consume(0, descs, bufs, bars, place, rows_of, keys_of, tile_map, sums)


@gluon.jit
def consume_second(descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    consume(1, descs, bufs, bars, place, rows_of, keys_of, tile_map, sums)


# ---- start of warps


@gluon.jit
def start_warps(given):
    """Two warpgroups that multiply, a warp that fetches, and one that adds."""
    gl.warp_specialize(
        [(consume_first, given), (consume_second, given), (produce, given), (add_shares, given)],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )


# ---- start


@gluon.jit
def stands_down(broken):
    """Whether this kernel's partner does the work."""
    idle = False
    if RUNS == "hold":
        idle = gl.load(broken) != 0
    if RUNS == "fail":
        idle = gl.load(broken) != 1
    return idle


@gluon.jit
def place_of(order, level, columns, heads, resident, numbers):
    """(place in the order of block columns, block column, batch entry, head) of this program; block columns in the given order, or the
    first one first, as under causal masks it has the most work; or in the order of their ranks. For each head an earlier place has an
    earlier program."""
    turns = long_lines(order, columns, level, True)
    i, head = find_turn(draw_number(numbers), turns, columns, resident, gl.num_programs(0) // columns)
    n = i
    if DETERMINISTIC and MAP_FORM == "list":
        n = columns - 1 - i
    elif order is not None:
        n = gl.load(order + i)
    return i, n, head // heads, head % heads


@gluon.jit
def rings(dtype: gl.constexpr, q_desc, k_desc, words_desc, dq_sums):
    """Shared memory: of each slot the queries, dout, their two numbers, the record and (crossed) the cuts; keys; values; two
    turns of ds of two warpgroups; of each slot the bits of its tile; two shares of dq."""
    VEC: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, PADDED_DIM], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_Q, PADDED_DIM], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, PADDED_DIM], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, PADDED_DIM], k_desc.layout)
    ds_s = gl.allocate_shared_memory(dtype, [4, 64, BLOCK_Q], DS)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], VEC)
    shift_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], VEC)
    rec_s = gl.allocate_shared_memory(gl.int32, [STAGES, FIELDS], VEC)
    cut_s = rec_s
    if CROSSED:
        cut_s = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_Q], VEC)
    words_s = rec_s
    if BITS:
        LINES: gl.constexpr = BLOCK_KV * BLOCK_Q // 32 // 256
        words_s = gl.allocate_shared_memory(gl.int32, [STAGES, 1, 1, LINES, 256], words_desc.layout)
    share_s = rec_s
    if not DETERMINISTIC:
        share_s = gl.allocate_shared_memory(gl.float32, [2, 16, 256], dq_sums.layout)
    return q_s, do_s, lse_s, shift_s, rec_s, cut_s, k_s, v_s, ds_s, words_s, share_s


@gluon.jit
def barriers():
    """Keys and values; filled and emptied slots, which both warpgroups empty, and the warp that reads their records too. Where columns take
    turns, those that have come and been taken."""
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # what TMA brings, and what the warp that fetches writes
        mbarrier.init(empty.index(i), count=3)
    come = full
    taken = full
    if DETERMINISTIC:
        come = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(come.index(i), count=1)
            mbarrier.init(taken.index(i), count=2)
    fence_async_shared()
    return kv_full, full, empty, come, taken


# lengths and counts are not specialised on: another length must not compile another kernel
@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "terms_len", "columns", "heads", "group", "readers", "resident", "stride_ib", "stride_ih", "stride_mb",
        "stride_mh", "level",
    ]
)  # fmt: skip
def attention_backward(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, dq_sums, lse, shift,  # float32 sums of dq (DETERMINISTIC), or a descriptor of them
    scale, q_len, kv_len, terms_len, columns, heads, group, readers, resident,  # `group` query heads share a key head, of `heads` in all
    score_tables, score_numbers,  # tuples: see `pack`
    starts, stops, stride_ib, stride_ih,  # intervals of keys (crossed: of queries), int32 [.., .., length, PIECES]; strides in entries
    ranges, counts, offsets, index, stride_mb, stride_mh,  # the tile map by columns, strides in block columns
    patterns, words_desc,  # the numbers of PARTIAL tiles' bits, beside `index`, and the bits
    order, level,  # as `lists.order_lines` gives it, and which of its levels says how many block columns are long; or None
    broken,  # int32: 0 where the map's intervals hold
    ranks, numbers,  # ranks of block columns; int32 zeros: how many programs have begun, have added to each tile of dq
):  # fmt: skip
    """One block column of dk and dv, over its `readers`: the query heads, of all batch entries where K has one for them; and its share of
    their dq."""
    if stands_down(broken):
        return
    i, n, kv_b, kv_h = place_of(order, level, columns, heads, resident, numbers)
    bufs = rings(q_desc.dtype, q_desc, k_desc, words_desc, dq_sums)
    bars = barriers()
    descs = (q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, words_desc)
    place = (n, kv_b, kv_h, heads, group, readers, (ranks, i, columns))
    rows_of = (lse, shift, terms_len, q_len, starts, stops)
    keys_of = (kv_len, stride_ib, stride_ih, starts, stops, q_len)
    tile_map = ((ranges, counts, offsets, index, patterns), stride_mb, stride_mh)
    sums = (dq_sums, numbers, scale * LOG2E, scale, score_tables, score_numbers)
    start_warps((descs, bufs, bars, place, rows_of, keys_of, tile_map, sums))


# ---- dq


@triton.jit(do_not_specialize=["q_len", "terms_len"])
def gather_queries(sums, dq, scale, q_len, terms_len, broken):
    """A block row of dq [B * Hq, Q, HEAD_DIM] from the sums, which lie in the order of registers, terms_len rows a head. The last ones
    first: those were added to last, and lie in the L2 cache."""
    if is_idle(broken):
        return
    blocks = tl.cdiv(q_len, BLOCK_Q)
    turn = tl.num_programs(0) - 1 - tl.program_id(0)
    head, m = turn // blocks, turn % blocks
    for w in tl.static_range(2):
        at = (head.to(tl.int64) * (terms_len // BLOCK_Q) + m) * (BLOCK_Q * PADDED_DIM) + w * 4096
        x = tl.load(sums + at + tl.arange(0, 4096))
        x = tl.reshape(x, [8, 4, 8, 4, 2, 2])  # column / 8, warp, row % 8, column / 2 % 4, row / 8 % 2, column % 2
        x = tl.reshape(tl.permute(x, (1, 4, 2, 0, 3, 5)), [64, 64]) * scale
        rows = m * BLOCK_Q + tl.arange(0, 64)
        columns = tl.arange(0, 64)
        if PADDED_DIM == 128:
            columns += w * 64
        else:
            rows += w * 64
        target = dq + (head.to(tl.int64) * q_len + rows[:, None]) * HEAD_DIM + columns[None, :]
        tl.store(target, x.to(dq.dtype.element_ty), mask=(rows < q_len)[:, None] & (columns < HEAD_DIM)[None, :])
