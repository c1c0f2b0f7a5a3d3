"""What torch's flex_attention refuses is refused, with what was found and what to write; kernel options key by key."""

from __future__ import annotations

import typing

import pytest
import torch
from flex_cases import causal
from torch.nn.attention import flex_attention as theirs

import flexmask
from flexmask import compat as ours
from flexmask.compat.options import REFUSED, WITHOUT_EFFECT


def x(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*shape, **options)


def square(batch=None, heads=None, n=8):
    return ours.create_block_mask(causal, batch, heads, n, n, device="cpu")


Q = x(2, 4, 8, 16)
# fmt: off
CALLS = {
    "a longer mask": ((Q, Q, Q), {"block_mask": square(n=16)}, r"made for q_len 16 and kv_len 16, .* have 8 and 8.*_adjust\(8, 8\)"),
    "a shorter mask": ((Q, Q, Q), {"block_mask": square(n=4)}, "create_block_mask"),
    "a mask for another batch": ((Q, Q, Q), {"block_mask": square(3)}, "made for batch 3, but query has 2"),
    "a mask for other heads": ((Q, Q, Q), {"block_mask": square(2, 2)}, "made for heads 2, but query has 4"),
    "a mask elsewhere": ((Q, Q, Q), {"block_mask": square().to("meta")}, "block_mask is on meta, but query on cpu"),
    "heads that differ": ((Q, x(2, 2, 8, 16), x(2, 2, 8, 16)), {}, "enable_gqa=True"),
    "heads that do not divide": ((Q, x(2, 3, 8, 16), x(2, 3, 8, 16)), {"enable_gqa": True}, "no multiple of 3"),
    "keys for one of the batch": ((Q, x(1, 4, 8, 16), x(1, 4, 8, 16)), {}, "batch 2 and key 1.*B=2"),
    "the same under a mask for all": ((Q, x(1, 4, 8, 16), x(1, 4, 8, 16)), {"block_mask": square()}, "batch 2 and key 1.*B=2"),
    "three dimensions": ((Q[0], Q[0], Q[0]), {}, r"query has shape \(4, 8, 16\); flex_attention takes"),
    "dtypes that differ": ((Q, Q.double(), Q), {}, "differ in dtype"),
    "head dims that differ": ((Q, x(2, 4, 8, 32), Q), {}, "differ in head_dim"),
    "devices that differ": ((Q, Q.to("meta"), Q), {}, "different devices"),
    "jagged sequences": ((torch.nested.nested_tensor([x(4, 3, 16)], layout=torch.jagged),) * 3, {}, "nested tensor.*masks.packed"),
    "a function as block mask": ((Q, Q, Q), {"block_mask": causal}, "block_mask is a function. Write `create_block_mask"),
    "a matrix as block mask": ((Q, Q, Q), {"block_mask": x(8, 8).bool()}, "block_mask is a Tensor.*from_dense"),
    "a mask as score mod": ((Q, Q, Q), {"score_mod": causal}, "a score returns a number"),
    "flexmask's mask as score mod": ((Q, Q, Q), {"score_mod": flexmask.masks.causal}, "Pass it as block_mask"),
    "a score as block mask": ((Q, Q, Q), {"block_mask": flexmask.scores.softcap(3.0)}, "block_mask is a Score"),
    "both ways to ask for lse": ((Q, Q, Q), {"return_lse": True, "return_aux": ours.AuxRequest(lse=True)}, "exclude each other"),
}
# fmt: on


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_torch_refuses(name):
    given, options, message = CALLS[name]
    with pytest.raises(flexmask.FlexmaskError, match=message):
        ours.flex_attention(*given, **options)


def reversed_names(b, h, kv_idx, q_idx):
    return q_idx >= kv_idx


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ours.create_block_mask(lambda s, b, h, q, k: s, None, None, 8, 8, device="cpu"), "a mask takes"),
        (lambda: ours.create_block_mask(reversed_names, None, None, 8, 8, device="cpu"), "in this order"),
        (lambda: ours.create_block_mask(causal, None, None, 8, 8, device="cpu", BLOCK_SIZE=0), "cannot be"),
        (lambda: ours.create_block_mask(causal, None, None, -8, 8, device="cpu"), "cannot be"),
        (lambda: ours.and_masks(causal, 3), "argument 1 is a int"),
        (lambda: ours.or_masks("causal"), "argument 0 is a str"),
        (lambda: ours.create_nested_block_mask(causal, 1, 1, x(3)), "masks.packed"),
    ],
)
def test_a_mask_that_cannot_be_made(make, message):
    with pytest.raises(flexmask.FlexmaskError, match=message):
        make()


