"""From the third call of a layout on, launches are repeated: the same bits as a call that prepares everything."""

import threading

import pytest
import torch

import flexmask
from flexmask import masks, scores
from flexmask.runtime import replay
from flexmask.runtime.store import default_store

pytestmark = pytest.mark.gpu


def tensors(seed, heads=4, kv_heads=4, q_len=200, kv_len=200, dim=64, turned=False):
    torch.manual_seed(seed)
    found = []
    for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len), (heads, q_len)):
        shape = (2, n, h, dim) if turned else (2, h, n, dim)
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        found.append((x.transpose(1, 2) if turned else x).requires_grad_())
    return found


def replays():
    """What is known of calls to be repeated, by the kernels they start."""
    return [made for made in default_store()._kernels.values() if isinstance(made, replay.Replays)]


@pytest.fixture
def prepare_all(monkeypatch):
    """Called, nothing is repeated from then on."""

    def forget():
        monkeypatch.setattr(replay.Replays, "_starts_kernels", staticmethod(lambda inputs: False))
        for known in replays():
            known.kept.clear()
        default_store().forget_maps()  # nor what calls remember of theirs

    return forget


def everything(attn, q, k, v, dout, **call):
    out, lse = attn(q, k, v, return_lse=True, **call)
    wanted = [q, k, v, *[x for x in call.values() if isinstance(x, torch.Tensor) and x.requires_grad]]
    return (out, lse, *torch.autograd.grad(out, wanted, dout, retain_graph=True))


def ids():
    document = torch.tensor([0] * 70 + [1] * 50 + [2] * 80, device="cuda")
    return masks.document(document)


