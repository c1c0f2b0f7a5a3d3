"""The survey kernel against torch, in Triton's interpreter. Run as a script under TRITON_INTERPRET=1; prints {case: error} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexmask.analysis import Form, Piece, box_test, derive
from flexmask.errors import NotInterval
from flexmask.ir import FLOAT, B, Env, Expr, H, K, Q, const, evaluate, load, make, parse, scalar, search, simplify, uses
from flexmask.lowering import CaptureSpec
from flexmask.runtime.grid import Grid, interval_ranges
from flexmask.runtime.intervals import ascending, solve
from flexmask.templates.assemble_survey import assemble_survey


@dataclass(frozen=True)
class Terms:
    """As much of a BoxTest as a survey looks at."""

    rows: tuple[Expr, ...] = ()
    columns: tuple[Expr, ...] = ()


@dataclass(frozen=True)
class Case:
    """One survey: what is asked for, of which captures, over which grid. `ranges` also where rows do not follow each other."""

    form: Form | None = None
    bounds: tuple[Form, ...] = ()
    box: Terms = Terms()
    tensors: tuple[torch.Tensor, ...] = ()
    scalars: tuple[int | float, ...] = ()
    tables: tuple[int, ...] = ()
    axis: str = "row"
    sizes: tuple[int, int, int, int] = (1, 1, 50, 70)  # batch, heads, q_len, kv_len
    blocks: tuple[int, int] = (16, 32)

    @property
    def ranges(self) -> bool:
        return self.form is not None and len(self.form.pieces) == 1

    @property
    def spec(self) -> CaptureSpec:
        names = [f"table_{i}" for i in range(len(self.tensors))]
        return CaptureSpec.of(self.tensors, names, self.scalars, [f"number_{i}" for i in range(len(self.scalars))])

    @property
    def lines(self) -> Grid:
        """The grid with the owner's blocks as rows."""
        batch, heads, q_len, kv_len = self.sizes
        if self.axis == "row":
            return Grid(q_len, kv_len, *self.blocks, batch, heads)
        return Grid(kv_len, q_len, *self.blocks[::-1], batch, heads)

    def source(self) -> str:
        return assemble_survey(
            axis=self.axis, block_q=self.blocks[0], block_kv=self.blocks[1], form=self.form, ranges=self.ranges, bounds=self.bounds,
            box=self.box, captures=self.spec, tables=self.tables,
        )  # fmt: skip


