"""Masks as drawn matrices: `#` is kept, `.` is not; one row a query, one column a key."""

from __future__ import annotations

import textwrap
from typing import Any

import torch

from flexmask import reference


def parse(drawn: str) -> torch.Tensor:
    """bool [rows, columns] of a drawing. Blanks between characters and around lines are for the eye only."""
    lines = ["".join(line.split()) for line in drawn.strip().splitlines() if line.strip()]
    if len({len(line) for line in lines}) > 1 or set("".join(lines)) - set("#."):
        raise ValueError(f"not a drawing of `#` and `.` with rows of one length:\n{drawn}")
    return torch.tensor([[c == "#" for c in line] for line in lines], dtype=torch.bool)


def draw(keep: torch.Tensor) -> str:
    """The drawing of bool [rows, columns]."""
    return "\n".join("".join("#" if x else "." for x in row) for row in keep.tolist())


def assert_mask(mask: Any, rows: int, columns: int, drawn: str, b: int = 0, h: int = 0) -> None:
    """The mask keeps exactly what is drawn, at batch entry `b` and head `h`."""
    found = reference.dense_mask(mask, b + 1, h + 1, rows, columns)[b, h]
    expected = parse(drawn)
    assert expected.shape == (rows, columns), f"the drawing is {list(expected.shape)}, not [{rows}, {columns}]"
    assert torch.equal(found, expected), f"\nfound\n{_indented(found)}\nbut drawn\n{_indented(expected)}"


def _indented(keep: torch.Tensor) -> str:
    return textwrap.indent(draw(keep), "    ")
