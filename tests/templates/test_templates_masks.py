"""The assembly that masks tiles, statement by statement on the registers of every thread, against what it is to keep: the simulated kernels
run what it means, not its text."""

import operator
import re

import hopper_masks_on_cpu
import hopper_on_cpu
import pytest
import torch
from hopper_cases import CASES, source_of

template = hopper_on_cpu.loaded(source_of(CASES["crossed"]))
OTHERWISE = {template.LOWEST: float("-inf"), template.ZERO: 0.0}


def registers(x):
    """The registers of all threads that hold x [64, N]: N / 2 tensors [4 warps, 8 rows, 4 places], as the accumulator of wgmma lies."""
    parts = x.view(4, 2, 8, -1, 4, 2)  # warp, row / 8 % 2, row % 8, column / 8, column / 2 % 4, column % 2
    return [parts[:, i // 2 % 2, :, i // 4, :, i % 2] for i in range(x.shape[1] // 2)]


def tile(held):
    """The reverse."""
    found = torch.stack(held).view(-1, 2, 2, 4, 8, 4)  # column / 8, row / 8 % 2, column % 2, warp, row % 8, place
    return found.permute(3, 1, 4, 0, 5, 2).reshape(64, -1)


def halves(word):
    return word.contiguous().view(torch.float16).view(*word.shape, 2)


def words(pair):
    return pair.contiguous().view(torch.int32)[..., 0]


OPERATIONS = {
    "and.b32": operator.and_,
    "setp.ne.b32": operator.ne,
    "selp.f32": lambda x, other, p: torch.where(p, x, other),
    "sub.f16x2": lambda x, y: words(halves(x) - halves(y)),
    "abs.f16x2": lambda x: words(halves(x).abs()),
    "setp.lt.f16x2": lambda x, y: (halves(x) < halves(y)).unbind(-1),
}


def run(text, count, given):
    """What the assembly leaves in its first `count` operands, the others being `given`."""
    known = {f"${count + i}": x for i, x in enumerate(given)}

    def value(name):
        if name in OTHERWISE:
            return torch.tensor(OTHERWISE[name])
        return torch.tensor(int(name)).to(torch.int32) if name.isdecimal() else known[name]

    for statement in re.sub(r"[{}]|\.reg[^;]*;", "", text).split(";"):
        if not statement.strip():
            continue
        name, rest = statement.split(maxsplit=1)
        target, *sources = [part.strip() for part in rest.split(",")]
        found = OPERATIONS[name](*map(value, sources))
        known.update(zip(target.split("|"), found, strict=True) if "|" in target else [(target, found)])
    return [known[f"${i}"] for i in range(count)]


def test_registers_and_tiles_are_each_others_reverse():
    x = torch.randn(64, 96)
    assert torch.equal(tile(registers(x)), x)


@pytest.mark.parametrize("otherwise", OTHERWISE)
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_words_of_bits(columns, otherwise):
    x, bits = torch.randn(64, columns), torch.randint(-(2**31), 2**31, (64, 1, 4, 1)).int()
    spread = bits.expand(64, columns // 8, 4, 2).reshape(64, columns)
    found = tile(run(template.kept_text(columns // 2, otherwise), columns // 2, registers(x) + registers(spread)))
    column = torch.arange(columns)
    keep = (bits[:, 0, :, 0][:, column // 2 % 4] >> (column // 8 * 2 + column % 2)) & 1
    assert torch.equal(found, torch.where(keep.bool(), x, OTHERWISE[otherwise]))
    assert torch.equal(found, hopper_masks_on_cpu.masked(otherwise, columns // 2, x, spread))


@pytest.mark.parametrize("otherwise", OTHERWISE)
@pytest.mark.parametrize("starting", [True, False])
@pytest.mark.parametrize("columns, block, first", [(128, 128, 0), (64, 128, 64), (128, 192, 128), (64, 64, 0)])
def test_cuts(columns, block, first, starting, otherwise):
    """Rows first to first + 63 of a block; the last columns do not exist, nor do the last rows. Many intervals end before they begin, some
    reach beyond the block."""
    generator, base, exist, last = torch.Generator().manual_seed(columns + block + first), 500, columns - 5, 500 + block - 9
    starts, stops = torch.randint(base - 40, base + block + 40, (2, columns), generator=generator).int()
    pointers = hopper_on_cpu.Pointer(starts[:exist].clone()), hopper_on_cpu.Pointer(stops[:exist].clone())
    cuts = template.cuts_of(*pointers, exist, base, last, columns, block, starting)
    x, row = torch.randn(64, columns), (first + torch.arange(64)).float()
    rows = template.two_halves(row, row)[:, None].expand(64, columns).contiguous()
    given = registers(x) + registers(cuts.expand(64, columns).contiguous()) + registers(rows)
    found = tile(run(template.cut_text(columns // 2, otherwise), columns // 2, given))
    place = base + row[:, None]
    keep = (place < stops) & (place < last) & (torch.arange(columns) < exist)
    if starting:
        keep &= place >= starts
    assert torch.equal(found, torch.where(keep, x, OTHERWISE[otherwise]))
    assert torch.equal(found, hopper_masks_on_cpu.masked(otherwise, columns // 2, x, cuts[None], rows))
