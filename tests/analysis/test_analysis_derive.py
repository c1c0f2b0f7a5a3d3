"""Row and column forms: what they read like, and that they keep exactly what the mask keeps."""

from __future__ import annotations

import pytest
import torch
from analysis_cases import Instance, check_forms, instances, random_masks, read
from drawing import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmask.analysis import Form, NotInterval, derive
from flexmask.errors import NotInterval as FromErrors
from flexmask.ir import FALSE, TRUE, K, Q

CAUSAL = "kv_idx <= q_idx"
LENGTHS = [(1, 1), (13, 13), (17, 9), (5, 20)]

# mask: (kept keys of a row, kept queries of a column), proved contiguous or not (*)
FORMS = {
    "True": ("[0, kv_len) *", "[0, q_len) *"),
    "False": ("[0, 0) *", "[0, 0) *"),
    CAUSAL: ("[0, q_idx + 1) *", "[kv_idx, q_len) *"),
    "q_idx > kv_idx + 2": ("[0, q_idx - 2) *", "[kv_idx + 3, q_len) *"),
    "q_idx + s1 >= kv_idx": ("[0, q_idx + s1 + 1) *", "[kv_idx - s1, q_len) *"),
    f"({CAUSAL}) & (q_idx - kv_idx < s0)": ("[q_idx - s0 + 1, q_idx + 1) *", "[kv_idx, kv_idx + s0) *"),
    "abs(q_idx - kv_idx) <= 3": ("[q_idx - 3, q_idx + 4) *", "[kv_idx - 3, kv_idx + 4) *"),
    "abs(q_idx - kv_idx) > 3": ("[0, q_idx - 3) | [q_idx + 4, kv_len)", "[0, kv_idx - 3) | [kv_idx + 4, q_len)"),
    "kv_idx != q_idx": ("[0, q_idx) | [q_idx + 1, kv_len)", "[0, kv_idx) | [kv_idx + 1, q_len)"),
    "kv_idx == q_idx": ("[q_idx, q_idx + 1) *", "[kv_idx, kv_idx + 1) *"),
    f"({CAUSAL}) & ((q_idx - kv_idx < s0) | (kv_idx < 4))": (
        "[0, min(q_idx + 1, 4)) | [q_idx - s0 + 1, q_idx + 1)",
        "[kv_idx, max(kv_idx + s0, where(kv_idx < 4, q_len, 0))) *",
    ),
    f"({CAUSAL}) | (kv_idx < s2)": ("[0, max(q_idx + 1, s2)) *", "[min(kv_idx, where(kv_idx < s2, 0, q_len)), q_len) *"),
    "kv_idx < t4[q_idx]": ("[0, t4[q_idx]) *", None),
    f"({CAUSAL}) & (kv_idx >= t4[q_idx])": ("[t4[q_idx], q_idx + 1)", None),
    "2 * kv_idx <= q_idx": ("[0, q_idx // 2 + 1) *", "[2 * kv_idx, q_len) *"),
    "3 * kv_idx >= q_idx - s1": ("[(q_idx - s1 + 2) // 3, kv_len) *", "[0, 3 * kv_idx + s1 + 1) *"),
    "q_idx // 4 == kv_idx // 4": ("[4 * (q_idx // 4), 4 * (q_idx // 4) + 4) *", "[4 * (kv_idx // 4), 4 * (kv_idx // 4) + 4) *"),
    "(q_idx + s0) // 8 >= kv_idx // 8": ("[0, 8 * ((q_idx + s0) // 8) + 8) *", "[8 * (kv_idx // 8) - s0, q_len) *"),
    "t0[q_idx] == t0[kv_idx]": (
        "[left(t0, t0[q_idx]), right(t0, t0[q_idx])) *",
        "[left(t0, t0[kv_idx]), right(t0, t0[kv_idx])) *",
    ),
    f"({CAUSAL}) & (t2[b, q_idx] == t2[b, kv_idx])": (
        "[left(t2, b, t2[b, q_idx]), q_idx + 1) *",
        "[kv_idx, right(t2, b, t2[b, kv_idx])) *",
    ),
    "t0[kv_idx] < 2": ("[0, right(t0, 1)) *", "[0, where(t0[kv_idx] < 2, q_len, 0)) *"),
    "t3[b, kv_idx]": (None, "[0, where(t3[b, kv_idx], q_len, 0)) *"),
    "where(q_idx < 5, kv_idx < 3, kv_idx >= 6)": (
        "[where(q_idx < 5, 0, 6), where(q_idx < 5, 3, kv_len))",
        None,
    ),
    f"({CAUSAL}) ^ (kv_idx < 3)": (
        "[min(q_idx + 1, 3), max(q_idx + 1, 3)) *",
        "[where(3 <= kv_idx, kv_idx, 0), where(3 <= kv_idx, q_len, kv_idx))",
    ),
}  # fmt: skip


