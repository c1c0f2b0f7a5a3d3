"""Fine-tuning on packed conversations: several in one sequence, none sees another, and only answers count for the loss.

    python -m examples.sft_packing

Loss and gradients are those of running the conversations one by one, which is checked at the end.
"""

from __future__ import annotations

from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F

import flexmask
from flexmask import masks

from .byte_model import Attend, ByteModel
from .text import IGNORED, pack

CONVERSATIONS = [
    [("What is a generator?", "A function with yield."), ("And a coroutine?", "One made by async def.")],
    [("How do I reverse a list?", "Write values[::-1].")],
    [("Name an immutable sequence.", "A tuple."), ("Another?", "A str."), ("One more?", "A range.")],
]
Conversation = list[tuple[str, str]]


def written(conversation: Conversation) -> tuple[bytes, list[bool]]:
    """The conversation as text, and which of its bytes an assistant wrote."""
    text, learned = b"", []
    for question, answer in conversation:
        for part, is_answer in ((f"Q: {question}\nA: ", False), (f"{answer}\n", True)):
            text += part.encode()
            learned += [is_answer] * len(part.encode())
    return text, learned


def answer_loss(model: ByteModel, conversations: list[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed cross-entropy, number of targets) over the answers of conversations packed into one sequence."""
    texts, learned = zip(*map(written, conversations), strict=True)
    batch = pack(list(texts), sum(map(len, texts)))
    is_answer = torch.tensor([*chain(*learned)]).roll(-1)[None]  # of each target
    targets = batch.targets.where(is_answer, IGNORED)
    # ids that ascend: said once, the mask never has to look whether they do
    mask = masks.causal & masks.document(flexmask.sorted(batch.documents))
    attend: Attend = partial(flexmask.attention, mask=mask)
    logits = model(batch.tokens, batch.positions, attend)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()


def step(model: ByteModel, groups: list[list[Conversation]]) -> tuple[float, list[torch.Tensor]]:
    """(mean loss, gradients) with each group packed into a sequence of its own."""
    losses, counts = zip(*(answer_loss(model, group) for group in groups), strict=True)
    loss = sum(losses) / sum(counts)
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def main() -> None:
    model = ByteModel(width=64, heads=2)
    lengths = [len(written(conversation)[0]) for conversation in CONVERSATIONS]
    print(f"{len(lengths)} conversations of {lengths} bytes: {sum(lengths)} packed, {len(lengths) * max(lengths)} padded")
    packed, packed_gradients = step(model, [CONVERSATIONS])
    apart, gradients = step(model, [[conversation] for conversation in CONVERSATIONS])
    largest = max((a - b).abs().max().item() for a, b in zip(packed_gradients, gradients, strict=True))
    print(f"loss over answers: packed {packed:.6f}, one by one {apart:.6f}; gradients differ by at most {largest:.1e}")
    assert abs(packed - apart) < 1e-5 and largest < 1e-5, "packed conversations saw each other"


if __name__ == "__main__":
    main()
