"""Extras: what a call of attention brings besides q, k, v, a mask and a score."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# chances are counted in parts of this
PARTS = 1 << 24


@dataclass(frozen=True)
class Extras:
    """`sinks` [Hq]: a logit a head that takes part in the softmax's denominator. `dropout_p` in [0, 1): the chance that a kept pair's
    probability is zeroed, drawn from `seed`, int64 [1] on q's device. `peaks`: whether the greatest score of each row is wanted too.

    >>> Extras(dropout_p=0.25, seed=torch.tensor([7])).factor
    1.3333333333333333
    """

    sinks: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None
    peaks: bool = False

    @property
    def threshold(self) -> int:
        """How many of 2**24 equally likely numbers drop a pair: never all of them, as what is kept could not make up for it."""
        return min(round(self.dropout_p * PARTS), PARTS - 1)

    @property
    def factor(self) -> float:
        """What the probabilities of pairs that are not dropped are multiplied by, so that their expected sum is 1."""
        return 1 / (1 - self.threshold / PARTS)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The sinks and the seed, where there are any."""
        return tuple(x for x in (self.sinks, self.seed) if x is not None)

    @property
    def kind(self) -> tuple[bool, float, bool]:
        """All but the tensors' values: which of them there are, the chance, and what is wanted."""
        return self.sinks is not None, self.dropout_p, self.peaks

    @property
    def dropout(self) -> tuple[torch.Tensor, int, float] | None:
        """(seed, threshold, factor) as the kernels take them; None where nothing is dropped."""
        if not self.dropout_p:
            return None
        if self.seed is None:
            raise ValueError("dropout draws from a seed: an int64 tensor of one element on q's device")
        return self.seed, self.threshold, self.factor


NO_EXTRAS = Extras()