def text(form: Form | NotInterval, contiguous: bool) -> str | None:
    if isinstance(form, NotInterval):
        return None
    return " | ".join(map(str, form.pieces)) + " *" * contiguous


@pytest.mark.parametrize("mask", FORMS)
def test_a_form_reads_as_one_would_write_it(mask):
    facts = derive(read(mask), signs=(1,))
    rows, columns = FORMS[mask]
    assert text(facts.rows, facts.rows_contiguous) == rows
    if columns is not None:
        assert text(facts.columns, facts.columns_contiguous) == columns


# more masks, for brute force; `-` where no form exists along the rows (columns), `r` where a residue stays
BRUTE = {
    "q_idx + kv_idx < 12": "..", "3 * q_idx < 2 * kv_idx + s1": "..", "-2 * q_idx <= 3 * kv_idx - s2": "..", "2 * kv_idx == q_idx": "..",
    "2 * q_idx != 3 * kv_idx": "..", "kv_idx < kv_len - q_len + q_idx + 1": "..", "q_idx + t6[h] >= kv_idx": "..",
    "kv_idx < t1[q_idx]": "..", "q_idx < t4[kv_idx]": "..", "(kv_idx <= q_idx) & (q_idx < t4[kv_idx])": "..", "kv_idx // 3 < s1": "..",
    "(q_idx - kv_idx) // 4 == 0": "..", "(kv_idx - q_idx) // -3 >= 1": "..", "q_idx // -2 == kv_idx // -2": "..",
    "q_idx // s0 == kv_idx // s0": "..", "(q_idx + 3) // 5 >= kv_idx // 5": "..", "kv_idx // 2 <= q_idx // 3": "..",
    "kv_idx >> 2 == q_idx >> 2": "..", "kv_idx - kv_idx % 4 <= q_idx": "..", "kv_idx + t4[kv_idx] <= q_idx": "-.",
    "kv_idx % 4 == 0": "-.", "(q_idx - kv_idx) % 3 == 1": "--", "kv_idx < q_idx % 5": ".r", "(kv_idx <= q_idx) & (kv_idx % 2 == 0)": "r.",
    "t5[q_idx, kv_idx]": "--", "(kv_idx <= q_idx) & t5[q_idx, kv_idx]": "rr", "t1[q_idx] == t1[kv_idx]": "..",
    "t2[b, q_idx] >= t0[kv_idx]": "..", "2 * t0[kv_idx] + 1 < q_idx": "..", "t0[q_idx] != t0[kv_idx]": "..", "t2[b, kv_idx] == 1": "..",
    "t3[b, q_idx] & t3[b, kv_idx]": "rr", "t3[b, q_idx] | (kv_idx <= q_idx)": ".-", "t7[q_idx] < 0.3": ".-",
    "(t7[q_idx] < 0.3) == (kv_idx < 4)": ".-", "max(q_idx, kv_idx) < 7": "..", "min(q_idx, kv_idx) < 3": "..",
    "max(q_idx - 3, 2) <= kv_idx + 1": "..", "min(max(kv_idx - q_idx, -2), 2) == 0": "..", "abs(2 * q_idx - 3 * kv_idx) <= 5": "..",
    "abs(abs(q_idx - kv_idx) - 4) <= 1": "..", "where(kv_idx < 4, q_idx, kv_idx) <= q_idx": "..",
    "q_idx - where(t3[b, q_idx], 2, 5) < kv_idx": "..", "(kv_idx <= q_idx) ^ (t0[q_idx] == t0[kv_idx])": "..",
    "bool(q_idx - kv_idx)": "..", "~((q_idx < 5) | ~(kv_idx > 2))": "..",
    "(q_idx >= kv_idx) & ((q_idx // 4 == kv_idx // 4) | (q_idx >= q_len - 3))": "..",
    "~((q_idx >= 3) & (q_idx < 6) & (kv_idx < 3)) & (kv_idx <= q_idx)": "..", "(kv_idx * s0 <= q_idx) & (kv_idx * s4 >= -9)": "..",
    "(kv_idx < s3) | (q_idx >= s3 + 4)": "..",
}  # fmt: skip


@pytest.mark.parametrize("mask", [*FORMS, *BRUTE])
def test_forms_keep_what_the_mask_keeps(mask):
    for seed, (q_len, kv_len) in enumerate(LENGTHS):
        for all_ascend in (True, False):
            instance = Instance(q_len, kv_len, seed, all_ascend)
            for signs in ((), instance.signs):
                check_forms(derive(read(mask), signs), instance)


