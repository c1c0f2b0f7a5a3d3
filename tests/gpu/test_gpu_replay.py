"""The second call of a layout repeats the first one's launches: the same bits as a call that prepares everything."""

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
def test_the_same_bits(case, monkeypatch):
    make, sizes, call = CASES[case]
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    call = {name: sinks if value == "sinks" else value for name, value in call.items()}
    attn, second = make(), tensors(1, **sizes)
    everything(attn, *tensors(0, **sizes), **call)  # records
    repeated = everything(attn, *second, **call)
    assert any(entry[0].replays.kept for entry in default_store()._launches.values())
    monkeypatch.setattr(replay, "MOST_REPLAYS", 0)
    default_store().forget_maps()
    for found, wanted in zip(repeated, everything(attn, *second, **call), strict=True):
        # where the hopper kernels add up dq, the order of sums is not the same twice
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())
    assert torch.equal(repeated[0], everything(attn, *second, **call)[0])


def test_one_tensor_three_times_then_three(monkeypatch):
    attn = flexmask.compile(masks.causal)
    x, (q, k, v, _) = tensors(0)[0].detach(), tensors(1)
    for _ in range(3):
        attn(x, x, x)
        found = attn(q, k, v)
    monkeypatch.setattr(replay, "MOST_REPLAYS", 0)
    default_store().forget_maps()
    assert torch.equal(found, attn(q, k, v))


def test_tensors_at_odd_addresses():
    attn = flexmask.compile(masks.causal)
    q, k, v, _ = (x.detach() for x in tensors(0))
    want = [attn(q, k, v) for _ in range(2)][1]
    odd = [torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    for _ in range(2):
        torch.testing.assert_close(attn(*odd), want, rtol=0, atol=2e-2)
        assert torch.equal(attn(q, k, v), want)


def test_a_replay_in_a_cuda_graph():
    attn = flexmask.compile(masks.causal)
    q, k, v, _ = (x.detach() for x in tensors(0))
    attn(q, k, v), attn(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attn(q, k, v))


def test_the_driver_starts_them_also_from_threads_that_never_met_cuda():
    default_store().forget_maps()
    attn, (q, k, v, dout) = flexmask.compile(masks.causal), tensors(0)
    wanted, found = everything(attn, q, k, v, dout), []
    replays = [replay for entry in default_store()._launches.values() for replay in entry[0].replays.kept.values()]
    launches = [launch for replay in replays if replay is not None for launch in replay._launches]
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
    for _ in range(2):
        attn(q, k, v)
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        attn(q, k, v)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 1
