"""The tile test: what it reads, that EMPTY and FULL are proofs, and that the usual masks leave only PARTIAL tiles UNKNOWN."""

from __future__ import annotations

import pytest
import torch
import zoo
from analysis_cases import TENSORS, Instance, instances, random_masks, read, true_states
from box_cases import check_boxes, tile_states
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Predicate, predicates

from flexmask.analysis import box_test
from flexmask.ir import K, Q, simplify, uses, walk
from flexmask.runtime.classify import UNKNOWN, classify
from flexmask.runtime.grid import Grid

SIZES = [(1, 1), (8, 8), (4, 16), (16, 3), (5, 7)]


def lines_of(mask: str) -> list[str]:
    """The lines of a box test. Captured tables are t0 to t8, so term 0 has its minimum in t9 and its maximum in t10."""
    return str(box_test(simplify(read(mask)), len(TENSORS))).split("\n")


def drawn(mask: str, instance: Instance, block_q: int, block_kv: int) -> str:
    """The tiles of batch entry and head 0: . EMPTY, # FULL, ? UNKNOWN."""
    rows = tile_states(read(mask), instance, block_q, block_kv)[0, 0].tolist()
    return "\n".join("".join(".!#?"[x] for x in row) for row in rows)


# what a test looks like


def test_causal_compares_ends_of_blocks():
    assert lines_of("kv_idx <= q_idx") == [
        "some: t11[0, 0, kv_idx] <= t10[0, 0, q_idx]",
        "every: t12[0, 0, kv_idx] <= t9[0, 0, q_idx]",
        "rows: q_idx",
        "columns: kv_idx",
    ]


def test_a_window_shares_the_terms_of_causal():
    some, _, rows, columns = lines_of("(kv_idx <= q_idx) & (q_idx - kv_idx < s0)")
    assert some == "some: (t11[0, 0, kv_idx] <= t10[0, 0, q_idx]) & (t9[0, 0, q_idx] - t12[0, 0, kv_idx] < s0)"
    assert (rows, columns) == ("rows: q_idx", "columns: kv_idx")


def test_multiples_share_a_term():
    some, *terms = lines_of("3 * q_idx + 1 < 2 * kv_idx")[::2] + lines_of("3 * q_idx + 1 < 2 * kv_idx")[3:]
    assert some == "some: 3 * t9[0, 0, q_idx] + 1 < 2 * t12[0, 0, kv_idx]"
    assert terms == ["rows: q_idx", "columns: kv_idx"]


def test_documents_overlap_or_are_one():
    some, every, *_ = lines_of("t2[b, q_idx] == t2[b, kv_idx]")
    assert some == "some: (t9[b, 0, q_idx] <= t12[b, 0, kv_idx]) & (t11[b, 0, kv_idx] <= t10[b, 0, q_idx])"
    assert every == "every: (t10[b, 0, q_idx] <= t11[b, 0, kv_idx]) & (t12[b, 0, kv_idx] <= t9[b, 0, q_idx])"


def test_what_depends_on_neither_axis_stays_as_it_is():
    some, _, rows, _ = lines_of("q_idx - kv_idx < t6[h]")
    assert (some, rows) == ("some: t9[0, 0, q_idx] - t12[0, 0, kv_idx] < t6[h]", "rows: q_idx")


@pytest.mark.parametrize(
    ("mask", "rows", "columns"),
    [
        ("t3[b, q_idx] & (t1[q_idx] == 2) & (t3[b, kv_idx] | (kv_idx % 3 == 0))", "t3[b, q_idx] & (t1[q_idx] == 2)",
         "t3[b, kv_idx] | (kv_idx % 3 == 0)"),
        ("kv_idx < t1[(3 * q_idx) % 5] + q_idx // 2", "t1[3 * q_idx % 5] + q_idx // 2", "kv_idx"),
        ("q_idx - t1[q_idx] <= kv_idx // 4 - t0[kv_idx]", "q_idx - t1[q_idx]", "kv_idx // 4 - t0[kv_idx]"),
        ("t7[kv_idx] > 0.25", "-", "0.25 < t7[kv_idx]"),
    ],
)  # fmt: skip
def test_all_that_depends_on_one_axis_is_one_term(mask, rows, columns):
    assert lines_of(mask)[2:] == [f"rows: {rows}", f"columns: {columns}"]


