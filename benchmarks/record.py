"""The file that a run leaves: its rows and what they were measured with, whole at every moment, and where the run has got to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.figures import Case, Row, load


class Record:
    """The rows in a JSON file, with `more` beside them. A file that is there is gone on with."""

    def __init__(self, path: Path):
        self.path = path
        self.more: dict[str, Any] = {}
        self.rows: list[Row] = []
        if path.exists():
            self.more, self.rows = load(path)

    def has(self, case: Case) -> bool:
        return any(row.case == case for row in self.rows)

    def save(self) -> None:
        beside = self.path.with_name(self.path.name + ".new")
        text = json.dumps({**self.more, "rows": [asdict(row) for row in self.rows]}, indent=1)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path)


class Progress:
    """Which contestant is at work on which case, in a file that another process looks at."""

    def __init__(self, path: Path):
        self.path = path

    def note(self, case: Case, label: str, why: str = "") -> None:
        """Also a sign of life; `why` is what ended the process."""
        self.path.write_text(json.dumps({"case": asdict(case), "label": label, "why": why}), encoding="utf-8")

    def clear(self) -> None:
        self.path.write_text("", encoding="utf-8")

    def read(self) -> tuple[Case, str, str] | None:
        """Case, contestant and what ended the process; None where it had not begun."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return Case(**found["case"]), found["label"], found["why"]
