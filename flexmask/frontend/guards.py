"""Guards: what a trace read of the user's variables, to see cheaply whether any of it has been rebound since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import CellType
from typing import Any

ABSENT = object()
_BY_VALUE = (bool, int, float, str)


@dataclass(frozen=True)
class Guards:
    """Variables and the values they had: identity for objects, type and value for numbers and strings."""

    cells: tuple[tuple[CellType, Any], ...] = ()
    items: tuple[tuple[Mapping[Any, Any], Any, Any], ...] = ()
    attributes: tuple[tuple[Any, str, Any], ...] = ()
    sizes: tuple[tuple[Any, int], ...] = ()
    sequences: tuple[tuple[Sequence[Any], tuple[Any, ...]], ...] = ()

    def hold(self) -> bool:
        """Whether everything is as it was."""
        for cell, value in self.cells:
            now = _contents(cell)
            if now is not value and not _equal(now, value):
                return False
        for mapping, key, value in self.items:
            now = mapping.get(key, ABSENT)
            if now is not value and not _equal(now, value):
                return False
        return self._objects_hold()

    def _objects_hold(self) -> bool:
        for owner, name, value in self.attributes:
            if getattr(owner, name, ABSENT) is not value:
                return False
        for sized, size in self.sizes:
            if len(sized) != size:
                return False
        for sequence, values in self.sequences:
            if len(sequence) != len(values) or any(
                now is not value and not _equal(now, value) for now, value in zip(sequence, values, strict=True)
            ):
                return False
        return True


@dataclass
class GuardList:
    """Guards while they are being collected."""

    cells: list[tuple[CellType, Any]] = field(default_factory=list)
    items: list[tuple[Mapping[Any, Any], Any, Any]] = field(default_factory=list)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)
    sizes: list[tuple[Any, int]] = field(default_factory=list)
    sequences: list[tuple[Sequence[Any], tuple[Any, ...]]] = field(default_factory=list)

    def freeze(self) -> Guards:
        return Guards(tuple(self.cells), tuple(self.items), tuple(self.attributes), tuple(self.sizes), tuple(self.sequences))


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def _equal(now: Any, value: Any) -> bool:
    return type(now) is type(value) and isinstance(value, _BY_VALUE) and bool(now == value)
