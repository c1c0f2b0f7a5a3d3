"""torch's documented examples, through torch's own flex_attention and through flexmask.compat: outputs, lse and gradients are equal."""

from __future__ import annotations

import pytest
import torch
from flex_cases import Example, examples
from torch.nn.attention import flex_attention as theirs

import flexmask
from flexmask import compat as ours

EXAMPLES = examples()


@pytest.fixture
def eager(monkeypatch):
    """torch's flex_attention as plain operations, which also on the CPU have gradients: all but those of captured tensors."""
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(theirs, "_validate_device", lambda *tensors: None)


@pytest.fixture
def traced(monkeypatch):
    """torch's flex_attention as it is by default, so that captured tensors have gradients too."""
    monkeypatch.setattr(theirs, "_validate_device", lambda *tensors: None)
    torch._dynamo.reset()


def tensors(case: Example, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    seeded = torch.Generator().manual_seed(3)
    shapes = [(case.heads, case.q_len), (case.kv_heads, case.kv_len), (case.kv_heads, case.kv_len)]
    return tuple(torch.randn(case.batch, *shape, 16, generator=seeded, dtype=dtype).requires_grad_() for shape in shapes)


def attend(library, case: Example, q, k, v):
    """(out, lse) of a model that uses the library, written once: only the import differs."""
    block_mask = None
    if case.mask_mod is not None:
        block_mask = library.create_block_mask(case.mask_mod, *case.mask_sizes, case.q_len, case.kv_len, device="cpu", BLOCK_SIZE=32)
    out, aux = library.flex_attention(
        q, k, v, score_mod=case.score_mod, block_mask=block_mask, scale=case.scale, enable_gqa=case.heads != case.kv_heads,
        return_aux=library.AuxRequest(lse=True),
    )  # fmt: skip
    assert aux.max_scores is None
    return out, aux.lse


def gradients(out: torch.Tensor, lse: torch.Tensor, wanted: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    seen = torch.where(lse == -torch.inf, 0, lse)
    return torch.autograd.grad(out.sin().sum() + seen.cos().sum(), wanted)


def compare(case: Example, wanted: tuple[torch.Tensor, ...], given: tuple[torch.Tensor, ...]) -> None:
    out, lse = attend(ours, case, *given)
    out2, lse2 = attend(theirs, case, *given)
    torch.testing.assert_close(out, out2)
    torch.testing.assert_close(lse, lse2)
    for found, expected in zip(gradients(out, lse, wanted), gradients(out2, lse2, wanted), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_what_torch_gives(name, eager):
    given = tensors(EXAMPLES[name])
    compare(EXAMPLES[name], given, given)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [name for name, case in EXAMPLES.items() if case.learned])
def test_learned_tensors_have_torchs_gradients(name, traced):
    given = tensors(EXAMPLES[name])
    compare(EXAMPLES[name], (*given, *EXAMPLES[name].learned), given)


@pytest.mark.parametrize("name", ["causal", "documents", "tanh soft-capping", "neighbourhood of an image"])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_dtypes(name, dtype, atol, eager):
    case, given = EXAMPLES[name], tensors(EXAMPLES[name], dtype)
    out, lse = attend(ours, case, *given)
    out2, _ = attend(theirs, case, *given)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out, out2, atol=atol, rtol=atol)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_mask_written_out_is_torchs(name):
    case = EXAMPLES[name]
    mod = case.mask_mod or case.score_mod
    if mod is not None:
        sizes = (case.batch, case.heads, case.q_len, case.kv_len)
        found = ours.create_mask(mod, *sizes, device="cpu")
        assert found.shape == sizes and torch.equal(found, theirs.create_mask(mod, *sizes, device="cpu"))


def test_torchs_block_mask_is_taken_as_it_is(eager):
    case = EXAMPLES["documents"]
    q, k, v = tensors(case)
    block_mask = theirs.create_block_mask(case.mask_mod, None, None, case.q_len, case.kv_len, device="cpu", BLOCK_SIZE=32)
    expected = theirs.flex_attention(q, k, v, block_mask=block_mask)
    torch.testing.assert_close(ours.flex_attention(q, k, v, block_mask=block_mask), expected)
    block_mask.kv_num_blocks[..., 1:] = 0  # changed in place: what is kept now lies in full blocks, and in the first block row
    block_mask.full_kv_num_blocks.zero_()
    assert torch.equal(ours.flex_attention(q, k, v, block_mask=block_mask)[:, :, 32:], torch.zeros_like(q[:, :, 32:]))
    block_mask.mask_mod = theirs.noop_mask
    assert not torch.equal(ours.flex_attention(q, k, v, block_mask=block_mask)[:, :, :32], expected[:, :, :32])


def test_our_block_mask_works_in_torchs_flex_attention(eager):
    case = EXAMPLES["documents"]
    q, k, v = tensors(case)
    block_mask = ours.create_block_mask(case.mask_mod, None, None, case.q_len, case.kv_len, device="cpu", BLOCK_SIZE=32)
    torch.testing.assert_close(theirs.flex_attention(q, k, v, block_mask=block_mask), ours.flex_attention(q, k, v, block_mask=block_mask))


def test_flexmasks_own_mods_are_taken():
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    mask, score = flexmask.masks.sliding_window(7), flexmask.scores.softcap(2.0)
    expected = flexmask.attention(q, k, v, mask=mask, score=score)
    block_mask = ours.create_block_mask(mask, None, None, 40, 40, device="cpu")
    for given in (mask, block_mask):
        assert torch.equal(ours.flex_attention(q, k, v, score, given), expected)
    assert block_mask.as_flexmask() is mask


def test_inference_mode_and_autocast():
    case = EXAMPLES["documents"]
    q, k, v = tensors(case, torch.float32)
    expected, _ = attend(ours, case, q, k, v)
    block_mask = ours.create_block_mask(case.mask_mod, None, None, case.q_len, case.kv_len, device="cpu", BLOCK_SIZE=16)
    with torch.inference_mode():
        made_inside = ours.create_block_mask(case.mask_mod, None, None, case.q_len, case.kv_len, device="cpu", BLOCK_SIZE=16)
        for mask in (block_mask, made_inside):
            assert mask.sparsity() > 0 and torch.equal(ours.flex_attention(q, k, v, block_mask=mask), expected)
        sliced = made_inside[:, :]
        sliced.mask_mod = case.mask_mod
        torch.testing.assert_close(ours.flex_attention(q, k, v, block_mask=sliced), expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours.flex_attention(q, k, v, block_mask=block_mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("q_len, kv_len", [(0, 5), (5, 0), (1, 1)])
def test_no_queries_or_no_keys(q_len, kv_len):
    q, k = torch.randn(1, 2, q_len, 16), torch.randn(1, 2, kv_len, 16)
    block_mask = ours.create_block_mask(EXAMPLES["causal"].mask_mod, None, None, q_len, kv_len, device="cpu", BLOCK_SIZE=4)
    assert block_mask.to_dense().shape == (1, 1, -(-q_len // 4), -(-kv_len // 4))
    assert ours.flex_attention(q, k, k, block_mask=block_mask).shape == q.shape


def test_one_sequence_of_keys_for_all_queries(eager):
    """torch allows it under a mask made for each batch entry, as paged caches are read."""
    q, k, v = torch.randn(3, 2, 5, 16), *torch.randn(2, 1, 2, 24, 16)

    def own_part(b, h, q_idx, kv_idx):
        return kv_idx // 8 == b

    sizes = (3, None, 5, 24)
    out = ours.flex_attention(q, k, v, block_mask=ours.create_block_mask(own_part, *sizes, device="cpu"))
    for b in range(3):
        part = slice(8 * b, 8 * b + 8)
        alone = torch.nn.functional.scaled_dot_product_attention(q[b], k[0, :, part], v[0, :, part])
        torch.testing.assert_close(out[b], alone)


def test_paged_attention():
    """torch's PagedAttention turns a logical mask into one of physical pages: lists, a mask mod and a score mod."""
    from torch.nn.attention.experimental._paged_attention import PagedAttention

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def biased(score, b, h, q_idx, kv_idx):
        return score + 0.1 * (kv_idx - q_idx)

    batch, heads, length, page = 2, 2, 48, 16
    paged = PagedAttention(n_pages=10, page_size=page, max_batch_size=batch, device="cpu")
    for step in range(1, 4):  # the two sequences' pages alternate
        for b in range(batch):
            paged.reserve(torch.tensor(b), torch.tensor(step * page))
    q, k, v = (torch.randn(batch, heads, length, 16) for _ in range(3))
    k_cache, v_cache = torch.zeros(2, 1, heads, 10 * page, 16)
    positions = torch.arange(length).expand(batch, length)
    paged.assign(torch.arange(batch), positions, k, v, k_cache, v_cache)
    logical = ours.create_block_mask(causal, batch, None, length, length, device="cpu", BLOCK_SIZE=page)
    physical = paged.convert_logical_block_mask(logical)
    out = ours.flex_attention(q, k_cache, v_cache, score_mod=paged.get_score_mod(biased), block_mask=physical)
    torch.testing.assert_close(out, ours.flex_attention(q, k, v, score_mod=biased, block_mask=logical))
