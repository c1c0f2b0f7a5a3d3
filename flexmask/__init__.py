"""flexmask compiles Python mask and score functions into exact attention that skips what the mask leaves out.

See README.md for a first run and docs/tour.md for one mask's way through the house.
"""

from . import masks, reference, scores
from .api import Attention, attention, compile
from .errors import BackendError, FlexmaskError, NotInterval, ShapeError, TraceError
from .mods import Mask, Score, mask, score
from .runtime.store import cache_info

__version__ = "0.1.0"

__all__ = [
    "Attention", "BackendError", "FlexmaskError", "Mask", "NotInterval", "Score", "ShapeError", "TraceError",
    "attention", "cache_info", "compile", "mask", "masks", "reference", "score", "scores",
]  # fmt: skip
