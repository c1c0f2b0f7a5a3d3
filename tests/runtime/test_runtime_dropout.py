"""Dropout's generator: the same bits as the reference's own, and numbers that look independent wherever one looks."""

import pytest
import torch

from flexmask import reference
from flexmask.runtime.dropout import dropped, row_keys
from flexmask.runtime.extras import Extras

B, H, Q, KV = 4, 4, 512, 512  # four million pairs
KNOWN = ["111100100100100011110110", "100111111001010101010010"]


def drawn(seed=0, p=0.25, sizes=(B, H, Q, KV)):
    """Whether pairs are dropped, [B, H, Q, KV]."""
    b, h, q, kv = (torch.arange(n) for n in sizes)
    keys = row_keys(torch.tensor([seed]), b.view(-1, 1, 1, 1), h.view(-1, 1, 1), q.view(-1, 1))
    return dropped(keys, kv, Extras(dropout_p=p).threshold)


def deviations(x, p):
    """How many standard deviations the mean of independent bools that are true with chance p is off."""
    return abs(x.double().mean().item() - p) / (p * (1 - p) / x.numel()) ** 0.5


def correlation(x, y, p):
    """Correlation of bools that are true with chance p, in standard deviations of that of independent ones."""
    product = (x.double() - p) * (y.double() - p)
    return abs(product.mean().item()) * product.numel() ** 0.5 / (p * (1 - p))


@pytest.mark.parametrize("seed", [0, 1, -1, 1 << 31, (1 << 32) + 1, (1 << 63) - 1, -(1 << 63), 123456789012345])
def test_bits_are_those_of_the_reference(seed):
    sizes = (2, 3, 37, 53)
    want = reference._dropped(seed, tuple(torch.arange(n) for n in sizes), 0.3)
    assert torch.equal(drawn(seed, 0.3, sizes), want)


def test_known_bits():
    """Results saved with a seed stay reproducible: these must never change."""
    found = drawn(7, 0.5, (1, 2, 1, 24)).int()
    assert ["".join(map(str, row.tolist())) for row in found[0, :, 0]] == KNOWN


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_rate(p):
    assert deviations(drawn(3, p), p) < 4


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p):
    x = drawn(5, p)
    for axis in range(4):
        for distance in (1, 2, 3):
            n = x.shape[axis] - distance
            assert correlation(x.narrow(axis, 0, n), x.narrow(axis, distance, n), p) < 4.5, (axis, distance)
    assert correlation(x[..., 1:, 1:], x[..., :-1, :-1], p) < 4.5
    above = torch.ones(Q, KV).triu(1).bool()
    assert correlation(x[..., above], x.mT[..., above], p) < 4.5
    for bit in range(9):  # the hash begins with kv ^ key, so try pairs of keys that differ in one bit
        keys = torch.arange(KV)[torch.arange(KV) & (1 << bit) == 0]
        assert correlation(x[..., keys], x[..., keys ^ (1 << bit)], p) < 4.5, bit


def test_rectangles_are_independent():
    """Rows that held the same bits in another order, or turned round, would show in products of four."""
    x = drawn(6, 0.5).double() * 2 - 1
    for distance in (1, 2, 7, 64):
        product = (
            x[..., distance:, distance:] * x[..., distance:, :-distance] * x[..., :-distance, distance:] * x[..., :-distance, :-distance]
        )
        assert abs(product.mean().item()) * product.numel() ** 0.5 < 4.5, distance


def test_seeds_are_independent():
    x = drawn(1000)
    for seed in (1001, 1002, 1000 + (1 << 32), -1000):
        assert correlation(x, drawn(seed), 0.25) < 4.5, seed


def test_counts_of_rows_and_keys_scatter_as_they_should():
    """chi-square of how many pairs are dropped, along each axis: too even would be as wrong as too uneven."""
    x, p = drawn(8).double(), 0.25
    for axis in (2, 3):
        counts = x.sum(axis)
        n = x.shape[axis]
        chi = ((counts - n * p) ** 2 / (n * p * (1 - p))).sum().item()
        assert abs(chi - counts.numel()) / (2 * counts.numel()) ** 0.5 < 4.5, axis


def test_places_decide_alone():
    """More of anything leaves the bits of what was there before."""
    small, large = drawn(9, 0.3, (2, 2, 10, 30)), drawn(9, 0.3, (3, 4, 70, 90))
    assert torch.equal(large[:2, :2, :10, :30], small)


def test_more_chance_drops_more():
    assert bool((drawn(4, 0.2) <= drawn(4, 0.3)).all())


def test_chances_are_parts_of_two_to_the_24th():
    assert Extras().dropout is None
    seed = torch.tensor([1])
    assert Extras(dropout_p=0.5, seed=seed).dropout == (seed, 1 << 23, 2.0)
    assert Extras(dropout_p=1e-9, seed=seed).factor == 1.0
    assert Extras(dropout_p=1 - 1e-12, seed=seed).factor == 1 << 24  # not infinite
    with pytest.raises(ValueError, match="seed"):
        _ = Extras(dropout_p=0.5).dropout
