"""Every zoo mask and score through Triton's interpreter: run with TRITON_INTERPRET=1. Prints {name: largest error or exception}."""

from __future__ import annotations

import json
import sys

import torch
import zoo
from test_zoo_through_the_house import states_of

import flexmask
from flexmask import reference

B, H, Q, KV = 1, 2, 35, 41


def error(mask: flexmask.Mask | None, score: flexmask.Score | None) -> float | str:
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, Q, 16), torch.randn(B, H, KV, 16), torch.randn(B, H, KV, 16)
    try:
        out, lse = flexmask.attention(q, k, v, mask=mask, score=score, backend="triton", return_lse=True)
        want, want_lse = reference.attention(q.double(), k.double(), v.double(), mask, score, return_lse=True)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    if not torch.equal(lse.isfinite(), want_lse.isfinite()):
        return "empty rows differ"
    lse_error = (lse.double() - want_lse).nan_to_num(0.0).abs().max()
    return max((out.double() - want).abs().max().item(), lse_error.item())


def tiles_differ(mask: flexmask.Mask) -> bool:
    """Whether a tile decided by the planning kernel differs from what every pair of the mask says."""
    found = mask.block_mask(Q, KV, B, H, (24, 8)).states()
    return not torch.equal(found.expand(B, H, -1, -1), states_of(reference.dense_mask(mask, B, H, Q, KV), 24, 8))


def main() -> None:
    found = {}
    with torch.no_grad():
        for name, make in zoo.MASKS.items():
            mask = make(B, H, Q, KV)
            found[f"mask {name}"] = "tiles differ" if tiles_differ(mask) else error(mask, None)
        for name, make in zoo.SCORES.items():
            found[f"score {name}"] = error(None, make(B, H, Q, KV))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
