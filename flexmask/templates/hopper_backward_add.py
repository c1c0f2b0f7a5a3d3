"""How a Hopper backward kernel adds its shares of dq to a float32 buffer, which lies in the order of the registers that hold them.

The warpgroups leave their shares in shared memory to a warp that has TMA add them. They meet it at named barriers: with those of
shared memory, which take a loop to wait for, the assembler spilled thirty numbers in each step. Where columns take turns
(`hopper_backward_turns`) the warpgroups add their registers themselves.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .hopper import meet, pass_by
from .hopper_backward_load import field
from .hopper_backward_plan import BLOCK_Q, FIELDS, NO_MORE, PADDED_DIM, STAGES

# ---- additions to dq


@gluon.jit
def add_four(addresses, x):
    """Adds four neighbouring registers of float32 to global memory, at the address of the first."""
    gl.inline_asm_elementwise(
        "red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11}; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f", [addresses, x], dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def add_dq(dq, tile, sums, WG: gl.constexpr):
    """Adds a [64, 64] piece of dq to its tile of the buffer, which holds two such pieces in the order of their registers."""
    LAYOUT: gl.constexpr = dq.type.layout
    row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    col = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))[None, :]
    at = (row // 16) * 128 + (row % 8) * 16 + ((row // 8) % 2) * 2 + (col // 8) * 512 + ((col // 2) % 4) * 4 + col % 2
    piece = tile.to(gl.int64) * (BLOCK_Q * PADDED_DIM) + WG * 4096
    add_four(sums.to(gl.int64) + piece * 4 + (at * 4).to(gl.int64), dq)


@gl._core.builtin
def add_of_36(tensor_desc, coord, src, _semantic=None):
    """What Triton 3.8 calls `async_atomic_add`; before, its compiler had it and Gluon did not show it."""
    from triton._C.libtriton import ir

    place = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, place, src.handle)


tma_add = getattr(tma, "async_atomic_add", None) or add_of_36


# named barriers of a warpgroup and the warp that adds, for each warpgroup: its share has been read; its share is there
SHARE_READ = gl.constexpr(10)
SHARE_THERE = gl.constexpr(12)
BOTH = gl.constexpr(160)


@gluon.jit
def hand_over(dq, share, WG: gl.constexpr):
    """Leaves this warpgroup's [64, 64] piece of dq to the warp that adds, once the piece of the step before has been read."""
    meet(SHARE_READ + WG, BOTH)
    x = gl.reshape(dq, [4, 2, 8, 8, 4, 2])  # warp, row / 8 % 2, row % 8, column / 8, column / 2 % 4, column % 2
    share.store(gl.reshape(gl.permute(x, (3, 0, 2, 4, 1, 5)), [16, 256]))
    fence_async_shared()
    pass_by(SHARE_THERE + WG, BOTH)


@gluon.jit
def await_last(WG: gl.constexpr):
    """Until the piece of the last step has been read, which the warp that adds says as after every other."""
    meet(SHARE_READ + WG, BOTH)


@gluon.jit
def add_shares(descs, bufs, bars, place, rows_of, keys_of, tile_map, sums):
    """The warp that adds: of each step both warpgroups' pieces, to the tile of the buffer that the record names."""
    full, empty = bars[1], bars[2]
    REC: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [1], [0])
    for w in gl.static_range(2):
        pass_by(SHARE_READ + w, BOTH)  # there is none yet
    it = 0
    mbarrier.wait(full.index(0), 0)
    record = bufs[4].index(0).load(REC)
    while field(record, 2, REC) != NO_MORE:
        line = field(record, 1, REC) * (BLOCK_Q * PADDED_DIM // 256)
        mbarrier.arrive(empty.index(it % STAGES))  # the record has been read, so it may give way
        for w in gl.static_range(2):
            meet(SHARE_THERE + w, BOTH)
            tma_add(sums[0], [line + w * 16, 0], bufs[10].index(w))
        tma.store_wait(0)
        for w in gl.static_range(2):
            pass_by(SHARE_READ + w, BOTH)
        it += 1
        mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
        record = bufs[4].index(it % STAGES).load(REC)
