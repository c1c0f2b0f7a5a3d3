"""Gradients of the CPU backend against autograd through dense float64 attention."""

import math

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layouts, predicates
from torch.utils._python_dispatch import TorchDispatchMode

import flexmask
from flexmask import masks, reference, scores
from flexmask.ir import simplify
from flexmask.runtime import cpu, cpu_backward, cpu_walk
from flexmask.runtime.cpu_backward import Gradients, backward
from flexmask.runtime.store import default_store

SCALE = 0.3
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def inputs(q_len, kv_len, heads=2, kv_heads=2, d=8, dv=8, batch=2, kv_batch=None, dtype=torch.float64, seed=0):
    """q, k, v, dout, dlse."""
    generator = torch.Generator().manual_seed(seed)
    keys = (kv_batch or batch, kv_heads, kv_len)
    shapes = (batch, heads, q_len, d), (*keys, d), (*keys, dv), (batch, heads, q_len, dv), (batch, heads, q_len)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def mods(q, k, mask=None, score=None, blocks=None):
    """What forward and backward take besides tensors."""
    q_len, kv_len, given_ = q.shape[2], k.shape[2], {"scale": SCALE}
    if mask is not None:
        traced = mask.traced()
        given_["mask"] = default_store().facts(traced)[1].predicate, traced.tensors, traced.scalars
        given_["tile_map"] = mask.block_mask(q_len, kv_len, q.shape[0], q.shape[1], blocks or cpu.blocks(q_len, kv_len))
    if score is not None:
        traced = score.traced()
        given_["score"] = simplify(traced.expr), traced.tensors, traced.scalars
    return given_


def ours(tensors, mask=None, score=None, blocks=None, tables=None):
    q, k, v, dout, dlse = tensors
    given_ = mods(q, k, mask, score, blocks)
    out, lse, _ = cpu.forward(q, k, v, **given_)
    return backward(q, k, v, out, lse, dout, dlse, **given_, tables=tables)


def dense(tensors, mask=None, score=None):
    """The same by autograd through the reference."""
    q, k, v = (x.double().detach().requires_grad_() for x in tensors[:3])
    tables = {} if score is None else {i: t for i, t in enumerate(score.traced().tensors) if t.is_floating_point() and t.is_leaf}
    needed = [t.requires_grad_() for t in tables.values()]
    out, lse = reference.attention(q, k, v, mask, score, scale=SCALE, enable_gqa=True, return_lse=True)
    kept = lse.isfinite()
    loss = (out * tensors[3].double()).sum() + (lse[kept] * tensors[4].double()[kept]).sum()
    found = torch.autograd.grad(loss, [q, k, v, *needed], allow_unused=True, materialize_grads=True)
    for table in needed:
        table.requires_grad_(False)
    return Gradients(*found[:3], dict(zip(tables, found[3:], strict=True)))


def assert_near(found, want, tolerance):
    """Equal up to `tolerance` of the greatest number."""
    greatest = max(1.0, float(want.abs().amax())) if want.numel() else 1.0
    torch.testing.assert_close(found.double(), want.double(), atol=tolerance * greatest, rtol=tolerance)


def assert_same(found, want, tolerance=1e-10):
    for name in ("q", "k", "v"):
        assert_near(getattr(found, name), getattr(want, name), tolerance)
    assert found.tables.keys() <= want.tables.keys()
    for number, table in want.tables.items():
        if number in found.tables:
            assert found.tables[number].dtype == table.dtype
            assert_near(found.tables[number], table, max(tolerance, TOLERANCE[table.dtype]))
        else:
            assert not table.any()  # the score's value does not depend on it


def check(tensors, mask=None, score=None, blocks=None, tolerance=None):
    assert_same(ours(tensors, mask, score, blocks), dense(tensors, mask, score), tolerance or TOLERANCE[tensors[0].dtype])


# every form of map, and every way to decide a place
MASKS = [
    "full", "causal", "causal_lower_right", "local_window", "head_window", "global_window", "sink_window", "document_batch", "strided",
    "document_unsorted", "padding_causal", "key_padding", "random_eviction_heads", "three_pieces", "bounds_by_batch_and_head",
    "empty_rows", "nothing", "from_dense", "block_sparse", "neighbourhood",
]  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_at_odd_lengths_and_blocks(name):
    for q_len, kv_len, blocks in ((33, 47, (16, 8)), (29, 20, (7, 13)), (1, 5, (16, 16))):
        check(inputs(q_len, kv_len), zoo.MASKS[name](2, 2, q_len, kv_len), None, blocks)