CASES = {
    "causal": (lambda: flexmask.compile(masks.causal), {}, {}),
    "no mask": (lambda: flexmask.compile(), {}, {}),
    "two kernels in turn": (lambda: flexmask.compile(masks.causal & ids()), {}, {}),
    "shared keys": (lambda: flexmask.compile(masks.causal, enable_gqa=True), {"kv_heads": 2}, {}),
    "lengths": (lambda: flexmask.compile(masks.sliding_window(40)), {"q_len": 100, "kv_len": 131}, {}),
    "turned": (lambda: flexmask.compile(masks.causal), {"turned": True}, {}),
    "score": (lambda: flexmask.compile(masks.causal, scores.alibi(4, device="cuda")), {}, {}),
    "dim 128": (lambda: flexmask.compile(masks.causal), {"dim": 128}, {}),
    "dropout": (lambda: flexmask.compile(masks.causal), {}, {"dropout_p": 0.2, "seed": 5}),
    "sinks": (lambda: flexmask.compile(masks.causal), {}, {"sinks": "sinks"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(case, prepare_all):
    make, sizes, call = CASES[case]
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    call = {name: sinks if value == "sinks" else value for name, value in call.items()}
    attn, second = make(), tensors(1, **sizes)
    default_store().clear()
    for _ in range(2):
        everything(attn, *tensors(0, **sizes), **call)
    kept = [each for known in replays() for each in known.kept.values()]
    assert len(kept) == 2 and (None in kept) == (case == "sinks")  # whose gradient torch computes
    repeated = everything(attn, *second, **call)
    prepare_all()
    for found, wanted in zip(repeated, everything(attn, *second, **call), strict=True):
        # where the hopper kernels add up dq, the order of sums is not the same twice
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())
    assert torch.equal(repeated[0], everything(attn, *second, **call)[0])


MAPS = {
    "intervals": lambda ids, bias: flexmask.compile(masks.causal & masks.document(ids)),
    "promised": lambda ids, bias: flexmask.compile(masks.causal & masks.document(flexmask.sorted(ids))),
    "predicate": lambda ids, bias: flexmask.compile(flexmask.mask(lambda q_idx, kv_idx: (ids[q_idx] ^ ids[kv_idx]) < 2)),
    "score": lambda ids, bias: flexmask.compile(masks.document(ids), flexmask.score(lambda score, h, kv_idx: score + bias[h, kv_idx])),
}


@pytest.mark.parametrize("case", MAPS)
def test_what_was_recorded_with_one_map_serves_the_next(case, prepare_all):
    default_store().clear()
    batches = []
    for seed in range(5):
        torch.manual_seed(seed)
        ids = torch.randint(0, 4, (200,), device="cuda").sort().values
        batches.append((ids, torch.randn(4, 200, device="cuda"), tensors(seed)))
    found = [everything(MAPS[case](ids, bias), *given) for ids, bias, given in batches]
    assert replays() and all(len(known.kept) == 1 and None not in known.kept.values() for known in replays())
    prepare_all()
    for repeated, (ids, bias, given) in zip(found, batches, strict=True):
        prepared = everything(MAPS[case](ids, bias), *given)
        assert all(map(torch.equal, repeated[:2], prepared[:2])), "out and lse have no order of sums to choose"
        for one, other in zip(repeated, prepared, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-2 * other.abs().max().item())


def test_keys_of_one_batch_entry_for_all_after_keys_of_each():
    """Their strides are the same, and the kernel's arguments are not."""
    attn, (q, k, v, dout) = flexmask.compile(masks.causal), tensors(0)
    for keys in (slice(None), slice(1)):
        for _ in range(4):
            out, _, *grads = everything(attn, q, k.detach()[keys].requires_grad_(), v.detach()[keys].requires_grad_(), dout)
    want = everything(attn, q, *[x.detach()[:1].expand_as(x).contiguous().requires_grad_() for x in (k, v)], dout)
    torch.testing.assert_close(out, want[0], rtol=0, atol=2e-2)
    for one, other in zip(grads[1:], want[3:], strict=True):
        torch.testing.assert_close(one.float(), other.float().sum(0, keepdim=True), rtol=0, atol=3e-2 * other.abs().max().item())


def test_layers_of_a_compiled_model_share_launches():
    """Each layer's call comes as text and tensors; what it starts is found, not made again."""
    default_store().clear()
    calls = []

    def model(q, k, v, ids):
        mask = masks.causal & masks.document(flexmask.sorted(ids))
        for _ in range(4):
            q = flexmask.attention(q, k, v, mask=mask)
        return q

    compiled = torch.compile(model, fullgraph=True)
    for seed in range(3):
        ids = (torch.arange(200, device="cuda") // (50 + seed)).int()
        q, k, v, dout = tensors(seed)
        before = flexmask.cache_info()
        out = compiled(q, k, v, ids)
        out.backward(dout)
        calls.append({name: n - before[name] for name, n in flexmask.cache_info().items()})
        torch.testing.assert_close(out, model(q, k, v, ids), rtol=0, atol=2e-2)
    assert calls[1]["maps"] == calls[2]["maps"] <= 2
    assert len(default_store()._launches) <= 4 * 3, (
        "two for each of three batches, or twice that where the eager model's count for themselves"
    )


def test_one_tensor_three_times_then_three(prepare_all):
    attn = flexmask.compile(masks.causal)
    x, (q, k, v, _) = tensors(0)[0].detach(), tensors(1)
    for _ in range(3):
        attn(x, x, x)
        found = attn(q, k, v)
    prepare_all()
    assert torch.equal(found, attn(q, k, v))


def test_tensors_at_odd_addresses():
    attn = flexmask.compile(masks.causal)
    q, k, v, _ = (x.detach() for x in tensors(0))
    want = [attn(q, k, v) for _ in range(3)][-1]
    odd = [torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    for _ in range(3):
        torch.testing.assert_close(attn(*odd), want, rtol=0, atol=2e-2)
        assert torch.equal(attn(q, k, v), want)


def test_a_replay_in_a_cuda_graph():
    attn = flexmask.compile(masks.causal)
    q, k, v, _ = (x.detach() for x in tensors(0))
    for _ in range(3):
        attn(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attn(q, k, v))


def test_the_driver_starts_them_also_from_threads_that_never_met_cuda():
    default_store().clear()
    attn, (q, k, v, dout) = flexmask.compile(masks.causal), tensors(0)
    wanted, found = [everything(attn, q, k, v, dout) for _ in range(2)][1], []
    launches = [launch for known in replays() for each in known.kept.values() if each is not None for launch in each._launches]
    assert len(launches) >= 2 and all(launch.direct is not None for launch in launches)
    thread = threading.Thread(target=lambda: found.extend(attn(q.detach(), k.detach(), v.detach(), return_lse=True)))
    thread.start()
    thread.join()
    assert len(found) == 2 and all(torch.equal(x, y) for x, y in zip(found, wanted[:2], strict=True))


def test_hooks_into_triton_see_every_launch():
    from triton import knobs

    attn, (q, k, v, _) = flexmask.compile(masks.causal), [x.detach() for x in tensors(0)]
    seen = []
    hook = lambda metadata: seen.append(metadata)
    for _ in range(3):
        attn(q, k, v)
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        attn(q, k, v)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 1
