"""Shuffle quality: a full window equals a perfect shuffle, narrow windows are measurably worse."""

from __future__ import annotations

import time
from dataclasses import astuple

import numpy as np
import pytest

from data_pipeline.order.shuffle_quality import (
    LABELS,
    format_quality_table,
    measure,
    shuffle_quality,
)

SIZES, BATCH = [256] * 64, 256


@pytest.mark.parametrize("seed", range(3))
def test_full_window_is_a_perfect_shuffle(seed: int) -> None:
    measured, perfect = shuffle_quality(SIZES, seed, 64, BATCH)
    assert measured.distance_mean == pytest.approx(1 / 3, rel=0.03)
    assert measured.distance_median == pytest.approx(1 - 0.5**0.5, rel=0.05)
    assert measured.distance_5_percent == pytest.approx(1 - 0.95**0.5, rel=0.1)
    assert measured.same_shard == pytest.approx(255 / (64 * 256 - 1), rel=0.25)
    # Expected value for 256 samples from 64 shards.
    expected = 1 / (1 / 64 + (1 - 1 / 64) / 256)
    assert measured.shards_per_batch == pytest.approx(expected, rel=0.03)
    assert measured.unevenness == pytest.approx(0.87 / 16, rel=0.15)  # Kolmogorov: 0.87 / sqrt(n)
    for value, perfect_value in zip(astuple(measured), astuple(perfect), strict=True):
        assert value == pytest.approx(perfect_value, rel=0.2)


def test_class_counts_of_a_perfect_shuffle_are_hypergeometric() -> None:
    measured, _ = shuffle_quality(SIZES, 0, 64, BATCH)
    total, fraction = 64 * 256, 1 / 64
    expected = BATCH * fraction * (1 - fraction) * (total - BATCH) / (total - 1)
    assert measured.class_variance == pytest.approx(expected, rel=0.15)


def test_narrow_windows_are_worse_in_every_metric() -> None:
    qualities = [shuffle_quality(SIZES, 0, window, BATCH)[0] for window in (1, 4, 16, 64)]
    for name, increases in (
        ("distance_mean", True),
        ("distance_5_percent", True),
        ("distance_median", True),
        ("shards_per_batch", True),
        ("same_shard", False),
        ("unevenness", False),
        ("class_variance", False),
    ):
        values = [getattr(quality, name) for quality in qualities]
        assert values == sorted(values, reverse=not increases), name
        assert max(values[0], values[-1]) > 2 * min(values[0], values[-1]), name

    # A window of one shard gives batches of one shard.
    assert qualities[0].shards_per_batch == pytest.approx(1.0)
    assert qualities[0].same_shard > 0.99


def test_metrics_of_small_orders() -> None:
    sizes = np.array([4, 4])
    alternating = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    quality = measure(alternating, sizes, alternating.reshape(2, 4), sizes)
    assert quality.distance_mean == pytest.approx(2 / 8)
    assert quality.same_shard == 0.0
    assert quality.shards_per_batch == 2.0

    sequential = measure(np.arange(8), sizes, np.arange(8).reshape(2, 4), sizes)
    assert sequential.distance_mean == pytest.approx(1 / 8)
    assert (sequential.same_shard, sequential.shards_per_batch) == (1.0, 1.0)
    # The first shard is at 1/16, 3/16, 5/16 and 7/16: at 7/16 its distribution is 1, not 7/16.
    assert sequential.unevenness == pytest.approx(1 - 7 / 16)
    # 8 classes: 1 or 0 samples in a batch instead of 1/2.
    assert sequential.class_variance == pytest.approx(0.25)


def test_large_dataset_is_measured_in_part() -> None:
    start = time.process_time()
    measured, perfect = shuffle_quality(np.full(8192, 256), 0, 256, 1024)
    assert time.process_time() - start < 10
    # A batch of 1024 from 256 shards, not from those of the reduced dataset.
    assert measured.shards_per_batch == pytest.approx(1 / (1 / 256 + 1 / 1024), rel=0.05)
    assert perfect.shards_per_batch == pytest.approx(1 / (1 / 8192 + 1 / 1024), rel=0.05)
    assert measured.distance_mean == pytest.approx(256 / 8192 / 3, rel=0.1)


def test_table_has_every_metric() -> None:
    table = format_quality_table(*shuffle_quality([3, 0, 5, 1], 0, 2, 4))
    assert all(label in table for label in LABELS.values())


def test_batch_larger_than_the_dataset() -> None:
    assert shuffle_quality([1], 0, 1, 64)[0].shards_per_batch == 1.0
