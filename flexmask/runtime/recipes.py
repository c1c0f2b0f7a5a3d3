"""How the maps of a mask are made on a GPU: what depends on its structure and on block sizes alone, kernels included, found once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from ..analysis import MOST_PIECES, BoxTest, Facts, Form
from ..frontend import Traced
from ..ir import FLOAT, B, H, show, uses
from ..lowering import CaptureSpec, TensorSpec, emit_function, emit_values
from ..templates.assemble import assemble_tiles
from ..templates.assemble_bits import assemble_bits
from ..templates.assemble_survey import assemble_survey
from . import launch
from .grid import Grid
from .host_map import find_box
from .prepared import Prepared
from .store import Store
from .variants import Variant

BOX_PARAMETERS = "b, h, q_idx, kv_idx, q_len, kv_len"
# a variant of a mask's kernels, and the tiles it works on: (variant, block_q, block_kv)
Wanted = tuple[Variant, int, int]


@dataclass(frozen=True)
class ByIntervals:
    """Maps from an exact form: `pieces` intervals a line, `ranges` or else lists; `flags` on the device (0: it always holds)."""

    axis: str
    pieces: int
    ranges: bool
    flags: int
    survey: Any


@dataclass(frozen=True)
class ByPredicate:
    """Maps by bounds (`hulls` of them), box test and evaluation; `flags` on the device (0: none, or those of a partner), of which the first
    says, for one that `holds` or not, whether it does. With `bits`, also the bits of PARTIAL tiles; with `crossing`, a survey of the other
    axis, also the interval of each line there."""

    axis: str
    hulls: int
    flags: int
    terms: tuple[Term, ...]
    survey: Any
    tiles: Any
    bits: Any = None
    crossing: Any = None
    holds: bool = False

    def summaries(self, grid: Grid, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Memory for the least and greatest value of each term in each block, in the order of the terms."""
        made: list[torch.Tensor] = []
        for term, same in groupby(self.terms):
            blocks = grid.rows if term.over_rows else grid.columns
            # strides are multiples of 16 whatever the length: Triton would compile anew for others
            lead = (grid.batch if term.uses_b else 1, grid.heads if term.uses_h else 1, -(-blocks // 16) * 16)
            made += torch.empty(2 * len(list(same)), *lead, dtype=term.dtype, device=device)[..., :blocks].unbind()
        return tuple(made)


@dataclass(frozen=True)
class Term:
    """What a term of the box test depends on, and the type of its extremes."""

    over_rows: bool
    uses_b: bool
    uses_h: bool
    dtype: torch.dtype


Recipe = ByIntervals | ByPredicate


def _terms(box: BoxTest) -> tuple[Term, ...]:
    sides = [(term, True) for term in box.rows] + [(term, False) for term in box.columns]
    return tuple(Term(side, uses(e, B), uses(e, H), torch.float32 if e.kind == FLOAT else torch.int64) for e, side in sides)


def captures_of(traced: Traced) -> CaptureSpec:
    """What generated code needs to know of a mod's captures."""
    return CaptureSpec.of(traced.tensors, traced.tensor_names, traced.scalars, traced.scalar_names)


def find_recipes(store: Store, traced: Traced, facts: Facts, wanted: Sequence[Wanted], axis: str) -> tuple[Recipe, ...]:
    """The recipes for one mask's variants, along an axis; kernels are written and loaded at most once."""

    def make() -> tuple[Recipe, ...]:
        cook = _Cook(store, traced, facts, axis)
        return tuple(cook.by_intervals(w, wanted) if w[0].pieces and not w[0].crossed else cook.by_predicate(w, wanted) for w in wanted)

    found: tuple[Recipe, ...] = store.kernel((store.key_of(traced), "maps", axis, tuple(wanted)), make)
    return found


@dataclass(frozen=True)
class _Cook:
    """One mask along one axis."""

    store: Store
    traced: Traced
    facts: Facts
    axis: str

    def by_intervals(self, wanted: Wanted, others: Sequence[Wanted]) -> ByIntervals:
        variant, block_q, block_kv = wanted
        form, ranges, tables = self._form(), variant.map_form == "range", tuple[int, ...]()
        if variant.runs == "hold":  # the partner's bounds ask about tables of their own
            tables = _tables((form, *self._bounds())) if len(others) > 1 else form.sorted_tables

        def write() -> str:
            return assemble_survey(
                axis=self.axis, block_q=block_q, block_kv=block_kv, form=form, ranges=ranges, bounds=(), box=None,
                captures=captures_of(self.traced), tables=tables, header=self._header("survey"),
            )  # fmt: skip

        flags = 1 + len(self.traced.tensors) if variant.runs == "hold" else 0
        survey = self._module(f"survey {variant.map_form} {tables}", wanted, write)
        return ByIntervals(self.axis, min(len(form.pieces), MOST_PIECES), ranges, flags, survey)

    def by_predicate(self, wanted: Wanted, others: Sequence[Wanted]) -> ByPredicate:
        variant, block_q, block_kv = wanted
        box, bounds = find_box(self.facts.predicate, len(self.traced.tensors)), self._bounds()
        # with a partner before it the tables have been looked at already
        tables = _tables(bounds) if wanted is others[0] else ()

        def write() -> str:
            return assemble_survey(
                axis=self.axis, block_q=block_q, block_kv=block_kv, form=None, ranges=False, bounds=bounds, box=box,
                captures=captures_of(self.traced), tables=tables, header=self._header("survey"),
            )  # fmt: skip

        surveyed = bool(bounds or box.terms)
        survey = self._module(f"bounds {tables}", wanted, write) if surveyed else None
        tiles = self._module("tiles", wanted, lambda: self._tiles_text(box, bounds, block_q, block_kv))
        bits = self._module("bits", wanted, lambda: self._bits_text(block_q, block_kv)) if variant.bits else None
        crossing = self._crossing(wanted) if variant.crossed else None
        flags = 1 + len(self.traced.tensors) if tables or variant.runs == "hold" else 0
        return ByPredicate(self.axis, len(bounds), flags, _terms(box), survey, tiles, bits, crossing, variant.runs == "hold")

    def _crossing(self, wanted: Wanted) -> Any:
        """The survey that gives the interval of each line of the other axis, and looks at the tables that must ascend for it."""
        _, block_q, block_kv = wanted
        other = replace(self, axis="column" if self.axis == "row" else "row")
        form = other._form()
        text = partial(
            assemble_survey, axis=other.axis, block_q=block_q, block_kv=block_kv, form=form, ranges=False, bounds=(), box=None,
            captures=captures_of(self.traced), tables=form.sorted_tables, header=self._header("survey"),
        )  # fmt: skip
        return other._module(f"survey crossing {form.sorted_tables}", wanted, text)

    def _tiles_text(self, box: BoxTest, bounds: Sequence[Form], block_q: int, block_kv: int) -> str:
        captures = captures_of(self.traced)
        wide = CaptureSpec((*captures.tensors, *_summary_specs(box)), captures.scalars)
        return assemble_tiles(
            axis=self.axis,
            block_q=block_q,
            block_kv=block_kv,
            mask=emit_function("mask_mod", self.facts.predicate, captures, "mask"),
            box=emit_values("box_test", BOX_PARAMETERS, (box.some, box.every), wide, "Whether a tile keeps something, and all."),
            bounds=[b.sorted_tables for b in bounds],
            header=self._header("tiles"),
        )

    def _bits_text(self, block_q: int, block_kv: int) -> str:
        mask = emit_function("mask_mod", self.facts.predicate, captures_of(self.traced), "mask")
        return assemble_bits(axis=self.axis, block_q=block_q, block_kv=block_kv, mask=mask, header=self._header("bits"))

    def _module(self, kind: str, wanted: Wanted, write: Callable[[], str]) -> Any:
        """The generated kernel of that kind, written and loaded."""
        _, block_q, block_kv = wanted
        text = f"{kind} {self.axis} {block_q} {block_kv} {self.store.key_of(self.traced)} {self.traced.name} {self.traced.names()}"
        module = launch.load(self.store.kernel_file(hashlib.sha256(text.encode()).hexdigest(), write))
        for name, watched in (("survey_block", (0, 1)), ("decide_tiles", (1, 2)), ("make_bits", (1, 2))):  # the mask's captures
            if hasattr(module, name):
                setattr(module, name, Prepared(getattr(module, name), watched))
        return module

    def _header(self, what: str) -> list[str]:
        return [f"{what} of mask {self.traced.name}", f"    {show(self.facts.predicate, self.traced.names())}"]

    def _form(self) -> Form:
        """The form, the tables that are promised to ascend left out of what it relies on."""
        form = self.facts.rows if self.axis == "row" else self.facts.columns
        assert isinstance(form, Form)
        return self._believed(form)

    def _bounds(self) -> tuple[Form, ...]:
        found = self.facts.row_bounds if self.axis == "row" else self.facts.column_bounds
        return tuple(map(self._believed, found))

    def _believed(self, form: Form) -> Form:
        return replace(form, sorted_tables=tuple(n for n in form.sorted_tables if n not in self.traced.promised))


def _tables(forms: Sequence[Form]) -> tuple[int, ...]:
    return tuple(sorted({n for form in forms for n in form.sorted_tables}))


def _summary_specs(box: BoxTest) -> list[TensorSpec]:
    kinds = ["float32" if term.kind == FLOAT else "int64" for term in box.terms]
    return [TensorSpec(f"{side}_{i}", 3, kind) for i, kind in enumerate(kinds) for side in ("least", "most")]
