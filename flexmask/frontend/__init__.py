"""The frontend: a Python function becomes an expression by being called once with symbols."""

from .promise import Ascending, check_promises, sorted
from .signature import bind
from .trace import trace
from .traced import Traced

__all__ = ["Ascending", "Traced", "bind", "check_promises", "sorted", "trace"]
