"""The CPU backend against dense float64 attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_cases import BATCH, HEADS, MASKS, dense_of, facts_of

from flexmask.ir import SCORE, B, Env, H, K, Q, const, evaluate, load, make, simplify
from flexmask.runtime import cpu, host_map


def dense_attention(q, k, v, scale, kept=None, score=None):
    """(out, lse) in float64. A pair that is not kept has no influence."""
    q, k, v = q.double(), k.double().expand(len(q), -1, -1, -1), v.double().expand(len(q), -1, -1, -1)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if score is not None:
        expr, tensors, scalars = score
        places = {n: torch.arange(s).view([-1 if i == a else 1 for i in range(4)]) for a, (n, s) in enumerate(zip(
            ("b", "h", "q_idx", "kv_idx"), scores.shape, strict=True))}  # fmt: skip
        scores = torch.as_tensor(evaluate(expr, Env(places | {"score": scores}, tensors, scalars))).double().expand(scores.shape)
    if kept is not None:
        scores = scores.masked_fill(~kept, -math.inf)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    p = (scores - top.masked_fill(top == -math.inf, 0)).exp()
    total = p.sum(-1, keepdim=True)
    weights = p / total.masked_fill(total == 0, 1)
    return (weights @ v), (top + total.log()).squeeze(-1).masked_fill(top.squeeze(-1) == -math.inf, -math.inf)


def run(name, q, k, v, block_q=None, block_kv=None, score=None, scale=0.3):
    """The backend under a zoo mask, and the oracle."""
    facts, (_, tensors, scalars) = facts_of(name), MASKS[name]
    q_len, kv_len = q.shape[2], k.shape[2]
    sides = cpu.blocks(q_len, kv_len)
    made = host_map.build(
        facts, tensors, scalars, q_len=q_len, kv_len=kv_len, batch=len(q), heads=q.shape[1],
        block_q=block_q or sides[0], block_kv=block_kv or sides[1],
    )  # fmt: skip
    kept = dense_of(name, q_len, kv_len)[: len(q)]
    kept = kept.expand(-1, q.shape[1], -1, -1) if kept.shape[1] == q.shape[1] else kept[:, :1].expand(-1, q.shape[1], -1, -1)
    found = cpu.forward(q, k, v, scale=scale, tile_map=made, mask=(facts.predicate, tensors, scalars), score=score)
    return found[:2], dense_attention(q, k, v, scale, kept, score)


def inputs(q_len, kv_len, heads=HEADS, kv_heads=HEADS, d=16, dv=16, batch=BATCH, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, q_len, d), (batch, kv_heads, kv_len, d), (batch, kv_heads, kv_len, dv)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_same(found, want, tolerance=1e-5):
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_at_odd_lengths_and_blocks(name):
    for q_len, kv_len, block_q, block_kv in (
        (1, 1, 16, 16),
        (37, 91, 16, 8),
        (150, 131, 64, 16),
        (299, 300, 32, 128),
        (150, 131, None, None),
    ):
        assert_same(*run(name, *inputs(q_len, kv_len), block_q, block_kv))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sink and window", "causal shuffled documents"])
def test_dtypes(name, dtype):
    found, want = run(name, *inputs(70, 90, dtype=dtype))
    assert found[0].dtype == dtype
    assert found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(found[:1], want[:1], {torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype])
    assert_same(found[1:], want[1:], 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["causal", "padding by batch", "causal, every third"])
def test_heads_in_groups(name, kv_heads):
    assert_same(*run(name, *inputs(75, 75, heads=6, kv_heads=kv_heads), 16, 16))


def test_maps_by_head_of_grouped_heads():
    for name in ("window by head", "by batch and head"):
        assert_same(*run(name, *inputs(75, 75, heads=HEADS, kv_heads=1), 16, 16))


@pytest.mark.parametrize(("d", "dv"), [(1, 1), (8, 40), (72, 16), (128, 64)])
def test_head_dims(d, dv):
    assert_same(*run("causal", *inputs(40, 50, d=d, dv=dv)))


def test_keys_and_values_shared_by_the_batch():
    q, k, v = inputs(60, 60)
    for shared in ((k[:1], v[:1]), (k[:1], v), (k, v[:1])):
        for name in ("causal", "documents by batch", "window by head"):
            assert_same(*run(name, q, *shared))


def test_strides():
    q, k, v = inputs(50, 70, d=16)
    want = run("sink and window", q, k, v)[1]
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    by_channel = [x.mT.contiguous().mT for x in (q, k, v)]
    every_other = [torch.stack([x, x.neg()], -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    for same in (by_token, by_channel, every_other):
        assert_same(run("sink and window", *same)[0], want)
    alike = [x[:, :1, :1].expand(-1, HEADS, n, -1) for x, n in ((q, 50), (k, 70), (v, 70))]
    assert_same(*run("sink and window", *alike))


def test_rows_that_keep_nothing():
    for name in ("nothing", "no window at all", "padding by batch", "bounds from tables"):
        found, want = run(name, *inputs(60, 60), 16, 16)
        assert_same(found, want)
        empty = want[1] == -math.inf
        assert empty.any() and (found[0][empty] == 0).all() and (found[1][empty] == -math.inf).all()


def test_empty_tensors():
    for q_len, kv_len, batch, heads in ((0, 5, 2, 3), (5, 0, 2, 3), (0, 0, 1, 1), (5, 5, 0, 3), (5, 5, 2, 0)):
        q, k, v = inputs(q_len, kv_len, heads=heads, kv_heads=heads, batch=batch, dv=8)
        out, lse, _ = cpu.forward(q, k, v, scale=1.0)
        assert out.shape == (batch, heads, q_len, 8) and lse.shape == (batch, heads, q_len)
        assert not out.any() if kv_len == 0 else True
        assert (lse == -math.inf).all() if kv_len == 0 else True


def test_a_nan_stays_where_it_is_kept():
    q, k, v = inputs(90, 90)
    q[0, 1, 17], k[1, 0, 40], v[0, 2, 60], v[1, 1, 3, 2], v[1, 1, 5, 2] = math.nan, math.nan, math.nan, math.inf, -math.inf
    for name in ("window", "causal", "causal, every third", "sorted documents", "sink and window"):
        kept = dense_of(name, 90, 90)
        found, _ = run(name, q, k, v, 16, 16)
        clean, _ = run(name, *(torch.nan_to_num(x, 0, 0, 0) for x in (q, k, v)), 16, 16)
        touched = torch.zeros(BATCH, HEADS, 90, dtype=torch.bool)
        touched[0, 1, 17] = kept[0, 1, 17].any()
        touched[1, 0] |= kept[1, 0, :, 40]
        touched[0, 2] |= kept[0, 2, :, 60]
        assert found[0][touched].isnan().all()
        channel = kept[1, 1, :, 3] | kept[1, 1, :, 5]
        both = kept[1, 1, :, 3] & kept[1, 1, :, 5]
        assert found[0][1, 1, both, 2].isnan().all() and found[0][1, 1, channel & ~both, 2].isinf().all()
        touched[1, 1] |= channel
        torch.testing.assert_close(found[0][~touched], clean[0][~touched])
        torch.testing.assert_close(found[0][1, 1, :, 3:], clean[0][1, 1, :, 3:])


t0 = load(0, "float", H)
SCORES = {
    "bias by head": (SCORE + t0 * make("cast", (K - Q,), "float32"), (torch.tensor([0.5, 0.25, 0.125]),), ()),
    "soft cap": (const(3.0) * make("tanh", (make("truediv", (SCORE, const(3.0))),)), (), ()),
    "by batch": (SCORE * load(0, "float", B), (torch.tensor([0.5, 2.0]),), ()),
    "masks by itself": (make("where", (K <= Q, SCORE, const(-math.inf))), (), ()),
    "forgets the score": (make("cast", (K % 7,), "float32"), (), ()),
    "a constant": (const(1.0), (), ()),
    "relative table": (SCORE + load(0, "float", Q - K + 90), (torch.linspace(-1, 1, 181),), ()),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["everything", "sink and window", "causal, every third", "by batch and head"])
def test_scores(name, score):
    assert_same(*run(name, *inputs(90, 80), 16, 16, SCORES[score]))


def test_without_a_map():
    q, k, v = inputs(70, 60)
    assert_same(cpu.forward(q, k, v, scale=0.3)[:2], dense_attention(q, k, v, 0.3))
    for name in ("causal, every third", "by batch and head"):
        predicate, tensors, scalars = MASKS[name]
        found = cpu.forward(q, k, v, scale=0.3, mask=(simplify(predicate), tensors, scalars))
        assert_same(found[:2], dense_attention(q, k, v, 0.3, dense_of(name, 70, 60)))


@pytest.mark.parametrize("name", ["causal", "sink and window", "causal shuffled documents", "window by head", "nothing"])
def test_keys_in_parts(name, monkeypatch):
    """Rows wider than the memory for scores are handled a part at a time."""
    monkeypatch.setattr(cpu, "SCORES", 1000)
    monkeypatch.setattr(cpu, "FEWEST_KEYS", 13)
    for score in (None, SCORES["masks by itself"]):
        assert_same(*run(name, *inputs(150, 140), 16, 16, score))


def test_large_scores_do_not_overflow():
    q, k, v = inputs(50, 50)
    assert_same(*run("causal", q * 100, k * 100, v), 2e-3)


def test_in_inference_mode_and_with_gradients_required():
    q, k, v = (x.requires_grad_() for x in inputs(40, 40))
    want = cpu.forward(q, k, v, scale=0.3)[0]
    assert not want.requires_grad
    with torch.inference_mode():
        assert torch.equal(cpu.forward(q, k, v, scale=0.3)[0], want)
    assert torch.equal(cpu.forward(q, k, v, scale=0.3)[0], want)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(MASKS)),
    lengths=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    blocks=st.tuples(st.sampled_from([8, 16, 33, 64, 128]), st.sampled_from([8, 16, 33, 64, 128])),
    dims=st.tuples(st.sampled_from([4, 24, 64]), st.sampled_from([4, 24, 64])),
    kv_heads=st.sampled_from([1, HEADS]),
)
def test_anything_together(name, lengths, blocks, dims, kv_heads):
    assert_same(*run(name, *inputs(*lengths, kv_heads=kv_heads, d=dims[0], dv=dims[1]), *blocks))


def test_empty_tiles_cost_nothing(monkeypatch):
    """A window of 40 at 4096: of 32 x 32 tiles only the two by the diagonal are multiplied."""
    seen = []
    part = cpu._Work._part
    monkeypatch.setattr(cpu._Work, "_part", lambda self, *args: (seen.append(args[5].width), part(self, *args))[1])
    facts, scalars = facts_of("window"), MASKS["window"][2]
    made = host_map.build(facts, (), scalars, q_len=4096, kv_len=4096)
    cpu.forward(*inputs(4096, 4096, 1, 1, 4, 4, 1), scale=1.0, tile_map=made, mask=(facts.predicate, (), scalars))
    assert sum(seen) == 128 + 31 * 256
