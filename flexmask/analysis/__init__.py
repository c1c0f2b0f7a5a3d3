"""What can be proved about a mask: intervals along rows and columns, tile states, index ranges. Facts only; nothing is changed."""

from ..errors import NotInterval
from .boxes import EMPTY, FULL, UNKNOWN, Boxes, classify
from .derive import derive
from .facts import AtomFact, Facts, Form, Piece
from .ranges import IndexRange, index_range

__all__ = [
    "EMPTY", "FULL", "UNKNOWN", "AtomFact", "Boxes", "Facts", "Form", "IndexRange", "NotInterval", "Piece",
    "classify", "derive", "index_range",
]  # fmt: skip
