"""The progress bar of the training examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """Steps done, a note beside them, and the time since the first; shown inside a `with`."""

    def __init__(self, name: str, total: int, console: Console):
        columns = (
            TextColumn("{task.description:14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(name, total=total, note="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def over(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            yield item
            self._progress.advance(self._task)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)
