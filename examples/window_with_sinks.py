"""A sliding window that may also read the first tokens, with a learned sink in each head's softmax.

    python -m examples.window_with_sinks

Two answers to one trouble: softmax must spend all its weight, so heads with nothing to say spend it on the first tokens, which a
window loses. Keeping those tokens (StreamingLLM, arXiv 2309.17453) is a mask; a logit that takes weight and has no value (as in
gpt-oss, arXiv 2508.10925) is `sinks`. Here heads learn the sinks of a teacher from its outputs, checked against dense attention.
"""

from __future__ import annotations

import torch

import flexmask
from flexmask import masks

LENGTH, FIRST, WINDOW = 256, 4, 16
TEACHER = torch.tensor([-2.0, 0.0, 2.0, 4.0])


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The same by its definition: the sink is one more column of the softmax, which is then left out."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
    column = sinks[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    mask = masks.sink_window(FIRST, WINDOW)
    attn = flexmask.compile(mask)
    print(mask, "\n")
    tiles = mask.block_mask(8192, 8192).states()
    print(f"at 8192 tokens {(tiles > 0).float().mean().item():.1%} of the tiles are computed\n")

    q, k, v = torch.randn(3, 2, len(TEACHER), LENGTH, 32).unbind()
    with torch.no_grad():
        target = attn(q, k, v, sinks=TEACHER)
    sinks = torch.zeros(len(TEACHER), requires_grad=True)
    optimizer = torch.optim.Adam([sinks], lr=0.2)
    for _ in range(steps):
        loss = (attn(q, k, v, sinks=sinks) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        _, lse = attn(q, k, v, sinks=sinks, return_lse=True)
    spent = (sinks[:, None] - lse).exp().mean((0, 2)).tolist()
    for head, (learned, taught, share) in enumerate(zip(sinks.tolist(), TEACHER.tolist(), spent, strict=True)):
        print(f"head {head}: sink {learned:5.2f} (taught {taught:4.1f}), {share:5.1%} of the weight goes to no key")
    assert torch.allclose(sinks, TEACHER, atol=0.2), "the sinks were not learned"

    weight, keep = torch.randn_like(target), mask.to_dense(LENGTH, LENGTH)
    (ours,) = torch.autograd.grad((attn(q, k, v, sinks=sinks) * weight).sum(), sinks)
    (theirs,) = torch.autograd.grad((dense(q, k, v, keep, sinks) * weight).sum(), sinks)
    difference = (ours - theirs).abs().max().item()
    print(f"gradient of the sinks: at most {difference:.1e} from dense attention")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
