"""What a mask or score means: interned expressions, their laws, their text and their value."""

from .derivative import derivative, float_loads
from .evaluate import Env, evaluate, evaluate_all
from .expr import (
    FALSE,
    INDICES,
    KV_LEN,
    Q_LEN,
    SCORE,
    TRUE,
    B,
    Expr,
    H,
    K,
    Q,
    const,
    digest,
    load,
    make,
    rebuild,
    scalar,
    search,
    substitute,
    uses,
    walk,
)
from .ops import BOOL, CASTS, FLOAT, INT, OPS, Op, kind_of_dtype
from .printer import parse, show
from .simplify import LAWS, simplify

__all__ = [
    "BOOL", "CASTS", "FALSE", "FLOAT", "INDICES", "INT", "KV_LEN", "LAWS", "OPS", "Q_LEN", "SCORE", "TRUE",
    "B", "Env", "Expr", "H", "K", "Op", "Q",
    "const", "derivative", "digest", "evaluate", "evaluate_all", "float_loads", "kind_of_dtype", "load", "make", "parse", "rebuild",
    "scalar", "search", "show", "simplify", "substitute", "uses", "walk",
]  # fmt: skip
