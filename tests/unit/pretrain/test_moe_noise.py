"""Random numbers by hash: known values, the right distribution, and no dependence on anything but
their names."""

from __future__ import annotations

import pytest
import torch

from pretrain.moe.noise import (
    gumbel,
    hash_numbers,
    mix,
    mix_int,
    normal,
    step_draw,
    token_identity,
    uniform,
)
from tests.support.slow_moe import identity, number, scramble
from tests.support.slow_moe import uniform as slow_uniform


def tokens(count: int) -> torch.Tensor:
    return mix(torch.arange(count))


def unsigned(x: int) -> int:
    return x & ((1 << 64) - 1)


def test_the_finaliser_is_that_of_splitmix64() -> None:
    # First outputs of SplitMix64 seeded with 1234567 (the reference generator in C).
    golden, known = (
        0x9E3779B97F4A7C15,
        [6457827717110365317, 3203168211198807973, 9817491932198370423],
    )
    assert [mix_int(1234567 + (i + 1) * golden) for i in range(3)] == known
    states = torch.tensor(
        [
            unsigned(1234567 + (i + 1) * golden)
            - (1 << 64) * (unsigned(1234567 + (i + 1) * golden) >> 63)
            for i in range(3)
        ]
    )
    assert [unsigned(int(x)) for x in mix(states)] == known


def test_identities_and_numbers_equal_those_of_plain_whole_numbers() -> None:
    ids, positions = torch.tensor([7, 2**40 + 3]), torch.tensor([0, 1, 8, 9, 10])
    found = token_identity(ids, 3, positions, 8)
    true = [identity(int(i), 0, p) for i in ids for p in range(3)]
    true += [identity(7, 1, s) for s in (0, 1)] + [identity(2**40 + 3, 1, s) for s in (0, 1, 2)]
    assert [unsigned(int(x)) for x in found] == true
    bits = hash_numbers(found, draw=99, block=4, purpose=1, size=5)
    assert [[unsigned(int(x)) for x in row] for row in bits] == [
        [number(t, 99, 4, 1, e) for e in range(5)] for t in true
    ]
    u = uniform(found, draw=99, block=4, purpose=1, size=5)
    assert u.tolist() == [[slow_uniform(t, 99, 4, e) for e in range(5)] for t in true]
    assert scramble(5) == mix_int(5)


def test_every_name_counts() -> None:
    base = {"draw": 1, "block": 2, "purpose": 1, "size": 4}
    first = hash_numbers(tokens(50), **base)
    assert torch.equal(first, hash_numbers(tokens(50), **base))
    for change in ({"draw": 2}, {"block": 3}, {"purpose": 2}):
        other = hash_numbers(tokens(50), **(base | change))
        assert not (first == other).any()
    assert first.unique().numel() == first.numel()
    assert len({step_draw(seed, step) for seed in range(20) for step in range(20)}) == 400
    # Patches and text of a sample, and neighbors, are different tokens.
    every = token_identity(torch.tensor([1, 2]), 4, torch.arange(16), 8)
    assert every.unique().numel() == 8 + 16


def test_distributions() -> None:
    u = uniform(tokens(40000), draw=5, block=0, purpose=1, size=4).double()
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.005)
    histogram = torch.histc(u, 20, 0, 1) / u.numel()
    assert float((histogram - 0.05).abs().max()) < 0.002
    assert float(torch.corrcoef(u.t()).fill_diagonal_(0).abs().max()) < 0.02
    n = normal(tokens(40000), draw=5, block=0, size=4).double()
    assert (float(n.mean()), float(n.std())) == (
        pytest.approx(0, abs=0.01),
        pytest.approx(1, abs=0.01),
    )
    g = gumbel(tokens(40000), draw=5, block=0, size=4).double()
    assert (float(g.mean()), float(g.var())) == (
        pytest.approx(0.5772, abs=0.01),
        pytest.approx(1.645, abs=0.03),
    )
    assert bool(torch.isfinite(g).all() and torch.isfinite(n).all())


def test_no_generator_is_touched() -> None:
    before = torch.get_rng_state()
    gumbel(tokens(10), draw=1, block=1, size=3)
    assert torch.equal(before, torch.get_rng_state())