def test_a_condition_on_one_side_of_an_equality_limits_both():
    """Text is in image -1: blocks of text and images do not meet there."""
    mask = "(kv_idx <= q_idx) | (t1[q_idx] == t1[kv_idx]) & (t1[q_idx] >= 0)"
    instance = Instance(12, 12)
    instance.tensors[1] = torch.tensor([0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, -1])
    assert drawn(mask, instance, 4, 4) == "?..\n#?.\n##?"
    assert "where(0 <= t1[kv_idx], t1[kv_idx], 4611686018427387904)" in lines_of(mask)[3]


def test_nothing_is_known_of_what_has_no_rule():
    assert lines_of("t5[q_idx, kv_idx]") == ["some: True", "every: False", "rows: -", "columns: -"]


# its proofs


def test_causal_drawn():
    assert drawn("kv_idx <= q_idx", Instance(10, 12), 4, 3) == "??..\n#??.\n###?"


def test_window_drawn():
    assert drawn("(kv_idx <= q_idx) & (q_idx - kv_idx < 5)", Instance(12, 12), 2, 2) == (
        "?.....\n#?....\n?#?...\n.?#?..\n..?#?.\n...?#?"
    )  # fmt: skip


def test_table_of_pairs_of_blocks_drawn():
    """An index that takes at most two values in a tile is followed: cells of 4 x 4 under tiles of 2 x 4, of 3 x 3, and of 8 x 8."""
    instance, mask = Instance(8, 8), "t5[q_idx // 4, kv_idx // 4]"
    instance.tensors[5] = torch.eye(2, dtype=torch.bool)
    assert drawn(mask, instance, 2, 4) == "#.\n#.\n.#\n.#"
    assert drawn(mask, instance, 3, 3) == "#?.\n???\n.?#"
    assert drawn(mask, instance, 8, 8) == "?"


# masks whose tiles are all decided but the truly PARTIAL ones
EXACT = [
    "True", "False", "kv_idx <= q_idx", "q_idx - kv_idx < s0", "abs(q_idx - kv_idx) <= 3", "q_idx + s1 >= kv_idx",
    "q_idx + t6[h] >= kv_idx", "(kv_idx <= q_idx) & (q_idx - kv_idx < 5)", "3 * q_idx < 2 * kv_idx + s1", "kv_idx < s2",
    "q_idx // 4 == kv_idx // 4", "(q_idx - kv_idx) // -3 >= 1", "t0[q_idx] == t0[kv_idx]", "t2[b, q_idx] == t2[b, kv_idx]",
    "t0[q_idx] < t2[0, kv_idx]", "kv_idx < t4[q_idx]", "t3[b, kv_idx]", "t3[b, q_idx]", "~t3[b, kv_idx]", "t3[b, q_idx] & t3[b, kv_idx]",
    "t7[kv_idx] > 0.25", "t1[kv_idx // 2] < 2", "kv_idx < q_len - 3", "(q_idx - kv_idx) % 64 < 5", "kv_idx < s2 + t6[h] * b",
    "q_idx >> 2 == kv_idx >> 2", "t7[q_idx] < t7[kv_idx]", "kv_idx < t4[t1[q_idx]]", "t1[kv_idx] == 2",
    "float32(q_idx) / 3.0 < float32(kv_idx)",
    "abs(q_idx - kv_idx) == 3", "(kv_idx + 1) / (q_idx + 1) <= 0.47", "sqrt(float32(kv_idx)) > 2.5",
]  # fmt: skip


