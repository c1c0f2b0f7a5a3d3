"""The tiles kernel against brute force. Run as a script under TRITON_INTERPRET=1; prints {case: what is wrong} as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexmask.ir import Env, Expr, evaluate, parse
from flexmask.lowering import CaptureSpec, emit_function
from flexmask.templates.assemble import assemble_tiles

# t0 int [B, N], t1 bool [Q, KV], t2 int [H, N]; s0 int
KINDS = ["int", "bool", "int"]
NAMES = ["evict", "keep", "shift"]
BOX_ARGUMENTS = "tables, numbers, b, h, q_idx, kv_idx, q_len, kv_len"


@dataclass(frozen=True)
class Case:
    """One map: sizes (B, H, Q, KV), tile (block_q, block_kv); `box` is the body of a box test; `hulls` how to make them."""

    mask: str
    sizes: tuple[int, int, int, int] = (1, 1, 40, 53)
    block: tuple[int, int] = (16, 8)
    box: tuple[str, str] | None = None
    hulls: str = ""
    slab: int = 1000
    flags: tuple[int, ...] | None = None  # of the map, of table 0, of table 1, ...
    only_if_broken: bool = False
    wrong: str = ""  # the states that a wrong hull or box test leaves, where they must show


CAUSAL, EVICT = "kv_idx <= q_idx", "(kv_idx <= q_idx) & (q_idx < t0[b, kv_idx])"
# block numbers: a tile of 16 x 8 keeps something if its first key is not after its last query, all if its last key not after its first
BOX = ("kv_idx * 8 <= q_idx * 16 + 15", "kv_idx * 8 + 7 <= q_idx * 16")
HOLE = "(q_idx != 21) | (kv_idx != 13)"  # one masked place, on no line that is looked at first
CASES = {
    "causal": Case(CAUSAL),
    "causal, one tile": Case(CAUSAL, (1, 1, 3, 5)),
    "causal, one query": Case(CAUSAL, (1, 1, 1, 100)),
    "causal, more queries than keys": Case(CAUSAL, (1, 1, 61, 33)),
    "causal, box test": Case(CAUSAL, box=BOX),
    "causal, box test, many keys": Case(CAUSAL, (1, 1, 9, 150), (7, 1), ("kv_idx < q_idx * 7 + 7", "kv_idx <= q_idx * 7")),
    "box test of one number": Case(CAUSAL, box=("q_idx >= 0", "q_idx < 0")),
    "blocks that are no powers of two": Case(EVICT, (1, 1, 50, 70), (24, 10)),
    "wide blocks": Case(EVICT, (1, 1, 50, 200), (5, 64)),
    "tall blocks": Case(EVICT, (1, 1, 200, 50), (64, 5)),
    "blocks of one": Case(EVICT, (1, 1, 6, 9), (1, 1)),
    "blocks longer than the lengths": Case(EVICT, (1, 1, 6, 9), (32, 64)),
    "by batch entry": Case(EVICT, (2, 1, 40, 53)),
    "by head": Case("kv_idx <= q_idx + t2[h, q_idx]", (1, 2, 40, 40)),
    "by both": Case("t2[h, q_idx] + t0[b, kv_idx] % 3 < (q_idx + kv_idx + b + 2 * h) % 23", (2, 2, 40, 40)),
    "by both, box test": Case("kv_idx <= q_idx + b - 9 * h", (2, 2, 40, 30), box=tuple(x + " + b - 9 * h" for x in BOX)),  # type: ignore[arg-type]
    "random table": Case("t1[q_idx, kv_idx]", (1, 1, 40, 53), (8, 8)),
    "few kept": Case("t1[q_idx, kv_idx] & (q_idx % 5 == 1) & (kv_idx % 7 == 2)", (1, 1, 40, 53)),
    "one place masked": Case(HOLE, (1, 1, 48, 48)),
    "one place kept": Case("(q_idx == 21) & (kv_idx == 13)", (1, 1, 48, 48)),
    "all kept": Case("kv_idx < 1000"),
    "nothing kept": Case("kv_idx < q_idx - 1000"),
    "by the query alone": Case("q_idx % 16 < 15", (1, 1, 48, 48)),
    "by the key alone": Case("kv_idx != 13", (1, 1, 48, 48)),
    "a number captured": Case("(kv_idx <= q_idx) & (q_idx - kv_idx < s0)", (1, 1, 50, 50)),
    "slabs": Case(EVICT, (2, 1, 60, 40), slab=2),
    "slabs, hulls": Case(EVICT, (2, 1, 60, 70), hulls="true", slab=3, flags=(0, 0)),
    "hulls": Case(EVICT, (2, 1, 40, 53), hulls="true", flags=(0, 0)),
    "hulls, box test": Case(CAUSAL, (1, 1, 60, 100), box=BOX, hulls="true", flags=(0, 0)),
    "hulls without flags": Case(EVICT, (2, 1, 40, 53), hulls="true"),
    "wrong hulls of tables that do not ascend": Case(EVICT, (2, 1, 40, 53), hulls="wrong", flags=(0, 1)),
    "wrong hulls are believed": Case(EVICT, (2, 1, 40, 53), hulls="wrong", flags=(1, 0), wrong="empty"),
    "hulls, one of them wrong": Case(EVICT, (2, 1, 40, 53), hulls="both", flags=(0, 1, 0)),
    "not asked for": Case(EVICT, flags=(0, 1), only_if_broken=True, wrong="untouched"),
    "asked for": Case(EVICT, flags=(1, 0), only_if_broken=True),
    "no queries": Case(CAUSAL, (1, 1, 0, 5)),
    "no keys": Case(CAUSAL, (1, 1, 5, 0)),
}


def captures(sizes: tuple[int, int, int, int]) -> tuple[list[torch.Tensor], list[int | float]]:
    batch, heads, q_len, kv_len = sizes
    g, longest = torch.Generator().manual_seed(5), max(sizes)
    evict = torch.randint(0, 2 * longest, (batch, longest), generator=g, dtype=torch.int32)
    return [evict, torch.rand(q_len, kv_len, generator=g) < 0.7, torch.randint(-9, 9, (heads, longest), generator=g)], [17]


def dense_states(mask: Expr, case: Case, axis: str) -> torch.Tensor:
    """States by brute force, the owner axis first."""
    batch, heads, q_len, kv_len = case.sizes
    grid = {"b": torch.arange(batch).view(-1, 1, 1, 1), "h": torch.arange(heads).view(-1, 1, 1)}
    grid |= {"q_idx": torch.arange(q_len)[:, None], "kv_idx": torch.arange(kv_len)[None]}
    keep = torch.as_tensor(evaluate(mask, Env(grid, *captures(case.sizes)))).expand(*case.sizes)
    rows, columns = (-(-n // side) for n, side in zip((q_len, kv_len), case.block, strict=True))
    states = torch.zeros(batch, heads, rows, columns, dtype=torch.int8)
    for i in range(rows):
        for j in range(columns):
            tile = keep[:, :, i * case.block[0] : (i + 1) * case.block[0], j * case.block[1] : (j + 1) * case.block[1]].flatten(2)
            states[:, :, i, j] = tile.any(-1).to(torch.int8) + tile.all(-1).to(torch.int8)
    return states if axis == "row" else states.transpose(2, 3).contiguous()


def hulls_of(states: torch.Tensor, kind: str) -> tuple[torch.Tensor | None, list[tuple[int, ...]]]:
    """(first, last) of what each owner block keeps, or 0 0, which is wrong; and the tables that must ascend for it."""
    if not kind:
        return None, []
    place = torch.arange(states.shape[-1])
    kept = states != 0
    first = torch.where(kept, place, states.shape[-1]).amin(-1)
    last = torch.where(kept, place + 1, 0).amax(-1)
    true = torch.stack([torch.minimum(first, last), last], -1).int()
    wrong = torch.zeros_like(true)
    made = {"true": ([true], [(0,)]), "wrong": ([wrong], [(0,)]), "both": ([wrong, true], [(0,), ()])}[kind]
    return torch.stack(made[0]), made[1]  # type: ignore[return-value]


def box_text(case: Case) -> str | None:
    if case.box is None:
        return None
    return f'@triton.jit\ndef box_test({BOX_ARGUMENTS}):\n    """By hand."""\n    return {case.box[0]}, {case.box[1]}'


def make_module(case: Case, mask: Expr, axis: str, bounds: list[tuple[int, ...]], folder: Path) -> Any:
    from flexmask.runtime.launch import load

    tensors, scalars = captures(case.sizes)
    text = emit_function("mask", mask, CaptureSpec.of(tensors, NAMES, scalars, ["window"]), "mask")
    sizes = {"axis": axis, "block_q": case.block[0], "block_kv": case.block[1]}
    source = assemble_tiles(**sizes, mask=text, box=box_text(case), bounds=bounds, header=[repr(case)])  # type: ignore[arg-type]
    path = folder / f"tiles_{abs(hash(source))}.py"
    path.write_text(source)
    return load(path)


def check(case: Case, axis: str, folder: Path) -> None:
    mask = parse(case.mask, KINDS, ["int"])
    expected = dense_states(mask, case, axis)
    hulls, bounds = hulls_of(expected, case.hulls)
    module = make_module(case, mask, axis, bounds, folder)
    packed = module.pack(*captures(case.sizes))
    flags = None if case.flags is None else torch.tensor(case.flags, dtype=torch.int32)
    expected = {"": expected, "empty": torch.zeros_like(expected), "untouched": torch.full_like(expected, 7)}[case.wrong]
    for first in range(0, max(expected.shape[2], 1), case.slab):
        wanted = expected[:, :, first : first + case.slab]
        states = torch.full(wanted.shape, 7, dtype=torch.int8)
        sizes = {"q_len": case.sizes[2], "kv_len": case.sizes[3]}
        module.tiles(states, first, packed, packed, **sizes, hulls=hulls, broken=flags, only_if_broken=case.only_if_broken)
        assert torch.equal(states, wanted), f"rows from {first} on:\n{states}\nshould be\n{wanted}"


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            for axis in ("row", "column"):
                try:
                    check(case, axis, Path(folder))
                    results[f"{name}, {axis}"] = ""
                except Exception:
                    results[f"{name}, {axis}"] = traceback.format_exc()[-1500:]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
