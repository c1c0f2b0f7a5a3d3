"""A prefix LM on packed pairs: each prompt is read in both directions, its continuation is written from left to right.

    python -m examples.prefix_lm

What each byte depends on is then measured, by gradients: they are nonzero exactly where the mask, drawn first, keeps something.
"""

from __future__ import annotations

from functools import partial

import torch

import flexmask
from flexmask import masks

from .byte_model import ByteModel, next_byte_loss
from .text import IGNORED, pack

PAIRS = [(b"hola", b" hello"), (b"gracias", b" thanks"), (b"uno", b" one")]


def packed_pairs() -> tuple[torch.Tensor, ...]:
    """(tokens, targets, positions, documents, prefix ends), each [1, N]; only continuations are targets."""
    batch = pack([prompt + answer for prompt, answer in PAIRS], sum(len(prompt + answer) for prompt, answer in PAIRS))
    in_prompt = batch.positions < torch.tensor([len(prompt) for prompt, _ in PAIRS])[batch.documents.long()]
    places = torch.arange(batch.tokens.shape[1])
    ends = torch.stack([((batch.documents[0] == n) & in_prompt[0]).mul(places + 1).amax() for n in range(len(PAIRS))])
    targets = batch.targets.masked_fill(in_prompt.roll(-1, dims=1), IGNORED)
    return batch.tokens, targets, batch.positions, batch.documents, ends[batch.documents.long()].int()


def dependence(model: ByteModel, positions: torch.Tensor, mask: flexmask.Mask) -> torch.Tensor:
    """bool [N, N]: whether the output at a row is moved by the input at a column, through one layer."""
    x = torch.randn(*positions.shape, 64, requires_grad=True)
    out = model.layers[0](x, positions, partial(flexmask.attention, mask=mask))
    rows = [torch.autograd.grad(out[0, row].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0 for row in range(x.shape[1])]
    return torch.stack(rows)


def main(steps: int = 40) -> None:
    tokens, targets, positions, documents, prefix_end = packed_pairs()
    mask = masks.prefix_document(documents, prefix_end)
    keep = mask.to_dense(tokens.shape[1], tokens.shape[1], batch=1)[0, 0]
    print("rows may read the columns marked #; prompts are in both directions:")
    for byte, row in zip(tokens[0].tolist(), keep, strict=True):
        print(f"  {chr(byte)} {''.join('.#'[int(kept)] for kept in row)}")

    model = ByteModel(width=64, heads=2)
    assert torch.equal(dependence(model, positions, mask), keep), "a byte depends on others than those that the mask keeps"
    print("each output depends on exactly these inputs")

    attend = partial(flexmask.attention, mask=mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = next_byte_loss(model(tokens, positions, attend), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss of the continuations over {steps} steps: {losses[0]:.2f} to {losses[-1]:.2f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