@pytest.mark.parametrize("mask", EXACT)
def test_only_partial_tiles_are_unknown(mask):
    for seed, (q_len, kv_len) in enumerate([(23, 23), (19, 30), (9, 2)]):
        for block_q, block_kv in SIZES:
            assert not check_boxes(read(mask), Instance(q_len, kv_len, seed), block_q, block_kv).any()


BITS = ["((q_idx ^ kv_idx) & ((q_idx ^ kv_idx) - 1)) == 0", "(q_idx ^ kv_idx) < 8", "(q_idx & kv_idx) == 0", "(q_idx | kv_idx) < 16"]


@pytest.mark.parametrize("mask", BITS)
def test_bits_are_followed_where_blocks_are_powers_of_two(mask):
    for block_q, block_kv in [(8, 8), (4, 4), (1, 1), (8, 2)]:
        assert not check_boxes(read(mask), Instance(32, 32), block_q, block_kv).any()


SOUND = [
    "tanh(t7[q_idx]) <= t7[kv_idx]", "exp(t7[kv_idx]) * 2.0 > 1.5", "t5[q_idx // 3, kv_idx // 5]", "t5[kv_idx, q_idx]",
    "log(t7[q_idx]) < t7[kv_idx]", "sqrt(t7[kv_idx]) >= 0.0", "1.0 / t7[kv_idx] < 2.0", "isnan(sqrt(t7[kv_idx]))",
    "floor(t7[kv_idx] * 3.0) == 1.0", "sin(t7[q_idx]) < 1.5", "where(t3[b, kv_idx], t7[q_idx], 0.5) <= 0.5",
    "int32(t7[q_idx] * 4.0) <= kv_idx - 3", "(q_idx & 6) < kv_idx", "q_idx * kv_idx % 7 < 3", "q_idx * (kv_idx - 9) <= s1 * kv_idx",
    "abs(t7[q_idx] - t7[kv_idx]) < 0.5", "sign(t7[q_idx]) < 0.0", "min(max(sqrt(t7[q_idx]), 0.0), 1.0) <= 1.0",
    "q_idx % -4 < kv_idx % 3 - 3", "~(t7[q_idx] < t7[kv_idx])", "t4[(q_idx * kv_idx) % 5] < kv_idx", "(1 << (q_idx % 4)) < kv_idx",
    "float16(q_idx) == 3.0", "bfloat16(t7[q_idx]) < t7[q_idx]", "q_idx // (kv_idx - 4 + 5) == 0", "(t7[q_idx] > 0.0) ^ (kv_idx < q_idx)",
    "pow(q_idx, 2) < kv_idx", "rsqrt(float32(q_idx + 1)) < 0.5", "t7[q_idx] % 0.5 < 0.25", "bool(t7[kv_idx])", "bool(q_idx - kv_idx)",
    "sign(q_idx - kv_idx) == 1", "int64((t7[q_idx] + t7[kv_idx]) * 4.0) < 3", "float32(q_idx - kv_idx) * t7[q_idx] > 1.0",
    "t7[q_idx] * 2.0 + 1.0 < t7[kv_idx]", "(q_idx - kv_idx) % s0 == 0", "(q_idx + kv_idx) // s0 == s1", "(q_idx - kv_idx) % -4 == -1",
    "t1[t0[q_idx] % 2 + t1[kv_idx] % 2] == 1", "t5[t0[q_idx], t1[kv_idx]]", "t7[t0[q_idx]] < t7[t1[kv_idx]]",
    "t3[b, q_idx] == t3[b, kv_idx]",
    "((q_idx - kv_idx) & 7) < 3", "t3[b, q_idx] <= (kv_idx > 4)", "where(t3[b, kv_idx], q_idx, kv_idx + t6[h]) < 9",
]  # fmt: skip


@pytest.mark.parametrize("mask", SOUND)
def test_proofs_hold_for_every_operation(mask):
    for block_q, block_kv in SIZES:
        check_boxes(read(mask), Instance(19, 22, 3, False), block_q, block_kv)