@pytest.mark.parametrize("name", zoo.SCORES)
def test_scores_and_their_tables(name):
    """Numbers written in a score are float32."""
    check(inputs(33, 47), masks.local_window(12), zoo.SCORES[name](2, 2, 33, 47), (16, 16), 2e-6)


@settings(max_examples=30)
@given(st.data())
def test_random_masks_and_layouts(data):
    layout = data.draw(layouts(largest=40, head_dims=(4, 8, 24)))
    mask = data.draw(predicates(layout.sizes)).mask()
    s = layout.sizes
    tensors = inputs(s.Q, s.KV, s.H, layout.Hkv, layout.D, layout.Dv, s.B, layout.Bkv)
    check(tensors, mask, data.draw(st.sampled_from([None, scores.softcap(2.0)])), data.draw(st.sampled_from([(16, 16), (8, 32), (13, 5)])))


def test_without_a_map():
    tensors = inputs(40, 30)
    check(tensors)
    for name in ("strided", "bounds_by_batch_and_head"):
        mask = zoo.MASKS[name](2, 2, 40, 30)
        q, k, v, dout, dlse = tensors
        given_ = mods(q, k, mask) | {"tile_map": None}
        out, lse, _ = cpu.forward(q, k, v, **given_)
        assert_same(backward(q, k, v, out, lse, dout, dlse, **given_), dense(tensors, mask))


class Attention(torch.autograd.Function):
    """out, lse of q, k, v and a score's tables."""

    @staticmethod
    def forward(ctx, given_, q, k, v, *tables):
        given_ = given_ | ({"score": (given_["score"][0], tables, given_["score"][2])} if tables else {})
        out, lse, _ = cpu.forward(q, k, v, **given_)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.given_, ctx.tables = given_, tables
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        found = backward(*ctx.saved_tensors, dout, dlse, **ctx.given_)
        return (None, found.q, found.k, found.v, *[found.tables.get(i) for i in range(len(ctx.tables))])


GAIN, BIAS = torch.tensor([0.5, 1.5]).double(), torch.linspace(-1, 1, 14).double()


@flexmask.score
def everything_at_once(score, h, q_idx, kv_idx):
    """A gain by head, a table read at three places, one of them from its end, and a function of it."""
    return torch.tanh(score * GAIN[h]) + BIAS[q_idx - kv_idx + 6] * BIAS[-1 - kv_idx] + torch.exp(BIAS[q_idx])


@pytest.mark.parametrize("score", [None, scores.softcap(2.0), everything_at_once], ids=["none", "softcap", "tables"])
@pytest.mark.parametrize("name", ["causal", "empty_rows", "strided"])
def test_gradcheck(name, score):
    q, k, v, *_ = inputs(5, 7, heads=2, kv_heads=1, d=3, dv=2, batch=1)
    given_ = mods(q, k, zoo.MASKS[name](1, 2, 5, 7), score, (4, 4))
    tables = () if score is None else tuple(t.clone().requires_grad_() for t in score.traced().tensors)

    def attend(*tensors):
        out, lse = Attention.apply(given_, *tensors)
        return out, lse.masked_fill(lse == -math.inf, 0)  # a row that keeps nothing has no difference quotient

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, v)] + list(tables))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    tensors = inputs(70, 90, dtype=dtype)
    for score in (None, scores.softcap(2.0), scores.relative_bias(torch.randn(2, 31).to(dtype))):
        found = ours(tensors, masks.sink_window(3, 20), score, (16, 16))
        assert found.q.dtype == found.k.dtype == found.v.dtype == dtype
        assert_same(found, dense(tensors, masks.sink_window(3, 20), score), TOLERANCE[dtype])


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kv_batch", [1, 2])
def test_grouped_heads_and_keys_for_the_whole_batch(kv_heads, kv_batch):
    tensors = inputs(40, 30, heads=6, kv_heads=kv_heads, kv_batch=kv_batch)
    for name in ("causal", "head_window", "document_batch", "bounds_by_batch_and_head"):
        check(tensors, zoo.MASKS[name](2, 6, 40, 30), scores.alibi(6), (16, 16))


