"""Attention on a GPU beside its rivals, in one process, interleaved, forward and backward; results checked in the same run.

    python -m benchmarks.kernels [--masks full causal ...] [--lengths 8192 32768 131072] [--head-dim 128 64] [--gqa 1 4] [--forward]
                                 [--rivals NAME ...] [--best] [--jobs N] [--json FILE]
    python -m benchmarks.markdown FILE         the tables of docs/benchmarks.md
    python -m benchmarks.plot FILE -o FILE.svg

For each case and contestant: milliseconds (the better of two medians, 26 runs at least), exact-area TFLOP/s (forward 4 * B * H * D * kept
pairs, backward 2.5 times that), block TFLOP/s (non-empty 128 x 128 blocks instead of kept pairs), the largest error of out, dq, dk and dv
against the float64 reference by sampled rows, how far all gradients are from FlexAttention's, and the peak memory of forward and backward.
The forward pass is timed as training runs it (with `--forward` alone: as inference does).

Contestants are those of `benchmarks.rivals`; `--best` adds FlexAttention after max-autotune, which compiles for minutes. One that is not
installed or fails is reported; one that hangs or breaks the GPU's context is left out of the rest, which goes on in a new process.
`--jobs N` first compiles all cases in N processes (not max-autotune, which needs the GPU for itself). `--resume` goes on with the cases
that FILE does not have, `--budget S` begins none after S seconds. `--maps` adds what `benchmarks.maps` measures of a case,
`--first-call` what `benchmarks.first_call` does. `--site DIR` adds a folder of packages.
"""

from __future__ import annotations

import argparse
import os
import site
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import masks as zoo
from benchmarks.checks import check as check
from benchmarks.contest import DeviceLost, Settings, answers, measure, run_once
from benchmarks.figures import HEADS as HEADS
from benchmarks.figures import OURS, PARTS, Case, Row, make_case, summary
from benchmarks.figures import kept_pairs as kept_pairs
from benchmarks.processes import compile_ahead, keep_measuring
from benchmarks.record import Progress, Record
from benchmarks.rivals import CONTESTANTS, Contestant
from benchmarks.show import show
from benchmarks.timing import LEAST_RUNS, RUN_MS
from benchmarks.timing import bench as bench
from benchmarks.versions import versions

