"""Hopper forward kernels for head dims beyond 128: tiles lie in parts of as many columns as a power of two allows."""
# ruff: noqa: SIM108
# (long conditional expressions read badly)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper import join, tma_load, tma_store, to_half
from .hopper_forward_plan import BLOCK_KV, DTYPE, OUTPUT, PADDED_DIM, PADDED_V_DIM, PART, ROWS, SCORES

# ---- functions of wide plans
# parts of keys, of values, and of a place that holds queries first and their output afterwards
PARTS = gl.constexpr(PADDED_DIM.value // PART.value)
V_PARTS = gl.constexpr(PADDED_V_DIM.value // PART.value)
Q_PARTS = gl.constexpr(max(PARTS.value, V_PARTS.value))


@gluon.jit
def load_parts(source, b, h, row, full, ring, at, COUNT: gl.constexpr):
    """Bring a tile that begins at `row`, part by part, to places from `at` on of a ring."""
    for i in gl.static_range(COUNT):
        tma_load(source, [b, h, row, i * PART], full, ring.index(at + i))


@gluon.jit
def begin_scores(q, k_ring, slot):
    """Q K^T in flight, added up over the parts; `q` is a ring and the place of the queries in it."""
    q_ring, at = q
    flying = gl.full([ROWS, BLOCK_KV], 0.0, gl.float32, SCORES)
    for i in gl.static_range(PARTS):
        k = k_ring.index(slot * PARTS + i).reshape([BLOCK_KV, PART]).permute((1, 0))
        flying = warpgroup_mma(q_ring.index(at + i).reshape([ROWS, PART]), k, flying, use_acc=i > 0, is_async=True)
    return flying


@gluon.jit
def no_output():
    """The parts of an output to which nothing has been added."""
    parts = ()
    for _ in gl.static_range(V_PARTS):
        parts += (gl.full([ROWS, PART], 0.0, gl.float32, OUTPUT),)
    return parts


@gluon.jit
def begin_output(p, v_ring, slot, acc):
    """P V in flight, a product a part."""
    flying = ()
    for i in gl.static_range(V_PARTS):
        v = v_ring.index(slot * V_PARTS + i).reshape([BLOCK_KV, PART])
        flying += (warpgroup_mma(p, v, acc[i], is_async=True),)
    return flying


@gluon.jit
def end_output(flying):
    """The parts of the output, when no product is in flight any more."""
    if V_PARTS == 1:
        parts = (warpgroup_mma_wait(0, deps=flying),)
    else:
        parts = warpgroup_mma_wait(0, deps=flying)
    return parts


@gluon.jit
def times(acc, factor):
    """The parts of the output, each row times its factor."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    parts = ()
    for i in gl.static_range(V_PARTS):
        parts += (acc[i] * factor,)
    return parts


@gluon.jit
def store_parts(out, b, h, start, acc, ring, at):
    """Store 64 rows of output by way of the place of their queries, which is free when all have come back from here."""
    for i in gl.static_range(V_PARTS):
        ring.index(at + i).reshape([ROWS, PART]).store(to_half(acc[i], DTYPE))
    fence_async_shared()
    for i in gl.static_range(V_PARTS):
        tma_store(out, [b, h, start, i * PART], ring.index(at + i))
    tma.store_wait(0)
    join()
