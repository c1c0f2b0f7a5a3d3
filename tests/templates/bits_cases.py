"""The bits kernel against brute force. Run as a script under TRITON_INTERPRET=1; prints {case: what is wrong} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Predicate, Sizes, predicates, sizes
from tiles_cases import CAUSAL, EVICT, HOLE, KINDS, NAMES, captures

from flexmask import reference
from flexmask.analysis import Form, derive
from flexmask.frontend import trace
from flexmask.ir import Env, Expr, evaluate, parse, simplify
from flexmask.lowering import CaptureSpec, emit_function
from flexmask.mods import Mask
from flexmask.templates.assemble_bits import assemble_bits, slots_for, words_in_line

PARTIAL = 1
Captures = tuple[list[Any], list[int | float]]


@dataclass(frozen=True)
class Case:
    """One mask: sizes (B, H, Q, KV), tile (block_q, block_kv); `pool` patterns at most (0: as many as tiles); `share` entries a line
    (0: as many as tiles); `flag` is broken[0] before; `breaks`: whether it must be 1 after; `one_hash`: all tiles have the same hash."""

    mask: str
    sizes: tuple[int, int, int, int] = (1, 1, 40, 53)
    block: tuple[int, int] = (16, 8)
    pool: int = 0
    slots: int = 0
    share: int = 0
    flag: int = 0
    breaks: bool = False
    one_hash: bool = False


DILATED = "(kv_idx <= q_idx) & ((q_idx - kv_idx) % 4 == 0)"
RANDOM = "t1[q_idx, kv_idx]"
# a tile takes the interpreter a fifth of a second, so there are few
CASES = {
    "causal": Case(CAUSAL, (1, 1, 20, 22), (16, 8)),
    "dilated": Case(DILATED, (1, 1, 64, 64), (32, 32), pool=2),
    "more queries than keys": Case(DILATED, (1, 1, 61, 17), (32, 16)),
    "neighbours in an image": Case("(abs(q_idx // 8 - kv_idx // 8) <= 1) & (abs(q_idx % 8 - kv_idx % 8) <= 2)", (1, 1, 64, 64), (32, 32)),
    "all different, a hash table as small as can be": Case(RANDOM, (1, 1, 8, 32), (8, 8), pool=4, slots=4),
    "all different, their hashes equal": Case(RANDOM, (1, 1, 8, 32), (8, 8), one_hash=True),
    "dilated, all hashes equal": Case(DILATED, (1, 1, 64, 64), (32, 32), one_hash=True),
    "words that are full": Case(RANDOM, (1, 1, 10, 100), (8, 64)),
    "blocks that are no powers of two": Case(RANDOM, (1, 1, 30, 50), (24, 33)),
    "blocks longer than the lengths": Case(RANDOM, (1, 1, 6, 9), (32, 64)),
    "blocks of one": Case("(q_idx < 1) & (kv_idx < 2)", (1, 1, 3, 3), (1, 1)),
    "one query": Case(EVICT, (1, 1, 1, 50), (16, 32)),
    "one key": Case("(q_idx + kv_idx) % 3 == 0", (1, 1, 30, 1)),
    "one place masked": Case(HOLE, (1, 1, 48, 48)),
    "by both": Case("t2[h, q_idx] + t0[b, kv_idx] % 3 < (q_idx + kv_idx + b + 2 * h) % 23", (2, 2, 12, 30), (16, 32)),
    "by the query alone": Case("q_idx % 16 < 15", (1, 1, 17, 32), (16, 32)),
    "a number captured": Case("(q_idx * q_idx + 3 * kv_idx) % s0 < 5", (1, 1, 20, 30), (16, 32)),
    "all kept": Case("kv_idx < 1000"),
    "no queries": Case(CAUSAL, (1, 1, 0, 5)),
    "no keys": Case(CAUSAL, (1, 1, 5, 0)),
    "small shares": Case(CAUSAL, (1, 1, 48, 48), (16, 16), share=3),
    "a line outgrows its share": Case(RANDOM, share=2, breaks=True),
    "more patterns than have room": Case(RANDOM, pool=2, breaks=True),
    "more patterns than have a place in the hash table": Case(RANDOM, slots=2, breaks=True),
    "broken before": Case(CAUSAL, flag=1, breaks=True),
}


@dataclass(frozen=True)
class Lists:
    """Tile lists as templates/lists.py makes them: PARTIAL tiles at the back of each line's share, descending."""

    counts: torch.Tensor
    offsets: torch.Tensor
    index: torch.Tensor
    iota: int


