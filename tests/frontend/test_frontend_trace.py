"""What a function means, traced, against calling it on every index with torch.vmap."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo import MASKS, SCORES

from flexmask import ir
from flexmask.frontend import trace

SIZES = {"b": 2, "h": 3, "q_idx": 7, "kv_idx": 9}


def grid() -> dict[str, torch.Tensor]:
    ranges = [torch.arange(n) for n in SIZES.values()]
    return dict(zip(SIZES, torch.meshgrid(*ranges, indexing="ij"), strict=True))


def traced_value(mod, kind: str, score: torch.Tensor | None = None) -> torch.Tensor:
    traced = trace(mod, kind)
    indices = grid() if score is None else grid() | {"score": score}
    value = ir.evaluate(traced.expr, ir.Env(indices, traced.tensors, traced.scalars))
    return torch.as_tensor(value).expand(*SIZES.values())


def called_value(mod, score: torch.Tensor | None = None) -> torch.Tensor:
    """The oracle: the function itself, one index after the other, as torch.vmap does it."""
    values = [*([] if score is None else [score]), *grid().values()]
    flat = torch.vmap(lambda *args: torch.as_tensor(mod(*args)))(*(v.reshape(-1) for v in values))
    return flat.view(*SIZES.values())


doc = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 3], [0, 1, 1, 1, 1, 1, 4, 4, 4]])
flags = torch.arange(27).view(3, 9) % 4 == 1
bias = torch.arange(2 * 3 * 7 * 9, dtype=torch.float32).view(2, 3, 7, 9).sin()
slopes = torch.tensor([0.5, 0.25, 0.125])
offset = torch.tensor(2)

# fmt: off
MASK_FUNCTIONS = {
    "causal": lambda b, h, q, k: q >= k,
    "reflected": lambda b, h, q, k: (3 + q > k) & (10 - q >= k) & (h < k),
    "window": lambda b, h, q, k: (q - k < 3) & (k - q < 2),
    "or, xor, not": lambda b, h, q, k: (q > k) | (k == 2) ^ ~(h != 1),
    "condition == condition": lambda b, h, q, k: (q > 3) == (k > 4),
    "condition != condition": lambda b, h, q, k: (q > 3) != (k > 4),
    "condition == True": lambda b, h, q, k: (q > 3) == True,  # noqa: E712
    "conditions added": lambda b, h, q, k: (q > 3) + (k > 4),
    "conditions multiplied": lambda b, h, q, k: (q > 3) * (k > 4),
    "conditions counted": lambda b, h, q, k: (q > 3).int() + (k > 4).int() == 1,
    "condition times index": lambda b, h, q, k: (q > 3) * k < 4,
    "condition against number": lambda b, h, q, k: (q > 3) + 1 > 1,
    "floor division of negatives": lambda b, h, q, k: (q - k) // 3 == (k - q) // -2,
    "modulo of negatives": lambda b, h, q, k: (q - k) % 3 == (k - q) % -2 + 1,
    "shifts": lambda b, h, q, k: (q << 1) >> 2 == k >> 1,
    "bits": lambda b, h, q, k: (q & 3) ^ (k | 1) == ~h + 6,
    "powers": lambda b, h, q, k: (q - k) ** 2 + q**3 - h**0 < 30,
    "abs and neg": lambda b, h, q, k: abs(q - k) <= -(k - 5),
    "divmod by hand": lambda b, h, q, k: q // 3 * 3 + q % 3 == k,
    "true division": lambda b, h, q, k: q / 2 > k / 3,
    "float comparison": lambda b, h, q, k: q * 0.5 < k - 1.5,
    "where": lambda b, h, q, k: torch.where(q > 3, q - 3, q) == torch.where(k > 3, k - 3, k),
    "where of conditions": lambda b, h, q, k: torch.where(h == 1, q > k, k > q),
    "minimum": lambda b, h, q, k: torch.minimum(q, k) > 1,
    "clamp": lambda b, h, q, k: q.clamp(2, 5) + torch.clamp(k, min=3) + torch.clip(h, max=1) > 9,
    "logical": lambda b, h, q, k: torch.logical_or(torch.logical_not(q > k), torch.logical_xor(q > 2, k > 2)),
    "logical of numbers": lambda b, h, q, k: torch.logical_and(q, k),
    "ones": lambda b, h, q, k: q.new_ones((), dtype=torch.bool) & (q > k),
    "casts": lambda b, h, q, k: (q > k).to(torch.int64) + q.to(torch.float32) > k.float(),
    "named methods": lambda b, h, q, k: q.ge(k) & q.sub(k).lt(3) | q.eq(k.add(2)) | h.gt(1),
    "document": lambda b, h, q, k: doc[b, q] == doc[b, k],
    "document in steps": lambda b, h, q, k: doc[b][q] == doc[b][k],
    "first document": lambda b, h, q, k: doc[0, q] == doc[-1][k],
    "ellipsis": lambda b, h, q, k: flags[..., k][h],
    "other dimension first": lambda b, h, q, k: flags[:, k][h] | flags[h, ...][q],
    "offset as tensor": lambda b, h, q, k: q + offset >= k,
    "tensor on the left": lambda b, h, q, k: (offset <= q) & (offset + k > q) & (offset == h),
    "table in a table": lambda b, h, q, k: doc[b, doc[b, q]] <= k,
    "tensor as index": lambda b, h, q, k: doc[b, offset] < k,
}

SCORE_FUNCTIONS = {
    "alibi": lambda s, b, h, q, k: s + (k - q) * slopes[h],
    "alibi computed": lambda s, b, h, q, k: s - torch.exp2(-((h + 1) * 8.0 / 3)) * (q - k),
    "alibi as power": lambda s, b, h, q, k: s - 2.0 ** (-(h + 1) * 8.0 / 3) * (q - k),
    "soft cap": lambda s, b, h, q, k: 3.0 * torch.tanh(s / 3.0),
    "bias": lambda s, b, h, q, k: s + bias[b, h, q, k],
    "bias in steps": lambda s, b, h, q, k: s + bias[b][h][q, k],
    "masked": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    "masked fill": lambda s, b, h, q, k: s.masked_fill(q < k, -1e4),
    "method where": lambda s, b, h, q, k: s.where(q >= k, bias[b, h, q, k]),
    "whole number": lambda s, b, h, q, k: q - k,
    "Python number": lambda s, b, h, q, k: 2,
    "in place on a local": lambda s, b, h, q, k: sum([s, 1, q], 0),
    "alpha": lambda s, b, h, q, k: torch.add(s, q, alpha=2) - torch.sub(s, k, alpha=0.5),
    "float table of conditions": lambda s, b, h, q, k: s * flags[h, k],
    "half table": lambda s, b, h, q, k: s + slopes.half()[h],
}
# fmt: on


@pytest.mark.parametrize("name", MASK_FUNCTIONS)
def test_a_mask_means_what_it_computes(name):
    mod = MASK_FUNCTIONS[name]
    assert torch.equal(traced_value(mod, "mask"), called_value(mod))


@pytest.mark.parametrize("name", SCORE_FUNCTIONS)
def test_a_score_means_what_it_computes(name):
    mod = SCORE_FUNCTIONS[name]
    score = torch.randn(*SIZES.values(), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(traced_value(mod, "score", score), called_value(mod, score).float(), rtol=1e-5, atol=1e-5)


# torch's uint8 differences wrap around; flexmask computes in int64
@pytest.mark.parametrize("name", sorted(set(MASKS) - {"small_unsigned_table"}))
def test_every_mask_of_the_zoo(name):
    mod = MASKS[name](*SIZES.values())
    try:
        wanted = called_value(mod)
    except (RuntimeError, NotImplementedError):  # some Python needs real numbers, which vmap has not
        wanted = torch.stack([torch.as_tensor(mod(*index)) for index in zip(*(g.reshape(-1) for g in grid().values()), strict=True)])
    assert torch.equal(traced_value(mod, "mask"), wanted.view(*SIZES.values()))


@pytest.mark.parametrize("name", sorted(SCORES))
def test_every_score_of_the_zoo(name):
    mod = SCORES[name](*SIZES.values())
    score = torch.randn(*SIZES.values(), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(traced_value(mod, "score", score), called_value(mod, score).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MASKS))
def test_text_of_every_mask_parses_back_and_the_trace_is_fresh(name):
    traced = trace(MASKS[name](*SIZES.values()), "mask")
    kinds = [ir.kind_of_dtype(t.dtype) for t in traced.tensors], ["float" if isinstance(s, float) else "int" for s in traced.scalars]
    assert ir.parse(ir.show(traced.expr), *kinds) is traced.expr
    assert traced.is_fresh() and not traced.volatile


@pytest.mark.parametrize("name", sorted(MASKS))
def test_masks_made_again_have_the_same_expression(name):
    first, second = (trace(MASKS[name](*SIZES.values(), seed=0), "mask") for _ in range(2))
    assert first.expr is second.expr and first.tensor_names == second.tensor_names


def test_expressions_as_written():
    assert repr(trace(lambda q, k: q >= k, "mask").expr) == "kv_idx <= q_idx"
    assert repr(trace(lambda q, k: (q - k) ** 2 < 9, "mask").expr) == "(q_idx - kv_idx) * (q_idx - kv_idx) < 9"
    assert repr(trace(lambda q, k: True, "mask").expr) == "True"
    assert repr(trace(lambda score: 1, "score").expr) == "1.0"
    assert repr(trace(lambda score, q_idx: q_idx, "score").expr) == "float32(q_idx)"
    assert repr(trace(lambda score: score.float(), "score").expr) == "score"
    assert repr(trace(lambda score: score.to(torch.bfloat16), "score").expr) == "bfloat16(score)"


def test_parameters_by_name_in_any_order_and_by_position():
    def alibi(score, q_idx, kv_idx, head_idx, bias_factor=0.5):
        return score + (kv_idx - q_idx) * bias_factor * head_idx

    traced = trace(alibi, "score")
    assert repr(traced.expr) == "score + (kv_idx - q_idx) * s0 * h"
    assert traced.scalars == (0.5,) and traced.scalar_names == ("bias_factor",)
    assert repr(trace(lambda *args: args[2] > args[3], "mask").expr) == "kv_idx < q_idx"
    assert repr(trace(lambda x, y, z, w: z > w, "mask").expr) == "kv_idx < q_idx"
    assert repr(trace(functools.partial(lambda size, b, h, q, k: q - k < size, 4), "mask").expr) == "q_idx - kv_idx < s0"


def test_names_and_text():
    def banded(b, h, q_idx, kv_idx, window=4):
        return (doc[b, q_idx] == doc[b, kv_idx]) & (q_idx - kv_idx < window)

    traced = trace(banded, "mask")
    assert str(traced) == "mask banded: (doc[b, q_idx] == doc[b, kv_idx]) & (q_idx - kv_idx < window)"
    assert trace(lambda q, k: q > k, "mask").name == "lambda"
    assert trace(functools.partial(banded, window=3), "mask").name == "banded"


def test_the_same_symbol_is_a_tensor_without_dimensions():
    def mod(score, q_idx):
        assert score.shape == () and score.ndim == 0 and score.dim() == 0 and score.numel() == 1
        assert score.dtype is torch.float32 and q_idx.dtype is torch.int64 and (q_idx > 1).dtype is torch.bool
        assert q_idx.to(torch.int32).dtype is torch.int32 and score.is_floating_point()
        return score.to(q_idx.device) + q_idx.type_as(score)

    assert repr(trace(mod, "score").expr) == "score + float32(q_idx)"


def test_conditions_on_structure_not_on_indices_are_plain_python():
    def mod(b, h, q, k, causal=True, mode="left"):
        keep = q >= k if causal else q == q
        return keep if mode == "left" else ~keep

    assert repr(trace(mod, "mask").expr) == "kv_idx <= q_idx"


def test_exceptions_of_the_users_code_pass_unchanged():
    with pytest.raises(KeyError, match="mine"):
        trace(lambda q, k: {}["mine"], "mask")


def test_places():
    def two_lines(b, h, q_idx, kv_idx):
        near = q_idx - kv_idx < 7
        return near & (q_idx >= kv_idx)

    traced = trace(two_lines, "mask")
    near, causal = traced.expr.args
    line = two_lines.__code__.co_firstlineno + 1
    at = traced.locate(near)
    assert (at.file, at.line, at.text[at.column : at.end_column]) == (__file__, line, "q_idx - kv_idx < 7")
    at = traced.locate(causal)
    assert (at.line, at.text[at.column : at.end_column]) == (line + 1, "q_idx >= kv_idx")
    # not written by the user, but made of what was
    at = traced.locate(~near)
    assert at.text[at.column : at.end_column] == "q_idx - kv_idx < 7"
    assert traced.locate(ir.Q) is None


def test_places_count_characters_not_bytes():
    traced = trace(lambda q, k, größe=7: q - k < größe, "mask")  # umlauts take two bytes
    at = traced.locate(traced.expr)
    assert at.text[at.column : at.end_column] == "q - k < größe"
