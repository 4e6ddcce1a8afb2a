"""Mixtures of sources: exact shares in every batch, and the same order however it is asked for."""

from __future__ import annotations

import itertools
import multiprocessing.reduction
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError
from data_pipeline.order.mixture import Mixture
from data_pipeline.order.order import Order, OrderSource
from data_pipeline.order.plan import Plan
from data_pipeline.order.shares import Points, Shares

CONSTANT: list[list[Points]] = [
    [((0, 0.5),), ((0, 0.25),), ((0, 0.25),)],
    [((0, 0.1),), ((0, 0.2),), ((0, 0.7),)],
    [((0, 1.0),)],
    [((0, 3.0),), ((0, 0.0),), ((0, 1.0),)],
    [((0, 1.0),), ((0, 1e-3),)],
    [((0, 0.333),), ((0, 2.7),), ((0, 0.01),), ((0, 1.0),), ((0, 1.0),)],
]
SCHEDULES: list[list[Points]] = [
    [((0, 1.0), (100, 0.0)), ((0, 0.0), (100, 1.0))],
    [((10, 0.2), (57, 0.9), (300, 0.1)), ((0, 0.5),), ((40, 0.1), (41, 3.0))],
    [((0, 0.0), (50, 0.0), (60, 0.3)), ((0, 1.0),)],
]


def share_at(weights: list[Points], pairs: int) -> list[Fraction]:
    """Shares at every point where a weight has one, and straight lines between; by definition."""

    def weight(points: Points, at: int) -> Fraction:
        exact = [(pair, Fraction(str(value))) for pair, value in points]
        if at <= exact[0][0]:
            return exact[0][1]
        for (left, low), (right, high) in itertools.pairwise(exact):
            if left <= at <= right:
                return low + (high - low) * (at - left) / (right - left)
        return exact[-1][1]

    def shares(at: int) -> list[Fraction]:
        found = [weight(points, at) for points in weights]
        return [value / sum(found) for value in found]

    knots = sorted({0} | {pair for points in weights for pair, _ in points})
    before = max(knot for knot in knots if knot <= pairs)
    after = [knot for knot in knots if knot > pairs]
    if not after:
        return shares(before)
    done = Fraction(pairs - before, after[0] - before)
    return [
        low + (high - low) * done
        for low, high in zip(shares(before), shares(after[0]), strict=True)
    ]


def brute_force(weights: list[Points], count: int) -> list[int]:
    """The stream by a loop over pairs: adds up each pair's share, and hands out what is due."""
    due, given, stream = [Fraction(0)] * len(weights), [0] * len(weights), list[int]()
    tick = 0
    while len(stream) < count:
        ends = zip(share_at(weights, tick), share_at(weights, tick + 1), strict=True)
        for source, (low, high) in enumerate(ends):
            due[source] += (low + high) / 2  # exact: a share is a straight line within one pair
            if given[source] < (due[source] + Fraction(1, 2)).__floor__():
                given[source] += 1
                stream.append(source)
        tick += 1
    return stream[:count]


@pytest.mark.parametrize("weights", CONSTANT + SCHEDULES)
def test_the_stream_is_that_of_a_loop(weights: list[Points]) -> None:
    expected = brute_force(weights, 420)
    mixture = Mixture(Shares(weights))
    assert mixture.stretch(0, 420).sources == expected
    for start in (0, 1, 2, 3, 7, 50, 99, 100, 101, 299, 300, 333):
        for count in (0, 1, 2, 17, 64):
            # A new one each time: what was asked before must not matter.
            firsts, sources = Mixture(Shares(weights)).stretch(start, count)
            assert sources == expected[start : start + count]
            seen = Counter(expected[:start])
            assert (
                firsts == mixture.before(start) == [seen[source] for source in range(len(weights))]
            )


@pytest.mark.parametrize("weights", CONSTANT + SCHEDULES)
def test_counts_stay_near_what_is_due(weights: list[Points]) -> None:
    mixture, near = Mixture(Shares(weights)), (len(weights) + 3) / 2
    due, bounds = [Fraction(0)] * len(weights), []
    before = [0] * len(weights)
    for position in range(500):
        counts = mixture.before(position)
        assert sum(counts) == position
        assert all(new >= old for new, old in zip(counts, before, strict=True))
        bounds += [abs(count - exact) for count, exact in zip(counts, due, strict=True)]
        ends = zip(share_at(weights, position), share_at(weights, position + 1), strict=True)
        due, before = (
            [old + (low + high) / 2 for old, (low, high) in zip(due, ends, strict=True)],
            counts,
        )
    assert max(bounds) < near
    far = mixture.before(10**12 + 7)  # and never drift
    assert sum(far) == 10**12 + 7
    if all(len(points) == 1 for points in weights):
        total = sum(Fraction(str(points[0][1])) for points in weights)
        for count, points in zip(far, weights, strict=True):
            assert abs(count - (10**12 + 7) * Fraction(str(points[0][1])) / total) < near


