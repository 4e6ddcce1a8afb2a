"""Mixtures of sources: exact fractions in every batch, and seeking to any position."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest

from data_pipeline.common.errors import ConfigError
from data_pipeline.order.mixture import Mixture
from data_pipeline.order.source_fractions import SourceFractions, WeightSchedule

CONSTANT: list[list[WeightSchedule]] = [
    [((0, 0.5),), ((0, 0.25),), ((0, 0.25),)],
    [((0, 0.1),), ((0, 0.2),), ((0, 0.7),)],
    [((0, 1.0),)],
    [((0, 3.0),), ((0, 0.0),), ((0, 1.0),)],
    [((0, 1.0),), ((0, 1e-3),)],
    [((0, 0.333),), ((0, 2.7),), ((0, 0.01),), ((0, 1.0),), ((0, 1.0),)],
]
SCHEDULES: list[list[WeightSchedule]] = [
    [((0, 1.0), (100, 0.0)), ((0, 0.0), (100, 1.0))],
    [((10, 0.2), (57, 0.9), (300, 0.1)), ((0, 0.5),), ((40, 0.1), (41, 3.0))],
    [((0, 0.0), (50, 0.0), (60, 0.3)), ((0, 1.0),)],
]


def reference_weight(points: WeightSchedule, position: int) -> Fraction:
    """Linear interpolation between the points of a schedule."""
    exact = [(pairs, Fraction(str(value))) for pairs, value in points]
    if position <= exact[0][0]:
        return exact[0][1]
    for (left, low), (right, high) in itertools.pairwise(exact):
        if left <= position <= right:
            return low + (high - low) * (position - left) / (right - left)
    return exact[-1][1]


def normalized_weights(weights: list[WeightSchedule], position: int) -> list[Fraction]:
    current = [reference_weight(points, position) for points in weights]
    return [weight / sum(current) for weight in current]


def reference_fractions(weights: list[WeightSchedule], position: int) -> list[Fraction]:
    """Fractions by definition: normalized at every point of any schedule, linear in between."""
    points = sorted({0} | {pairs for schedule in weights for pairs, _ in schedule})
    start = max(point for point in points if point <= position)
    later = [point for point in points if point > position]
    if not later:
        return normalized_weights(weights, start)

    progress = Fraction(position - start, later[0] - start)
    ends = zip(
        normalized_weights(weights, start), normalized_weights(weights, later[0]), strict=True
    )
    return [low + (high - low) * progress for low, high in ends]


def reference_stream(weights: list[WeightSchedule], count: int) -> list[int]:
    """The stream by a loop over pairs that integrates every fraction."""
    integrals, emitted = [Fraction(0)] * len(weights), [0] * len(weights)
    stream: list[int] = []
    tick = 0
    while len(stream) < count:
        ends = zip(
            reference_fractions(weights, tick), reference_fractions(weights, tick + 1), strict=True
        )
        for source, (low, high) in enumerate(ends):
            integrals[source] += (low + high) / 2  # exact: a fraction is linear within one pair
            if emitted[source] < (integrals[source] + Fraction(1, 2)).__floor__():
                emitted[source] += 1
                stream.append(source)
        tick += 1
    return stream[:count]


@pytest.mark.parametrize("weights", CONSTANT + SCHEDULES)
def test_stream_matches_the_reference(weights: list[WeightSchedule]) -> None:
    expected = reference_stream(weights, 420)
    mixture = Mixture(SourceFractions(weights))
    assert mixture.slice_at(0, 420).sources == expected

    for start in (0, 1, 2, 3, 7, 50, 99, 100, 101, 299, 300, 333):
        counts = Counter(expected[:start])
        counts_before = [counts[source] for source in range(len(weights))]
        for count in (0, 1, 2, 17, 64):
            # A new object each time: the result must not depend on earlier calls.
            part = Mixture(SourceFractions(weights)).slice_at(start, count)
            assert part.sources == expected[start : start + count]
            assert part.counts_before == mixture.counts_before(start) == counts_before


@pytest.mark.parametrize("weights", CONSTANT + SCHEDULES)
def test_counts_stay_close_to_the_expected_ones(weights: list[WeightSchedule]) -> None:
    mixture, bound = Mixture(SourceFractions(weights)), (len(weights) + 3) / 2
    expected, previous = [Fraction(0)] * len(weights), [0] * len(weights)
    differences = []
    for position in range(500):
        counts = mixture.counts_before(position)
        assert sum(counts) == position
        assert all(new >= old for new, old in zip(counts, previous, strict=True))
        differences += [abs(count - exact) for count, exact in zip(counts, expected, strict=True)]

        left = reference_fractions(weights, position)
        right = reference_fractions(weights, position + 1)
        ends = zip(expected, left, right, strict=True)
        expected = [total + (low + high) / 2 for total, low, high in ends]
        previous = counts
    assert max(differences) < bound

    # No drift at large positions.
    position = 10**12 + 7
    counts = mixture.counts_before(position)
    assert sum(counts) == position
    if all(len(points) == 1 for points in weights):
        fractions = normalized_weights(weights, 0)
        for count, fraction in zip(counts, fractions, strict=True):
            assert abs(count - position * fraction) < bound


def test_exact_batches_for_integer_counts() -> None:
    mixture = Mixture(SourceFractions([((0, 0.5),), ((0, 0.3),), ((0, 0.15),), ((0, 0.05),)]))
    for batch in range(50):
        sources = mixture.slice_at((10**9 + batch) * 40, 40).sources
        assert Counter(sources) == {0: 20, 1: 12, 2: 6, 3: 2}


def test_schedule_changes_the_fractions() -> None:
    mixture = Mixture(SourceFractions([((1000, 1.0), (2000, 0.0)), ((1000, 0.0), (2000, 1.0))]))
    assert mixture.counts_before(1000) == [1000, 0]
    assert mixture.counts_before(2000) == [1500, 500]  # the integral of a fraction from 1 to 0
    assert mixture.counts_before(1500) == [1375, 125]
    assert set(mixture.slice_at(2001, 500).sources) == {1}


@pytest.mark.parametrize("weights", CONSTANT + SCHEDULES)
def test_position_of_a_sample(weights: list[WeightSchedule]) -> None:
    mixture = Mixture(SourceFractions(weights))
    stream = mixture.slice_at(0, 400).sources
    for source in range(len(weights)):
        positions = [position for position, other in enumerate(stream) if other == source]
        for sample in range(0, min(len(positions), 100), 7):
            position = mixture.approximate_position(source, sample)
            assert position is not None
            assert abs(position - positions[sample]) <= len(weights)


def test_position_of_a_sample_that_is_never_reached() -> None:
    assert Mixture(SourceFractions([((0, 1.0),), ((0, 0.0),)])).approximate_position(1, 0) is None
    mixture = Mixture(SourceFractions([((0, 1.0), (100, 0.0)), ((0, 1.0),)]))
    total = mixture.counts_before(10**6)[0]
    assert mixture.approximate_position(0, total - 1) is not None
    assert mixture.approximate_position(0, total) is None


def test_all_weights_zero() -> None:
    with pytest.raises(ConfigError, match=r"data.train: the weights of all sources are 0;"):
        SourceFractions([((0, 0.0),), ((0, 0.0),)])
    with pytest.raises(ConfigError, match=r"data.train: .* 0 at 50 pairs"):
        SourceFractions([((0, 1.0), (50, 0.0)), ((50, 0.0), (70, 1.0))])