LOST = 3  # exit code of a process whose GPU answers no more
MAPS = "maps"
TELLING = ("forward", "sample", "promised", "per_head", "rounds", "run_ms", "least")  # options that figures depend on


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", nargs="+", default=list(zoo.NAMES), choices=zoo.NAMES, metavar="MASK")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    parser.add_argument("--gqa", type=int, nargs="+", default=[1], help="query heads a key head")
    parser.add_argument("--forward", action="store_true", help="forward alone, as inference runs it")
    parser.add_argument("--sample", type=int, default=0, help="which of the five samples of documents")
    parser.add_argument("--promised", action="store_true", help="flexmask is promised that document ids ascend")
    parser.add_argument("--per-head", action="store_true", help="random eviction differs by head and batch entry")
    parser.add_argument("--rivals", nargs="*", help="of: " + ", ".join(CONTESTANTS))
    parser.add_argument("--best", action="store_true", help="also FlexAttention with max-autotune")
    parser.add_argument("--jobs", type=int, default=0, help="compile in so many processes first")
    parser.add_argument("--json", help="write rows there as they are measured")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has")
    parser.add_argument("--maps", action="store_true")
    parser.add_argument("--first-call", nargs="*", metavar="MASK", help="of these masks, or of three")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--run-ms", type=int, default=RUN_MS, help="time a contestant for so long, in each round")
    parser.add_argument("--least", type=int, default=LEAST_RUNS, help="but for so many runs at least")
    parser.add_argument("--patience", type=float, default=240, help="seconds without a sign of life after which a contestant is given up")
    parser.add_argument("--budget", type=float, default=0, help="begin no case after so many seconds")
    parser.add_argument("--site", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--commit", help="what to write down where there is no git checkout")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    # what the processes of a run tell each other
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--without", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--ahead", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def grid(given: argparse.Namespace) -> list[Case]:
    """The cases asked for; those at one size follow each other, the full mask first."""
    more = {"sample": given.sample, "promised": given.promised}
    names = sorted(given.masks, key=zoo.NAMES.index)
    sizes = [(length, dim, group) for dim in given.head_dim for group in given.gqa for length in given.lengths]
    return [
        make_case(name, length, dim, group, per_head=given.per_head and name == "random_eviction", **more)
        for length, dim, group in sizes
        for name in names
    ]


def wanted(given: argparse.Namespace) -> tuple[list[Contestant], dict[str, str]]:
    """flexmask and the rivals asked for, and why others are missing."""
    chosen = [c for c in CONTESTANTS.values() if c.label == OURS or _asked_for(c, given)]
    missing = {c.label: why for c in chosen if (why := c.missing())}
    return [c for c in chosen if c.label not in missing and c.label not in (given.without or ())], missing


def _asked_for(contestant: Contestant, given: argparse.Namespace) -> bool:
    if given.rivals is not None and contestant.label in given.rivals:
        return True
    return given.best if contestant.slow else given.rivals is None


def settings_of(given: argparse.Namespace) -> Settings:
    return Settings(PARTS[:1] if given.forward else PARTS, given.device, given.rounds, given.run_ms, given.least)


def work(given: argparse.Namespace, path: Path) -> int:
    """Measure the cases that the file does not have yet. The exit code of the process that does it."""
    record, progress, settings = Record(path), Progress(path.with_name(path.name + ".progress")), settings_of(given)
    contestants, missing = wanted(given)
    options = {name: getattr(given, name) for name in TELLING}
    record.more |= {"versions": versions() | ({"commit": given.commit} if given.commit else {}), "options": options, "missing": missing}
    print(record.more["versions"], *[f"not installed: {label}: {why}" for label, why in missing.items()], sep="\n", flush=True)
    to_do = [case for case in grid(given) if not record.has(case)]
    for number, case in enumerate(to_do):
        if given.deadline and time.time() > given.deadline:
            print(f"no time left for {len(to_do) - number} cases: --resume measures them", flush=True)
            break
        torch.compiler.reset()
        note = lambda label: progress.note(case, label)
        try:
            row = measure(case, [c for c in contestants if c.takes(case)], settings, note)
            if given.maps and MAPS not in (given.without or ()) and _is_first_of_its_mask(case, given):
                note(MAPS)
                add_maps(row)
        except DeviceLost as lost:
            progress.note(case, lost.label, lost.why)
            sys.stdout.flush()
            os._exit(LOST)  # what Python would do at the end waits for the GPU
        except Exception as error:
            row = Row(case, failures={"case": f"{type(error).__name__}: {str(error)[:400]}"})
            if not answers(settings.device):
                progress.note(case, OURS, row.failures["case"])
                os._exit(LOST)
        record.rows.append(row)
        record.save()
        print(show(row, record.rows), flush=True)
    progress.clear()
    return 0


def _is_first_of_its_mask(case: Case, given: argparse.Namespace) -> bool:
    """Maps are the same at every head dim and group."""
    return (case.head_dim, case.heads) == (given.head_dim[0], case.kv_heads * given.gqa[0])


def add_maps(row: Row) -> None:
    """Time and memory of the mask's maps, as `benchmarks.maps` measures them."""
    try:
        from benchmarks import maps

        found = maps.measure(row.case.mask, row.case.length)
        row.maps |= found.figures
        row.failures |= {f"maps, {label}": why for label, why in found.failures.items()}
    except Exception as error:
        row.failures[MAPS] = f"{type(error).__name__}: {str(error)[:300]}"


def compile_share(given: argparse.Namespace) -> int:
    """What one of the processes does that compile ahead."""
    cases, (contestants, _) = grid(given), wanted(given)
    for number in map(int, given.ahead):
        torch.compiler.reset()
        try:
            takers = [c for c in contestants if c.takes(cases[number]) and not c.slow]
            failures = run_once(cases[number], takers, settings_of(given), lambda label: None)
        except Exception as error:
            failures = {"case": f"{type(error).__name__}: {str(error)[:300]}"}
        for label, why in failures.items():
            print(f"{cases[number].name}: {label} failed: {why}", flush=True)
    return 0


def run(given: argparse.Namespace, argv: list[str], path: Path) -> int:
    """The whole of it, in other processes: this one never touches the GPU."""
    if not given.resume:
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.kernels", *argv, "--json", str(path)]
    command += ["--deadline", str(time.time() + given.budget)] if given.budget else []
    if given.jobs:
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # FlashAttention-4's cache on disk is off by default
        record = Record(path)
        numbers = [number for number, case in enumerate(grid(given)) if not record.has(case)]
        compile_ahead([*command, "--ahead"], numbers, given.jobs, 2 * given.patience)
    well = keep_measuring([*command, "--worker"], path, given.patience)
    record = Record(path)
    if given.first_call is not None:
        from benchmarks import first_call

        masks = given.first_call or first_call.MASKS
        record.more["first_call"] = first_call.table(masks, given.lengths[0], given.head_dim[0], max(1, given.jobs), given.device)
        record.save()
    print(*[f"left out: {label}, {why}" for label, why in record.more.get("left_out", {}).items()], *summary(record.rows), sep="\n")
    return 0 if well else 1


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    given = arguments(argv)
    for folder in given.site:
        site.addsitedir(folder)  # unlike PYTHONPATH it minds .pth files
    if given.ahead is not None:
        return compile_share(given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(given.json or Path(folder) / "rows.json")
        return work(given, path) if given.worker else run(given, argv, path)


if __name__ == "__main__":
    sys.exit(main())
