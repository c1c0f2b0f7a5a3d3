"""Named masks and scores for tests: every ready-made mod, the benchmark's masks, and whatever else people write.

`MASKS[name](B, H, Q, KV, seed=0, device="cpu")` is a Mask, `SCORES[name](...)` a Score. Equal arguments give equal mods.
All of them work at any lengths from 1 on, also with Q != KV.
"""

import zoo_wild  # noqa: F401  registers its masks
from zoo_case import Case
from zoo_masks import MASKS
from zoo_scores import SCORES

__all__ = ["MASKS", "SCORES", "Case"]
