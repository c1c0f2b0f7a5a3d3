"""Every ready-made score against a formula written out over whole matrices."""

import math

import pytest
import torch

from flexmask import reference, scores

B, H, Q, KV = 2, 3, 12, 10
QI, KI = torch.arange(Q)[:, None], torch.arange(KV)
FAR = QI - KI  # query minus key
HEAD = torch.arange(H)[:, None, None]
RAW = torch.randn(B, H, Q, KV, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def reals(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def modified(score):
    """The score mod applied to RAW [B, H, Q, KV], read off the reference: q @ k^T is RAW and v picks each key."""
    each = torch.eye(KV).double().expand(B, H, KV, KV)
    weights, lse = reference.attention(RAW, each, each, score=score, scale=1.0, return_lse=True)
    return torch.log(weights) + lse[..., None]


GATE, TABLE, PAIR = reals(B, H), reals(H, 2 * Q + 1), reals(B, H, Q, KV)
SWIN, ROWS, COLUMNS, SUMS = reals(35, H), reals(B, H, Q, 4), reals(B, H, Q, 3), reals(B, H, Q).cumsum(-1)
KIND = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 1, 1])
CASES = {
    "softcap": (scores.softcap(1.5), lambda s: 1.5 * torch.tanh(s / 1.5)),
    "softcap of a tensor": (scores.softcap(torch.tensor(0.5)), lambda s: 0.5 * torch.tanh(s / 0.5)),
    "temperature": (scores.temperature(0.25), lambda s: s * 4),
    "temperature of heads": (scores.temperature(torch.tensor([1.0, 2.0, 4.0])), lambda s: s / 2.0**HEAD),
    "head_gate": (scores.head_gate(GATE[0]), lambda s: s * GATE[0][:, None, None]),
    "head_gate of batches": (scores.head_gate(GATE), lambda s: s * GATE[..., None, None]),
    "head_bias": (scores.head_bias(GATE[0]), lambda s: s + GATE[0][:, None, None]),
    "head_bias of batches": (scores.head_bias(GATE), lambda s: s + GATE[..., None, None]),
    "log_n_scaling": (scores.log_n_scaling(4), lambda s: s * (torch.log(QI + 1.0) / math.log(4)).clamp(min=1)),
    "floor_scaling": (scores.floor_scaling(0.1, 4), lambda s: s * (1 + 0.1 * torch.log(torch.div(QI + 1, 4, rounding_mode="floor") + 1.0))),
    "checkerboard": (scores.checkerboard(), lambda s: torch.where(FAR.remainder(2) == 0, 2 * s, s / 2)),
    "chain": (scores.chain(scores.head_bias(GATE[0]), scores.softcap(1.0)), lambda s: torch.tanh(s + GATE[0][:, None, None])),
    "at_offset": (scores.at_offset(scores.distance_decay(0.1), 4, 1), lambda s: s - 0.1 * (FAR + 3).abs()),
    "alibi": (scores.alibi(H), lambda s: s - torch.tensor([2**-4, 2**-8, 2**-2])[:, None, None] * FAR),
    "alibi symmetric": (scores.alibi(GATE[0].abs(), symmetric=True), lambda s: s - GATE[0].abs()[:, None, None] * FAR.abs()),
    "relative_bias": (scores.relative_bias(TABLE[0]), lambda s: s + TABLE[0][FAR + Q]),
    "relative_bias of heads, clipped": (scores.relative_bias(TABLE[:, :7]), lambda s: s + TABLE[:, :7][:, FAR.clamp(-3, 3) + 3]),
    "swin_bias": (
        scores.swin_bias(SWIN, 4, 3),  # 12 tokens, a 4 x 3 picture
        lambda s: s + SWIN.T.view(H, 7, 5)[:, QI // 3 - KI // 3 + 3, QI % 3 - KI % 3 + 2],
    ),
    "distance_decay": (scores.distance_decay(0.3), lambda s: s - 0.3 * FAR.abs()),
    "distance_decay of heads": (scores.distance_decay(GATE[0]), lambda s: s - GATE[0][:, None, None] * FAR.abs()),
    "kerple": (
        scores.kerple(GATE[0], GATE[1].abs()),
        lambda s: s - GATE[0][:, None, None] * torch.log1p(GATE[1].abs().double()[:, None, None] * FAR.abs()),
    ),
    "window_bias": (scores.window_bias(2, 0.75), lambda s: s + 0.75 * (FAR.abs() <= 2)),
    "key_bias": (scores.key_bias(PAIR[0, 0, 0]), lambda s: s + PAIR[0, 0, 0]),
    "key_bias of batches": (scores.key_bias(PAIR[:, 0, 0]), lambda s: s + PAIR[:, :1, :1]),
    "key_bias of heads": (scores.key_bias(PAIR[:, :, 0]), lambda s: s + PAIR[:, :, :1]),
    "full_bias": (scores.full_bias(PAIR), lambda s: s + PAIR),
    "full_bias of a plane": (scores.full_bias(PAIR[0, 0]), lambda s: s + PAIR[0, 0]),
    "full_bias of heads": (scores.full_bias(PAIR[0]), lambda s: s + PAIR[0]),
    "full_bias of one head": (scores.full_bias(PAIR[:, :1]), lambda s: s + PAIR[:, :1]),
    "full_bias of one batch entry": (scores.full_bias(PAIR[:1]), lambda s: s + PAIR[:1]),
    "decomposed_bias": (
        scores.decomposed_bias(ROWS, COLUMNS, width=3),
        lambda s: s + (ROWS[..., None] + COLUMNS[..., None, :]).flatten(-2)[..., :KV],
    ),
    "forgetting": (scores.forgetting(SUMS), lambda s: s + SUMS[..., None] - SUMS[..., None, :KV]),
    "group_bias": (scores.group_bias(KIND, TABLE[:3, :3]), lambda s: s + TABLE[:3, :3][KIND[:, None], KIND[:KV]]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_score_is_its_formula(name):
    score, formula = CASES[name]
    torch.testing.assert_close(modified(score), formula(RAW).double(), rtol=1e-6, atol=1e-6)


def test_every_ready_made_score_is_tested():
    makers = {n for n in scores.__all__ if n not in ("alibi_slopes", "t5_buckets", "t5_bias")}
    assert makers == {name.split()[0].strip(",") for name in CASES}


def slopes_of_the_paper(n):
    """The function of the ALiBi repository, as published."""

    def power_of_2(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return power_of_2(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_2(closest) + slopes_of_the_paper(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 16, 20, 40, 71])
def test_alibi_slopes_are_the_papers(heads):
    torch.testing.assert_close(scores.alibi_slopes(heads), torch.tensor(slopes_of_the_paper(heads)))


def bucket_of_t5(relative_position, bidirectional, num_buckets, max_distance):
    """T5's bucketing, step by step for one distance (float32 logarithms)."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket = num_buckets if relative_position > 0 else 0
        distance = abs(relative_position)
    else:
        distance = max(-relative_position, 0)
    exact = num_buckets // 2
    if distance < exact:
        return bucket + distance
    log = torch.log(torch.tensor(float(distance)) / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return bucket + min(exact + int(log), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (12, 40), (32, 1000)])
def test_t5_bias_is_the_table_at_t5s_bucket(buckets, max_distance, bidirectional):
    table = torch.arange(float(buckets))[:, None].repeat(1, H)
    mod = scores.t5_bias(table, max_distance, bidirectional)
    for distance in [*range(-300, 300, 7), -9000, -max_distance, max_distance, -1, 0, 1, 9000]:
        q, k = max(0, -distance), max(0, distance)
        found = mod(torch.tensor(0.0), 0, 1, torch.tensor(q), torch.tensor(k))
        assert int(found) == bucket_of_t5(distance, bidirectional, buckets, max_distance), distance


def test_learned_tables_get_gradients():
    table = reals(H, 7).requires_grad_()
    out = reference.attention(RAW, RAW[:, :, :5], RAW[:, :, :5], score=scores.chain(scores.relative_bias(table), scores.softcap(2.0)))
    (grad,) = torch.autograd.grad(out.square().sum(), [table])
    assert grad.shape == table.shape and grad.isfinite().all() and (grad != 0).any(dim=1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scores.relative_bias(torch.zeros(2, 4)), r"\[H, 2 R \+ 1\] or \[2 R \+ 1\]; got \[2, 4\]"),
        (lambda: scores.full_bias(torch.zeros(4)), r"got \[4\]"),
        (lambda: scores.swin_bias(torch.zeros(9, 1), 3, 3), r"expected a table \[25, H\] for 3 x 3; got \[9, 1\]"),
        (lambda: scores.decomposed_bias(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 3), 2), r"\[B, H, Q, 2\]"),
        (lambda: scores.forgetting(torch.zeros(4)), r"running sums \[B, H, N\]; got \[4\]"),
        (lambda: scores.t5_bias(torch.zeros(32)), r"expected a table \[buckets, H\]; got \[32\]"),
        (lambda: scores.t5_buckets(2, 128), "more buckets"),
        (lambda: scores.alibi(0), "at least 1; got 0"),
        (lambda: scores.log_n_scaling(1), "at least 2; got 1"),
        (lambda: scores.floor_scaling(1.0, 0), "at least 1; got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
