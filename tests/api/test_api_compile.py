"""Attention inside torch.compile(fullgraph=True): masks made in the model, documents and lengths that change, and no new graph for them."""

import pytest
import torch
import torch._dynamo
import zoo
from torch._dynamo.utils import counters

import flexmask
from flexmask import masks


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def graphs():
    return counters["stats"]["unique_graphs"]


def packed(length, document, heads=2, dim=8):
    q, k, v = torch.randn(3, 1, heads, length, dim)
    return q, k, v, (torch.arange(length, dtype=torch.int32) // document)[None]


def test_a_mask_made_inside_with_other_documents_and_lengths_is_one_graph():
    bias = torch.nn.Parameter(torch.randn(2, 64))

    def model(q, k, v, doc):
        near = flexmask.mask(lambda q_idx, kv_idx: abs(q_idx - kv_idx) < q.shape[2] // 2)
        return flexmask.attention(q, k, v, mask=masks.causal & masks.document(doc) & near, score=relative(bias))

    run = compiled(model, dynamic=True)
    for length, document in ((40, 7), (50, 9), (33, 5), (64, 64)):
        q, k, v, doc = packed(length, document)
        q.requires_grad_()
        found, want = run(q, k, v, doc), model(q, k, v, doc)
        torch.testing.assert_close(found, want)
        got, expected = (torch.autograd.grad(out.square().sum(), (q, bias)) for out in (found, want))
        for gradient, other in zip(got, expected, strict=True):
            torch.testing.assert_close(gradient, other)
    assert graphs() == 1


def relative(bias):
    @flexmask.score
    def relative(score, h, q_idx, kv_idx):
        return score + bias[h, (q_idx - kv_idx).clamp(0, bias.shape[1] - 1)]

    return relative


def test_a_mask_made_outside_and_a_module_that_holds_one():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.randn(2, 64))
            self.attention = flexmask.compile(masks.sliding_window(5), relative(self.bias))

        def forward(self, q, k, v):
            return self.attention(q, k, v)

    block, (q, k, v, _) = Block(), packed(40, 7)
    found, want = compiled(block)(q, k, v), block(q, k, v)
    torch.testing.assert_close(found, want)
    got, expected = (torch.autograd.grad(out.sum(), block.bias)[0] for out in (found, want))
    torch.testing.assert_close(got, expected)


def test_promised_tables_stay_promised():
    def model(q, k, v, doc):
        ids = flexmask.sorted(doc)
        return flexmask.attention(q, k, v, mask=flexmask.mask(lambda b, q_idx, kv_idx: ids[b, q_idx] == ids[b, kv_idx]))

    seen = []

    def backend(graph, inputs):
        seen.extend(node.args for node in graph.graph.nodes if "flexmask" in str(node.target))
        return graph

    q, k, v, doc = packed(40, 7)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(q, k, v, doc), model(q, k, v, doc))
    assert '"promised": [0]' in seen[0][8]


def test_a_number_that_changes_costs_one_more_graph_at_most():
    def model(q, k, v, window):
        return flexmask.attention(q, k, v, mask=masks.sliding_window(window))

    run, (q, k, v, _) = compiled(model), packed(40, 7)
    for window in (3, 5, 8, 13):
        torch.testing.assert_close(run(q, k, v, window), model(q, k, v, window))
    assert graphs() == 2


def test_a_number_that_shapes_the_code_is_a_constant_of_the_graph():
    def model(q, k, v, block):
        return flexmask.attention(q, k, v, mask=masks.block_causal(block))

    run, (q, k, v, _) = compiled(model), packed(40, 7)
    for block in (3, 5, 8):
        torch.testing.assert_close(run(q, k, v, block), model(q, k, v, block))


SIGNATURES = {
    "torch's order": lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
    "other names": lambda i, j, m, n: m >= n,
    "two names": lambda q, kv: q >= kv,
    "a default": lambda q_idx, kv_idx, size=4: (q_idx >= kv_idx) & (q_idx - kv_idx < size),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_are_matched_as_outside(name):
    q, k, v, _ = packed(12, 4)

    def model(q, k, v):
        return flexmask.attention(q, k, v, mask=SIGNATURES[name])

    torch.testing.assert_close(compiled(model)(q, k, v), model(q, k, v))


def test_pythons_own_operators():
    q, k, v, doc = packed(23, 4)

    def model(q, k, v, doc):
        def mask(b, h, q_idx, kv_idx):
            near = (abs(q_idx - kv_idx) < 9) & (-q_idx <= +kv_idx) & ~(q_idx % 5 == 4)
            return near & ((q_idx << 1) >= kv_idx) & (5 // (kv_idx + 1) <= 5) & (doc[b][q_idx] ^ 1 >= 0) & (kv_idx**2 >= 0)

        return flexmask.attention(q, k, v, mask=mask)

    torch.testing.assert_close(compiled(model)(q, k, v, doc), model(q, k, v, doc))


def test_a_branch_on_an_index_is_refused():
    q, k, v, _ = packed(12, 4)

    def model(q, k, v):
        return flexmask.attention(q, k, v, mask=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx if q_idx > 3 else True)

    with pytest.raises(Exception, match=r"[Dd]ata-dependent"):
        compiled(model)(q, k, v)


def test_what_flexmask_cannot_compile_says_so():
    q, k, v, _ = packed(12, 4)

    def model(q, k, v):
        return flexmask.attention(q, k, v, mask=lambda b, h, q_idx, kv_idx: torch.bernoulli(q_idx) > 0)

    with pytest.raises(Exception, match="draws random numbers"):
        compiled(model)(q, k, v)


MODS = [("mask", name) for name in zoo.MASKS] + [("score", name) for name in zoo.SCORES]


@pytest.mark.parametrize(("kind", "name"), MODS)
def test_every_mask_and_score_of_the_zoo(kind, name):
    batch, heads, length = 2, 2, 35
    mod = (zoo.MASKS if kind == "mask" else zoo.SCORES)[name](batch, heads, length, length)
    q, k, v = torch.randn(3, batch, heads, length, 8)

    def model(q, k, v):
        return flexmask.attention(q, k, v, **{kind: mod})

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(q, k, v), model(q, k, v), atol=1e-6, rtol=1e-6)
