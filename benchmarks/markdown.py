"""The tables of docs/benchmarks.md from the file of a run, so that no figure is typed by hand.

python -m benchmarks.markdown FILE [FILE ...]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from benchmarks.figures import FLEX, OURS, PARTS, Row, load, summary

Cells = Sequence[str]


def table(head: Cells, lines: Iterable[Cells]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def number(x: float, form: str) -> str:
    """Nothing where it was not measured."""
    return "" if math.isnan(x) else format(x, form)


def page(data: dict[str, Any], rows: list[Row]) -> str:
    """All that one file holds, as markdown."""
    parts = [setting(data)]
    for size, group in groupby(rows, lambda row: (row.case.head_dim, row.case.heads // row.case.kv_heads)):
        same = list(group)
        shape = f"D = {size[0]}" + (f", {size[1]} query heads a key head" if size[1] > 1 else "")
        parts += [f"{part.capitalize()}, {shape}:\n\n{speeds(same, part)}" for part in PARTS if any(row.ms[part] for row in same)]
        parts.append(f"Errors and memory, {shape}:\n\n{checks(same)}")
    if any(row.maps for row in rows):
        parts.append(f"Maps:\n\n{maps(rows)}")
    if data.get("first_call"):
        parts.append(f"First call:\n\n{first_calls(data['first_call'])}")
    told = [f"* {line}" for line in [*summary(rows), *_troubles(data, rows)]]
    return "\n\n".join([*parts, "\n".join(told)])


def setting(data: dict[str, Any]) -> str:
    """What the figures were measured with, and what they mean."""
    versions = ", ".join(f"{what} {value}" for what, value in data.get("versions", {}).items())
    options = ", ".join(f"{what} {value}" for what, value in data.get("options", {}).items())
    return (
        f"{versions}. Options: {options}. TFLOP/s count kept pairs (exact: 4 * B * H * D of each forward, 2.5 times that backward) or the "
        "pairs of non-empty 128 x 128 blocks (block); of full: block TFLOP/s over those without a mask at that size. Of rivals: exact "
        "TFLOP/s and, in brackets, how many times as fast flexmask is."
    )


def speeds(rows: list[Row], part: str) -> str:
    labels = list(dict.fromkeys(label for row in rows for label in row.ms[part] if label != OURS))
    head = ["mask", "length", "block density", "ms", "exact", "block", "of full", *labels]
    lines = [_speed(row, part, labels, rows) for row in rows if row.ms[part]]
    if len([label for label in labels if label.startswith(FLEX)]) > 1:
        best = [number(row.ratio(part, row.best_flex(part)), ".2f") for row in rows if row.ms[part]]
        head, lines = [*head, "over FlexAttention's best"], [[*line, cell] for line, cell in zip(lines, best, strict=True)]
    return table(head, lines)


def _speed(row: Row, part: str, labels: list[str], rows: list[Row]) -> list[str]:
    cells = [row.case.mask.replace("_", " "), str(row.case.length), f"{row.density:.4f}"]
    cells += [
        number(row.ms[part].get(OURS, math.nan), ".3f"),
        number(row.tflops(part), ".0f"),
        number(row.tflops(part, blocks=True), ".0f"),
    ]
    cells.append(number(row.of_full(part, rows), ".2f"))
    for label in labels:
        ratio = number(row.ratio(part, label), ".2f")
        cells.append(number(row.tflops(part, label), ".0f") + (f" ({ratio})" if ratio else ""))
    return cells


def checks(rows: list[Row]) -> str:
    """Errors against float64, gradients against FlexAttention's, and the peak memory of forward and backward by contestant."""
    labels = list(dict.fromkeys(label for row in rows for label in row.peak_mib))
    head = ["mask", "length", "error", "gradients' error", "gradients from FlexAttention's", *[f"{label}, MiB" for label in labels]]
    lines = []
    for row in rows:
        errors = [by.get(OURS, math.nan) for by in (row.error, row.gradient_error)]
        memory = [number(row.peak_mib.get(label, math.nan), ".0f") for label in labels]
        found = [number(x, ".0e") for x in (*errors, row.difference)]
        lines.append([row.case.mask.replace("_", " "), str(row.case.length), *found, *memory])
    return table(head, lines)


def maps(rows: list[Row]) -> str:
    labels = list(dict.fromkeys(label for row in rows for label in row.maps))
    head = ["mask", "length", *[f"{label}: ms, waited, MiB" for label in labels]]
    lines = []
    for row in (row for row in rows if row.maps):
        figures = ["{:.3f}, {:.2f}, {:.0f}".format(*row.maps[label]) if label in row.maps else "" for label in labels]
        lines.append([row.case.mask.replace("_", " "), str(row.case.length), *figures])
    return table(head, lines)


def first_calls(found: list[dict[str, Any]]) -> str:
    lines = []
    for row in found:
        cells = [number(row.get(kind, {}).get(part, math.nan), ".2f") for kind in ("cold", "warm") for part in PARTS]
        lines.append([row["mask"].replace("_", " "), row["contestant"], *cells])
    return table(["mask", "", "cold, forward, s", "backward", "warm, forward, s", "backward"], lines)


def _troubles(data: dict[str, Any], rows: list[Row]) -> list[str]:
    """What is missing, was left out, or failed."""
    lines = [f"not installed: {label}" for label in data.get("missing", {})]
    lines += [f"left out of the rest of the run: {label} ({why})" for label, why in data.get("left_out", {}).items()]
    return lines + [f"failed: {row.case.name}, {label}: {why}" for row in rows for label, why in row.failures.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    print("\n\n".join(page(*load(path)) for path in parser.parse_args().files))


if __name__ == "__main__":
    main()
