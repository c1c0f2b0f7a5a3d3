"""The frontend: a Python function becomes an expression by being called once with symbols."""

from .signature import bind
from .trace import trace
from .traced import Traced

__all__ = ["Traced", "bind", "trace"]
