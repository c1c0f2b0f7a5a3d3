"""Emitted gradient functions: their values (in Triton's interpreter, against autograd), their text, and that they compile."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zoo
from gradient_cases import FIXED, SCORES
from gradient_compiled import CASES

from flexmask.errors import BackendError
from flexmask.ir import FLOAT, KV_LEN, Q_LEN, SCORE, B, H, K, Q, load, make, parse, simplify
from flexmask.lowering import CaptureSpec, TensorSpec, emit_function, emit_gradient, gradient_tables, most_additions

HERE = Path(__file__).parent
TESTS = HERE.parent


def run(script: str, **env: str) -> dict[str, str]:
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    given["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / script], capture_output=True, text=True, env=given, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def interpreted():
    """Every case run once, in a process where Triton interprets kernels."""
    return run("gradient_cases.py", TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", [*SCORES, *(f"fixed {text}" for text in FIXED), *(f"zoo {name}" for name in zoo.SCORES)])
def test_gradients_are_those_of_autograd(interpreted, case):
    assert interpreted[case] == "", interpreted[case]


@pytest.fixture(scope="session")
def compiled():
    return run("gradient_compiled.py")


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_compiles_for_hopper(compiled, case):
    additions = re.findall(r"\b(?:red|atom)\.global.*", compiled[case])
    assert bool(additions) == ("[" in case)
    assert all(".relaxed." in line for line in additions)


# text


def read(text: str, *dtypes: str):
    spec = CaptureSpec(tuple(TensorSpec(f"t{i}", text.split(f"t{i}[")[1].split("]")[0].count(",") + 1, d) for i, d in enumerate(dtypes)))
    return simplify(parse(text, [t.kind for t in spec.tensors])), spec


def scatter(text: str, *dtypes: str) -> str:
    return emit_gradient(*read(text, *dtypes)).split("def score_scatter")[1]


def test_the_text_of_a_learned_bias():
    bias = CaptureSpec((TensorSpec("bias", 2, "float16"),))
    text = emit_gradient(make("mul", (SCORE, load(0, FLOAT, H, Q))), bias)
    assert (
        text
        == '''\
@triton.jit
def score_slope(tables, numbers, row, score, b, h, q_idx, kv_idx):
    """How the changed score grows with the score, float32."""
    (bias_h_q_idx,) = row
    return bias_h_q_idx


@triton.jit
def score_scatter(grads, tables, numbers, row, score, b, h, q_idx, kv_idx, ds, valid):
    """Adds to `grads` what the captured tables receive from a tile:
    ds, float32 [BLOCK_Q, BLOCK_KV], the gradient of the changed score, counts where `valid`.
    """
    (bias_h_q_idx,) = row
    bias_size_0 = number(numbers[0])
    bias_size_1 = number(numbers[1])
    sent = tl.sum(tl.where(valid & (ds != 0.0), ds * score, 0.0), 1, keep_dims=True)
    tl.atomic_add(
        grads[0] + (h.to(tl.int64) * bias_size_1 + q_idx),
        sent,
        mask=(sent != 0.0) & (h < bias_size_0) & (q_idx < bias_size_1),
        sem="relaxed",
    )'''
    )


def test_the_text_of_two_launches_whose_sums_know_no_order():
    expr, bias = load(0, FLOAT, H, Q) + SCORE, CaptureSpec((TensorSpec("bias", 2, "float32"),))
    peak, fixed = (emit_gradient(expr, bias, scatter=scatter).split("keep_dims=True)\n")[1] for scatter in ("peak", "fixed"))
    assert (
        peak
        == """\
    tl.atomic_max(
        grads[1] + (h.to(tl.int64) * bias_size_1 + q_idx),
        magnitude(sent),
        mask=(sent != 0.0) & (h < bias_size_0) & (q_idx < bias_size_1),
        sem="relaxed",
    )"""
    )
    assert (
        fixed
        == """\
    entry = h.to(tl.int64) * bias_size_1 + q_idx
    peak = tl.load(grads[1] + entry, mask=(h < bias_size_0) & (q_idx < bias_size_1), other=0)
    tl.atomic_add(
        grads[0] + entry,
        fixed_point(sent, peak, grads[2]),
        mask=(sent != 0.0) & (h < bias_size_0) & (q_idx < bias_size_1),
        sem="relaxed",
    )"""
    )


@pytest.mark.parametrize(
    ("score", "most"),
    [
        ("t0[h]", 2 * (2 * 4)),  # a sum from each tile of each batch entry
        ("t0[h] + t0[h + b]", 2 * (2 * 4) + 2 * 3 * (2 * 4)),  # other heads may reach the same entry
        ("t0[b, q_idx]", 3 * 4),
        ("t0[b, h, q_idx, kv_idx]", 1),
        ("t0[q_idx // 2]", 2 * 3 * 128 * 4),
        ("t0[q_idx - kv_idx]", 2 * 3 * 128 * 128),
    ],
)
def test_how_many_additions_an_entry_gets_at_most(score, most):
    """2 batch entries, 3 heads, 100 queries and 128 keys in tiles of 64 x 32."""
    assert most_additions(read(f"score + {score}", "float32")[0], 0, (2, 3, 100, 128), (64, 32)) == most


def test_a_score_mod_keeps_its_row():
    expr, spec = read("score * t0[h] + t0[q_idx] * t0[kv_idx]", "float32")
    unpacked = next(line for line in emit_function("f", expr, spec, "score").splitlines() if line.endswith("= row"))
    assert emit_gradient(expr, spec).count(unpacked) == 2


def test_sums_come_before_additions_and_are_shared():
    assert "tl.sum" not in scatter("score + t0[q_idx, kv_idx]", "float32")
    assert scatter("score + t0[q_idx] - t1[b, q_idx // 2] * t1[0, q_idx]", "float32", "float32").count("tl.sum(") == 1
    both = scatter("score + t0[h] + t0[b + 1]", "float32")
    assert both.count("tl.sum(tl.where(valid, ds, 0.0))") == 1
    assert "tl.sum(tl.where(valid & (ds != 0.0), ds * score, 0.0), 0, keep_dims=True)" in scatter("score * t0[kv_idx]", "float32")


@pytest.mark.parametrize(
    "index", ["q_idx - kv_idx", "kv_idx - (q_idx + 3)", "max(min(q_idx - kv_idx, 8), -8) + 8", "t1[abs(kv_idx - q_idx)]",
              "where(q_idx < kv_idx, 0, (q_idx - kv_idx) // 4)", "max(q_idx, kv_idx) - kv_idx", "-q_idx + b + kv_idx"],
)  # fmt: skip
def test_entries_of_a_distance_are_summed_along_diagonals(index):
    assert "diagonal_sums(" in scatter(f"score + t0[{index}]", "float32", *["int32"] * ("t1" in index))


@pytest.mark.parametrize("index", ["q_idx + kv_idx", "q_idx // 4 - kv_idx // 4", "2 * q_idx - kv_idx", "(q_idx - kv_idx) * q_idx"])
def test_other_entries_are_added_pair_by_pair(index):
    assert "diagonal_sums(" not in scatter(f"score + t0[{index}]", "float32")


def test_only_the_tables_asked_for_get_a_gradient():
    expr, spec = read("score * t0[h] + t1[q_idx] + t2[kv_idx]", "float32", "float32", "float32")
    assert gradient_tables(expr) == (0, 1, 2)
    text = emit_gradient(expr, spec, tables=(2, 0))
    assert "grads[0] + kv_idx" in text and "grads[1] + h" in text and "t1_size" not in text
    assert "atomic_add" not in emit_gradient(expr, spec, tables=())


def test_tables_that_carry_gradient():
    assert gradient_tables(parse("score + t2[t1[q_idx]] * t0[h]", ["float", "int", "float"])) == (0, 2)
    assert gradient_tables(parse("where(t0[q_idx] < 0.5, score, t1[int64(t0[h])])", ["float", "float"])) == (1,)
    assert gradient_tables(SCORE) == ()


@pytest.mark.parametrize("length", [Q_LEN, KV_LEN])
def test_only_indices_that_a_function_is_given_can_be_used(length):
    with pytest.raises(BackendError, match="is not given"):
        emit_gradient(make("mul", (SCORE, make("cast", (length,), "float32"))), CaptureSpec())


def test_deep_scores_are_written_in_few_statements():
    x = SCORE
    for i in range(300):
        x = make("tanh", (make("add", (x, load(0, FLOAT, K + i % 3))),))
    text = emit_gradient(x, CaptureSpec((TensorSpec("t", 1, "float32"),)))
    assert text.count("\n") < 4000


@pytest.mark.parametrize("name", ["grads", "ds", "valid", "sent"])
def test_captures_may_be_called_like_the_functions_own_names(name):
    expr = make("add", (SCORE, load(0, FLOAT, B)))
    text = emit_gradient(expr, CaptureSpec((TensorSpec(name, 1, "float32"),)))
    own = "t0" if name != "sent" else "sent"
    assert f"{own}_size_0 = number(numbers[0])" in text