def tiles_of(keep: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """keep [B, H, Q, KV] as [B, H, nQ, nK, block_q, block_kv]; what is beyond the lengths is not kept."""
    batch, heads, q_len, kv_len = keep.shape
    rows, columns = -(-q_len // block[0]), -(-kv_len // block[1])
    whole = torch.zeros(batch, heads, rows * block[0], columns * block[1], dtype=torch.bool)
    whole[:, :, :q_len, :kv_len] = keep
    return whole.view(batch, heads, rows, block[0], columns, block[1]).transpose(3, 4)


def states_of(keep: torch.Tensor, block: tuple[int, int], axis: str) -> torch.Tensor:
    """int8 [B, H, lines, columns]."""
    kept, open_places = tiles_of(keep, block), tiles_of(~keep, block)
    states = kept.flatten(4).any(-1).to(torch.int8) * (2 - open_places.flatten(4).any(-1).to(torch.int8))
    return states if axis == "row" else states.transpose(2, 3)


def lists_of(states: torch.Tensor, share: int) -> Lists:
    batch, heads, lines, columns = states.shape
    iota, share = batch * heads * lines * (share or columns), share or columns
    index = torch.full((iota + columns,), -1, dtype=torch.int32)
    index[iota:] = torch.arange(columns)
    counts, offsets = torch.zeros(2, batch * heads * lines, 2, dtype=torch.int32).unbind()
    for line, state in enumerate(states.flatten(0, 2)):
        full, partial = ((state == kind).nonzero().flatten().int() for kind in (2, PARTIAL))
        kept = state.nonzero().flatten()
        if len(kept) > share:
            counts[line, 1], offsets[line, 1] = kept[-1] + 1 - kept[0], iota + kept[0]
            continue
        begin, end = line * share, (line + 1) * share
        index[begin : begin + len(full)], index[end - len(partial) : end] = full, partial.flip(0)
        counts[line], offsets[line] = torch.tensor([len(full), len(partial)]), torch.tensor([begin, end - len(partial)])
    shape = (batch, heads, lines, 2)
    return Lists(counts.view(shape), offsets.view(shape), index, iota)


def assert_patterns(keep: torch.Tensor, block: tuple[int, int], axis: str, made: Lists, words: torch.Tensor, patterns: torch.Tensor) -> int:
    """Every PARTIAL tile's words are its own, a line's bits in its words, and others have other words; how many patterns that makes."""
    tiles, places = tiles_of(keep, block).contiguous(), block[1]
    if axis == "column":
        tiles, places = tiles.transpose(2, 3).transpose(4, 5).contiguous(), block[0]
    found = (words[..., None] >> torch.arange(32)) & 1 == 1
    numbers, seen = [], []
    for place in torch.cartesian_prod(*map(torch.arange, made.counts.shape[:3])).tolist():
        begin = int(made.offsets[(*place, 1)])
        for at in range(begin, begin + int(made.counts[(*place, 1)])):
            tile, bits = tiles[(*place, int(made.index[at]))], found[int(patterns[at])].flatten(1)
            assert torch.equal(bits[:, :places], tile), (place, at)
            assert not bits[:, places:].any(), (place, at)
            numbers.append(int(patterns[at]))
            seen.append(tile.flatten())
    if not numbers:
        return 0
    assert len(torch.stack(seen).unique(dim=0)) == len(set(numbers)) == max(numbers) + 1
    return len(set(numbers))


def check(case: Case, axis: str, mask: Expr, keep: torch.Tensor, given: Captures, names: tuple[Any, Any], folder: Path) -> None:
    from flexmask.runtime.launch import load

    text = emit_function("mask", mask, CaptureSpec.of(given[0], names[0], given[1], names[1]), "mask")
    source = assemble_bits(axis=axis, block_q=case.block[0], block_kv=case.block[1], mask=text, header=[repr(case)])
    if case.one_hash:
        source = source.replace("return tl.maximum(", "return 1 + 0 * tl.maximum(")
    path = folder / f"bits_{abs(hash(source))}.py"
    path.write_text(source)
    module = load(path)
    made = lists_of(states_of(keep, case.block, axis), case.share)
    pool = case.pool or max(1, int(made.counts[..., 1].sum()))
    patterns = torch.full_like(made.index, -1)
    line, places = case.block if axis == "row" else case.block[::-1]
    words = torch.full((pool, line, words_in_line(places)), 0x5A5A5A5A, dtype=torch.int32)
    slots = torch.zeros(1 + case.slots if case.slots else slots_for(pool), dtype=torch.int64)
    broken = torch.tensor([case.flag, 0], dtype=torch.int32)
    lists = (made.counts, made.offsets, made.index)
    module.bits(*lists, patterns, words, slots, broken, module.pack(*given), *keep.shape[2:], made.iota)
    assert broken.tolist() == [int(case.breaks), 0]
    if case.flag:
        assert (patterns == -1).all() and (slots == 0).all()
    if not case.breaks:
        assert assert_patterns(keep, case.block, axis, made, words, patterns) == int(slots[0])


def dense(mask: Expr, of: tuple[int, int, int, int]) -> torch.Tensor:
    grid = {"b": torch.arange(of[0]).view(-1, 1, 1, 1), "h": torch.arange(of[1]).view(-1, 1, 1)}
    grid |= {"q_idx": torch.arange(of[2])[:, None], "kv_idx": torch.arange(of[3])[None]}
    return torch.as_tensor(evaluate(mask, Env(grid, *captures(of)))).expand(*of)


def check_text(case: Case, axis: str, folder: Path) -> None:
    mask = parse(case.mask, KINDS, ["int"])
    check(case, axis, mask, dense(mask, case.sizes), captures(case.sizes), (NAMES, ["window"]), folder)


def check_mod(mod: Any, of: tuple[int, int, int, int], block: tuple[int, int], axis: str, folder: Path) -> None:
    """A mask of the user's."""
    traced, keep = trace(mod, "mask"), reference.dense_mask(mod, *of)
    given = (list(traced.tensors), list(traced.scalars))
    check(Case("", of, block), axis, simplify(traced.expr), keep, given, (traced.tensor_names, traced.scalar_names), folder)


def has_no_form(mask: Mask) -> bool:
    """Whether PARTIAL tiles of a mask evaluate it."""
    rows = derive(simplify(trace(mask, "mask").expr)).rows
    return not isinstance(rows, Form) or rows.residue is not None


def check_zoo(folder: Path) -> str:
    """Every fourth mask of the zoo that has no interval form; the names of those that fail, and how many there were."""
    of, wrong, count = (1, 1, 35, 41), [], 0
    for number, (name, make) in enumerate(zoo.MASKS.items()):
        mask = make(*of)
        if has_no_form(mask) and (count := count + 1) % 4 == 0:
            try:
                check_mod(mask, of, (24, 41) if number % 2 else (35, 30), "row" if number % 3 else "column", folder)
            except Exception:
                wrong.append(f"{name}: {traceback.format_exc()[-500:]}")
    return "\n".join(wrong) if wrong or count > 10 else f"the zoo has only {count} masks without an interval form"


def check_random(folder: Path) -> str:
    """Random masks, sizes and blocks."""
    sides = st.integers(1, 40)

    @settings(max_examples=10, derandomize=True, deadline=None, database=None)
    @given(predicates(sizes(largest=40, heads=2)), sides, sides, st.sampled_from(["row", "column"]))
    def run(predicate: Predicate, block_q: int, block_kv: int, axis: str) -> None:
        s: Sizes = predicate.sizes
        # as few tiles as make sense: each takes the interpreter a fifth of a second
        block = (max(block_q, -(-s.Q // 2)), max(block_kv, -(-s.KV // 2)))
        check_mod(predicate.mask(), (s.B, s.H, s.Q, s.KV), block, axis, folder)

    run()
    return ""


def attempt(run: Any) -> str:
    try:
        return run() or ""
    except Exception:
        return traceback.format_exc()[-1500:]


def main() -> None:
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        results = {
            f"{name}, {axis}": attempt(lambda case=case, axis=axis: check_text(case, axis, folder))
            for name, case in CASES.items()
            for axis in ("row", "column")
        }
        results["zoo"] = attempt(lambda: check_zoo(folder))
        results["random"] = attempt(lambda: check_random(folder))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