def test_batches_are_exact_where_shares_are_whole() -> None:
    mixture = Mixture(Shares([((0, 0.5),), ((0, 0.3),), ((0, 0.15),), ((0, 0.05),)]))
    for batch in range(50):
        assert Counter(mixture.stretch((10**9 + batch) * 40, 40).sources) == {
            0: 20,
            1: 12,
            2: 6,
            3: 2,
        }


def test_a_schedule_moves_the_shares() -> None:
    mixture = Mixture(Shares([((1000, 1.0), (2000, 0.0)), ((1000, 0.0), (2000, 1.0))]))
    assert mixture.before(1000) == [1000, 0]
    assert mixture.before(2000) == [1500, 500]  # the integral of a share that falls from 1 to 0
    assert mixture.before(1500) == [1375, 125]
    assert set(mixture.stretch(2001, 500).sources) == {1}


def test_a_sample_is_reached_where_it_comes() -> None:
    for weights in CONSTANT + SCHEDULES:
        mixture = Mixture(Shares(weights))
        stream = mixture.stretch(0, 400).sources
        for source in range(len(weights)):
            places = [place for place, drawn in enumerate(stream) if drawn == source]
            for number in range(0, min(len(places), 100), 7):
                found = mixture.reached(source, number)
                assert found is not None
                assert abs(found - places[number]) <= len(weights)
    assert Mixture(Shares([((0, 1.0),), ((0, 0.0),)])).reached(1, 0) is None
    fading = Mixture(Shares([((0, 1.0), (100, 0.0)), ((0, 1.0),)]))
    total = fading.before(10**6)[0]
    assert fading.reached(0, total - 1) is not None
    assert fading.reached(0, total) is None


def test_weights_that_sum_to_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the weights of all sources are 0; give one"):
        Shares([((0, 0.0),), ((0, 0.0),)])
    with pytest.raises(ConfigError, match=r"all sources are 0 at 50 pairs"):
        Shares([((0, 1.0), (50, 0.0)), ((50, 0.0), (70, 1.0))])


def source(sizes: list[int], weight: float | None = None, **more: object) -> OrderSource:
    weights = () if weight is None else ((0, weight),)
    return OrderSource(name=f"of {sum(sizes)}", sizes=sizes, weights=weights, **more)  # type: ignore[arg-type]


def test_a_source_alone_is_its_plan() -> None:
    sizes = [5, 3, 0, 8, 1]
    plan = Plan(sizes, 3, 2)
    for alone in (source(sizes), source(sizes, 0.3), source(sizes, repeats=4)):
        order = Order([alone], 3, 2)
        assert order.samples(0, 60) == plan.samples(0, 60)
        assert order.samples(31, 7) == plan.samples(31, 7)


def test_without_weights_every_sample_comes_repeats_times_in_a_pass() -> None:
    sizes = [[5, 3], [2, 2, 2], [1]]
    order = Order(
        [source(own, repeats=repeats) for own, repeats in zip(sizes, (1, 2, 3), strict=True)], 7, 2
    )
    total = 8 * 1 + 6 * 2 + 1 * 3
    expected = {
        (shard, sample): (1, 1, 2, 2, 2, 3)[shard]
        for shard, size in enumerate((5, 3, 2, 2, 2, 1))
        for sample in range(size)
    }
    for turn in range(3):
        refs = order.samples(turn * total, total)
        assert Counter((ref.shard, ref.sample) for ref in refs) == expected
    assert [(c.samples, c.epochs) for c in order.consumed(2 * total)] == [
        (16, 2.0),
        (24, 4.0),
        (6, 6.0),
    ]


