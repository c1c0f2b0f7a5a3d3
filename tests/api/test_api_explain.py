"""explain() as a report: forms with the user's names, why where there is none, what was proved; and advice."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from hypothesis import given, settings
from strategies import predicates
from zoo import MASKS

import flexmask
from flexmask import masks
from flexmask.ir import Env, evaluate, show, walk
from flexmask.runtime.store import default_store

doc = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2], dtype=torch.int32)


def report(mask, *lengths, **extent) -> list[str]:
    """The report's lines, without the spaces that align them."""
    return [" ".join(line.split()) for line in mask.explain(*lengths, **extent).splitlines()]


def notes(mask, *lengths, **extent) -> list[str]:
    return [line.removeprefix("note ") for line in report(mask, *lengths, **extent) if line.startswith("note ")]


def line_of(text: str) -> str:
    """`file:line` of the one line of this file on which `text` stands, as a report names it."""
    source = inspect.getsource(inspect.getmodule(line_of)).splitlines()
    (number,) = [i for i, line in enumerate(source, 1) if text in line and "line_of(" not in line]
    return f"{os.path.relpath(__file__)}:{number}"


def document(ids, window):
    @flexmask.mask
    def recent(b, h, q_idx, kv_idx):
        near = q_idx - kv_idx < window
        return (q_idx >= kv_idx) & near & (ids[q_idx] == ids[kv_idx])

    return recent


def test_the_forms_are_formulas_with_the_users_names():
    lines = report(document(doc, 3))
    where = lines.index("kept keys of row q_idx: [max(q_idx - window + 1, left(ids, ids[q_idx])), q_idx + 1)")
    assert lines[where + 1 : where + 3] == [
        "exact if ids ascends",
        "else bounds only: all of them in [q_idx - window + 1, q_idx + 1); the mask is evaluated",
    ]
    assert "where left(t, x) and right(t, x) count the entries of t that are < x and <= x" in lines


def test_each_condition_is_shown_with_its_line_and_both_solutions():
    lines = report(document(doc, 3))
    where = lines.index(f"condition q_idx - kv_idx < window ({line_of('near = q_idx - kv_idx < window')})")
    assert lines[where + 1 : where + 3] == ["along a row [q_idx - window + 1, kv_len)", "down a column [0, kv_idx + window)"]


def test_a_promise_makes_it_exact():
    lines = report(document(flexmask.sorted(doc), 3))
    assert lines.count("exact if ids ascends (promised)") == 2 and not any("flexmask.sorted" in line for line in lines)
    assert "captures ids: int32[8] on cpu, promised to ascend" in lines


def test_without_tables_it_is_exact():
    assert report(masks.causal).count("exact") == 2


def scattered(q_idx, kv_idx):
    even = kv_idx % 2
    near = q_idx - kv_idx < 9
    return near & (even == 0)


def test_a_residue_is_named_with_its_line():
    lines = report(flexmask.mask(scattered))
    assert "kept keys of row q_idx: [q_idx - 8, kv_len)" in lines
    assert f"bounds only: `kv_idx % 2 == 0` is evaluated ({line_of('near & (even == 0)')})" in lines


def test_a_dont_know_gives_the_reason_and_the_line_of_the_culprit():
    lines = report(flexmask.mask(scattered))
    where = lines.index(f"condition kv_idx % 2 == 0 ({line_of('near & (even == 0)')})")
    reason = "no interval form: kv_idx % 2 is periodic, so what it keeps is scattered"
    assert lines[where + 1] == f"along a row {reason} ({line_of('even = kv_idx % 2')})"


def test_a_mask_without_a_form_gives_them_too():
    def either(q_idx, kv_idx):
        odd = kv_idx % 5
        return (odd == 1) | (q_idx % 3 == 0)

    reason = "no interval form: kv_idx % 5 is periodic, so what it keeps is scattered"
    assert f"kept keys of row q_idx: {reason} ({line_of('odd = kv_idx % 5')})" in report(flexmask.mask(either))


