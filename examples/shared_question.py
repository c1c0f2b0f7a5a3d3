"""Preference training (DPO, arXiv 2305.18290) with a shared question: one sequence holds it once, then the better and the worse answer.

    python -m examples.shared_question

Both answers read the question and neither reads the other, so each gets the log-probability that it has in a sequence of its own,
which is checked, gradients included. A long question is computed once instead of twice.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import flexmask
from flexmask import masks

from .byte_model import ByteModel

QUESTION = b"Q: Which of `is` and `==` compares values in Python, and what does the other one compare?\nA: "
BETTER, WORSE = b"`==` compares values; `is` compares identities.", b"Both do the same."
BETA = 0.1


def tensor(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text))


def log_probability(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits, targets, reduction="sum")


def shared(model: ByteModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the two answers, from one sequence: question, better answer, worse answer."""
    first, better, worse = len(QUESTION), len(BETTER), len(WORSE)
    segment = torch.tensor([0] * first + [1] * better + [2] * worse, dtype=torch.int32)
    positions = torch.cat([torch.arange(first), first + torch.arange(better), first + torch.arange(worse)])[None]
    mask = masks.shared_question(torch.zeros_like(segment), segment)
    logits = model(tensor(QUESTION + BETTER + WORSE)[None], positions, partial(flexmask.attention, mask=mask))[0]
    # an answer's first byte is told from the question's last one
    ends = torch.arange(first - 1, first), torch.arange(first, first + better - 1), torch.arange(first + better, len(segment) - 1)
    return (
        log_probability(logits[torch.cat((ends[0], ends[1]))], tensor(BETTER)),
        log_probability(logits[torch.cat((ends[0], ends[2]))], tensor(WORSE)),
    )


def separate(model: ByteModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from two sequences, each with the question."""
    found = []
    for answer in (BETTER, WORSE):
        text = tensor(QUESTION + answer)[None]
        logits = model(text, torch.arange(text.shape[1])[None], partial(flexmask.attention, mask=masks.causal))[0]
        found.append(log_probability(logits[len(QUESTION) - 1 : -1], tensor(answer)))
    return found[0], found[1]


def loss_of(chosen: torch.Tensor, rejected: torch.Tensor, start: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """DPO's loss against the model as it was at the start, whose log-probabilities are `start`."""
    return -F.logsigmoid(BETA * ((chosen - start[0]) - (rejected - start[1])))


def main(steps: int = 10) -> None:
    model = ByteModel(width=64, heads=2)
    together, apart = shared(model), separate(model)
    start = tuple(value.detach() for value in together)
    pairs = zip(*(torch.autograd.grad(loss_of(*found, start), list(model.parameters())) for found in (together, apart)), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"one sequence of {len(QUESTION + BETTER + WORSE)} bytes instead of two of {len(QUESTION + BETTER)} and {len(QUESTION + WORSE)}")
    for name, one, two in zip(("better", "worse"), together, apart, strict=True):
        print(f"log-probability of the {name} answer: {one.item():.4f} in one sequence, {two.item():.4f} in its own")
        assert torch.isclose(one, two, rtol=1e-5), "the answers saw each other"
    print(f"gradients of the loss differ by at most {difference:.1e}")
    assert difference < 1e-4

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(*shared(model), start)
        loss.backward()
        optimizer.step()
    chosen, rejected = ((now - before).item() for now, before in zip(shared(model), start, strict=True))
    print(f"after {steps} steps: better answer {chosen:+.1f} nats, worse answer {rejected:+.1f}, loss {loss.item():.3f}")
    assert chosen > rejected


if __name__ == "__main__":
    main()