def test_keys_alone_or_values_alone_for_the_whole_batch():
    q, k, v, dout, dlse = inputs(40, 30)
    for alone in ((k[:1], v), (k, v[:1])):
        found, want = (f((q, *alone, dout, dlse), masks.causal) for f in (ours, dense_expanded))
        assert_same(found, want)


def dense_expanded(tensors, mask):
    """`dense`, where k or v alone is for the whole batch."""
    q, k, v, *rest = tensors
    found = dense((q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1), *rest), mask)
    return Gradients(found.q, found.k.sum_to_size(k.shape), found.v.sum_to_size(v.shape), {})


@pytest.mark.parametrize(("d", "dv"), [(1, 1), (8, 40), (72, 16)])
def test_head_dims(d, dv):
    check(inputs(40, 50, d=d, dv=dv), masks.causal)


def test_strides():
    tensors = inputs(33, 33, d=16, dv=16)
    want = dense(tensors, masks.sliding_window(9))
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x.neg()], -1).flatten(-2)[..., ::2],
    ):
        assert_same(ours([change(x) for x in tensors], masks.sliding_window(9)), want)
    q, k, v, dout, dlse = tensors
    # as the gradient of a sum is
    check([q, k, v, dout[:1, :1, :1, :1].expand(dout.shape), dlse[:1, :1, :1].expand(dlse.shape)], masks.sliding_window(9))


def test_lengths_of_zero():
    for q_len, kv_len, batch, heads in ((0, 5, 2, 3), (5, 0, 2, 3), (0, 0, 1, 1), (5, 5, 0, 3), (5, 5, 2, 0)):
        tensors = inputs(q_len, kv_len, heads, heads, batch=batch, kv_batch=batch, dv=4)
        for mask in (None, masks.causal):
            found = ours(tensors, mask, scores.head_bias(torch.ones(3)))
            for x, gradient in zip(tensors[:3], (found.q, found.k, found.v), strict=True):
                assert gradient.shape == x.shape and (0 in (kv_len, q_len) or batch * heads == 0) and not gradient.any()
            assert torch.equal(found.tables[0], torch.zeros(3))


@pytest.mark.parametrize("score", [None, scores.softcap(2.0), scores.head_bias(torch.tensor([1.0, 2.0]))], ids=["none", "softcap", "bias"])
def test_rows_that_keep_nothing_get_exactly_zero(score):
    """Whatever comes in from behind."""
    for name in ("empty_rows", "nothing"):
        mask = zoo.MASKS[name](2, 2, 50, 50)
        kept = reference.dense_mask(mask, 2, 2, 50, 50)
        empty, unseen = ~kept.any(-1), ~kept.any(-2)
        tensors = inputs(50, 50)
        want = ours(tensors, mask, score, (16, 16))
        assert empty.any() and not want.q[empty].any() and not want.k[unseen].any() and not want.v[unseen].any()
        tensors[3][empty], tensors[4][empty] = math.nan, math.inf
        assert_same(ours(tensors, mask, score, (16, 16)), want)


def test_rows_that_the_score_empties():
    """log(0) is -inf, and its slope an infinity that nothing may come of."""
    table = torch.tensor([1.0, 0.0]).double()
    score = flexmask.score(lambda score, q_idx: score + torch.log(table[q_idx % 2]))
    for mask in (None, masks.causal):
        tensors = inputs(30, 30)
        want = ours(tensors, mask, score)
        assert not want.q[:, :, 1::2].any() and not want.tables[0][1]
        assert all(x.any() and x.isfinite().all() for x in (want.q, want.k, want.v, want.tables[0]))
        tensors[3][:, :, 1::2] = math.nan
        assert_same(ours(tensors, mask, score), want)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e308])
@pytest.mark.parametrize("score", [None, scores.softcap(2.0), scores.relative_bias(torch.zeros(181).double())], ids=["none", "cap", "bias"])
def test_a_nan_stays_where_it_is_kept(bad, score):
    """It reaches rows that keep it, and keys that these rows keep."""
    for name in ("causal", "strided", "sink_window", "empty_rows"):
        mask = zoo.MASKS[name](2, 2, 90, 90)
        kept = reference.dense_mask(mask, 2, 2, 90, 90)
        clean, spoilt = inputs(90, 90), inputs(90, 90)
        for tensor, place in ((0, (0, 1, 17)), (1, (1, 0, 40)), (2, (0, 0, 60)), (3, (1, 1, 3))):
            clean[tensor][place], spoilt[tensor][place] = 0, bad
        rows = torch.zeros(2, 2, 90, dtype=torch.bool)
        rows[0, 1, 17] = rows[1, 1, 3] = True
        rows[1, 0] |= kept[1, 0, :, 40]
        rows[0, 0] |= kept[0, 0, :, 60]
        keys = (kept & rows[..., None]).any(-2)
        found, want = ours(spoilt, mask, score, (16, 16)), ours(clean, mask, score, (16, 16))
        torch.testing.assert_close(found.q[~rows], want.q[~rows])
        torch.testing.assert_close(found.k[~keys], want.k[~keys])
        torch.testing.assert_close(found.v[~keys], want.v[~keys])
        assert rows.any() and not rows.all() and not keys.all()


