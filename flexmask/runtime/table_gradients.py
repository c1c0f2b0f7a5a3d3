"""Gradients of a score's captured float tables: what each pair contributes, added at the place that the pair reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..ir import Expr, derivative, float_loads


def gradient_loads(expr: Expr) -> tuple[tuple[Expr, Expr], ...]:
    """Each distinct load of a float table that carries gradient, with d expr / d load."""
    return tuple([(load, derivative(expr, load)) for load in float_loads(expr)])


class TableGradients:
    """Sums for captured tables, by their numbers, in `dtype` until the end."""

    def __init__(self, tables: dict[int, torch.Tensor], dtype: torch.dtype):
        self._tables = tables
        self._sums = {number: torch.zeros(table.shape, dtype=dtype) for number, table in tables.items()}

    def add(self, number: int, indices: Sequence[Any], values: torch.Tensor) -> None:
        """Add `values` at `indices` of a table: numbers or tensors that broadcast to the values' shape, negative ones from the end.

        Where the indices do not depend on an axis of the values, the sum over it is added. Equal places are added up one after the
        other, so the result is the same from run to run.

        >>> import torch
        >>> from flexmask.runtime.table_gradients import TableGradients
        >>> found = TableGradients({0: torch.zeros(3)}, torch.float32)
        >>> found.add(0, [torch.tensor([[0], [-1]])], torch.ones(2, 4))
        >>> found.result()[0]
        tensor([4., 0., 4.])
        """
        total = self._sums[number]
        place = torch.zeros((), dtype=torch.int64)
        for index, size in zip(indices, total.shape, strict=True):
            index = torch.as_tensor(index).long()
            place = place * size + torch.where(index < 0, index + size, index)
        values = values.sum_to_size(place.shape).to(total.dtype)
        # index_add_ on a vector is one loop; index_put_ may share the work among threads, whose order is left open
        total.view(-1).index_add_(0, place.reshape(-1), values.reshape(-1))

    def result(self) -> dict[int, torch.Tensor]:
        """The gradient of each table, of its shape and dtype."""
        return {number: total.to(self._tables[number].dtype) for number, total in self._sums.items()}
