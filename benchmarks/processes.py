"""Processes of a run: those that compile ahead, and the one that measures, which is started again without the contestant that ended it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benchmarks.figures import OURS, Row
from benchmarks.record import Progress, Record

LOOK_S = 0.5


def compile_ahead(command: Sequence[str], cases: Sequence[int], jobs: int, limit_s: float) -> None:
    """Run the cases once, dealt out to `jobs` processes: `command` with the numbers of its cases. What they compile, the caches on disk of
    flexmask, Triton, torch and FlashAttention keep for the process that measures."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the processes are parallel enough
    shares = [[str(n) for n in cases[first::jobs]] for first in range(min(jobs, len(cases)))]

    def run(share: list[str]) -> None:
        try:
            done = subprocess.run(
                [*command, *share], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            print(f"cases {' '.join(share)} were not compiled in {limit_s:.0f} s", flush=True)
            return
        told = [line for line in done.stdout.splitlines() if "failed" in line] if done.returncode == 0 else [done.stdout[-400:]]
        if told:
            print("compiling ahead:", *told, sep="\n    ", flush=True)

    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        list(pool.map(run, shares))


def keep_measuring(command: Sequence[str], path: Path, patience_s: float) -> bool:
    """Run `command` until it ends well. When it dies, or gives no sign of life for `patience_s`, what was at work is written down, left out
    where it is a rival, and the command is started again with `--without` it. False where it dies before it has begun."""
    progress = Progress(path.with_name(path.name + ".progress"))
    while True:
        without = Record(path).more.get("left_out", {})
        progress.clear()
        why = _watch([*command, *(["--without", *without] if without else [])], progress.path, patience_s)
        found = progress.read()
        progress.path.unlink(missing_ok=True)
        if not why or found is None:
            return not why
        case, label, told = found
        record = Record(path)
        print(f"{case.name}: {label} ended the run: {told or why}", flush=True)
        if label == OURS or label in without:
            record.rows.append(Row(case, failures={label: told or why}))
        else:
            record.more.setdefault("left_out", {})[label] = f"{case.name}: {told or why}"
        record.save()


def _watch(command: Sequence[str], sign_of_life: Path, patience_s: float) -> str:
    """Why the command did not end well; nothing where it did. It ends with this process."""
    before = signal.signal(signal.SIGTERM, _leave)
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            time.sleep(LOOK_S)
            if time.time() - sign_of_life.stat().st_mtime > patience_s:
                return f"no sign of life for {patience_s:.0f} s"
        return f"exit code {process.returncode}" if process.returncode else ""
    finally:
        process.kill()
        process.wait()
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # through the `finally` above