@pytest.mark.parametrize(("mask", "marks"), BRUTE.items())
def test_every_interval_is_found(mask, marks):
    facts = derive(read(mask), Instance(5, 5).signs)
    for form, mark in zip((facts.rows, facts.columns), marks, strict=True):
        assert isinstance(form, NotInterval) == (mark == "-"), str(form)
        assert isinstance(form, NotInterval) or (form.residue is not None) == (mark == "r"), str(form)


@settings(max_examples=250)
@given(random_masks(), instances, st.booleans())
def test_random_masks_of_solvable_atoms(mask, instance, signed):
    check_forms(derive(read(mask), instance.signs if signed else ()), instance)


@settings(max_examples=250)
@given(random_masks(scattered=0.3), instances, st.booleans())
def test_random_masks_with_scattered_atoms(mask, instance, signed):
    check_forms(derive(read(mask), instance.signs if signed else ()), instance)


def test_a_form_drawn():
    """Causal, a window of 3 and documents 0 0 0 1 1 2: the interval of each row."""
    facts = derive(read("(kv_idx <= q_idx) & (q_idx - kv_idx < 3) & (t0[q_idx] == t0[kv_idx])"))
    instance = Instance(6, 6)
    instance.tensors[0] = torch.tensor([0, 0, 0, 1, 1, 2])
    assert isinstance(facts.rows, Form) and isinstance(facts.columns, Form)
    drawn = draw(instance.kept_by(facts.rows)[0, 0])
    assert drawn == draw(instance.kept_by(facts.columns)[0, 0])
    assert drawn == "#.....\n##....\n###...\n...#..\n...##.\n.....#"


def test_a_conjunct_without_a_form_leaves_the_bounds_of_the_others():
    rows = derive(read("(kv_idx <= q_idx) & t5[q_idx, kv_idx] & (q_idx - kv_idx < 9) & (kv_idx % 2 == 0)")).rows
    assert str(rows) == "kept keys of row q_idx: [q_idx - 8, q_idx + 1) where t5[q_idx, kv_idx] & (kv_idx % 2 == 0)"


def test_tables_known_not_to_ascend_become_residue():
    mask = read("(kv_idx <= q_idx) & (t0[q_idx] == t0[kv_idx])")
    assert derive(mask).rows.sorted_tables == (0,)
    rows = derive(mask, unsorted=[0]).rows
    assert (rows.sorted_tables, str(rows)) == ((), "kept keys of row q_idx: [0, q_idx + 1) where t0[q_idx] == t0[kv_idx]")


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ("(q_idx - kv_idx) % 3 == 0", "(q_idx - kv_idx) % 3 is periodic, so what it keeps is scattered"),
        ("t3[b, kv_idx] | (kv_idx < 4)", "t3[b, kv_idx] decides each kv_idx apart"),
        ("t5[q_idx, kv_idx]", "t5[q_idx, kv_idx] decides each (q_idx, kv_idx) apart"),
        ("t7[kv_idx] < 0.5", "t7[kv_idx] < 0.5 compares floating-point numbers"),
        ("q_idx * kv_idx < 5", "the sign of q_idx is not known"),
        ("s1 * kv_idx < q_idx", "the sign of s1 is not known"),
    ],
)
def test_a_refusal_names_its_reason(mask, reason):
    form = derive(read(mask)).rows
    assert isinstance(form, FromErrors)
    assert form.reason == reason and form.culprit


def test_signs_of_scalars_are_used():
    """A window of known positive size keeps the diagonal; one that may be empty is contiguous all the same."""
    mask = read("(kv_idx <= q_idx) & (q_idx - kv_idx < s0) & (t0[q_idx] == t0[kv_idx])")
    assert derive(mask, signs=(1,)).rows_contiguous
    assert not derive(mask).rows_contiguous
    assert str(derive(mask, signs=(-1,)).rows.pieces[0]) == "[0, 0)"


def test_constants():
    assert derive(TRUE).rows_contiguous and derive(FALSE).columns_contiguous
    assert derive(TRUE).atoms == ()
    with pytest.raises(ValueError, match=r"predicate is bool, got int: q_idx \+ kv_idx"):
        derive(Q + K)


def test_which_indices_matter():
    facts = derive(read("(t2[b, q_idx] == t2[b, kv_idx]) & (kv_idx <= q_idx)"))
    assert (facts.uses_b, facts.uses_h) == (True, False)
    assert derive(read("q_idx + t6[h] >= kv_idx")).uses_h
