"""Measures of a shuffle: perfect ones look perfect, narrow windows measurably worse."""

from __future__ import annotations

import time
from dataclasses import astuple

import numpy as np
import pytest

from data_pipeline.order.shuffle_quality import LABELS, measure, quality_table, shuffle_quality

SIZES, BATCH = [256] * 64, 256


def test_a_window_over_all_shards_is_a_perfect_shuffle() -> None:
    for seed in range(3):
        found, perfect = shuffle_quality(SIZES, seed, 64, BATCH)
        assert found.distance_mean == pytest.approx(1 / 3, rel=0.03)
        assert found.distance_median == pytest.approx(1 - 0.5**0.5, rel=0.05)
        assert found.distance_5_percent == pytest.approx(1 - 0.95**0.5, rel=0.1)
        assert found.same_shard == pytest.approx(255 / (64 * 256 - 1), rel=0.25)
        # Of 256 draws among 64 shards: 1 / (1/64 + (1 - 1/64) / 256) on average.
        assert found.shards_per_batch == pytest.approx(1 / (1 / 64 + (1 - 1 / 64) / 256), rel=0.03)
        assert found.unevenness == pytest.approx(0.87 / 16, rel=0.15)  # Kolmogorov: 0.87 / sqrt(n)
        for mine, theirs in zip(astuple(found), astuple(perfect), strict=True):
            assert mine == pytest.approx(theirs, rel=0.2)


def test_class_counts_of_a_perfect_shuffle_are_hypergeometric() -> None:
    found, _ = shuffle_quality(SIZES, 0, 64, BATCH)
    total, share = 64 * 256, 1 / 64
    expected = BATCH * share * (1 - share) * (total - BATCH) / (total - 1)
    assert found.class_variance == pytest.approx(expected, rel=0.15)


def test_narrow_windows_are_worse_in_every_measure() -> None:
    found = [shuffle_quality(SIZES, 0, window, BATCH)[0] for window in (1, 4, 16, 64)]
    for name, rises in (
        ("distance_mean", True),
        ("distance_5_percent", True),
        ("distance_median", True),
        ("shards_per_batch", True),
        ("same_shard", False),
        ("unevenness", False),
        ("class_variance", False),
    ):
        values = [getattr(quality, name) for quality in found]
        assert values == sorted(values, reverse=not rises), name
        assert max(values[0], values[-1]) > 2 * min(values[0], values[-1]), name
    assert found[0].shards_per_batch == pytest.approx(
        1.0
    )  # a window of one shard: batches of one shard
    assert found[0].same_shard > 0.99


def test_the_measures_by_hand() -> None:
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # two shards of four, in turns
    quality = measure(order, np.array([4, 4]), order.reshape(2, 4), np.array([4, 4]))
    assert quality.distance_mean == pytest.approx(2 / 8)
    assert quality.same_shard == 0.0
    assert quality.shards_per_batch == 2.0
    straight = measure(np.arange(8), np.array([4, 4]), np.arange(8).reshape(2, 4), np.array([4, 4]))
    assert straight.distance_mean == pytest.approx(1 / 8)
    assert (straight.same_shard, straight.shards_per_batch) == (1.0, 1.0)
    # Places of the first shard are 1/16, 3/16, 5/16, 7/16: at 7/16 all of them, where 7/16 should
    # be.
    assert straight.unevenness == pytest.approx(1 - 7 / 16)
    assert straight.class_variance == pytest.approx(
        0.25
    )  # 8 classes: 1 or 0 in a batch instead of 1/2


def test_a_large_set_is_measured_in_part() -> None:
    start = time.process_time()
    found, perfect = shuffle_quality(np.full(8192, 256), 0, 256, 1024)
    assert time.process_time() - start < 10
    # A batch of 1024 from 256 shards: 1 / (1/256 + 1/1024), not what a small copy of the set would
    # give.
    assert found.shards_per_batch == pytest.approx(1 / (1 / 256 + 1 / 1024), rel=0.05)
    assert perfect.shards_per_batch == pytest.approx(1 / (1 / 8192 + 1 / 1024), rel=0.05)
    assert found.distance_mean == pytest.approx(256 / 8192 / 3, rel=0.1)


def test_the_table_names_every_measure() -> None:
    table = quality_table(*shuffle_quality([3, 0, 5, 1], 0, 2, 4))
    assert all(label in table for label in LABELS.values())
    assert shuffle_quality([1], 0, 1, 64)[0].shards_per_batch == 1.0
