"""The loop of the smaller benchmarks: a case after the other, each printed and written as soon as it is measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.versions import versions


def options(parser: argparse.ArgumentParser, lengths: list[int], masks: Iterable[str]) -> argparse.Namespace:
    """The arguments that they share: lengths, masks, and the file that rows are written to."""
    parser.add_argument("--lengths", type=int, nargs="*", default=lengths)
    parser.add_argument("--masks", nargs="+", default=list(masks))
    parser.add_argument("--json")
    return parser.parse_args()


def measured(
    cases: Iterable[tuple[str, int]], measure: Callable[[str, int], Any], show: Callable[[Any], str], path: str | None
) -> list[Any]:
    """The rows (dataclasses) of the cases; one that fails is printed and left out."""
    print(versions(), flush=True)
    rows: list[Any] = []
    for name, length in cases:
        torch.compiler.reset()
        try:
            rows.append(measure(name, length))
            print(show(rows[-1]), flush=True)
        except Exception as error:
            print(f"{name:28s} {length:8d} FAILED {type(error).__name__}: {str(error)[:400]}", flush=True)
        write(path, rows)
    return rows


def write(path: str | None, rows: list[Any], **more: Any) -> None:
    """Rows and whatever else was measured, as JSON, where a path was given."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"versions": versions(), "rows": [asdict(row) for row in rows], **more}, file, indent=1)