@settings(max_examples=250)
@given(random_masks(scattered=0.4), instances, st.sampled_from(SIZES))
# a condition on kv_idx must not become one on t4[q_idx] if it reads a table there: t0 is not that long
@example("(kv_idx == t4[q_idx]) & (2 * t0[kv_idx] + 1 < 3)", Instance(14, 14, 439, False), (5, 7))
def test_random_masks(mask, instance, block):
    check_boxes(read(mask), instance, *block)


@settings(max_examples=100)
@given(predicates(depth=3), st.sampled_from(SIZES))
def test_random_functions(predicate: Predicate, block: tuple[int, int]):
    """The same for functions with tables of every dtype."""
    s, traced = predicate.sizes, predicate.mask().traced()
    found = classify(
        box_test(simplify(traced.expr), len(traced.tensors)), Grid(s.Q, s.KV, *block, s.B, s.H), traced.tensors, traced.scalars
    )
    truth = true_states(predicate.mask().to_dense(s.Q, s.KV, s.B, s.H), *block)
    assert torch.equal(torch.where(found == UNKNOWN, truth, found), truth)


@st.composite
def conjunctions(draw: st.DrawFn) -> str:
    """A comparison of tables, and conditions on the same and other table values."""

    def table(i: str) -> str:
        return draw(st.sampled_from([f"t0[{i}]", f"t1[{i}]", f"t2[b, {i}]", f"t8[b, {i}]", f"t4[{i}]", f"(t0[{i}] + t1[{i}])"]))

    def relation() -> str:
        return draw(st.sampled_from(["==", "==", "==", "<", "<=", ">", "!="]))

    def condition(value: str, i: str) -> str:
        return draw(st.sampled_from([f"({value} {relation()} 1)", f"(0 <= {value})", f"t3[b, {i}]", f"({table(i)} != 2)", f"({i} < s2)"]))

    x, y = table("q_idx"), table("kv_idx")
    parts = [f"({x} {relation()} {y})", *(condition(x, "q_idx") for _ in range(draw(st.integers(0, 2))))]
    parts += [condition(y, "kv_idx") for _ in range(draw(st.integers(0, 2)))]
    text = " & ".join(draw(st.permutations(parts)))
    return draw(st.sampled_from([text, f"(kv_idx <= q_idx) | {text}", f"~({text})"]))


@settings(max_examples=150)
@given(conjunctions(), instances, st.sampled_from(SIZES))
def test_joined_conditions(mask, instance, block):
    check_boxes(read(mask), instance, *block)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mask", [
    "t7[kv_idx] < 5.0", "~(t7[kv_idx] < 5.0)", "max(t7[kv_idx], 0.0) <= 9.0", "t7[kv_idx] * 0.0 == 0.0", "t7[kv_idx] != t7[kv_idx]",
    "t7[q_idx] < t7[kv_idx]", "t7[q_idx] != t7[kv_idx]", "~(t7[q_idx] == t7[kv_idx])", "t7[q_idx] - t7[kv_idx] <= 1.0",
    "t7[q_idx] * t7[kv_idx] <= 1.0", "t7[q_idx] / t7[kv_idx] < 2.0", "where(q_idx < kv_idx, t7[q_idx], t7[kv_idx]) < 1.0",
])  # fmt: skip
def test_nothing_is_concluded_from_nan_and_infinity(mask, bad):
    instance = Instance(8, 8)
    instance.tensors[7][5] = bad
    for block in [(4, 2), (1, 1), (8, 8)]:
        check_boxes(read(mask), instance, *block)


@pytest.mark.parametrize("value", [2**62, 2**63 - 1, -(2**63)])
def test_huge_integers_do_not_overflow(value):
    instance = Instance(8, 8)
    instance.tensors[1] = torch.full((9,), value)
    for mask in (
        "t1[kv_idx] + t1[q_idx] < 0", "t1[kv_idx] * 4 == 0", "t1[kv_idx] > kv_idx", "t1[kv_idx] == t1[q_idx] - 1", "q_idx < t1[kv_idx]",
        "q_idx - kv_idx <= t1[q_idx]", "q_idx - kv_idx < t1[q_idx] + s0", "q_idx - kv_idx < s0 + t1[b]",
    ):  # fmt: skip
        check_boxes(read(mask), instance, 4, 4)


