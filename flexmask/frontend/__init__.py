"""The frontend: a Python function becomes an expression by being called once with symbols."""

from .portable import Captured, captured, from_text, to_text
from .promise import Ascending, check_promises, sorted
from .signature import bind
from .trace import trace
from .traced import Traced

__all__ = [
    "Ascending", "Captured", "Traced", "bind", "captured", "check_promises", "from_text",
    "sorted", "to_text", "trace",
]  # fmt: skip