def test_parameters_named_in_another_order_are_refused():
    """flexmask would match them by name, torch by position: neither is taken silently."""
    with pytest.raises(flexmask.TraceError, match="Name them in the order"):
        ours.flex_attention(Q, Q, Q, score_mod=lambda score, h, b, q_idx, kv_idx: score + h)


def test_names_are_all_there():
    assert set(theirs.__all__) <= set(ours.__all__)
    assert (ours.AuxRequest, ours.AuxOutput, ours.FlexKernelOptions) == (theirs.AuxRequest, theirs.AuxOutput, theirs.FlexKernelOptions)


def test_every_documented_kernel_option_is_decided():
    documented = set(typing.get_type_hints(theirs.FlexKernelOptions))
    assert documented == WITHOUT_EFFECT | {"BACKEND"} and not documented & set(REFUSED)


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_what_only_tunes_is_without_effect(key):
    q = torch.randn(1, 2, 8, 16)
    expected = ours.flex_attention(q, q, q)
    for name in (key, f"fwd_{key}", f"bwd_{key}"):
        assert torch.equal(ours.flex_attention(q, q, q, kernel_options={name: 1}), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"OUTPUT_LOGSUMEXP": True}, r"AuxRequest\(lse=True\)"),
        ({"OUTPUT_MAX": True}, r"AuxRequest\(max_scores=True\)"),
        ({"fwd_FLOAT32_PRECISION": "'tf32'"}, "float32's precision"),
        ({"num_warp": 4}, "Did you mean 'num_warps'"),
        ({"fwd_BACKEND": "TRITON"}, "Did you mean 'BACKEND'"),
        ({"SAFE_HEAD_DIM": True}, "Leave it out"),
        ({"BACKEND": "FLASH"}, "no FlashAttention kernels"),
        ({"BACKEND": "TRITON_DECODE"}, "takes any length"),
        ({"BACKEND": "triton"}, 'Write "AUTO" or "TRITON"'),
        ({"BACKEND": "AUTO", "FORCE_USE_FLEX_ATTENTION": True}, "exclude each other"),
    ],
)
def test_kernel_options_that_cannot_be_followed(options, message):
    with pytest.raises(flexmask.BackendError, match=message):
        ours.flex_attention(Q, Q, Q, kernel_options=options)


def test_the_backend_asked_for_is_used_or_refused(monkeypatch):
    assert torch.equal(ours.flex_attention(Q, Q, Q, kernel_options={"BACKEND": "AUTO"}), ours.flex_attention(Q, Q, Q))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(flexmask.BackendError, match="takes CUDA tensors"):
        ours.flex_attention(Q, Q, Q, kernel_options={"BACKEND": "TRITON"})


def test_lse_and_max_scores_on_request():
    q = torch.randn(1, 2, 8, 16)
    out = ours.flex_attention(q, q, q, block_mask=square())
    scores = (q @ q.mT / 4).masked_fill(~square().as_flexmask().to_dense(8, 8), -torch.inf)
    both = ours.AuxRequest(lse=True, max_scores=True)
    for wanted in (ours.AuxRequest(), ours.AuxRequest(lse=True), ours.AuxRequest(max_scores=True), both):
        found, aux = ours.flex_attention(q, q, q, block_mask=square(), return_aux=wanted)
        assert torch.equal(found, out) and isinstance(aux, ours.AuxOutput)
        assert (aux.lse is not None, aux.max_scores is not None) == tuple(wanted)
    torch.testing.assert_close(aux.lse, scores.logsumexp(-1))
    torch.testing.assert_close(aux.max_scores, scores.amax(-1))
    found, lse = ours.flex_attention(q, q, q, block_mask=square(), return_lse=True)
    assert torch.equal(lse, aux.lse)