def test_a_table_may_hold_the_largest_integers_as_no_bound():
    instance = Instance(4, 4)
    instance.tensors[1] = torch.tensor([2**63 - 1, 2**63 - 1, -(2**63), -(2**63)])
    assert drawn("kv_idx < t1[q_idx]", instance, 2, 2) == "##\n.."


# every mask of the zoo

# Of the tiles that keep nothing or everything, the share that is yet unknown, where it is not 0: tables of pairs in small cells,
# bounds or flags of every row apart, bits under blocks that are no powers of two, distances along two axes.
UNDECIDED = {
    "bigbird": 1.0, "two_index_table": 1.0, "block_sparse": 0.5, "tree_of_parents": 0.9, "bitwise": 0.9,
    "per_document": 0.4, "bounds_by_table": 0.3, "flamingo": 0.3, "benchmark_qk_sparse": 0.3, "block_diffusion": 0.2,
    "tiled_neighbourhood": 0.2, "sliding_tile": 0.2, "benchmark_causal_blockwise": 0.2, "vertical_slash": 0.1, "random_eviction": 0.1,
    "random_eviction_heads": 0.1, "prefix_document": 0.1, "benchmark_prefix_lm_document": 0.1, "benchmark_share_question": 0.1,
    "flipped": 0.1, "neighbourhood": 0.05, "transfusion": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.MASKS)
def test_zoo(name):
    B, H, q_len, kv_len = 2, 2, 150, 130
    mask = zoo.MASKS[name](B, H, q_len, kv_len)
    traced = mask.traced()
    predicate = simplify(traced.expr)
    test = box_test(predicate, len(traced.tensors))
    for block_q, block_kv in [(16, 16), (30, 13)]:
        truth = true_states(mask.to_dense(q_len, kv_len, B, H), block_q, block_kv)
        found = classify(test, Grid(q_len, kv_len, block_q, block_kv, B, H), traced.tensors, traced.scalars)
        assert torch.equal(torch.where(found == UNKNOWN, truth, found), truth)
        undecided, whole = ((found == UNKNOWN) & (truth != 1)).sum(), (truth != 1).sum()
        assert undecided <= UNDECIDED.get(name, 0.0) * whole, f"{undecided} of {whole}"


@pytest.mark.parametrize("name", zoo.MASKS)
def test_what_a_test_reads(name):
    """Its terms are of one axis and need no search; its tables beyond the captured ones are their summaries; all of them are read."""
    traced = zoo.MASKS[name](2, 2, 40, 40).traced()
    n = len(traced.tensors)
    test = box_test(simplify(traced.expr), n)
    for terms, own, other in ((test.rows, Q, K), (test.columns, K, Q)):
        assert all(uses(term, own) and not uses(term, other) for term in terms)
    assert not any(node.op == "search" for e in (test.some, test.every, *test.terms) for node in walk(e))
    read_tables = {node.value for e in (test.some, test.every) for node in walk(e) if node.op == "load"}
    assert {(number - n) // 2 for number in read_tables if number >= n} == set(range(len(test.terms)))
    assert len(set(test.terms)) == len(test.terms) <= 9
    assert all(node.value in (Q.value, K.value, "b", "h", "q_len", "kv_len") for node in walk(test.some) if node.op == "index")


def test_too_many_terms_leave_the_rest_unknown():
    mask = " | ".join(f"(t1[q_idx] * {i} == t1[kv_idx])" for i in range(1, 40))
    assert len(box_test(simplify(read(mask)), len(TENSORS)).terms) <= 24
    check_boxes(read(mask), Instance(12, 12), 4, 4)
