"""Which line of which head has its turn, and how many lines are long: a permutation, whatever the numbers."""

import hopper_on_cpu
import pytest
import torch
from hopper_cases import CASES, source_of

from flexmask.templates import hopper, lists
from flexmask.templates.hopper_turns import long_level

find_turn = hopper_on_cpu.loaded(source_of(CASES["full"])).find_turn


def turns_of(long, late, lines, resident, heads):
    numbers = [torch.tensor(x) for x in (lines, resident, heads)]
    line, head = find_turn(torch.arange(lines * heads), (torch.tensor(long), torch.tensor(late)), *numbers)
    return list(zip(line.tolist(), head.tolist(), strict=True))


@pytest.mark.parametrize("lines", [1, 2, 5, 8])
@pytest.mark.parametrize(("resident", "heads"), [(1, 1), (1, 5), (2, 8), (3, 9), (4, 4)])
def test_every_line_of_every_head_has_one_turn(lines, resident, heads):
    everything = {(line, head) for line in range(lines) for head in range(heads)}
    for long in range(lines + 1):
        for late in (0, 1, 3, 7, 511):
            found = turns_of(long, late, lines, resident, heads)
            assert set(found) == everything and len(found) == len(everything)
            last = min(late * resident, heads)
            first = found[: long * last]
            assert first == [(line, head) for line in range(long) for head in range(heads - last, heads)]
            rest = found[long * last :]
            assert rest == sorted(rest, key=lambda turn: (turn[1] // resident, *turn))


def test_without_long_lines_heads_come_in_groups():
    assert turns_of(0, 0, 2, 2, 4) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert turns_of(0, 7, 1, 1, 3) == [(0, 0), (0, 1), (0, 2)]


def test_kernels_know_how_many_levels_there_are():
    assert hopper.LEVELS.value == lists.ORDER_LEVELS.value


@pytest.mark.parametrize("resident", [1, 2, 3, 6, 32])
def test_levels(resident):
    """Of two neighbouring shares of the work the greater one that is at least what a program has while these heads are walked."""
    level, share = long_level(resident, 132), resident / 132
    assert level == 8 or 2**level / 256 >= share > 2 ** (level - 1) / 256
