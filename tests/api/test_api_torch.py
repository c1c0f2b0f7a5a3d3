"""Attention as one of torch's operators: checks, transforms, checkpoints, export, autocast, FLOPs, and sharded parameters."""

import functools
import io

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import flexmask
from flexmask import masks
from flexmask.frontend import captured
from flexmask.runtime import ops
from flexmask.runtime.differentiable import Call

N = 40
DOC = torch.arange(N)[None] // 7


def rows(dtype=torch.float64, length=N):
    torch.manual_seed(0)
    return [torch.randn(1, 2, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


def relative(bias):
    @flexmask.score
    def relative(score, h, q_idx, kv_idx):
        return score + bias[h, (q_idx - kv_idx).clamp(0, 15)]

    return relative


class Model(torch.nn.Module):
    """Attention over documents with a learned bias; x [B, H, N, 24] holds queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(2, 16))

    def forward(self, x, doc):
        q, k, v = x.chunk(3, -1)
        return flexmask.attention(q, k, v, mask=masks.causal & masks.document(doc), score=relative(self.bias))


def arguments(sinks=None, dropout_p=0.0, length=N):
    bias = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    mods = [captured(mod.traced()) for mod in (masks.causal & masks.document(DOC) & masks.sliding_window(11), relative(bias))]
    lists = [[*mods[0][at], *mods[1][at]] for at in (1, 2, 3)]
    seed = torch.tensor([7]) if dropout_p else None
    return (*rows(length=length), sinks, seed, *lists, mods[0][0], mods[1][0], 0.3, dropout_p, True, "cpu", False, True)


@pytest.mark.parametrize("case", ["plain", "sinks and dropout"])
def test_opcheck(case):
    given = {} if case == "plain" else {"sinks": torch.randn(2, dtype=torch.float64, requires_grad=True), "dropout_p": 0.3}
    found = torch.library.opcheck(ops.attention, arguments(**given))
    assert set(found.values()) == {"SUCCESS"}


def test_gradcheck_of_the_operator():
    given = arguments(sinks=torch.randn(2, dtype=torch.float64, requires_grad=True), dropout_p=0.2, length=9)
    bias = next(t for t in given[5] if t.requires_grad)

    def run(q, k, v, sinks, bias):
        tables = [bias if t.requires_grad else t for t in given[5]]
        return ops.attention(q, k, v, sinks, given[4], tables, *given[6:])[:2]

    assert torch.autograd.gradcheck(run, (*given[:4], bias), fast_mode=True)


def test_a_second_derivative_is_refused():
    q, k, v = rows()
    (first,) = torch.autograd.grad(flexmask.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_func_grad():
    q, k, v = (x.detach() for x in rows())
    bias = torch.randn(2, 16, dtype=torch.float64)

    def loss(q, bias):
        return flexmask.attention(q, k, v, mask=masks.causal, score=relative(bias)).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(q, bias)
    q, bias = q.requires_grad_(), bias.requires_grad_()
    for gradient, other in zip(found, torch.autograd.grad(loss(q, bias), (q, bias)), strict=True):
        torch.testing.assert_close(gradient, other)


def test_func_functional_call():
    model, x = Model(), torch.randn(1, 2, N, 24)
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x, DOC)).sum())(parameters)["bias"]
    torch.testing.assert_close(found, torch.autograd.grad(model(x, DOC).sum(), model.bias)[0])


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_length_and_through_a_file(strict):
    model, length = Model(), torch.export.Dim("length", min=2, max=4096)
    sizes = ({2: length}, {1: length})
    program = torch.export.export(model, (torch.randn(1, 2, N, 24), DOC), dynamic_shapes=sizes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x, doc = torch.randn(1, 2, 33, 24), torch.arange(33)[None] // 5
    torch.testing.assert_close(torch.export.load(file).module()(x, doc), model(x, doc))


def test_autocast_as_torchs_own_attention():
    q, k, v = rows(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flexmask.attention(q, k, v.bfloat16(), mask=masks.causal)
        assert out.dtype == torch.bfloat16
        assert flexmask.attention(*rows()).dtype == torch.float64
    want = flexmask.attention(*(x.bfloat16() for x in (q, k, v)), mask=masks.causal)
    torch.testing.assert_close(out, want)
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


def test_checkpointing_draws_the_same_dropout_again():
    attn = flexmask.compile(masks.causal)
    q, k, v = rows()
    torch.manual_seed(3)
    plain = torch.autograd.grad(attn(q, k, v, dropout_p=0.4).square().sum(), q)[0]
    torch.manual_seed(3)
    out = checkpoint(lambda *x: attn(*x, dropout_p=0.4), q, k, v, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), q)[0], plain)


def test_selective_checkpointing_can_keep_what_attention_gave(monkeypatch):
    runs, forward = [], Call.forward
    monkeypatch.setattr(Call, "forward", lambda self, *x: runs.append(self) or forward(self, *x))

    def policy(ctx, operator, *args, **kwargs):
        kept = operator == torch.ops.flexmask.attention.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    model, x = Model(), torch.randn(1, 2, N, 24, requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(model, x, DOC, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(out.square().sum(), x)[0]
    assert len(runs) == 1
    torch.testing.assert_close(found, torch.autograd.grad(model(x, DOC).square().sum(), x)[0])


def test_flops_are_those_of_the_kept_pairs():
    kept = sum(q % 7 + 1 for q in range(N)) * 2
    q, k, v = rows()
    attn = flexmask.compile(masks.causal & masks.document(DOC))
    with FlopCounterMode(display=False) as counter:
        attn(q, k, v).sum().backward()
    found = counter.get_flop_counts()["Global"]
    assert found[torch.ops.flexmask.attention] == kept * 2 * (8 + 8)
    assert found[torch.ops.flexmask.attention_backward] == kept * 2 * (3 * 8 + 2 * 8)


def test_flops_of_a_mask_without_intervals_are_those_of_its_tiles():
    chosen = torch.rand(300, 300) < 0.5
    chosen[128:256, :128] = False
    q, k, v = rows(torch.float32, 300)
    with FlopCounterMode(display=False) as counter:
        flexmask.attention(q, k, v, mask=lambda b, h, q_idx, kv_idx: chosen[q_idx, kv_idx])
    assert counter.get_total_flops() == 2 * (300 * 300 - 128 * 128) * 2 * (8 + 8)


def test_only_inputs_out_and_lse_are_saved():
    saved = []
    q, k, v = rows(torch.float32, 512)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        flexmask.attention(q, k, v, mask=masks.causal & masks.sliding_window(64))
    assert sorted(x.numel() for x in saved) == sorted([q.numel()] * 4 + [2 * 512])


def test_parameters_sharded_by_fsdp2(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(1)
        plain, x = Model(), torch.randn(1, 2, N, 24)
        want = torch.autograd.grad(plain(x, DOC).square().sum(), plain.bias)[0]
        sharded = fully_shard(plain, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        sharded(x, DOC).square().sum().backward()
        torch.testing.assert_close(sharded.bias.grad.full_tensor(), want)
    finally:
        torch.distributed.destroy_process_group()