def test_where_no_part_is_exact_there_are_still_bounds():
    lines = report(flexmask.mask(lambda q_idx, kv_idx: scattered(q_idx, kv_idx) | (kv_idx == q_idx)))
    where = lines.index("kept keys of row q_idx: [q_idx - 8, kv_len)")
    assert lines[where + 1] == "bounds only: the mask is evaluated"


def test_a_table_to_blame_has_the_users_name():
    marks = torch.ones(8, 8, dtype=torch.bool)
    lines = report(flexmask.mask(lambda q_idx, kv_idx: marks[q_idx, kv_idx]))
    assert any(line.startswith("kept keys of row q_idx: no interval form: marks[q_idx, kv_idx] decides each") for line in lines)


def test_a_simplified_condition_is_found_where_it_was_written():
    negated = flexmask.mask(lambda q_idx, kv_idx: ~(q_idx < kv_idx))  # negated in place
    assert f"condition kv_idx <= q_idx ({line_of('# negated in place')})" in report(negated)
    ahead = flexmask.mask(lambda q_idx, kv_idx: q_idx < kv_idx)  # negated as a mask
    assert f"condition kv_idx <= q_idx ({line_of('# negated as a mask')})" in report(~ahead)


def test_proofs():
    lines = report(masks.causal)
    assert "contiguous what a block of rows keeps is one run of keys: proved" in lines
    assert "never empty rows: proved; columns: proved if kv_len <= q_len" in lines
    assert "depends on neither batch, head nor lengths" in lines
    per_both = flexmask.mask(lambda b, h, q_idx, kv_idx: kv_idx + b < q_idx + h)
    assert "depends on batch and head" in report(per_both)


def test_labels_are_aligned():
    for line in masks.sink_window(4, 9).explain(64, 64, block_size=16).splitlines():
        if not line.startswith(("mask", "map", "  kept")):
            assert line[:18].strip() == line[:18].strip(" ") and line[17] == " " and line[18] != " "


def test_rows_of_too_many_runs():
    many = flexmask.mask(lambda q_idx, kv_idx: (kv_idx == 0) | (kv_idx == q_idx + 8) | (kv_idx == q_idx + 16) | (kv_idx == 2 * q_idx + 64))
    lines = report(many)
    where = lines.index(
        "kept keys of row q_idx: [0, 1) and [q_idx + 8, q_idx + 9) and [q_idx + 16, q_idx + 17) and [2 * q_idx + 64, 2 * q_idx + 65)"
    )
    assert lines[where + 1] == "exact if no row keeps more than 3 runs"


# advice


def test_wide_tables():
    assert notes(masks.document(flexmask.sorted(doc.long()))) == [
        "`doc` is int64: as int32 it is half to read. Write `doc = doc.to(torch.int32)`."
    ]
    assert notes(masks.document(flexmask.sorted(doc))) == []


def test_an_equality_of_ids_names_the_promise_to_make():
    (note,) = notes(masks.document(doc))
    assert note.startswith("`doc[q_idx] == doc[kv_idx]` is a range only where `doc` ascends")
    assert note.endswith("promise it: `doc = flexmask.sorted(doc)`.")


def test_two_tables_need_two_promises():
    rows, columns = doc, doc.clone()
    found = notes(flexmask.mask(lambda q_idx, kv_idx: rows[q_idx] == columns[kv_idx]))
    assert [any(f"`{name} = flexmask.sorted({name})`" in note for note in found) for name in ("rows", "columns")] == [True, True]


def test_a_promise_beside_what_has_no_interval_form_is_worth_making_too():
    (note,) = notes(flexmask.mask(lambda q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (kv_idx % 2 == 0)))
    assert "flexmask.sorted(doc)" in note