def buffers(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Memory for all that a survey may write, filled with what it never writes."""
    lines, lead = case.lines, case.sizes[:2]
    blank = lambda *shape: torch.full(shape, -7, dtype=torch.int32, device=device)
    made: dict[str, Any] = {"hulls": blank(len(case.bounds), *lead, lines.rows, 2)}
    if case.form is not None:
        shape = (*lead, lines.q_len, min(len(case.form.pieces), 3))
        made |= {"starts": blank(*shape), "stops": blank(*shape)}
    if case.ranges:
        made["ranges"] = blank(*lead, lines.rows, 4)
    made["summaries"] = tuple(x for term in (*case.box.rows, *case.box.columns) for x in summary_memory(case, term, device))
    made["broken"] = torch.zeros(1 + len(case.tensors), dtype=torch.int32, device=device)
    return made


def summary_memory(case: Case, term: Expr, device: str) -> list[torch.Tensor]:
    batch, heads, q_len, kv_len = case.sizes
    is_row = any(term is x for x in case.box.rows)
    blocks = -(-q_len // case.blocks[0]) if is_row else -(-kv_len // case.blocks[1])
    shape = (batch if uses(term, B) else 1, heads if uses(term, H) else 1, blocks)
    dtype = torch.float32 if term.kind == FLOAT else torch.int64
    return [torch.full(shape, -7, dtype=dtype, device=device) for _ in range(2)]


def expected(case: Case) -> dict[str, Any]:
    """The same by torch, on the CPU."""
    batch, heads, q_len, kv_len = case.sizes
    lines, lead = case.lines, case.sizes[:2]
    given = {"q_len": q_len, "kv_len": kv_len, "batch": batch, "heads": heads}
    flags = [int(not ascending(t)) if i in case.tables else 0 for i, t in enumerate(case.tensors)]
    found: dict[str, Any] = {"hulls": torch.empty(len(case.bounds), *lead, lines.rows, 2, dtype=torch.int32)}
    broken = False
    if case.form is not None:
        broken = any(flags[t] for t in case.form.sorted_tables)
        try:
            solved = solve(case.form, case.tensors, case.scalars, **given)
            found |= {"starts": solved.starts.expand(*lead, -1, -1), "stops": solved.ends.expand(*lead, -1, -1)}
            if case.ranges:
                found["ranges"] = interval_ranges(solved, lines).expand(*lead, -1, -1)
        except NotInterval:
            broken = True
    for g, bound in enumerate(case.bounds):
        solved = [solve(replace(bound, pieces=(p,)), case.tensors, case.scalars, **given) for p in bound.pieces]
        starts, stops = ([getattr(s, name).expand(*lead, -1, -1) for s in solved] for name in ("starts", "ends"))
        found["hulls"][g] = hulls(torch.cat(starts, -1), torch.cat(stops, -1), lines)
    found["broken"] = torch.tensor([int(broken), *flags], dtype=torch.int32)
    terms = [(Q, q_len, case.blocks[0], x) for x in case.box.rows] + [(K, kv_len, case.blocks[1], x) for x in case.box.columns]
    found["summaries"] = tuple(x for term in terms for x in extremes(case, *term))
    return found


def hulls(starts: torch.Tensor, stops: torch.Tensor, lines: Grid) -> torch.Tensor:
    """First and last block that any row of a block row keeps something of, by looking at each block row."""
    found = []
    for i in range(lines.rows):
        rows = slice(i * lines.block_q, (i + 1) * lines.block_q)
        start, stop = starts[:, :, rows].flatten(2), stops[:, :, rows].flatten(2)
        last = (stop.amax(-1) + lines.block_kv - 1) // lines.block_kv
        first = start.masked_fill(start >= stop, 1 << 30).amin(-1) // lines.block_kv
        found.append(torch.stack([torch.minimum(first, last), last], -1))
    return torch.stack(found, 2) if found else starts.new_empty(*starts.shape[:2], 0, 2)


def extremes(case: Case, index: Expr, length: int, block: int, term: Expr) -> list[torch.Tensor]:
    batch, heads, q_len, kv_len = case.sizes
    indices = {"b": torch.arange(batch).view(-1, 1, 1), "h": torch.arange(heads).view(1, -1, 1), index.value: torch.arange(length)}
    value = torch.as_tensor(evaluate(term, Env({**indices, "q_len": q_len, "kv_len": kv_len}, case.tensors, case.scalars)))
    value = value.float() if term.kind == FLOAT else value.long()
    shape = (batch if uses(term, B) else 1, heads if uses(term, H) else 1, length)
    parts = value.expand(shape).split(block, -1) if length else ()
    # amin and amax give NaN where there is one
    return [torch.stack([getattr(p, how)(-1) for p in parts], -1) if parts else torch.empty(*shape[:2], 0) for how in ("amin", "amax")]


def run(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """What the kernel writes, back on the CPU."""
    from flexmask.runtime.launch import load as load_module

    source = case.source()
    path = folder / f"survey_{abs(hash(source))}.py"
    path.write_text(source)
    module = load_module(path)
    made = buffers(case, device)
    batch, heads, q_len, kv_len = case.sizes
    module.survey(module.pack([t.to(device) for t in case.tensors], case.scalars), q_len, kv_len, batch, heads, **made)
    return {name: tuple(x.cpu() for x in value) if isinstance(value, tuple) else value.cpu() for name, value in made.items()}


def check(case: Case, folder: Path, device: str = "cpu") -> None:
    found, wanted = run(case, folder, device), expected(case)
    broken = bool(wanted["broken"][0])
    for name, value in wanted.items():
        if name in ("starts", "stops", "ranges") and broken:
            continue  # nobody reads them
        if name == "hulls":  # those of tables that do not ascend are not read either
            trusted = [g for g, bound in enumerate(case.bounds) if not any(wanted["broken"][1 + t] for t in bound.sorted_tables)]
            found[name], value = found[name][trusted], value[trusted]
        for have, want in zip(found[name], value, strict=True) if name == "summaries" else [(found[name], value)]:
            torch.testing.assert_close(have, want.to(have.dtype), rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


# hand-made cases

s0, s1 = scalar(0, "int"), scalar(1, "int")
N = 75


def t(number: int, *indices: Expr, kind: str = "int") -> Expr:
    return load(number, kind, *indices)


def runs(axis: str, *pairs: tuple[Any, Any], tables: tuple[int, ...] = ()) -> Form:
    lift = lambda x: x if isinstance(x, Expr) else const(x)
    return Form(axis, tuple(Piece(lift(a), lift(z)) for a, z in pairs), None, tables)


def documents(*lead: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*lead, N, generator=generator) < 1 / 9).long().cumsum(-1).to(dtype)


def shuffled(*lead: int) -> torch.Tensor:
    return documents(*lead).flip(-1).contiguous()


CAUSAL = runs("row", (0, Q + const(1)))
CAUSAL_KEYS = runs("column", (K, 1 << 20))
DOCUMENT = runs("row", (search(0, "left", t(0, Q)), search(0, "right", t(0, Q))), tables=(0,))
BY_BATCH = runs("row", (search(0, "left", B, t(0, B, Q)), search(0, "right", B, t(0, B, Q))), tables=(0,))
FAR = const(2**40)
SCATTERED = [(Q * 3 % 50, Q * 3 % 50 + 9), (Q * 7 % 41, Q * 7 % 41 + Q % 5), (Q % 9 * 7, Q % 9 * 7 + 6), (40, Q % 8 + 40), (66, 70)]
MIXED_TERMS = Terms(
    rows=(t(0, Q), t(1, B, Q, kind="float"), make("lt", (t(0, Q), const(3))), Q * const(2**33), H - Q, const(7), s0 * Q),
    columns=(t(0, K) - K, t(1, B, K, kind="float") * const(0.5), t(2, H, kind="bool"), make("eq", (K % 3, const(0)))),
)
REALS = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
REALS[0, 20], REALS[1, 3], REALS[1, 70] = float("nan"), float("inf"), float("-inf")
MIXED_TENSORS = (shuffled(), REALS, torch.tensor([True, False, True]))


def narrow(dtype: torch.dtype) -> Case:
    return Case(DOCUMENT, tensors=(documents(dtype=dtype),), tables=(0,))


def order(*tables: torch.Tensor, **options: Any) -> Case:
    return Case(tensors=tables, tables=tuple(range(len(tables))), **options)


def dip(*shape: int, at: tuple[int, ...], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """An ascending table with one entry that is less than the one before it."""
    table = torch.arange(shape[-1]).expand(shape).clone()
    table[at] -= 2
    return table.to(dtype)


CASES: dict[str, Case] = {
    "causal": Case(CAUSAL, bounds=(CAUSAL,)),
    "causal, long": Case(CAUSAL, sizes=(1, 1, 700, 650), blocks=(128, 128)),
    "causal, keys": Case(CAUSAL_KEYS, bounds=(CAUSAL_KEYS,), axis="column"),
    "odd blocks": Case(CAUSAL, bounds=(CAUSAL,), blocks=(13, 7)),
    "odd blocks, keys": Case(CAUSAL_KEYS, bounds=(CAUSAL_KEYS,), axis="column", blocks=(13, 7)),
    "blocks of one": Case(CAUSAL, blocks=(1, 1), sizes=(1, 1, 9, 11)),
    "one block": Case(CAUSAL, blocks=(1024, 256)),
    "more queries than keys": Case(CAUSAL, sizes=(1, 1, 90, 20)),
    "one query, one key": Case(CAUSAL, sizes=(1, 1, 1, 1)),
    "no queries": Case(CAUSAL, bounds=(CAUSAL,), sizes=(1, 1, 0, 5)),
    "no keys": Case(CAUSAL, bounds=(CAUSAL,), sizes=(1, 1, 5, 0)),
    "bounds beyond 32 bits": Case(runs("row", (Q - FAR, Q + FAR)), bounds=(runs("row", (Q + FAR, Q + FAR * const(2))),)),
    "constant bounds": Case(runs("row", (5, 44)), bounds=(runs("row", (0, 0)), runs("row", (3, 1)))),
    "by batch and head": Case(runs("row", (B * const(9), Q + H * const(5))), sizes=(2, 3, 50, 70)),
    "by the lengths": Case(runs("row", (parse("q_idx - q_len + kv_len"), parse("kv_len - 2")))),
    "scalars": Case(runs("row", (Q - s0, Q + s1)), scalars=(2**20 - 3, 9)),
    "two runs": Case(runs("row", (0, 5), (Q - const(7), Q + const(1))), bounds=(runs("row", (0, 5), (Q, 60)), CAUSAL)),
    "three runs": Case(runs("row", *SCATTERED[:3])),
    "runs that touch": Case(runs("row", (20, 30), (10, 20), (30, 31))),
    "runs in runs": Case(runs("row", (0, 60), (3, 5), (50, 61))),
    "four runs, two after all": Case(runs("row", (Q, Q + const(4)), (Q + const(2), Q + const(6)), (40, 44), (44, 50))),
    "five runs, sometimes more than three": Case(runs("row", *SCATTERED)),
    "eight runs": Case(runs("row", *[(i * 5 % 7 * 3, Q % 2 + (i * 5 % 7 * 3 + 2)) for i in range(8)])),
    "eight empty runs": Case(runs("row", *[(Q, Q - const(i)) for i in range(8)])),
    "eight runs as a bound": Case(bounds=(runs("row", *SCATTERED, *SCATTERED[:3]), CAUSAL)),
    "documents": Case(DOCUMENT, bounds=(DOCUMENT,), tensors=(documents(),), tables=(0,)),
    "shuffled documents": Case(DOCUMENT, bounds=(CAUSAL, DOCUMENT), tensors=(shuffled(),), tables=(0,)),
    "shuffled documents, not looked at": Case(bounds=(CAUSAL,), tensors=(shuffled(),)),
    "documents of a wider table": Case(DOCUMENT, tensors=(documents(3)[1, 3:70],), tables=(0,), sizes=(1, 1, 50, 67)),
    "documents of a strided table": Case(DOCUMENT, tensors=(documents(3).repeat_interleave(2, -1)[2, ::2],), tables=(0,)),
    "documents by batch": Case(BY_BATCH, tensors=(documents(2),), tables=(0,), sizes=(2, 1, 50, 70)),
    "documents by batch, transposed": Case(BY_BATCH, tensors=(documents(2).T.contiguous().T,), tables=(0,), sizes=(2, 1, 50, 70)),
    **{f"documents as {d}": narrow(d) for d in (torch.int64, torch.int16, torch.int8, torch.uint8)},
    "one document": Case(DOCUMENT, tensors=(torch.zeros(N, dtype=torch.int64),), tables=(0,)),
    "documents of one place": Case(DOCUMENT, tensors=(torch.zeros(1, dtype=torch.int32),), tables=(0,), sizes=(1, 1, 1, 1)),
    "terms": Case(box=MIXED_TERMS, tensors=MIXED_TENSORS, scalars=(-3,), sizes=(2, 3, 50, 70)),
    "terms of odd blocks": Case(box=MIXED_TERMS, tensors=MIXED_TENSORS, scalars=(-3,), sizes=(2, 3, 50, 70), blocks=(11, 40)),
    "terms by columns": Case(box=MIXED_TERMS, tensors=MIXED_TENSORS, scalars=(-3,), sizes=(2, 3, 50, 70), axis="column"),
    "terms of keys only": Case(box=Terms(rows=(), columns=(K,)), sizes=(1, 1, 0, 70)),
    "all at once": Case(
        runs("column", (K, K + s0), (60, 70)), (CAUSAL_KEYS, runs("column", (0, t(0, K)), (K, K))), MIXED_TERMS, MIXED_TENSORS,
        (4,), (0, 1), "column", (2, 3, 50, 70),
    ),
    "order of many tables": order(
        torch.tensor(3), torch.empty(0), torch.zeros(1), torch.empty(4, 0), torch.empty(0, 4), documents(2, 3), shuffled(2, 3),
        dip(2, 3, 300, at=(1, 2, 299)), dip(3000, at=(1024,)), dip(3000, at=(1025,), dtype=torch.float64), documents(4).T,
        torch.tensor([0.0, float("nan"), 2.0]), torch.tensor([True, True, False]), torch.tensor([-(2**40), 0, 2**40]),
        torch.tensor([1, 200], dtype=torch.uint8), torch.tensor([1.0, 1.0 + 2**-40], dtype=torch.float64),
        torch.tensor([1.0 + 2**-40, 1.0], dtype=torch.float64), torch.tensor([0.5, 0.25], dtype=torch.bfloat16), dip(20, at=(10,))[::2],
    ),
    "order, by one program": order(dip(3000, at=(2999,)), dip(7, 1000, at=(6, 1)), sizes=(1, 1, 1, 1)),
    "order, without a block": order(dip(3000, at=(2999,)), sizes=(1, 1, 0, 1)),
    "order, by many programs": order(dip(3000, at=(2999,)), dip(7, 1000, at=(6, 1)), documents(), sizes=(2, 3, 50, 70)),
}  # fmt: skip


def attempt(case: Callable[[], Case], folder: Path) -> str:
    try:
        check(case(), folder)
    except Exception:
        return traceback.format_exc()[-1500:]
    return ""


# cases from masks


def case_of(predicate: Expr, tensors: Sequence[torch.Tensor], scalars: Sequence[int | float], axis: str, sizes: Any, blocks: Any) -> Case:
    """All that is ever asked of a mask at once: its form, its bounds, and the terms of its box test."""
    facts = derive(predicate, tuple((s > 0) - (s < 0) if isinstance(s, int) else 0 for s in scalars))
    form, bounds = (facts.rows, facts.row_bounds) if axis == "row" else (facts.columns, facts.column_bounds)
    form = form if isinstance(form, Form) else None
    box = box_test(predicate, len(tensors))
    lead = (sizes[0] if facts.uses_b else 1, sizes[1] if facts.uses_h else 1)
    tables = tuple(range(len(tensors)))
    return Case(form, bounds, Terms(box.rows, box.columns), tuple(tensors), tuple(scalars), tables, axis, (*lead, *sizes[2:]), blocks)


def zoo_cases() -> dict[str, Callable[[], Case]]:
    """Every mask of the zoo, rows and columns in turn."""
    import zoo

    sizes = (2, 2, 37, 45)
    turns = [("row", (32, 8)), ("column", (16, 24))] * len(zoo.MASKS)
    return {
        f"{name}, {axis}": lambda make_mask=make_mask, axis=axis, blocks=blocks: of_mask(make_mask(*sizes), axis, sizes, blocks)
        for (name, make_mask), (axis, blocks) in zip(zoo.MASKS.items(), turns, strict=False)
    }


def of_mask(mask: Any, axis: str, sizes: Any, blocks: Any) -> Case:
    traced = mask.traced()
    return case_of(simplify(traced.expr), traced.tensors, traced.scalars, axis, sizes, blocks)


def random_masks(folder: Path) -> str:
    """Masks as hypothesis draws them, both axes; the first failure."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from strategies import predicates

    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test(data: Any) -> None:
        predicate = data.draw(predicates())
        s = predicate.sizes
        blocks = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
        axis = data.draw(st.sampled_from(["row", "column"]))
        check(of_mask(predicate.mask(), axis, (s.B, s.H, s.Q, s.KV), blocks), folder)

    try:
        test()
    except Exception:
        return traceback.format_exc()[-3000:]
    return ""


def main() -> None:
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        found = {case: attempt(lambda case=case: CASES[case], folder) for case in CASES}
        found |= {f"zoo {case}": attempt(make_case, folder) for case, make_case in zoo_cases().items()}
        found["random masks"] = random_masks(folder)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent))
    main()
