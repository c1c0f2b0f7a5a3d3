"""One case: every contestant called, checked and timed in turn; one that fails is written down and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.checks import Expected, Memory, Tensors, difference
from benchmarks.figures import FLEX, OURS, PARTS, Case, Row, kept_pairs
from benchmarks.rivals import Attend, Contestant, build
from benchmarks.timing import LEAST_RUNS, RUN_MS, bench

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """`parts`: forward, or forward and backward. Each contestant is timed `rounds` times, in turn with the others, for `run_ms`
    milliseconds or `least` runs, whichever is longer, and the best of the medians counts."""

    parts: tuple[str, ...] = PARTS
    device: str = "cuda"
    rounds: int = 2
    run_ms: int = RUN_MS
    least: int = LEAST_RUNS

    @property
    def trains(self) -> bool:
        return "backward" in self.parts


class DeviceLost(Exception):
    """The GPU answers no more: a contestant broke the process."""

    def __init__(self, label: str, why: str):
        super().__init__(f"{label}: {why}")
        self.label, self.why = label, why


@dataclass
class Entry:
    """A contestant that has run: its inputs in its layout, and its output with its graph."""

    label: str
    attend: Attend
    given: Tensors
    dout: torch.Tensor
    out: torch.Tensor | None = None

    def forward(self) -> torch.Tensor:
        q, k, v = self.given
        return self.attend(q, k, v)

    def backward(self, dout: torch.Tensor | None = None) -> Tensors:
        """dq, dk, dv in the contestant's layout."""
        assert self.out is not None
        return torch.autograd.grad(self.out, self.given, self.dout if dout is None else dout, retain_graph=True)


def inputs(case: Case, settings: Settings) -> tuple[Tensors, torch.Tensor]:
    """q, k, v and dout: normal, bfloat16, the same in every process."""
    torch.manual_seed(0)
    shapes = [(case.batch, heads, case.length, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    q, k, v, dout = (torch.randn(shape, device=settings.device, dtype=torch.bfloat16) for shape in shapes)
    return tuple(x.requires_grad_(settings.trains) for x in (q, k, v)), dout


def enter(contestant: Contestant, case: Case, given: Tensors, dout: torch.Tensor, settings: Settings) -> Entry:
    """The contestant after its first call, which compiles."""
    if contestant.heads_last:
        given = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_(contestant.trains and settings.trains) for x in given)
        dout = dout.transpose(1, 2).contiguous()
    entry = Entry(contestant.label, contestant.make(case, settings.device), given, dout)
    entry.out = entry.forward()
    if contestant.trains and settings.trains:
        entry.backward()
    return entry


def run_once(case: Case, contestants: Iterable[Contestant], settings: Settings, note: Callable[[str], None]) -> dict[str, str]:
    """Calls each contestant, so that what it compiles is in the caches on disk. What failed, by contestant."""
    failures: dict[str, str] = {}
    given, dout = inputs(case, settings)
    for contestant in contestants:
        note(contestant.label)
        with written_down(failures, contestant.label, settings.device):
            enter(contestant, case, given, dout, settings)
    return failures


def measure(case: Case, contestants: Iterable[Contestant], settings: Settings, note: Callable[[str], None]) -> Row:
    """The row of a case; `note` hears which contestant is about to run. Raises DeviceLost, and whatever the mask itself does not bear."""
    row, expected = Row(case), None
    note(OURS)
    mask = build(case, settings.device)
    given, dout = inputs(case, settings)
    with written_down(row.failures, "reference", settings.device):
        row.kept_pairs, row.block_pairs = kept_pairs(mask, case.length, device=settings.device)
        expected = Expected(given[0], given[1], given[2], dout if settings.trains else None, mask)
    entries, gradients = [], {}
    for contestant in contestants:
        note(contestant.label)
        with written_down(row.failures, contestant.label, settings.device):
            entry = enter(contestant, case, given, dout, settings)
            trained = contestant.trains and settings.trains
            found = judge(entry, row, expected, dout, contestant.heads_last, trained)
            entries.append((entry, trained))
            if entry.label in (OURS, FLEX) and trained:
                gradients[entry.label] = found
    if {OURS, FLEX} <= gradients.keys():
        row.difference = difference(gradients[OURS], gradients[FLEX])
    gradients.clear()
    del expected
    time_all(entries, row, settings, note)
    return row


def judge(entry: Entry, row: Row, expected: Expected | None, dout: torch.Tensor, heads_last: bool, trained: bool) -> Tensors:
    """Writes error and peak memory of a contestant down; its gradients of `dout`."""
    turned = (lambda x: x.transpose(1, 2)) if heads_last else (lambda x: x)
    assert entry.out is not None
    if expected is not None:
        row.error[entry.label] = expected.error(turned(entry.out.detach()))
    entry.out = None
    memory = Memory.start("cuda" if dout.is_cuda else "cpu")
    entry.out = entry.forward()
    found = entry.backward() if trained else ()
    row.peak_mib[entry.label] = memory.peak_mib() - sum(x.numel() * x.element_size() for x in found) / MIB
    if trained and expected is not None:
        few = entry.backward(turned(expected.sampled(dout)).contiguous())
        row.gradient_error[entry.label] = expected.gradient_error(tuple(turned(x) for x in few))
    return tuple(turned(x) for x in found)


def time_all(entries: list[tuple[Entry, bool]], row: Row, settings: Settings, note: Callable[[str], None]) -> None:
    for _ in range(settings.rounds):
        for entry, trained in entries:
            runs: dict[str, Callable[[], object]] = {"forward": entry.forward}
            if trained:
                runs["backward"] = entry.backward
            note(entry.label)
            for part in settings.parts:
                if part in runs:
                    with written_down(row.failures, entry.label, settings.device):
                        ms = bench(runs[part], settings.device, settings.run_ms, settings.least)
                        row.ms[part][entry.label] = min(row.ms[part].get(entry.label, float("inf")), ms)


@contextmanager
def written_down(failures: dict[str, str], label: str, device: str) -> Iterator[None]:
    """A failure inside goes to `failures`; only one that broke the GPU's context leaves, as DeviceLost."""
    try:
        yield
        if device != "cpu":
            torch.cuda.synchronize()
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        failures[label] = why
        if not answers(device):
            raise DeviceLost(label, why) from None


def answers(device: str) -> bool:
    """Whether the GPU still does, after an error; what the error left in memory is given back."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True