# fmt: off
SETTLED = {
    "from the start": (lambda q_idx, kv_idx: (q_idx >= kv_idx) & (kv_idx >= 0), ["`0 <= kv_idx` is always true"]),
    "never": (lambda q_idx, kv_idx: (q_idx >= kv_idx) | (kv_idx < 0), ["`kv_idx < 0` is always false"]),
    "a remainder": (lambda q_idx, kv_idx: (kv_idx % 4 < 4) & (kv_idx <= q_idx), ["`kv_idx % 4 < 4` is always true"]),
    "itself": (lambda q_idx, kv_idx: (q_idx == q_idx) & (kv_idx <= q_idx), ["`q_idx == q_idx` is always true"]),
    "contradiction": (lambda q_idx, kv_idx: (q_idx > kv_idx) & (q_idx < kv_idx), ["the mask keeps nothing at all."]),
    "nothing to say": (lambda q_idx, kv_idx: (q_idx > kv_idx) | (q_idx % 2 == 0), []),
}
# fmt: on


@pytest.mark.parametrize("name", SETTLED)
def test_conditions_that_are_settled(name):
    mod, expected = SETTLED[name]
    found = notes(flexmask.mask(mod))
    assert len(found) == len(expected) and all(note.startswith(start) for note, start in zip(found, expected, strict=True))
    assert all("test_api_explain.py:" in note or "at all" in note for note in found)


@pytest.mark.parametrize("ids", [doc, flexmask.sorted(doc), doc.flip(0), doc.roll(3)], ids=["plain", "promised", "descending", "rotated"])
def test_rows_that_keep_nothing(ids):
    strict = flexmask.mask(lambda q_idx, kv_idx: (q_idx > kv_idx) & (ids[q_idx] == ids[kv_idx]))
    empty = (~strict.to_dense(8, 8).any(-1)).flatten().nonzero().flatten().tolist()
    expected = f"{len(empty)} of 8 rows keep nothing, so their output is 0: q_idx = {', '.join(map(str, empty[:5]))}"
    assert expected in notes(strict, 8, 8)


def test_rows_that_keep_nothing_by_batch_entry_and_head():
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    found = notes(masks.padding(lengths), 7, 7, batch=2, heads=2)
    assert found == [
        "7 of 14 rows keep nothing, so their output is 0: (b, h, q_idx) = (1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 0, 3), (1, 0, 4), ..."
    ]


def test_a_table_that_does_not_ascend_now():
    assert any("`doc` does not ascend now, so its conditions are evaluated" in n for n in notes(masks.document(doc.flip(0)), 8, 8))
    assert not any("does not ascend" in n for n in notes(masks.document(doc), 8, 8))


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_of_the_zoo_explains_itself_and_counts_its_empty_rows(name):
    mask = MASKS[name](2, 2, 37, 29)
    text = mask.explain(37, 29, batch=2, heads=2, block_size=16)
    facts = default_store().facts(mask.traced())[1]
    dense = mask.to_dense(37, 29, 2 if facts.uses_b else 1, 2 if facts.uses_h else 1)
    empty, rows = int((~dense.any(-1)).sum()), dense.shape[0] * dense.shape[1] * 37
    assert (f"{empty} of {rows} rows keep nothing" in text) == (empty > 0)
    assert not any(f"{c}{n}" in text.replace("float32", "").split() for c in "ts" for n in range(3)), "captures have the user's names"


@settings(max_examples=30)
@given(predicates())
def test_advice_on_random_masks_is_true(predicate):
    """What is called always true (false) is, and the rows that keep nothing are counted right."""
    mask, s = predicate.mask(), predicate.sizes
    traced = mask.traced()
    text = mask.explain(s.Q, s.KV, batch=s.B, heads=s.H, block_size=16)
    grid = torch.meshgrid(*map(torch.arange, (s.B, s.H, s.Q, s.KV)), indexing="ij")
    env = Env(dict(zip(("b", "h", "q_idx", "kv_idx"), grid, strict=True)), traced.tensors, traced.scalars)
    for node in walk(traced.expr):
        for word, value in (("true", True), ("false", False)):
            if f"`{show(node, traced.names())}` is always {word}" in text:
                assert bool((torch.as_tensor(evaluate(node, env)) == value).all())
    facts = default_store().facts(traced)[1]
    dense = mask.to_dense(s.Q, s.KV, s.B if facts.uses_b else 1, s.H if facts.uses_h else 1)
    empty = int((~dense.any(-1)).sum())
    assert (f"{empty} of {dense[..., 0].numel()} rows keep nothing" in text) == (empty > 0)
