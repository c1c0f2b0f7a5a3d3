"""A dictionary of what was used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Keeps the `most` entries that were found or put last.

    >>> recent = Recent(2)
    >>> for name in "abc":
    ...     recent.put(name, name.upper())
    >>> "a" in recent, recent.get("b"), len(recent)
    (False, 'B', 2)
    """

    def __init__(self, most: int):
        self.most = most
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: Hashable, value: Value) -> None:
        self._entries[key] = value
        if len(self._entries) > self.most:
            self._entries.popitem(last=False)

    def pop(self, key: Hashable) -> Value | None:
        return self._entries.pop(key, None)

    def drop(self, unwanted: Callable[[Value], bool]) -> None:
        """Keep only what is not `unwanted`."""
        for key in [key for key, value in self._entries.items() if unwanted(value)]:
            del self._entries[key]

    def clear(self) -> None:
        self._entries.clear()

    def values(self) -> Iterator[Value]:
        return iter(self._entries.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)