def test_a_nan_that_is_kept_shows():
    tensors = inputs(30, 30)
    tensors[1][0, 0, 10, 3] = math.nan
    found = ours(tensors, masks.sliding_window(5), None, (16, 16))
    assert found.q[0, 0, 10:15].isnan().all() and found.k[0, 0, 6:15].isnan().all() and found.v[0, 0, 6:15].isnan().all()
    assert found.q[0, 0, :10].isfinite().all() and found.k[0, 0, :6].isfinite().all() and found.q[:, 1].isfinite().all()


def test_weights_of_zero_let_nothing_through():
    """A product with weights of both signs, by definition: the sum over the weights that are not 0."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-2, 3, (2, 40, 5), generator=generator).double()
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1.0, 2.0, 3.0, 4.0])[torch.randint(0, 8, (2, 5, 9), generator=generator)]
    terms = weights[..., None] * values.double()[:, None]
    want = terms.masked_fill(weights[..., None] == 0, 0).sum(2)
    torch.testing.assert_close(cpu_walk.weigh(weights, values.double()), want, equal_nan=True)
    assert want.isnan().any() and want.isposinf().any() and want.isneginf().any() and want.isfinite().any()


def test_slopes_that_are_infinite_where_nothing_is_kept():
    """sqrt(q - k + bias) has none at or above the diagonal, where the mask keeps nothing."""
    bias = torch.zeros(40).double()

    def root(score, q_idx, kv_idx):
        return score * torch.sqrt((q_idx - kv_idx) + bias[kv_idx])

    mask = flexmask.mask(lambda q_idx, kv_idx: kv_idx < q_idx)
    check(inputs(40, 40), mask, flexmask.score(root), (16, 16))


SMALL = torch.linspace(-1, 1, 12).double()
TABLES = {
    "no axis": (torch.tensor(0.7).double(), lambda t: lambda s, h, q, k: s * t),
    "always one place": (SMALL, lambda t: lambda s, h, q, k: s + t[3] * t[-1]),
    "from the end": (SMALL, lambda t: lambda s, h, q, k: s + t[(k % 5) - 5] * q),
    "computed places": (SMALL, lambda t: lambda s, h, q, k: s + t[torch.clamp(q - k + 6, 0, 11)]),
    "places from a table": (SMALL, lambda t: lambda s, h, q, k: s + t[torch.arange(40).flip(0)[k] % 12] * t[q % 12]),
    "several places": (SMALL, lambda t: lambda s, h, q, k: s * t[h] + t[q % 7] * t[k % 11] + t[h + 1]),
    "two axes": (SMALL.view(3, 4), lambda t: lambda s, h, q, k: s + t[q % 3, (k + h) % 4]),
    "four axes": (SMALL.view(1, 2, 3, 2), lambda t: lambda s, h, q, k: s + t[0, h, q % 3, k % 2]),
    "strided": (SMALL.view(4, 3).mT[:, ::2], lambda t: lambda s, h, q, k: s + t[q % 3, k % 2]),
    "expanded": (SMALL.view(1, 12).expand(2, 12), lambda t: lambda s, h, q, k: s + t[h, k % 12]),
    "only a condition": (SMALL, lambda t: lambda s, h, q, k: torch.where(t[k % 12] > 0, s, -s)),
    "half": (SMALL.half(), lambda t: lambda s, h, q, k: torch.sin(t[k % 12]) * s),
    "without the score": (SMALL, lambda t: lambda s, h, q, k: torch.exp(t[k % 12] * t[q % 12])),
    "whole numbers": (torch.arange(12), lambda t: lambda s, h, q, k: s * t[k % 12] * 0.1),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    table, make = TABLES[name]
    inner = make(table)
    check(inputs(40, 30), masks.causal, flexmask.score(lambda score, h, q_idx, kv_idx: inner(score, h, q_idx, kv_idx)), (16, 16), 1e-6)


def test_gradients_of_some_tables_only():
    tensors = inputs(20, 20)
    score = flexmask.score(lambda score, h, q_idx: score * GAIN[h] + SMALL[q_idx % 12])
    every = ours(tensors, None, score).tables
    assert sorted(every) == [0, 1]
    for wanted in ((), (1,), (0, 1, 5)):
        found = ours(tensors, None, score, tables=wanted).tables
        assert sorted(found) == [n for n in wanted if n in every]
        assert all(torch.equal(found[n], every[n]) for n in found)


@pytest.mark.parametrize("name", ["causal", "sink_window", "document_unsorted", "head_window", "nothing"])
def test_keys_in_parts(name, monkeypatch):
    """Rows wider than the memory for scores are handled a part at a time."""
    monkeypatch.setattr(cpu_backward, "SCORES", 1000)
    monkeypatch.setattr(cpu_backward, "FEWEST_KEYS", 13)
    for score in (None, scores.relative_bias(torch.linspace(-1, 1, 41).double())):
        check(inputs(60, 70), zoo.MASKS[name](2, 2, 60, 70), score, (16, 16))


def test_gradient_of_lse_alone():
    q, k, v, dout, dlse = inputs(30, 40)
    found = ours((q, k, v, torch.zeros_like(dout), dlse), masks.causal)
    assert_same(found, dense((q, k, v, torch.zeros_like(dout), dlse), masks.causal))
    assert found.q.any() and not found.v.any()
    without = dense((q, k, v, dout, torch.zeros_like(dlse)), masks.causal)
    given_ = mods(q, k, masks.causal)
    assert_same(backward(q, k, v, *cpu.forward(q, k, v, **given_)[:2], dout, **given_), without)


def test_large_scores_do_not_overflow():
    q, k, *rest = inputs(50, 50, dtype=torch.float32)
    found, want = (f((q * 100, k * 100, *rest), masks.causal) for f in (ours, dense))
    assert_same(found, want, 1e-3)


def test_the_same_bits_from_run_to_run():
    tensors = inputs(300, 300, d=16, dtype=torch.float32)
    score = scores.relative_bias(torch.randn(2, 63))
    one, two = (ours(tensors, masks.causal, score) for _ in range(2))
    assert torch.equal(one.tables[0], two.tables[0])
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in "qkv")


def test_nothing_of_the_caller_changes():
    tensors = inputs(40, 40, dtype=torch.float32)
    before = [x.clone() for x in tensors]
    leaves = [x.requires_grad_() for x in tensors]
    found = ours(leaves, masks.causal, scores.softcap(2.0))
    assert not found.q.requires_grad
    with torch.inference_mode():
        assert torch.equal(ours(leaves, masks.causal, scores.softcap(2.0)).k, found.k)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor made within."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.nbytes)
        return result


def test_memory_grows_with_the_lengths_alone(monkeypatch):
    monkeypatch.setattr(cpu_backward, "SCORES", 1 << 12)
    score, length = scores.relative_bias(torch.zeros(31)), 2048
    for mask in (masks.causal, zoo.MASKS["strided"](1, 1, length, length)):
        q, k, v, dout, dlse = inputs(length, length, 1, 1, 4, 4, 1, dtype=torch.float32)
        given_ = mods(q, k, mask, score)
        out, lse, _ = cpu.forward(q, k, v, **given_)
        with Largest() as seen:
            backward(q, k, v, out, lse, dout, dlse, **given_)
        assert seen.most <= 3 * 4 * 128 * cpu_backward.FEWEST_KEYS < 4 * length * length / 16


def test_empty_tiles_cost_nothing(monkeypatch):
    """A window of 40 at 4096: of 32 x 32 tiles only the two by the diagonal are multiplied."""
    seen, chunk = [], cpu_backward._Work._chunk
    monkeypatch.setattr(cpu_backward._Work, "_chunk", lambda self, *args: (seen.append(args[1].width), chunk(self, *args))[1])
    ours(inputs(4096, 4096, 1, 1, 4, 4, 1, dtype=torch.float32), masks.sliding_window(40))
    assert sum(seen) == 128 + 31 * 256
