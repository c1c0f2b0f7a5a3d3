"""Emitted device functions: their values (in Triton's interpreter, against `ir.evaluate`) and their text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emitted_cases import MASKS, SCORES, VALUES

from flexmask.errors import BackendError
from flexmask.ir import KV_LEN, Q_LEN, SCORE, B, K, Q, const, load, make, parse, scalar, search
from flexmask.lowering import CaptureSpec, TensorSpec, emit_function, emit_values

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def interpreted():
    """Every case run once, in a process where Triton interprets kernels."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / "emitted_cases.py"], capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [f"mask {m}" for m in MASKS] + [f"score {s}" for s in SCORES] + ["; ".join(v) for v in VALUES])
def test_emitted_functions_mean_what_evaluate_says(interpreted, case):
    assert interpreted[case] == "", interpreted[case]


DOC = CaptureSpec((TensorSpec("doc", 2, "int32"),), (("window", "int"),))


def test_what_depends_on_the_row_only_is_loaded_once_a_tile_row():
    same = make("eq", (load(0, "int", B, Q), load(0, "int", B, K)))
    text = emit_function("document", same & (scalar(0, "int") > Q - K), DOC, "mask")
    assert (
        text
        == '''\
@triton.jit
def mask_row(tables, numbers, b, h, q_idx):
    """What `document` needs of a query row."""
    doc = tables[0]
    doc_stride_0 = tables[1]
    doc_size_0 = number(numbers[0])
    doc_stride_1 = tables[2]
    doc_size_1 = number(numbers[1])
    doc_b_q_idx = tl.load(
        doc + b.to(tl.int64) * doc_stride_0 + q_idx.to(tl.int64) * doc_stride_1,
        mask=(b < doc_size_0) & (q_idx < doc_size_1),
        other=0,
    )
    return (doc_b_q_idx,)


@triton.jit
def mask_mod(tables, numbers, row, b, h, q_idx, kv_idx):
    """`document`: (doc[b, q_idx] == doc[b, kv_idx]) & (q_idx - kv_idx < window)"""
    (doc_b_q_idx,) = row
    doc = tables[0]
    doc_stride_0 = tables[1]
    doc_size_0 = number(numbers[0])
    doc_stride_1 = tables[2]
    doc_size_1 = number(numbers[1])
    window = number(numbers[2])
    doc_b_kv_idx = tl.load(
        doc + b.to(tl.int64) * doc_stride_0 + kv_idx.to(tl.int64) * doc_stride_1,
        mask=(b < doc_size_0) & (kv_idx < doc_size_1),
        other=0,
    )
    return (doc_b_q_idx == doc_b_kv_idx) & ((q_idx - kv_idx) < window)'''
    )


def last_line(text, tensors=(), scalars=()):
    spec = CaptureSpec(tuple(TensorSpec(f"t{i}", 1, d) for i, d in enumerate(tensors)), tuple((f"s{i}", k) for i, k in enumerate(scalars)))
    kinds = ["int" if "int" in d else "float" for d in tensors]
    return emit_function("f", parse(text, kinds, scalars), spec, "mask").rsplit("return ", 1)[1]


def test_integers_are_32_bits_wide_where_that_is_enough():
    assert last_line("q_idx - kv_idx < 5") == "(q_idx - kv_idx) < 5"
    assert last_line("kv_idx * 100 < 5") == "(kv_idx * 100) < 5"
    assert last_line("kv_idx * 1000 < 5") == "(kv_idx.to(tl.int64) * 1000) < 5"
    assert last_line("kv_idx + s0 < 5", scalars=["int"]) == "(kv_idx.to(tl.int64) + s0) < 5"


def test_floor_division_needs_help_for_negative_numbers_only():
    assert last_line("kv_idx // 4 == kv_idx % 3") == "(kv_idx // 4) == (kv_idx % 3)"
    assert last_line("(kv_idx - 9) // 4 == (kv_idx - 9) % 3").count("floor_") == 2


def test_only_indices_that_may_be_negative_are_wrapped():
    doc = CaptureSpec((TensorSpec("doc", 1, "int32"),))
    assert "tl.where" not in emit_function("f", load(0, "int", K) < K, doc, "mask")
    assert "tl.where(place < 0, place + doc_size_0, place)" in emit_function("f", load(0, "int", K - Q) < K, doc, "mask")


