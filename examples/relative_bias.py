"""A learned bias for each distance, as a score mod: attention finds out how far back to look.

    python -m examples.relative_bias

Each head is to repeat the token that stood some steps before, and its queries and keys say nothing: only the table of biases can
tell. Its gradient is summed over all pairs of a distance; nothing of N x N is written. It is checked against dense attention.
"""

from __future__ import annotations

import torch

import flexmask
from flexmask import masks, reference, scores

LENGTH, VOCABULARY, REACH = 96, 16, 7
LAGS = (2, 5)  # what each head is to learn


def draw(table: torch.Tensor) -> None:
    """The softmax of each head's biases over the distances 0 to REACH, as bars."""
    for lag, row in zip(LAGS, table.detach()[:, REACH:].softmax(-1), strict=True):
        print(f"head for lag {lag}")
        for distance, weight in enumerate(row.tolist()):
            print(f"  {distance} back {weight:5.2f} {'#' * round(40 * weight)}")


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    table = torch.zeros(len(LAGS), 2 * REACH + 1, requires_grad=True)  # entry REACH + d is distance d
    attn = flexmask.compile(masks.sliding_window(REACH + 1), scores.relative_bias(table))
    silent = torch.zeros(1, len(LAGS), LENGTH, 16)
    optimizer = torch.optim.Adam([table], lr=0.3)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (LENGTH,))
        values = torch.eye(VOCABULARY)[tokens].expand(1, len(LAGS), -1, -1)
        seen = attn(silent, silent, values)[0, :, REACH:]  # the probability of each token
        wanted = torch.stack([tokens.roll(lag)[REACH:] for lag in LAGS])
        loss = -seen.gather(-1, wanted[..., None]).clamp_min(1e-6).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    draw(table)
    print(f"loss over {steps} steps: {losses[0]:.2f} to {losses[-1]:.2f}")
    assert table[:, REACH:].argmax(-1).tolist() == list(LAGS), "the biases point elsewhere"

    q, k, v, weight = torch.randn(4, 1, len(LAGS), LENGTH, 16).unbind()
    (ours,) = torch.autograd.grad((attn(q, k, v) * weight).sum(), table)
    (dense,) = torch.autograd.grad((reference.attention(q, k, v, attn.mask, attn.score) * weight).sum(), table)
    difference = (ours - dense).abs().max().item()
    print(f"gradient of the table: at most {difference:.1e} from dense attention in float64")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
