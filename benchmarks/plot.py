"""Bars by mask, flexmask's beside its rivals', from the file of a run. Needs matplotlib.

python -m benchmarks.plot FILE -o FILE.svg [--blocks]
"""

from __future__ import annotations

import argparse
from itertools import groupby
from typing import Any

from benchmarks.figures import OURS, PARTS, Row, load

COLOURS = {
    OURS: "#c0392b", "FlexAttention": "#1b4f72", "FlexAttention tuned": "#2e86c1", "FlexAttention FLASH": "#85c1e9",
    "SDPA cuDNN": "#52be80", "SDPA flash": "#a9dfbf", "FA3": "#f39c12", "FA4": "#f8c471",
}  # fmt: skip
OTHER = "#7f8c8d"
WIDTH = 0.8  # of a mask's bars together


def panels(rows: list[Row]) -> list[tuple[str, str, list[Row]]]:
    """(title, part, rows): one panel for each size and part that was measured."""
    found = []
    for _, group in groupby(rows, lambda row: (row.case.length, row.case.head_dim, row.case.heads // row.case.kv_heads)):
        same = list(group)
        size = same[0].case.name.split(maxsplit=1)[1]
        found += [(f"{part}, {size}", part, same) for part in PARTS if any(row.ms[part] for row in same)]
    return found


def draw(data: dict[str, Any], rows: list[Row], blocks: bool = False) -> Any:
    """The figure: TFLOP/s by exact area, or by non-empty blocks."""
    from matplotlib.figure import Figure

    all_panels = panels(rows)
    if not all_panels:
        raise ValueError("nothing was timed in this file: its rows hold failures alone.")
    figure = Figure(figsize=(13, 2.9 * len(all_panels)), layout="constrained")
    for axes, (title, part, same) in zip(figure.subplots(len(all_panels), squeeze=False)[:, 0], all_panels, strict=True):
        _bars(axes, part, same, blocks)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("TFLOP/s, " + ("blocks" if blocks else "exact area"), fontsize=8)
    versions = data.get("versions", {})
    figure.suptitle(", ".join(versions[key] for key in ("gpu", "date", "commit") if key in versions), fontsize=9)
    return figure


def _bars(axes: Any, part: str, rows: list[Row], blocks: bool) -> None:
    labels = [OURS, *dict.fromkeys(label for row in rows for label in row.ms[part] if label != OURS)]
    for place, row in enumerate(rows):
        present = [label for label in labels if label in row.ms[part]]  # rivals that know few masks leave no gaps beside the others
        width = WIDTH / max(1, len(present))
        for number, label in enumerate(present):
            where = place - WIDTH / 2 + width * (number + 0.5)
            axes.bar(where, row.tflops(part, label, blocks), width, color=COLOURS.get(label, OTHER), label=label)
    axes.set_xticks(range(len(rows)), [row.case.mask.replace("_", "\n") for row in rows], fontsize=7)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    shown = [label for label in labels if label in handles]
    axes.legend(
        [handles[label] for label in shown], shown, fontsize=7, ncols=len(shown), frameon=False, loc="lower right", bbox_to_anchor=(1, 1)
    )
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--blocks", action="store_true", help="TFLOP/s of non-empty blocks instead of kept pairs")
    given = parser.parse_args()
    draw(*load(given.file), given.blocks).savefig(given.output)


if __name__ == "__main__":
    main()
