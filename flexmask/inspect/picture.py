"""A mask as a small picture of characters: rows are queries, columns are keys."""

from __future__ import annotations

import torch

SIGNS = {0: ".", 1: "+", 2: "#"}


def draw(states: torch.Tensor) -> str:
    """One character an entry of a [rows, columns] matrix: bool (`#` kept) or tile states (`.` empty, `+` partial, `#` full).

    >>> import torch
    >>> print(draw(torch.ones(2, 3).tril().bool()))
    #..
    ##.
    """
    numbers = states.to(torch.int8) * (2 if states.dtype == torch.bool else 1)
    return "\n".join("".join(SIGNS[x] for x in row) for row in numbers.tolist())
