"""What can be proved about a mask: intervals along rows and columns, tile states, index ranges. Facts only; nothing is changed."""

from ..errors import NotInterval
from .boxes import BoxTest, box_test
from .derive import derive
from .facts import MOST_PIECES, MOST_RUNS, AtomFact, Facts, Form, Piece
from .ranges import IndexRange, index_range

__all__ = [
    "MOST_PIECES", "MOST_RUNS", "AtomFact", "BoxTest", "Facts", "Form", "IndexRange", "NotInterval", "Piece",
    "box_test", "derive", "index_range",
]  # fmt: skip
