"""Facts as text: for people, and for the disk."""

from __future__ import annotations

import json

import pytest
from analysis_cases import SCALARS, TENSORS, random_masks, read
from hypothesis import given, settings

from flexmask.analysis import Facts, derive


def test_facts_print_themselves():
    facts = derive(read("(kv_idx <= q_idx) & (t2[b, q_idx] == t2[b, kv_idx])"))
    assert str(facts).splitlines() == [
        "keep (kv_idx <= q_idx) & (t2[b, q_idx] == t2[b, kv_idx])",
        "kept keys of row q_idx: [left(t2, b, t2[b, q_idx]), q_idx + 1), given that t2 ascends (contiguous)",
        "kept queries of column kv_idx: [kv_idx, right(t2, b, t2[b, kv_idx])), given that t2 ascends (contiguous)",
        "depends on the batch entry",
    ]


def test_atoms_say_what_was_solved():
    facts = derive(read("(kv_idx <= q_idx) & (t0[kv_idx] < 3) & (kv_idx % 2 == 0) & (q_idx < s0)"))
    assert [str(a).splitlines() for a in facts.atoms] == [
        ["kv_idx <= q_idx", "  row     [0, q_idx + 1)", "  column  [kv_idx, q_len)"],
        ["t0[kv_idx] < 3", "  row     [0, right(t0, 2)), given that t0 ascends", "  column  all where t0[kv_idx] < 3"],
        [
            "kv_idx % 2 == 0",
            "  row     no interval form: kv_idx % 2 is periodic, so what it keeps is scattered (in `kv_idx % 2`)",
            "  column  all where kv_idx % 2 == 0",
        ],
        ["q_idx < s0", "  row     all where q_idx < s0", "  column  [0, s0)"],
    ]


@pytest.mark.parametrize("mask", ["True", "False", "t5[q_idx, kv_idx]", "(kv_idx <= q_idx) & t5[q_idx, kv_idx]", "t0[q_idx] == t0[kv_idx]"])
def test_json_there_and_back(mask):
    facts = derive(read(mask))
    back = Facts.from_json(json.loads(json.dumps(facts.to_json())), TENSORS, SCALARS)
    assert str(back) == str(facts) and back.to_json() == facts.to_json()
    assert (back.predicate, back.atoms) == (facts.predicate, facts.atoms)


@settings(max_examples=60)
@given(random_masks(scattered=0.2))
def test_json_of_random_masks(mask):
    facts = derive(read(mask))
    assert Facts.from_json(facts.to_json(), TENSORS, SCALARS).to_json() == facts.to_json()


def test_from_json_refuses_other_text():
    data = derive(read("kv_idx <= q_idx")).to_json()
    with pytest.raises(ValueError, match="unknown name"):
        Facts.from_json({**data, "predicate": "kv_idx <= other"}, TENSORS, SCALARS)
