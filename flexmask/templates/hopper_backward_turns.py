"""The warps that put the additions to dq in order, in deterministic Hopper backward kernels.

Every tile of dq has a number in global memory: how many block columns have added their share. (Before these stands one: how many programs
have begun.) A column's rank is how many go before it, of
those that keep the tile; it adds when the number is its rank. Columns go in the order in which their programs begin (each draws a number
then), so a program waits only for programs that have begun, and none waits for ever. One warp waits for the turns of a program's steps,
another passes them on when both warpgroups have added, so that neither the wait for other programs' additions nor that for the own ones to
arrive is spent by those that multiply.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_backward import consume_first, consume_second
from .hopper_backward_load import field, produce
from .hopper_backward_plan import CONSUMER_REGISTERS, FIELDS, NO_MORE, PRODUCER_REGISTERS, STAGES

# ---- the warps that keep order


@gluon.jit
def await_number(address, number):
    """Until `number` columns have added to a tile."""
    gl.inline_asm_elementwise(
        "{ .reg .pred waits; .reg .b32 found; again: ld.acquire.gpu.global.b32 found, [$1]; "
        "setp.ne.b32 waits, found, $2; @waits bra again; mov.b32 $0, found; }",
        "=r,l,r,~{memory}", [address.to(gl.int64), number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def count_up(address):
    """One more column has added, and whoever sees that sees what it has added."""
    gl.inline_asm_elementwise(
        "{ .reg .b32 lane; .reg .pred first; mov.u32 lane, %laneid; setp.eq.b32 first, lane, 0; "
        "@first red.release.gpu.global.add.u32 [$1], 1; mov.b32 $0, 0; }",
        "=r,l,~{memory}", [address.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def turn_at(bufs, it):
    """(what to do, tile of dq, rank) of step `it`."""
    REC: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [1], [0])
    record = bufs[4].index(it % STAGES).load(REC)
    return field(record, 2, REC), field(record, 1, REC), field(record, 6, REC)


@gluon.jit
def await_turns(descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    """Says for each step when it is its turn. A step that adds nothing (its rank is -1) has none, and the first one's has come."""
    full, turn_come, numbers = bars[1], bars[3], sums[1]
    mbarrier.wait(full.index(0), 0)
    state, tile, rank = turn_at(bufs, 0)
    it = 0
    while state != NO_MORE:
        if rank > 0:
            await_number(numbers + (1 + tile), rank)
        mbarrier.arrive(turn_come.index(it % STAGES))
        it += 1
        mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
        state, tile, rank = turn_at(bufs, it)


@gluon.jit
def pass_turns(descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    """Passes each step's turn on when it has been taken."""
    full, empty, turn_taken, numbers = bars[1], bars[2], bars[4], sums[1]
    mbarrier.wait(full.index(0), 0)
    state, tile, rank = turn_at(bufs, 0)
    it = 0
    while state != NO_MORE:
        mbarrier.wait(turn_taken.index(it % STAGES), (it // STAGES) & 1)
        mbarrier.arrive(empty.index(it % STAGES))  # the record has been read, so it may give way
        if rank >= 0:
            count_up(numbers + (1 + tile))
        it += 1
        mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
        state, tile, rank = turn_at(bufs, it)


@gluon.jit
def start_warps(given):
    """The five kinds of warps."""
    gl.warp_specialize(
        [(consume_first, given), (consume_second, given), (produce, given), (await_turns, given), (pass_turns, given)],
        [4, 1, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
