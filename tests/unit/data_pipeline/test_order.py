"""The order over several sources: epochs, repeats, shards in use, and errors."""

from __future__ import annotations

import itertools
import multiprocessing.reduction
import time
from collections import Counter

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError
from data_pipeline.order.order import Order, OrderSource
from data_pipeline.order.plan import Plan
from data_pipeline.order.source_fractions import WeightSchedule


def make_source(sizes: list[int], weight: float | None = None, **options: object) -> OrderSource:
    weights = () if weight is None else ((0, weight),)
    name = f"of {sum(sizes)}"
    return OrderSource(name=name, sizes=sizes, weights=weights, **options)  # type: ignore[arg-type]


def test_single_source_is_its_plan() -> None:
    sizes = [5, 3, 0, 8, 1]
    plan = Plan(sizes, 3, 2)
    for source in (make_source(sizes), make_source(sizes, 0.3), make_source(sizes, repeats=4)):
        order = Order([source], 3, 2)
        assert order.samples(0, 60) == plan.samples(0, 60)
        assert order.samples(31, 7) == plan.samples(31, 7)


def test_repeats_without_weights() -> None:
    """One pass contains every sample exactly `repeats` times."""
    sizes = [[5, 3], [2, 2, 2], [1]]
    sources = [
        make_source(shard_sizes, repeats=repeats)
        for shard_sizes, repeats in zip(sizes, (1, 2, 3), strict=True)
    ]
    order = Order(sources, 7, 2)
    total = 8 * 1 + 6 * 2 + 1 * 3
    expected = {
        (shard, sample): (1, 1, 2, 2, 2, 3)[shard]
        for shard, size in enumerate((5, 3, 2, 2, 2, 1))
        for sample in range(size)
    }
    for index in range(3):
        refs = order.samples(index * total, total)
        assert Counter((ref.shard, ref.sample) for ref in refs) == expected

    consumed = [(source.samples, source.epochs) for source in order.consumed(2 * total)]
    assert consumed == [(16, 2.0), (24, 4.0), (6, 6.0)]


def test_weights_do_not_change_the_order_within_a_source() -> None:
    sizes = [[4, 4, 4], [9, 1], [6]]

    def make_order(*weights: float) -> Order:
        pairs = zip(sizes, weights, strict=True)
        return Order([make_source(shard_sizes, weight) for shard_sizes, weight in pairs], 5, 2)

    orders = [make_order(1.0, 1.0, 2.0), make_order(5.0, 0.5, 1.0)]
    for first_shard, end_shard in ((0, 3), (3, 5), (5, 6)):
        left, right = (
            [ref for ref in order.samples(0, 400) if first_shard <= ref.shard < end_shard]
            for order in orders
        )
        assert all(a == b for a, b in zip(left, right, strict=False))
        assert {ref.epoch for ref in left} == set(range(left[-1].epoch + 1))
    assert orders[0].samples(0, 12) != orders[1].samples(0, 12)


def test_equal_sources_are_shuffled_differently() -> None:
    order = Order([make_source([50, 50], 1.0), make_source([50, 50], 1.0)], 0, 2)
    first, second = (
        [ref for ref in order.samples(0, 100) if ref.shard // 2 == source] for source in (0, 1)
    )
    assert [ref.sample for ref in first] != [ref.sample for ref in second]


def make_three_source_order() -> Order:
    weights = (((0, 1.0), (60, 0.2)), ((0, 0.7),), ((0, 0.0),))
    sources = [
        OrderSource(name=str(index), sizes=[3, 0, 4], weights=schedule)
        for index, schedule in enumerate(weights)
    ]
    return Order(sources, 1, 2)


def test_any_range_and_pickling() -> None:
    order = make_three_source_order()
    expected = order.samples(0, 200)
    for start in range(0, 150, 11):
        for count in (0, 1, 8, 33):
            part = expected[start : start + count]
            assert make_three_source_order().samples(start, count) == part
            assert order.sources_of(start, count) == [ref.shard // 3 for ref in part]

    pickled = multiprocessing.reduction.ForkingPickler.dumps(order)
    unpickled = multiprocessing.reduction.ForkingPickler.loads(pickled)
    assert unpickled.samples(5, 90) == expected[5:95]


@pytest.mark.parametrize("is_sampled_late", [False, True])
def test_shards_are_in_the_order_of_use(is_sampled_late: bool) -> None:
    late_source = OrderSource(
        name="late",
        sizes=[4, 4],
        weights=((0, 0.0), (300, 0.0), (400, 1.0 if is_sampled_late else 0.0)),
    )
    sources = [make_source([3] * 5, 2.0), make_source([2] * 4, 1.0), late_source]
    order = Order(sources, 2, 2)
    for position in (0, 1, 13, 200, 3001):
        windows = order.shards_from(position)
        in_use, changes = next(windows), 0
        for ref in order.samples(position, 60):
            # A reader keeps one list of shards open until a sample is in none of them.
            while ref.shard not in in_use:
                in_use, changes = next(windows), changes + 1
                assert len(in_use) == len(set(in_use)) <= 6
        # Not too early: windows have 4 to 8 samples, so there are at most this many changes.
        assert 5 < changes <= 60 / 4 + 3
        assert any(shard >= 9 for shard in in_use) == (is_sampled_late and position == 3001)


def test_shards_of_a_single_source() -> None:
    order, plan = Order([make_source([3] * 5)], 2, 2), Plan([3] * 5, 2, 2)
    expected = [window.shards for window in itertools.islice(plan.windows_from(17), 9)]
    assert list(itertools.islice(order.shards_from(17), 9)) == expected


@pytest.mark.parametrize(
    "sources",
    [
        [make_source([0])],
        [make_source([4]), make_source([0, 0])],
        [make_source([4], 1.0), make_source([], 0.5)],
    ],
)
def test_empty_sources_are_errors(sources: list[OrderSource]) -> None:
    with pytest.raises(ConfigError, match=r"source 'of 0' has no samples .*manifest"):
        Order(sources, 0, 1)


def test_source_without_kept_samples() -> None:
    with pytest.raises(ConfigError, match=r"source 'of 4' has no samples .*drop-list .*4"):
        Order([make_source([4], dropped={0: np.arange(4)})], 0, 1)


def test_empty_source_with_weight_0() -> None:
    order = Order([make_source([4], 1.0), make_source([0], 0.0)], 0, 1)
    assert {ref.shard for ref in order.samples(0, 30)} == {0}


def test_weights_for_some_sources_only() -> None:
    with pytest.raises(ConfigError, match=r"data.train .*weight"):
        Order([make_source([4], 1.0), make_source([4])], 0, 1)


def test_speed_of_a_micro_batch() -> None:
    weights: list[WeightSchedule] = [
        ((0, 0.1), (10**10, 0.5)),
        ((500, 0.05), (10**6, 0.01)),
        ((0, 0.3),),
        ((0, 0.27),),
        ((0, 0.2),),
    ]
    sources = [OrderSource(name="", sizes=[1000] * 500, weights=points) for points in weights]
    order = Order(sources, 0, 64)
    order.samples(10**9, 64)

    seconds = []
    for step in range(200):
        start = time.process_time()
        order.samples(10**9 + 64 * step, 64)
        seconds.append(time.process_time() - start)
    assert float(np.median(seconds)) < 5e-3  # 0.7 ms on a slow core
