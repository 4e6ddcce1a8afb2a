"""The order of one source: complete, shuffled, and independent of how it is read."""

from __future__ import annotations

import itertools
import multiprocessing.reduction
import time

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError
from data_pipeline.order.plan import Plan

SIZES = (5, 3, 8, 1, 4, 7)
TOTAL = sum(SIZES)


@pytest.mark.parametrize("window", [1, 2, 4, 6, 100])
def test_every_epoch_contains_every_sample_once(window: int) -> None:
    plan = Plan(SIZES, seed=3, shuffle_window=window)
    all_samples = {(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)}
    orders = []
    for epoch in range(3):
        refs = plan.samples(epoch * TOTAL, TOTAL)
        assert {ref.epoch for ref in refs} == {epoch}
        assert len(refs) == TOTAL
        assert {(ref.shard, ref.sample) for ref in refs} == all_samples
        orders.append([(ref.shard, ref.sample) for ref in refs])
    assert orders[0] != orders[1] != orders[2]


def test_any_range() -> None:
    plan = Plan(SIZES, seed=3, shuffle_window=2)
    expected = plan.samples(0, 4 * TOTAL)
    for start in range(2 * TOTAL + 3):
        for count in (0, 1, 5, TOTAL + 2):
            # A new plan each time: the result must not depend on earlier calls.
            assert Plan(SIZES, 3, 2).samples(start, count) == expected[start : start + count]
    assert plan.sample_at(17) == expected[17]


def test_window_limits_the_shards_in_use() -> None:
    refs = Plan([10] * 9, seed=1, shuffle_window=3).samples(0, 90)
    windows = [{ref.shard for ref in refs[start : start + 30]} for start in (0, 30, 60)]
    assert [len(window) for window in windows] == [3, 3, 3]
    assert set.union(*windows) == set(range(9))
    assert len({ref.shard for ref in refs[:10]}) > 1  # samples of a window are mixed


def test_seed_changes_the_order() -> None:
    assert Plan(SIZES, 1, 2).samples(0, TOTAL) != Plan(SIZES, 2, 2).samples(0, TOTAL)


def test_uniform_shuffle_of_a_window() -> None:
    # Each of 6 samples should come first about 600 times in 3600 epochs; 5 sigma is 112.
    plan = Plan([2, 4], seed=0, shuffle_window=2)
    counts = np.zeros((2, 4))
    for epoch in range(3600):
        first = plan.sample_at(epoch * 6)
        counts[first.shard, first.sample] += 1
    assert np.abs(counts[counts > 0] - 600).max() < 112
    assert (counts > 0).sum() == 6


def test_golden_order() -> None:
    """A change here breaks the resumption of every earlier run."""
    refs = Plan(SIZES, seed=7, shuffle_window=2).samples(TOTAL - 2, 5)
    assert [tuple(ref) for ref in refs] == [(0, 4, 2), (0, 4, 1), (1, 0, 1), (1, 0, 2), (1, 4, 0)]


def test_pickling() -> None:
    plan = Plan(SIZES, seed=3, shuffle_window=2)
    plan.samples(0, 10)
    pickled = multiprocessing.reduction.ForkingPickler.dumps(plan)
    assert len(pickled) < 1000  # without caches
    unpickled = multiprocessing.reduction.ForkingPickler.loads(pickled)
    assert unpickled.samples(5, 40) == plan.samples(5, 40)


def test_window_of_one_sample() -> None:
    plan = Plan([3, 1], seed=0, shuffle_window=1)
    for epoch in range(6):  # in some of them the shard of one sample comes last
        samples = {(ref.shard, ref.sample) for ref in plan.samples(4 * epoch, 4)}
        assert samples == {(0, 0), (0, 1), (0, 2), (1, 0)}


def test_speed_of_a_large_plan() -> None:
    plan = Plan([1000] * 20_000, seed=0, shuffle_window=256)
    start = time.process_time()
    plan.samples(10_000_000, 64)  # shuffles one window of 256,000 samples
    for step in range(200):
        plan.samples(10_000_000 + 64 * step, 64)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(("sizes", "window"), [([], 1), ([0, 0], 1), ([1], 0)])
def test_no_samples_or_no_window(sizes: list[int], window: int) -> None:
    with pytest.raises(ConfigError, match=f"{len(sizes)} shards? .* shuffle_window {window}"):
        Plan(sizes, 0, window)


@pytest.mark.parametrize(
    "sizes", [(0, 5, 0, 0, 3, 0), (7,), (0, 1, 0), (100, 1, 1, 1, 10, 1), (1,)]
)
@pytest.mark.parametrize("window", [1, 2, 9])
def test_unusual_shard_sizes(sizes: tuple[int, ...], window: int) -> None:
    """Empty shards, one shard, one sample, and shards of very different size."""
    plan, total = Plan(sizes, seed=1, shuffle_window=window), sum(sizes)
    expected = sorted((shard, sample) for shard, size in enumerate(sizes) for sample in range(size))
    for epoch in range(3):
        refs = plan.samples(epoch * total, total)
        assert sorted((ref.shard, ref.sample) for ref in refs) == expected
        assert {ref.epoch for ref in refs} == {epoch}


def test_empty_shards_do_not_change_the_order() -> None:
    plan, with_empty = Plan((4, 3, 5), 2, 2), Plan((0, 4, 0, 3, 5), 2, 2)
    index = {1: 0, 3: 1, 4: 2}
    refs = [ref._replace(shard=index[ref.shard]) for ref in with_empty.samples(0, 40)]
    assert refs == plan.samples(0, 40)


def test_windows_are_in_the_order_of_use() -> None:
    plan = Plan([3] * 7, seed=4, shuffle_window=3, first_shard=10)
    for start in (0, 4, 9, 20, 21, 50):
        for window in itertools.islice(plan.windows_from(start), 5):
            count = 3 * len(window.shards)
            assert {ref.shard for ref in plan.samples(window.first, count)} == set(window.shards)
            assert start < window.first + count

    firsts = [window.first for window in itertools.islice(plan.windows_from(10), 4)]
    assert firsts == [9, 18, 21, 30]


@pytest.mark.parametrize("window", [1, 3, 256])
def test_speed_of_seeking_in_a_billion_samples(window: int) -> None:
    plan = Plan(np.full(100_000, 10_000), seed=0, shuffle_window=window)
    for position in (10**9 - 5, 3 * 10**9 + 77):
        start = time.process_time()
        assert len(plan.samples(position, 64)) == 64
        assert time.process_time() - start < 1.0
