"""flexmask compiles Python mask and score functions into exact attention that skips what the mask leaves out.

See README.md for a first run and docs/tour.md for one mask's way through the house.
"""

from . import masks, reference, scores
from .api import Attention, attention, compile
from .errors import BackendError, ConversionError, FlexmaskError, NotInterval, PromiseError, ShapeError, TraceError
from .masks.torch_blocks import from_torch
from .mods import Mask, Score, mask, score, sorted
from .runtime.store import cache_info

__version__ = "0.1.0"

__all__ = [
    "Attention", "BackendError", "ConversionError", "FlexmaskError", "Mask", "NotInterval", "PromiseError", "Score", "ShapeError",
    "TraceError", "attention", "cache_info", "compile", "from_torch", "mask", "masks", "reference", "score", "scores", "sorted",
]  # fmt: skip
