"""Score mods for tiles that have keys down: what is computed ahead of the scores, and what for each pair."""

import ast

import pytest
import zoo

from flexmask.errors import BackendError
from flexmask.ir import parse, simplify
from flexmask.lowering import CaptureSpec, TensorSpec, crowds_registers, emit_column
from flexmask.runtime.recipes import captures_of
from flexmask.templates.assemble_hopper import in_gluon


def functions(text, *ranks):
    """The emitted functions by name, for tables of these ranks."""
    spec = CaptureSpec(tuple(TensorSpec(f"table_{i}", rank, "float32") for i, rank in enumerate(ranks)))
    emitted = emit_column("mod", simplify(parse(text, ["float"] * len(ranks))), spec)
    return dict(zip(("column", "row", "pair"), emitted.split("\n\n\n"), strict=True))


def results(function):
    """What a function returns, as text."""
    return function[function.index("return ") + len("return ") :]


@pytest.mark.parametrize(
    ("text", "ranks", "column", "row"),
    [
        ("score + t0[h] * (kv_idx - q_idx)", (1,), "(table_0_h,)", "()"),
        ("score + t0[b, h, kv_idx]", (3,), "(table_0_b_h_kv_idx,)", "()"),
        ("score * t0[h, q_idx]", (2,), "()", "(table_0_h_q_idx,)"),
        ("score + t0[q_idx] * t1[kv_idx]", (1, 1), "(table_1_kv_idx,)", "(table_0_q_idx,)"),
        ("score + (2 * q_idx + 1)", (), "()", "()"),
        ("score * log(float32(q_idx + 1))", (), "()", "(value,)"),
        ("3.0 * tanh(score / 3.0)", (), "()", "()"),
    ],
)
def test_what_does_not_need_the_score_is_computed_ahead(text, ranks, column, row):
    """But for sums and the like of queries, which cost less than to hand them on."""
    found = functions(text, *ranks)
    assert (results(found["column"]), results(found["row"])) == (column, row)


def test_score_and_derivative_share_what_they_can():
    pair = functions("3.0 * tanh(score / 3.0)")["pair"]
    assert pair.count("tanh(") == 2  # one in the docstring
    assert results(pair) == "(3.0 * value, 1.0 - (value * value))"


def test_a_derivative_that_is_1_costs_nothing():
    assert results(functions("score + t0[h, kv_idx]", 2)["pair"]) == "(score + table_0_h_kv_idx, tl.full((1, 1), 1.0, tl.float32))"


def test_names_from_both_sides_do_not_clash():
    pair = functions("score + exp(float32(q_idx)) + exp(float32(kv_idx))")["pair"]
    assert "(value,) = column" in pair and "(value_2,) = row" in pair


def test_bools_of_queries_are_handed_on_as_numbers():
    spec = CaptureSpec((TensorSpec("special", 1, "bool"),))
    text = emit_column("mod", simplify(parse("where(t0[q_idx], score, 2.0 * score)", ["bool"])), spec)
    assert "return (special_q_idx.to(tl.int32), " in text and "tl.where(special_q_idx != 0, " in text


def test_a_score_that_is_no_function_of_the_products():
    found = functions("t0[h, kv_idx]", 2)
    assert results(found["pair"]) == "(table_0_h_kv_idx, tl.full((1, 1), 0.0, tl.float32))"


def test_lengths_are_refused():
    with pytest.raises(BackendError, match="kv_len"):
        emit_column("mod", parse("score * kv_len"), CaptureSpec())


@pytest.mark.parametrize("name", zoo.SCORES)
def test_every_score_of_the_zoo_is_python_that_gluon_takes(name):
    score = zoo.SCORES[name](2, 4, 37, 53).traced()
    text = emit_column(score.name, simplify(score.expr), captures_of(score))
    ast.parse(in_gluon(text))


@pytest.mark.parametrize(
    ("text", "crowds"),
    [
        ("score + float32(q_idx - kv_idx)", False),
        ("where(kv_idx < q_idx, erf(score), exp(score))", False),
        ("score * score + pow(score, 3.0)", False),
        ("score + cos(float32(kv_idx)) + pow(float32(q_idx), 0.3)", False),
        ("sin(score)", True),
        ("score + cos(float32(q_idx - kv_idx))", True),
        ("pow(abs(score), 0.3)", True),
        ("score % 3.0", True),
        (" + ".join(f"tanh(score * {i}.5)" for i in range(20)), True),
    ],
)
def test_whether_pairs_need_more_registers_than_there_are(text, crowds):
    assert crowds_registers(simplify(parse(text))) == crowds
