"""Versions of flexmask beside each other: what a change of a kernel brings.

    python -m benchmarks.versus COMMIT ... [--masks full causal ...] [--lengths 8192] [--head-dim 128] [--forward] [--load SECONDS]

Versions are commits, or folders that hold a package `flexmask` ("." is the working tree); the first is what the others are compared with.
Each runs in a process of its own, with the benchmarks of the working tree; they take turns, so that all find the GPU equally hot. For each
case: the errors of out and gradients against the float64 reference, milliseconds (the best of the rounds' medians), and in brackets how
many times as fast as the first. With `--load` each then runs for so long, and the mean time, clock and power are told:
where power is at its limit, a kernel is as fast as it is thrifty. (That needs the package nvidia-ml-py.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import masks as zoo
from benchmarks.checks import Expected
from benchmarks.contest import Entry, Settings, enter, inputs
from benchmarks.figures import OURS, PARTS, Case, make_case
from benchmarks.rivals import CONTESTANTS, build
from benchmarks.timing import bench

ROOT = Path(__file__).parent.parent
Answer = dict[str, Any]


# ---- the process of a version
class Worker:
    """Answers what `Version.ask` asks, of one case at a time."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.entry: Entry | None = None

    def prepare(self, **case: Any) -> Answer:
        """Compiles, and says how far out and gradients are from the reference."""
        self.entry = None  # gives its memory back
        asked = Case(**case)
        given, dout = inputs(asked, self.settings)
        mask = build(asked, self.settings.device)
        expected = Expected(given[0], given[1], given[2], dout if self.settings.trains else None, mask)
        self.entry = enter(CONTESTANTS[OURS], asked, given, dout, self.settings)
        assert self.entry.out is not None
        found = {"forward": expected.error(self.entry.out)}
        if self.settings.trains:
            found["backward"] = expected.gradient_error(self.entry.backward(expected.sampled(dout)))
        return found

    def time(self, part: str) -> Answer:
        return {"ms": bench(self._run(part), self.settings.device, self.settings.run_ms, self.settings.least)}

    def load(self, part: str, seconds: float) -> Answer:
        """What a load that lasts comes to; clock and power are looked at after calls of some 20 ms."""
        run, looks, calls = self._run(part), [], 0
        at_once = max(1, round(20 / self.time(part)["ms"]))
        begun = time.perf_counter()
        while (passed := time.perf_counter() - begun) < seconds:
            for _ in range(at_once):
                run()
            torch.cuda.synchronize()
            calls += at_once
            looks.append((torch.cuda.clock_rate(), torch.cuda.power_draw() / 1000))
        late = looks[len(looks) // 3 :]  # the clock takes a while to fall
        mhz, watts = (sum(look[i] for look in late) / len(late) for i in range(2))
        return {"ms": 1e3 * passed / calls, "mhz": mhz, "watts": watts}

    def _run(self, part: str) -> Callable[[], object]:
        assert self.entry is not None
        return self.entry.forward if part == "forward" else self.entry.backward


def serve(settings: Settings, questions: TextIO, answers: TextIO) -> None:
    """Answers a question a line until there are no more; what fails is an answer too."""
    worker = Worker(settings)
    for line in questions:
        name, arguments = json.loads(line)
        try:
            answer = getattr(worker, name)(**arguments)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


# ---- the process that asks
class Version:
    """A process that has this version of flexmask, of `folder`."""

    def __init__(self, name: str, folder: Path, options: Sequence[str]):
        self.name = name
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        # -P: the working folder does not come first
        command = [sys.executable, "-P", "-m", "benchmarks.versus", name, "--worker", *options]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, name: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer tells
            print(json.dumps([name, arguments]), file=self.process.stdin, flush=True)

    def answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: Answer = json.loads(line) if line else {"failed": f"its process ended ({self.process.wait()})"}
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def folder_of(version: str, place: Path) -> Path:
    """A folder that holds the package of a version; of a commit, its files at `place`. Raises SystemExit where there is none."""
    if (Path(version) / "flexmask").is_dir():
        return Path(version).resolve()
    done = subprocess.run(["git", "-C", str(ROOT), "archive", version, "flexmask"], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{version!r} is neither a folder with a package flexmask nor a commit: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as files:
        files.extractall(place, filter="data")
    return place


def compare(versions: Sequence[Version], case: Case, parts: Sequence[str], rounds: int, seconds: float) -> list[str]:
    """What there is to say of a case, a line each."""
    for version in versions:
        version.ask("prepare", **asdict(case))
    errors = {version: version.answer() for version in versions}
    lines = [f"{case.name}: {version.name} failed: {found['failed']}" for version, found in errors.items() if "failed" in found]
    sound = [version for version in versions if "failed" not in errors[version]]
    for part in parts:
        best: dict[Version, float] = {}
        for number in range(rounds):
            for version in sound[:: 1 if number % 2 == 0 else -1]:
                version.ask("time", part=part)
                found = version.answer()
                if "failed" in found:
                    lines.append(f"{case.name}: {version.name} failed: {found['failed']}")
                best[version] = min(best.get(version, math.inf), found.get("ms", math.inf))
        told = [f"{v.name} {ms:.3f} ms ({best[sound[0]] / ms:.3f}, error {errors[v][part]:.1e})" for v, ms in best.items()]
        lines.append(f"{part:8s} {case.name}: " + ("  ".join(told) or "no version runs it"))
        lines += [loaded(version, part, seconds) for version in sound if seconds]
    return lines


def loaded(version: Version, part: str, seconds: float) -> str:
    version.ask("load", part=part, seconds=seconds)
    found = version.answer()
    if "failed" in found:
        return f"    {version.name} under load: {found['failed']}"
    return f"    {version.name} under load: {found['ms']:.3f} ms, {found['mhz']:.0f} MHz, {found['watts']:.0f} W"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("versions", nargs="+", metavar="COMMIT")
    parser.add_argument("--masks", nargs="+", default=["full", "causal"], choices=zoo.NAMES, metavar="MASK")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[128])
    parser.add_argument("--forward", action="store_true", help="forward alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    parts = PARTS[:1] if given.forward else PARTS
    if given.worker:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed goes where errors go
        serve(Settings(parts, given.device, run_ms=60, least=9), sys.stdin, answers)
        return 0
    options = ["--device", given.device, *["--forward"] * given.forward]
    with tempfile.TemporaryDirectory() as place:
        folders = [folder_of(name, Path(place) / str(number)) for number, name in enumerate(given.versions)]
        versions = [Version(name, folder, options) for name, folder in zip(given.versions, folders, strict=True)]
        try:
            for dim in given.head_dim:
                for case in (make_case(mask, length, dim) for length in given.lengths for mask in given.masks):
                    print(*compare(versions, case, parts, given.rounds, given.load), sep="\n", flush=True)
        finally:
            for version in versions:
                version.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
