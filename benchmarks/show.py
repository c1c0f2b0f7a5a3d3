"""A row as lines of text, for whoever watches a run."""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchmarks.figures import OURS, PARTS, Row


def show(row: Row, rows: Iterable[Row]) -> str:
    """A line a part: milliseconds, TFLOP/s and how many times as fast flexmask is; then errors, memory and failures."""
    lines = [f"{row.case.name}, density {row.density:.4f}"]
    lines += [_part(row, part, rows) for part in PARTS if row.ms[part]]
    lines += [f"    {text}" for text in [_checks(row)] if text]
    if row.maps:
        times = [f"{label} {gpu:.3f} ms, waited {waited:.3f} ms, {peak:.0f} MiB" for label, (gpu, waited, peak) in row.maps.items()]
        lines.append("    map " + " | ".join(times))
    return "\n".join([*lines, *[f"    {label} FAILED {why}" for label, why in row.failures.items()]])


def _part(row: Row, part: str, rows: Iterable[Row]) -> str:
    cells = []
    for label, ms in row.ms[part].items():
        text = f"{label} {ms:.3f} ms {row.tflops(part, label):.0f}"
        cells.append(text if label == OURS else f"{text} x{row.ratio(part, label):.2f}")
    if OURS in row.ms[part]:
        share = row.of_full(part, rows)
        cells.append(f"block {row.tflops(part, blocks=True):.0f}" + ("" if math.isnan(share) else f" = {share:.2f} of full"))
    return f"    {part:8s} " + " | ".join(cells)


def _checks(row: Row) -> str:
    found = {"error": row.error, "gradient error": row.gradient_error}
    text = [f"{what} " + ", ".join(f"{label} {x:.1e}" for label, x in by.items()) for what, by in found.items() if by]
    if not math.isnan(row.difference):
        text.append(f"gradients from FlexAttention's {row.difference:.1e}")
    if row.peak_mib:
        text.append("peak " + ", ".join(f"{label} {mib:.0f}" for label, mib in row.peak_mib.items()) + " MiB")
    return " | ".join(text)
