"""The random numbers of a sample."""

from __future__ import annotations

import numpy as np

from data_pipeline.content.image import NUM_GEOMETRY_UNIFORMS
from data_pipeline.content.image.random_numbers import NUM_UNIFORMS, uniform_numbers


def test_uniform_numbers_are_fixed_and_depend_on_all_arguments() -> None:
    uniforms = uniform_numbers(b"sample", 1, 2, "shard", "key")
    assert uniforms[:3] == [0.36659216694533825, 0.33065076149068773, 0.37546042795293033]
    assert len(uniforms) == NUM_UNIFORMS >= NUM_GEOMETRY_UNIFORMS + 2
    arguments = [
        (b"sample", 1, 2, "shard", "key"),
        (b"colour", 1, 2, "shard", "key"),
        (b"sample", 11, 2, "shard", "key"),
        (b"sample", 1, 12, "shard", "key"),
        (b"sample", 1, 2, "shardk", "ey"),
        (b"sample", 1, 2, "shar", "dkey"),
        (b"sample", 1, 2, "shard", "key "),
        (b"sample", -1, 2, "shard", "key"),
        (b"sample", 1, 2, "shard", "k\udcffey"),
    ]
    assert len({tuple(uniform_numbers(*args)) for args in arguments}) == len(arguments)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    table = np.array([uniform_numbers(b"sample", 0, 0, "s", str(key)) for key in range(4000)])
    assert table.min() >= 0 and table.max() < 1
    assert np.abs(table.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(table.T) - np.eye(NUM_UNIFORMS)).max() < 0.07