@pytest.mark.parametrize("name", ['x"""\nimport os', "x; y", "doc[0]", "tl", "import", "", "дом", "a" * 99, "q_idx", "__import__('os')"])
def test_a_name_never_becomes_code(name):
    spec = CaptureSpec((TensorSpec(name, 1, "int32"),), ((name, "int"),))
    assert spec.identifiers["t0"] == "t0"
    assert spec.identifiers["s0"] == "s0"
    text = emit_function(name, (load(0, "int", K) < scalar(0, "int")), spec, "mask")
    names = {n.id for n in __import__("ast").walk(__import__("ast").parse(text)) if n.__class__.__name__ == "Name"}
    assert names <= {"tl", "triton", "tables", "numbers", "number", "row", "b", "h", "q_idx", "kv_idx", "t0", "s0", "t0_value", "t0_kv_idx",
                     "t0_stride_0", "t0_size_0"}  # fmt: skip


def test_names_that_collide_are_numbered():
    spec = CaptureSpec((TensorSpec("doc", 1, "int32"), TensorSpec("doc", 1, "int32")), (("doc_stride_0", "int"),))
    names = list(spec.identifiers.values())
    assert len(set(names)) == len(names)
    assert names[:3] == ["doc", "doc_2", "doc_stride_0"]


@pytest.mark.parametrize("expr", [K < KV_LEN, Q < Q_LEN, SCORE < const(0.0)])
def test_only_indices_that_a_function_is_given_can_be_used(expr):
    with pytest.raises(BackendError, match="is not given"):
        emit_function("f", expr, CaptureSpec(), "mask")
    with pytest.raises(BackendError, match="is not given"):
        emit_values("f", "b, h", [expr], CaptureSpec(), "One.")


def test_values_of_one_function_share_what_they_compute():
    begin, end = search(0, "left", B, load(0, "int", B, Q)), search(0, "right", B, load(0, "int", B, Q))
    text = emit_values(
        "bounds", "b, h, q_idx, q_len, kv_len", [begin, make("min", (Q + 1, end)), begin, KV_LEN], DOC, "Kept keys of a query."
    )
    assert (
        text
        == '''\
@triton.jit
def bounds(tables, numbers, b, h, q_idx, q_len, kv_len):
    """Kept keys of a query."""
    doc = tables[0]
    doc_stride_0 = tables[1]
    doc_size_0 = number(numbers[0])
    doc_stride_1 = tables[2]
    doc_size_1 = number(numbers[1])
    doc_b_q_idx = tl.load(
        doc + b.to(tl.int64) * doc_stride_0 + q_idx.to(tl.int64) * doc_stride_1,
        mask=(b < doc_size_0) & (q_idx < doc_size_1),
        other=0,
    )
    place = count_below(
        doc + b.to(tl.int64) * doc_stride_0,
        doc_stride_1,
        doc_size_1,
        doc_b_q_idx,
        (b < doc_size_0),
        False,
        tl.int32,
    )
    place_2 = count_below(
        doc + b.to(tl.int64) * doc_stride_0,
        doc_stride_1,
        doc_size_1,
        doc_b_q_idx,
        (b < doc_size_0),
        True,
        tl.int32,
    )
    return (place, tl.minimum(q_idx + 1, place_2), place, kv_len)'''
    )


def test_a_function_may_have_no_value_or_many():
    assert emit_values("f", "b", [], CaptureSpec(), "None.").endswith("    return ()")
    assert emit_values("f", "b", [B], CaptureSpec(), "One.").endswith("    return (b,)")
    many = emit_values("f", "b", [B + i for i in range(1, 20)], CaptureSpec(), "Many.")
    assert "    return (\n        b + 1,\n        b + 2,\n" in many


def test_captures_are_described_from_tensors():
    spec = CaptureSpec.of([torch.zeros(2, 3, dtype=torch.bool)], ["pad"], [1, 0.5], ["n", "slope"])
    assert spec == CaptureSpec((TensorSpec("pad", 2, "bool"),), (("n", "int"), ("slope", "float")))
    assert spec.tensors[0].kind == "bool"


def test_shared_expressions_are_written_once():
    e = Q - K
    for _ in range(30):
        e = make("max", (e, e - const(1)))
    text = emit_function("f", e < 3, CaptureSpec(), "mask")
    assert len(text) < 5000
