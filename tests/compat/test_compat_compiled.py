"""flex_attention inside torch.compile(fullgraph=True), as models for torch's own are written."""

from __future__ import annotations

import pytest
import torch
from flex_cases import causal, examples
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as theirs

from flexmask import compat as ours


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Layer(torch.nn.Module):
    """Packed documents with a learned bias by distance; the mask is made inside."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 96)
        self.bias = torch.nn.Parameter(torch.randn(2, 9))

    def forward(self, x: torch.Tensor, document: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)

        def packed(b, h, q_idx, kv_idx):
            return document[b, q_idx] == document[b, kv_idx]

        def relative(score, b, h, q_idx, kv_idx):
            return score + self.bias[h, torch.clamp(q_idx - kv_idx, 0, 8)]

        block_mask = ours.create_block_mask(ours.and_masks(causal, packed), batch, None, length, length, device=x.device)
        out, aux = ours.flex_attention(q, k, v, relative, block_mask, return_aux=ours.AuxRequest(lse=True))
        return out, aux.lse


def test_a_model_that_makes_its_mask_compiles_once():
    model, counter = Layer(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for length in (40, 57, 33):
        x, document = torch.randn(2, length, 32), torch.randint(0, 3, (2, length)).sort()[0]
        results = []
        for run in (model, compiled):
            out, lse = run(x, document)
            results.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.sum(), list(model.parameters()))))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["documents", "tanh soft-capping", "neighbourhood of an image", "padding, grouped heads"])
@pytest.mark.parametrize("library", [ours, theirs], ids=["our BlockMask", "torch's BlockMask"])
def test_a_mask_made_outside(name, library):
    case = examples()[name]
    block_mask = library.create_block_mask(case.mask_mod, *case.mask_sizes, case.q_len, case.kv_len, device="cpu", BLOCK_SIZE=32)
    q = torch.randn(case.batch, case.heads, case.q_len, 16)
    k, v = torch.randn(2, case.batch, case.kv_heads, case.kv_len, 16)
    compiled = torch.compile(ours.flex_attention, fullgraph=True, backend="aot_eager")
    options = {"block_mask": block_mask, "enable_gqa": True, "kernel_options": {"BLOCK_M": 64}}
    torch.testing.assert_close(compiled(q, k, v, case.score_mod, **options), ours.flex_attention(q, k, v, case.score_mod, **options))


def test_create_block_mask_under_torch_compile():
    """What torch advises for its own; here there is nothing to gain, and it works."""
    made = torch.compile(ours.create_block_mask, backend="eager")(causal, None, None, 48, 40, device="cpu", BLOCK_SIZE=16)
    assert torch.equal(made.kv_indices, theirs.create_block_mask(causal, None, None, 48, 40, device="cpu", BLOCK_SIZE=16).kv_indices)
    q, k = torch.randn(1, 1, 48, 16), torch.randn(1, 1, 40, 16)
    plain = ours.create_block_mask(causal, None, None, 48, 40, device="cpu")
    assert torch.equal(ours.flex_attention(q, k, k, block_mask=made), ours.flex_attention(q, k, k, block_mask=plain))


def test_a_slice_inside():
    whole = ours.create_block_mask(causal, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    row = whole[:, :, 1]
    row.mask_mod, row.seq_lengths = (lambda b, h, q_idx, kv_idx: q_idx + 20 >= kv_idx), (1, 48)
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 48, 16)
    compiled = torch.compile(lambda q, k, row: ours.flex_attention(q, k, k, block_mask=row), fullgraph=True, backend="aot_eager")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k[:, :, :21], k[:, :, :21])
    torch.testing.assert_close(compiled(q, k, row), expected)
    row.kv_num_blocks.zero_()
    row.full_kv_num_blocks.zero_()  # in place: seen, as lists that count are inputs of the graph
    assert not compiled(q, k, row).any()
