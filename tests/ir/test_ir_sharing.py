"""Expressions are graphs: what shares much prints short, reads back, and is handled in no time."""

import flexmask
from flexmask.ir import K, Q, digest, make, parse, show, walk


def doubled(times):
    x = Q + K
    for _ in range(times):
        x = make("mul", (x + 1, x))
    return x


def test_a_graph_of_a_billion_paths_prints_short_and_reads_back():
    expr = doubled(40)
    text = show(expr)
    assert len(text) < 3000 and ":=" in text
    assert parse(text) is expr
    assert len(digest(expr)) == 64


def test_short_texts_name_nothing():
    assert show(doubled(2)) == "((q_idx + kv_idx + 1) * (q_idx + kv_idx) + 1) * ((q_idx + kv_idx + 1) * (q_idx + kv_idx))"


def test_a_mask_that_shares_much_is_traced_analysed_and_run():
    @flexmask.mask
    def folded(q_idx, kv_idx):
        x = q_idx - kv_idx
        for _ in range(30):
            x = (x * x + x) % 7
        return x < 4

    assert len(list(walk(folded.traced().expr))) < 200
    assert len(folded.explain()) < 20000
    states = folded.block_mask(64, 64, block_size=16).states()
    assert states.shape == (1, 1, 4, 4)
