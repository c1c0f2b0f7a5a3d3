"""Proofs that every row keeps something: a position within the lengths at which the predicate is proved to hold."""

from __future__ import annotations

from collections.abc import Iterator

from ..ir import KV_LEN, Q_LEN, Expr, K, simplify, substitute
from .facts import ALWAYS, COLUMNS_FIT, NOT_PROVED, ROWS_FIT
from .linear import ZERO
from .pieces import COLUMN, ROW, Axis
from .prove import Prover, conjuncts


def rows_nonempty(predicate: Expr, prover: Prover) -> str:
    """When each query row below q_len is proved to keep a key: ALWAYS, ROWS_FIT or NOT_PROVED."""
    return _nonempty(predicate, ROW, ROWS_FIT, Q_LEN <= KV_LEN, prover)


def columns_nonempty(predicate: Expr, prover: Prover) -> str:
    """When each key column below kv_len is proved to be kept by a query: ALWAYS, COLUMNS_FIT or NOT_PROVED."""
    return _nonempty(predicate, COLUMN, COLUMNS_FIT, KV_LEN <= Q_LEN, prover)


def _nonempty(predicate: Expr, axis: Axis, condition: str, fits: Expr, prover: Prover) -> str:
    for position, needed in _witnesses(axis):
        facts = (fits,) if needed else ()
        at = {axis.index: position}
        if all(prover.holds(simplify(substitute(part, at)), facts) for part in conjuncts(predicate)):
            return condition if needed else ALWAYS
    return NOT_PROVED


def _witnesses(axis: Axis) -> Iterator[tuple[Expr, bool]]:
    """Positions within the length, and whether they are so only if the other length is no larger."""
    yield ZERO, False
    yield axis.length - 1, False
    yield axis.other, True
    mine, others = (KV_LEN, Q_LEN) if axis.index is K else (Q_LEN, KV_LEN)
    yield axis.other + mine - others, True