def test_each_source_keeps_its_own_order() -> None:
    """Whatever the weights, the samples of a source come as if it were alone."""
    sizes = [[4, 4, 4], [9, 1], [6]]
    light = Order(
        [source(own, weight) for own, weight in zip(sizes, (1.0, 1.0, 2.0), strict=True)], 5, 2
    )
    heavy = Order(
        [source(own, weight) for own, weight in zip(sizes, (5.0, 0.5, 1.0), strict=True)], 5, 2
    )
    for low, high in ((0, 3), (3, 5), (5, 6)):
        mine = [
            [ref for ref in order.samples(0, 400) if low <= ref.shard < high]
            for order in (light, heavy)
        ]
        assert all(a == b for a, b in zip(*mine, strict=False))
        assert {ref.epoch for ref in mine[0]} == set(range(mine[0][-1].epoch + 1))
    assert light.samples(0, 12) != heavy.samples(0, 12)


def test_two_equal_sources_are_not_shuffled_alike() -> None:
    order = Order([source([50, 50], 1.0), source([50, 50], 1.0)], 0, 2)
    first, second = (
        [ref for ref in order.samples(0, 100) if ref.shard // 2 == number] for number in (0, 1)
    )
    assert [ref.sample for ref in first] != [ref.sample for ref in second]


def test_pieces_agree_with_the_whole_and_travel() -> None:
    def make() -> Order:
        weights = (((0, 1.0), (60, 0.2)), ((0, 0.7),), ((0, 0.0),))
        return Order(
            [OrderSource(name=str(n), sizes=[3, 0, 4], weights=w) for n, w in enumerate(weights)],
            1,
            2,
        )

    order = make()
    whole = order.samples(0, 200)
    for start in range(0, 150, 11):
        for count in (0, 1, 8, 33):
            assert make().samples(start, count) == whole[start : start + count]
            assert [order.sources_of(start, count)] == [
                [ref.shard // 3 for ref in whole[start : start + count]]
            ]
    sent = multiprocessing.reduction.ForkingPickler.dumps(order)
    assert multiprocessing.reduction.ForkingPickler.loads(sent).samples(5, 90) == whole[5:95]


@pytest.mark.parametrize("late", [False, True])
def test_shards_come_in_the_order_of_need(late: bool) -> None:
    fades = OrderSource(
        name="late",
        sizes=[4, 4],
        weights=((0, 0.0), (300, 0.0), (400, 1.0) if late else (400, 0.0)),
    )
    order = Order([source([3] * 5, 2.0), source([2] * 4, 1.0), fades], 2, 2)
    for position in (0, 1, 13, 200, 3001):
        lists = order.shards_from(position)
        in_use, changes = next(lists), 0
        for ref in order.samples(position, 60):
            while (
                ref.shard not in in_use
            ):  # a reader that holds one list, and takes the next when it must
                in_use, changes = next(lists), changes + 1
                assert len(in_use) == len(set(in_use)) <= 6
        # Nothing too early: windows have 4 to 8 samples, so there are this many changes at most.
        assert changes <= 60 / 4 + 3
        assert changes > 5
        assert any(shard >= 9 for shard in in_use) == (late and position == 3001)
    alone = Order([source([3] * 5)], 2, 2)
    plan = Plan([3] * 5, 2, 2)
    assert list(itertools.islice(alone.shards_from(17), 9)) == [
        window.shards for window in itertools.islice(plan.windows_from(17), 9)
    ]


def test_empty_sources_are_refused_unless_their_weight_is_0() -> None:
    for sources in (
        [source([0])],
        [source([4]), source([0, 0])],
        [source([4], 1.0), source([], 0.5)],
    ):
        with pytest.raises(
            ConfigError, match=r"source 'of 0' has no samples \(its manifest has none\)"
        ):
            Order(sources, 0, 1)
    everything = {0: np.arange(4)}
    with pytest.raises(ConfigError, match=r"its drop-list leaves out all 4"):
        Order([source([4], dropped=everything)], 0, 1)
    order = Order([source([4], 1.0), source([0], 0.0)], 0, 1)
    assert {ref.shard for ref in order.samples(0, 30)} == {0}
    with pytest.raises(ConfigError, match="a weight for all of them or for none"):
        Order([source([4], 1.0), source([4])], 0, 1)


def test_a_micro_batch_of_five_sources_costs_little() -> None:
    weights: list[Points] = [
        ((0, 0.1), (10**10, 0.5)),
        ((500, 0.05), (10**6, 0.01)),
        ((0, 0.3),),
        ((0, 0.27),),
        ((0, 0.2),),
    ]
    order = Order(
        [OrderSource(name="", sizes=[1000] * 500, weights=points) for points in weights], 0, 64
    )
    order.samples(10**9, 64)
    times = []
    for step in range(200):
        start = time.perf_counter()
        order.samples(10**9 + 64 * step, 64)
        times.append(time.perf_counter() - start)
    assert float(np.median(times)) < 1e-3
