"""Hash-based random numbers: known values, distributions, and dependence on every argument."""

from __future__ import annotations

import pytest
import torch

from pretrain.moe.noise import (
    derive_step_seed,
    gumbel,
    hash_tokens,
    mix,
    mix_int,
    normal,
    random_int64,
    uniform,
)
from tests.support.reference_moe import random_bits, splitmix64, token_hash
from tests.support.reference_moe import uniform as reference_uniform


def token_hashes(count: int) -> torch.Tensor:
    return mix(torch.arange(count))


def unsigned(x: int) -> int:
    return x & ((1 << 64) - 1)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def test_finalizer_of_splitmix64() -> None:
    # First outputs of the reference generator in C, seeded with 1234567.
    golden = 0x9E3779B97F4A7C15
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [unsigned(1234567 + (i + 1) * golden) for i in range(3)]
    assert [mix_int(state) for state in states] == known
    mixed = mix(torch.tensor([signed(state) for state in states]))
    assert [unsigned(int(x)) for x in mixed] == known


def test_numbers_equal_those_of_python_integers() -> None:
    ids, positions = torch.tensor([7, 2**40 + 3]), torch.tensor([0, 1, 8, 9, 10])
    hashes = hash_tokens(ids, 3, positions, 8)
    expected = [token_hash(int(i), 0, p) for i in ids for p in range(3)]
    expected += [token_hash(7, 1, s) for s in (0, 1)]
    expected += [token_hash(2**40 + 3, 1, s) for s in (0, 1, 2)]
    assert [unsigned(int(x)) for x in hashes] == expected

    bits = random_int64(hashes, step_seed=99, block_index=4, purpose=1, size=5)
    for row, token in zip(bits, expected, strict=True):
        assert [unsigned(int(x)) for x in row] == [
            random_bits(token, 99, 4, 1, e) for e in range(5)
        ]
    u = uniform(hashes, step_seed=99, block_index=4, purpose=1, size=5)
    for row, token in zip(u.tolist(), expected, strict=True):
        assert row == [reference_uniform(token, 99, 4, e) for e in range(5)]
    assert splitmix64(5) == mix_int(5)


def test_numbers_depend_on_every_argument() -> None:
    arguments = {"step_seed": 1, "block_index": 2, "purpose": 1, "size": 4}
    numbers = random_int64(token_hashes(50), **arguments)
    assert torch.equal(numbers, random_int64(token_hashes(50), **arguments))
    for change in ({"step_seed": 2}, {"block_index": 3}, {"purpose": 2}):
        changed = random_int64(token_hashes(50), **(arguments | change))
        assert not (numbers == changed).any()
    assert numbers.unique().numel() == numbers.numel()
    assert len({derive_step_seed(seed, step) for seed in range(20) for step in range(20)}) == 400

    # Patches and text of a sample, and neighboring samples, have different hashes.
    hashes = hash_tokens(torch.tensor([1, 2]), 4, torch.arange(16), 8)
    assert hashes.unique().numel() == 8 + 16


def test_distributions() -> None:
    hashes = token_hashes(40000)
    u = uniform(hashes, step_seed=5, block_index=0, purpose=1, size=4).double()
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.005)
    histogram = torch.histc(u, 20, 0, 1) / u.numel()
    assert float((histogram - 0.05).abs().max()) < 0.002
    assert float(torch.corrcoef(u.t()).fill_diagonal_(0).abs().max()) < 0.02

    n = normal(hashes, step_seed=5, block_index=0, size=4).double()
    assert float(n.mean()) == pytest.approx(0, abs=0.01)
    assert float(n.std()) == pytest.approx(1, abs=0.01)

    g = gumbel(hashes, step_seed=5, block_index=0, size=4).double()
    assert float(g.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(g.var()) == pytest.approx(1.645, abs=0.03)
    assert bool(torch.isfinite(g).all() and torch.isfinite(n).all())


def test_global_generator_is_unchanged() -> None:
    before = torch.get_rng_state()
    gumbel(token_hashes(10), step_seed=1, block_index=1, size=3)
    assert torch.equal(before, torch.get_rng_state())
