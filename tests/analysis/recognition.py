"""How many random masks that truly keep few runs get an exact interval form.

A random mask is drawn once as a list of choices and built from them again, as other *instances* of the same structure: at other
lengths, with its tables drawn anew, its literal numbers (bounds and widths, not divisors and slopes) multiplied by a stretch, and its
run-time numbers taking other values, integers of the same sign. Lengths are always at least three times as large as the numbers.
Tables of numbers (neither ids nor bounds) hold small ones, large ones, or rising or falling ones with some noise, by turns; tables of
bounds different ones, or few that come often.
An atom (a comparison, or a table of bools) is *scattered* along an axis if by itself it keeps more than three runs of some row in some
instance. A mask *truly keeps few runs* if in every instance each row (each one looked at, in the largest) keeps at most three, also
with noise in place of its scattered atoms. So a mask whose tables happen to be short or alike, whose period is as long as its window,
or that keeps few runs because few positions are left to keep, does not count, unless few are left whatever the scattered atoms are.
It is *recognised* if in every instance its form, derived knowing which tables ascend, is exact, so that it settles to the few runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any
from unittest import mock

import strategies
import torch
from analysis_cases import most_runs
from strategies import Predicate, Sizes, _Builder

from flexmask.analysis import Form, NotInterval, derive
from flexmask.frontend import Traced, trace
from flexmask.ir import Env, Expr, evaluate

MOST = 3
LARGEST = 12
# (stretch, seed of the tables) of each instance, and how many rows are looked at
INSTANCES = ((1, 0), (1, 1), (3, 2), (3, 3), (40, 4), (40, 5), (40, 6), (40, 7), (3, 9))
ROWS = 40


class _Plain:
    """What the builder asks hypothesis for, answered by one throw of the dice: hypothesis would vary what it has drawn before."""

    @staticmethod
    def sampled_from(values: Sequence[Any]) -> Callable[[Random], Any]:
        return lambda random: random.choice(values)

    @staticmethod
    def integers(low: int, high: int) -> Callable[[Random], Any]:
        return lambda random: random.randint(low, high)

    @staticmethod
    def booleans() -> Callable[[Random], Any]:
        return lambda random: random.random() < 0.5


class _Stretched(_Builder):
    """Draws as its parent does, with numbers of a toy size for lengths that are larger."""

    def __init__(self, draw: Callable[[Any], Any], sizes: Sizes, stretch: int, seed: int):
        super().__init__(draw, sizes, tables=True)
        self.stretch, self.seed = stretch, seed

    def pick(self, *choices: Callable[[], str]) -> str:
        return choices[self.draw(_Plain.integers(0, len(choices) - 1))]()

    def number(self, low: int, high: int) -> str:
        low, high = max(low, -LARGEST), min(high, LARGEST)
        value = self.draw(_Plain.integers(low, high))
        how = self.draw(_Plain.sampled_from(["literal", "literal", "int", "tensor"]))
        if how == "literal":
            value *= self.stretch
            return str(value) if value >= 0 else f"({value})"
        if self.seed:
            value = self._another(value, low, high, of_its_sign=how == "int")
        value *= 1 if self.seed % 2 else self.stretch  # some stay as small as periods are
        return self.capture(value if how == "int" else torch.tensor(value))

    def _another(self, value: int, low: int, high: int, of_its_sign: bool) -> int:
        others = [n for n in range(low, high + 1) if not of_its_sign or (n > 0) - (n < 0) == (value > 0) - (value < 0)]
        return others[(others.index(value) + self.seed // 2) % len(others)]

    def table(self, *shape: int, low: int = 0, high: int = 4, ascending: bool = False) -> str:
        number, dtype = self.draw(_Plain.integers(0, 99)), self.draw(_Plain.sampled_from(strategies.INT_DTYPES))
        high += self.seed % 3 if high <= 6 else 0  # more ids
        values = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(100 * self.seed + number))
        if low < 0:
            rising = torch.arange(shape[-1]) * (0, 0, 1, -1)[self.seed % 4]
            values = values * (self.stretch, 8 * self.stretch, 1, 1)[self.seed % 4] + rising
        elif high > 16 and self.seed % 2:  # bounds, many of them alike
            values = values // ((high - 1) // 6) * ((high - 1) // 6)
        values = values.sort(-1).values if ascending else values
        return self.capture(values.to(dtype if low >= 0 and high <= 256 else torch.int32))

    def bools(self, *shape: int) -> str:
        number, share = self.draw(_Plain.integers(0, 99)), self.draw(_Plain.sampled_from([0.1, 0.5, 0.9]))
        return self.capture(torch.rand(shape, generator=torch.Generator().manual_seed(100 * self.seed + number)) < share)


@dataclass
class Drawn:
    """A random mask as the choices that make it."""

    depth: int
    sizes: Sizes
    choices: list[Any] = field(default_factory=list)

    def instance(self, stretch: int, seed: int) -> Predicate:
        s, left = self.sizes, iter(self.choices)
        return _built(self.depth, Sizes(s.B, s.H, s.Q * stretch, s.KV * stretch), lambda _: next(left), stretch, seed)


def _built(depth: int, sizes: Sizes, draw: Callable[[Any], Any], stretch: int, seed: int) -> Predicate:
    builder = _Stretched(draw, sizes, stretch, seed)
    with mock.patch.object(strategies, "st", _Plain):
        return Predicate(builder.condition(depth), builder.captures, sizes)


def drawn(random: Random, depth: int) -> Drawn:
    mask = Drawn(depth, Sizes(2, 2, *(random.choice([3 * LARGEST, 3 * LARGEST + 1, 4 * LARGEST]) for _ in range(2))))

    def record(choose: Callable[[Random], Any]) -> Any:
        mask.choices.append(choose(random))
        return mask.choices[-1]

    _built(depth, mask.sizes, record, 1, 0)
    return mask


@dataclass(frozen=True)
class Look:
    """Some rows (columns) of one instance: what a mask and its forms keep there."""

    axis: str
    traced: Traced
    sizes: Sizes
    places: torch.Tensor  # of the rows

    @property
    def length(self) -> int:
        return self.sizes.KV if self.axis == "row" else self.sizes.Q

    def env(self, rank: int) -> Env:
        s, mine, other = self.sizes, "q_idx", "kv_idx"
        mine, other = (mine, other) if self.axis == "row" else (other, mine)
        shape = [1] * (rank - 3)
        indices = {"b": torch.arange(s.B).view(-1, 1, 1, *shape), "h": torch.arange(s.H).view(-1, 1, *shape)}
        indices |= {mine: self.places.view(-1, *shape), **({other: torch.arange(self.length)} if shape else {})}
        return Env({**indices, "q_len": s.Q, "kv_len": s.KV}, self.traced.tensors, self.traced.scalars)

    def atom(self, atom: Expr) -> torch.Tensor:
        """bool [B, H, rows, length] by brute force."""
        shape = (self.sizes.B, self.sizes.H, len(self.places), self.length)
        return torch.as_tensor(evaluate(atom, self.env(4))).expand(shape)

    def keep(self, scattered: frozenset[int] = frozenset()) -> torch.Tensor:
        """The same of the whole mask, with noise for its scattered atoms."""
        noise, number = torch.Generator().manual_seed(0), itertools.count()

        def value(p: Expr) -> torch.Tensor:
            if p.op in _CONNECTIVES:
                return _CONNECTIVES[p.op](*map(value, p.args))
            return torch.rand(found.shape, generator=noise) < 0.5 if next(number) in scattered else self.atom(p)

        found = self.atom(self.traced.expr)
        return value(self.traced.expr) if scattered else found

    def kept_by(self, form: Form) -> torch.Tensor:
        """The same, as the pieces of a form say."""
        env, position = self.env(3), torch.arange(self.length)
        shape = (self.sizes.B, self.sizes.H, len(self.places))
        found = torch.zeros(*shape, self.length, dtype=torch.bool)
        for piece in form.pieces:
            start, stop = (torch.as_tensor(evaluate(e, env)).expand(shape)[..., None] for e in (piece.start, piece.stop))
            found |= (start <= position) & (position < stop)
        return found


def look(axis: str, traced: Traced, s: Sizes, seed: int = 0, most: int = ROWS) -> Look:
    n = s.Q if axis == "row" else s.KV
    some = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most]
    return Look(axis, traced, s, torch.cat([some, torch.arange(0, n, n // 6)]).unique())


def ascending(table: torch.Tensor) -> bool:
    return bool((table[..., 1:] >= table[..., :-1]).all())


def signs_of(traced: Traced) -> tuple[int, ...]:
    return tuple((x > 0) - (x < 0) if isinstance(x, int) else 0 for x in traced.scalars)


def why_not(form: Form | NotInterval, seen: Look, keep: torch.Tensor) -> str | None:
    """Why the form is not exact for a mask of few runs, None if it is. Raises AssertionError if it is wrong."""
    if isinstance(form, NotInterval):
        return form.reason
    if form.residue is not None:
        return f"residue {form.residue}"
    if not all(ascending(seen.traced.tensors[n]) for n in form.sorted_tables):
        return "a table does not ascend"
    assert torch.equal(seen.kept_by(form), keep), f"unsound: {form}"
    return None


_CONNECTIVES: dict[str, Callable[..., torch.Tensor]] = {
    "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor, "not": torch.logical_not, "where": torch.where,
}  # fmt: skip


def atoms(p: Expr) -> list[Expr]:
    """The leaves of the bool structure, left to right."""
    return [atom for a in p.args for atom in atoms(a)] if p.op in _CONNECTIVES else [p]


def judge(mask: Drawn) -> list[list[str | None] | None]:
    """Along rows and along columns: None if the mask does not truly keep few runs, else why not recognised, an instance each."""
    instances = [(predicate := mask.instance(*which), trace(predicate.function(), "mask")) for which in INSTANCES]
    return [_judge([look(axis, traced, p.sizes, i) for i, (p, traced) in enumerate(instances)]) for axis in ("row", "column")]


def _judge(looks: list[Look]) -> list[str | None] | None:
    if any(most_runs(seen.keep()) > MOST for seen in looks):
        return None
    of_each = [[most_runs(seen.atom(atom)) > MOST for atom in atoms(seen.traced.expr)] for seen in looks]
    scattered = frozenset(i for i, flags in enumerate(zip(*of_each, strict=True)) if any(flags))
    if scattered and any(most_runs(seen.keep(scattered)) > MOST for seen in looks):
        return None
    return [why_not(_form(seen), seen, seen.keep()) for seen in looks]


def _form(seen: Look) -> Form | NotInterval:
    """As a caller gets it who looks whether the tables ascend, and asks again if they do not."""
    unsorted = [n for n, table in enumerate(seen.traced.tensors) if table.dim() and not ascending(table)]
    facts = derive(seen.traced.expr, signs_of(seen.traced), unsorted)
    return facts.rows if seen.axis == "row" else facts.columns


def measure(cases: int, depth: int, seed: int = 0, report: Callable[[str, Drawn, str], None] | None = None) -> dict[str, tuple[int, int]]:
    """Per axis (masks recognised, masks that truly keep few runs) of so many random masks; `report` hears of each that is not."""
    random, found = Random(seed), {"row": (0, 0), "column": (0, 0)}
    for _ in range(cases):
        mask = drawn(random, depth)
        for axis, why in zip(found, judge(mask), strict=True):
            if why is not None:
                reasons = [w for w in why if w is not None]
                found[axis] = (found[axis][0] + (not reasons), found[axis][1] + 1)
                if reasons and report is not None:
                    report(axis, mask, reasons[0])
    return found
