"""Which sizes of a kernel are fastest on the user's GPU: measured at the first call of a kind where `autotune` asks for it, then read.

What was found is kept in memory and, as numbers in JSON, in the disk cache. Nothing is believed of a file but sizes that would be tried.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch

from ..lowering.tuned import P, Plan, candidates, changed, differences, from_table
from .request import Request
from .store import Store, code_fingerprint

# how many times as fast sizes must be to be taken rather than the planned ones: less may be chance, and other sizes round otherwise
WORTH = 1.02
# milliseconds that one kind of kernel is run for, and how many times at least and at most
MEASURED_MS, FEWEST, MOST = 60.0, 7, 100
# of the largest number, how far results with other sizes may be apart: they round otherwise, a wrong kernel is wrong by far more
APART = 0.05
SAMPLE = 1 << 20


# those that differ from what was planned
Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Tuned:
    """What was measured of kernel `number` of a chain ("forward", "fused", "dq", "dkdv") on a GPU: with these `sizes` the pass is `gain`
    times as fast as planned; or no others were faster, and there are none. `times`: milliseconds of the pass by sizes, () as planned."""

    chain: str
    number: int
    gpu: str
    sizes: Sizes = ()
    gain: float = 1.0
    times: tuple[tuple[Sizes, float], ...] = ()

    def note(self, planned: Plan) -> str:
        """The same in words, for explain()."""
        if not self.sizes:
            return f"measured on {self.gpu}: {_named(planned, planned)} is the fastest of {len(self.times)}"
        plan = changed(planned, dict(self.sizes)) or planned
        names = _named(plan, planned), _named(planned, plan)
        if self.chain in ("dq", "dkdv"):  # one kernel of several, which are timed together
            return f"measured on {self.gpu}: the pass is {self.gain:.2f} times as fast with {names[0]} as with {names[1]}"
        return f"measured on {self.gpu}: {names[0]} is {self.gain:.2f} times as fast as {names[1]}"


Found = tuple[Tuned, ...]
UNTUNED: Found = ()


@dataclass(frozen=True)
class Trial:
    """The kernels of a pass, ready to run: which of each chain has its turn (none, where those of another chain have), and how to."""

    turns: Mapping[str, int | None]
    run: Callable[[], Sequence[torch.Tensor | None]]


Attempt = Callable[[Store, Found], Trial]


@dataclass(frozen=True)
class Subject:
    """A pass that may be tuned: what tells it from others besides its mods and sizes, its plans by chain, and how to prepare it with what
    was found, from a store of its own (None where nothing is to be measured)."""

    key: tuple[Any, ...]
    plans: Callable[[], Mapping[str, Sequence[Plan]]]
    attempt: Attempt | None = None


class Timer(Protocol):
    """How runs are timed, and where."""

    def name(self, device: torch.device) -> str:
        """The name of the GPU; "" for a device on which nothing is tuned."""

    def is_free(self) -> bool:
        """Whether kernels may be run and waited for now."""

    def milliseconds(self, run: Callable[[], object]) -> float:
        """How long a run takes the GPU."""


class Events:
    """A timer by CUDA events: the median of runs that find nothing of their tensors in the L2 cache."""

    def name(self, device: torch.device) -> str:
        return _name_of(device) if device.type == "cuda" else ""

    def is_free(self) -> bool:
        return not torch.cuda.is_current_stream_capturing()

    def milliseconds(self, run: Callable[[], object]) -> float:
        run()  # compiles
        about = max(self._median(run, 3), 1e-3)
        return self._median(run, max(FEWEST, min(MOST, int(MEASURED_MS / about))))

    def _median(self, run: Callable[[], object], times: int) -> float:
        cache = 4 * getattr(torch.cuda.get_device_properties(), "L2_cache_size", 1 << 24)
        flush = torch.empty(cache // 4, dtype=torch.int32, device="cuda")
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for start, stop in marks:
            flush.zero_()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return float(statistics.median(start.elapsed_time(stop) for start, stop in marks))


TIMER: Timer = Events()


@lru_cache(maxsize=64)
def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def sized(plan: P, narrow: bool, tuned: Found, chain: str, number: int) -> tuple[P, str]:
    """The plan of kernel `number` of a chain with the sizes that were measured, or else those of the table of lowering/tuned.json, and how
    explain() says so ("" for the planner's own). `narrow` is as in `from_table`."""
    here = torch.cuda.is_available() and plan.arch == _current_arch()
    planned, measured = from_table(plan, narrow, _name_of(torch.device("cuda", torch.cuda.current_device())) if here else "")
    for each in tuned:
        if (each.chain, each.number) == (chain, number):
            return changed(planned, dict(each.sizes)) or planned, each.note(planned)
    return planned, f"from the table ({measured})" if measured else ""


def _current_arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def find(store: Store, request: Request, device: torch.device, subject: Subject) -> Found:
    """What was found for the subject, in this process or an earlier one, or else now. Nothing where the request does not ask for it, or
    there is no GPU; nor where nothing was found before, and the stream is being captured, the subject cannot be attempted, or memory is
    short."""
    gpu = TIMER.name(device) if request.autotune else ""
    if not gpu or 0 in astuple(request.shapes):
        return UNTUNED
    key = (gpu, *subject.key, *_kind(store, request))
    known: Found | None = store.tuned.get(key)
    if known is not None:
        return known
    plans = subject.plans()
    name = _file_name(key, plans)
    known = _read(store, name, plans, gpu)
    if known is None:
        if subject.attempt is None or not TIMER.is_free():
            return UNTUNED
        try:
            known = _measure(store, plans, subject.attempt, gpu)
        except torch.OutOfMemoryError:  # measuring takes memory for results besides those of the call
            return UNTUNED
        store.disk.put(name, ".tuned.json", json.dumps([asdict(each) for each in known]))
    store.tuned[key] = known
    return known


def unknown(device: torch.device) -> str:
    """Why nothing is known of what was to be measured, for explain()."""
    return "not measured yet: the next call does" if TIMER.name(device) else "not measured, as there is no GPU to measure on"


def _kind(store: Store, request: Request) -> tuple[Any, ...]:
    """The mods' structures, and sizes: head dims as they are, all others rounded up to powers of two."""
    s = request.shapes
    rounded = tuple([1 << max(0, n - 1).bit_length() for n in (s.batch, s.heads, s.kv_heads, s.q_len, s.kv_len)])
    return *[None if mod is None else store.key_of(mod) for mod in (request.mask, request.score)], s.head_dim, s.v_head_dim, *rounded


def _file_name(key: tuple[Any, ...], plans: Mapping[str, Sequence[Plan]]) -> str:
    texts = [code_fingerprint(), repr(key), *(f"{chain} {plan.to_json()}" for chain, some in plans.items() for plan in some)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _read(store: Store, name: str, plans: Mapping[str, Sequence[Plan]], gpu: str) -> Found | None:
    """What the file says; None where there is none, or where it says what no measurement would."""
    try:
        text = store.disk.get(name, ".tuned.json")
        return None if text is None else tuple([_checked(each, plans, gpu) for each in json.loads(text)])
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return None


def _checked(given: Any, plans: Mapping[str, Sequence[Plan]], gpu: str) -> Tuned:
    chain, number, gain = (given[name] for name in ("chain", "number", "gain"))
    times = tuple([(_sizes(sizes), float(ms)) for sizes, ms in given["times"]])
    if type(number) is not int or number < 0 or not all(map(math.isfinite, (gain, *dict(times).values()))):
        raise ValueError("no numbers")
    planned, sizes = plans[chain][number], _sizes(given["sizes"])
    if sizes and changed(planned, dict(sizes)) not in candidates(planned):
        raise ValueError("no sizes that would be tried")
    return Tuned(chain, number, gpu, sizes, float(gain), times)


def _sizes(given: Any) -> Sizes:
    found = tuple([(str(name), value) for name, value in given])
    if not all(type(value) is int for _, value in found):
        raise ValueError("sizes are whole numbers")
    return found


def _measure(store: Store, plans: Mapping[str, Sequence[Plan]], attempt: Attempt, gpu: str) -> Found:
    """For each chain of which a kernel has its turn, the sizes of that kernel that make the pass fastest."""
    usual = attempt(store.aside(), UNTUNED)
    found = []
    for chain, some in plans.items():
        number = usual.turns.get(chain)
        if number is not None:
            found.append(_fastest(store, Tuned(chain, number, gpu), some[number], usual, attempt))
    return tuple(found)


def _fastest(store: Store, usual: Tuned, planned: Plan, trial: Trial, attempt: Attempt) -> Tuned:
    times = _timings(store, usual, planned, trial, attempt)
    sizes = min(times, key=lambda each: times[each])
    if sizes:  # again, one beside the other
        again = attempt(store.aside(), (replace(usual, sizes=sizes),))
        for _ in range(2):
            times[()] = min(times[()], TIMER.milliseconds(trial.run))
            times[sizes] = min(times[sizes], TIMER.milliseconds(again.run))
    found, gain = replace(usual, times=tuple(times.items())), times[()] / times[sizes]
    return replace(found, sizes=sizes, gain=gain) if gain >= WORTH else found


def _timings(store: Store, usual: Tuned, planned: Plan, trial: Trial, attempt: Attempt) -> dict[Sizes, float]:
    """Milliseconds of a pass as planned (`trial`), and with each candidate for the kernel `usual` names; without those that fail, or give
    other results."""
    wanted = trial.run()
    times: dict[Sizes, float] = {(): TIMER.milliseconds(trial.run)}
    for plan in candidates(planned):
        sizes = tuple(differences(planned, plan).items())
        try:
            other = attempt(store.aside(), (replace(usual, sizes=sizes),))
            if agree(other.run(), wanted):
                times[sizes] = TIMER.milliseconds(other.run)
        except Exception:  # whatever a compiler or a GPU may say of sizes that are too much for it: others serve
            continue
    return times


def agree(found: Sequence[torch.Tensor | None], wanted: Sequence[torch.Tensor | None]) -> bool:
    """Whether results are the same but for rounding, by a sample of each."""
    return all((x is None) == (y is None) and (x is None or y is None or _close(x, y)) for x, y in zip(found, wanted, strict=True))


def _close(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.shape != y.shape:
        return False
    step = (y.numel() // SAMPLE) | 1  # odd, so that all columns have a part in the sample
    x, y = (z.reshape(-1)[::step].float() for z in (x, y))
    most = y.masked_fill(~y.isfinite(), 0).abs().amax() if y.numel() else y.sum()
    return torch.allclose(x, y, rtol=0, atol=float(APART * most), equal_nan=True)


def turn_of(kernels: Sequence[tuple[Any, Mapping[str, Any]]]) -> int | None:
    """Which of the kernels that take turns has it, by what their maps' flags say now; None for none. On a GPU this waits."""
    for number, (module, given) in enumerate(kernels):
        flag = given.get("broken")
        if module.RUNS.value == "always" or flag is None or int(flag[0]) == (module.RUNS.value == "fail"):
            return number
    return None


def _named(plan: Plan, other: Plan) -> str:
    """A plan by its tiles and by what else tells it from the other: 128x64 (4 warps, 3 stages)."""
    words = {"num_warps": "warps", "num_stages": "stages", "stages": "stages"}
    more = [f"{getattr(plan, name)} {words[name]}" for name in differences(other, plan) if name in words]
    return f"{plan.block_q}x{plan.block_kv}" + f" ({', '.join(more)})" * bool(more)
