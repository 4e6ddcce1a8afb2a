"""Sampling fraction of each source at any position, and the exact integral of it.

A source has a constant weight or a weight schedule. At every position where any schedule has a
point, the weights of all sources are normalized to fractions that sum to 1. Between points the
fractions are interpolated linearly; before the first and after the last point they are constant.
The expected count of a source after `t` pairs is the integral of its fraction over `[0, t]`: a
quadratic polynomial between two points. It is computed in integers and exact fractions (weights are
read in decimal: 0.1 is one tenth), so it accumulates no error and is the same on every machine.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from data_pipeline.common.errors import ConfigError

WeightSchedule = Sequence[tuple[int, float | Fraction]]
"""Points `(pairs, weight)`, pairs ascending; a single point is a constant weight."""

_HALF = Fraction(1, 2)


class _Polynomial(NamedTuple):
    """Integral of one source's fraction in one segment.

    `(constant + (linear + quadratic * x) * x) // scale` is the expected count, rounded.
    """

    constant: int
    linear: int
    quadratic: int


class _Segment(NamedTuple):
    """The range between two points; x counts from `start`."""

    start: int
    scale: int
    polynomials: tuple[_Polynomial, ...]


class SourceFractions:
    """Sampling fractions of several sources, computed from their weights."""

    def __init__(self, weights: Sequence[WeightSchedule]) -> None:
        """Normalize weights to fractions.

        Args:
            weights: One schedule per source.

        Raises:
            ConfigError: At some position all weights are 0.
        """
        points = sorted({0} | {pairs for schedule in weights for pairs, _ in schedule})
        self.num_sources = len(weights)
        self._points = points
        self._fractions = [_fractions_at(point, weights) for point in points]
        self._integrals = self._integrate()
        self._segments = [self._segment(index) for index in range(len(points))]

    def at(self, pairs: int) -> list[Fraction]:
        """The fraction of every source at one position."""
        index = bisect_right(self._points, pairs) - 1
        if index == len(self._points) - 1:
            return self._fractions[-1]

        start, end = self._points[index], self._points[index + 1]
        progress = Fraction(pairs - start, end - start)
        ends = zip(self._fractions[index], self._fractions[index + 1], strict=True)
        return [left + progress * (right - left) for left, right in ends]

    def expected_counts(self, pairs: int) -> list[int]:
        """Samples that each source should have contributed after `pairs` pairs.

        This is the integral of its fraction, rounded to the nearest integer (halves up).
        """
        segment = self._segments[bisect_right(self._points, pairs) - 1]
        x, scale = pairs - segment.start, segment.scale
        return [
            (constant + (linear + quadratic * x) * x) // scale
            for constant, linear, quadratic in segment.polynomials
        ]

    def first_position_above(self, source: int, count: int) -> int | None:
        """First position after which the expected count of a source exceeds `count`.

        None if it never does.
        """
        if Fraction(count) + _HALF > self._integrals[-1][source]:
            last_fraction = self._fractions[-1][source]
            if not last_fraction:
                return None
            remaining = count + 1 - self._integrals[-1][source]
            high = self._points[-1] + math.ceil(remaining / last_fraction) + 1
        else:
            high = self._points[-1]

        low = 0
        while low < high:
            middle = (low + high) // 2
            if self.expected_counts(middle)[source] > count:
                high = middle
            else:
                low = middle + 1
        return low

    def is_sampled(self, source: int) -> bool:
        """Whether the fraction of a source is above 0 at any position."""
        return any(fractions[source] for fractions in self._fractions)

    def to_json(self) -> list[list[object]]:
        """JSON value: each point with the fraction of every source."""
        return [
            [point, [str(fraction) for fraction in row]]
            for point, row in zip(self._points, self._fractions, strict=True)
        ]

    def _integrate(self) -> list[list[Fraction]]:
        """Integral of every source's fraction up to each point."""
        integrals = [[Fraction(0)] * self.num_sources]
        for index in range(1, len(self._points)):
            length = self._points[index] - self._points[index - 1]
            rows = zip(
                integrals[-1], self._fractions[index - 1], self._fractions[index], strict=True
            )
            integrals.append(
                [integral + length * (left + right) / 2 for integral, left, right in rows]
            )
        return integrals

    def _segment(self, index: int) -> _Segment:
        """The segment that begins at point `index`, with a common denominator."""
        start, fractions = self._points[index], self._fractions[index]
        quadratics = [Fraction(0)] * self.num_sources
        if index + 1 < len(self._points):
            length = self._points[index + 1] - start
            ends = zip(fractions, self._fractions[index + 1], strict=True)
            quadratics = [(right - left) / (2 * length) for left, right in ends]

        exact = [
            (integral + _HALF, linear, quadratic)
            for integral, linear, quadratic in zip(
                self._integrals[index], fractions, quadratics, strict=True
            )
        ]
        scale = math.lcm(*(value.denominator for row in exact for value in row))
        polynomials = [_Polynomial(*(int(value * scale) for value in row)) for row in exact]
        return _Segment(start, scale, tuple(polynomials))


def exact_fraction(weight: float | Fraction) -> Fraction:
    """The decimal value of a weight: 0.1 is one tenth, not the nearest binary number."""
    return weight if isinstance(weight, Fraction) else Fraction(repr(weight))


def _fractions_at(pairs: int, weights: Sequence[WeightSchedule]) -> list[Fraction]:
    current = [_weight_at(pairs, schedule) for schedule in weights]
    total = sum(current)
    if not total:
        where = f" at {pairs} pairs" if any(len(schedule) > 1 for schedule in weights) else ""
        raise ConfigError(
            f"data.train: the weights of all sources are 0{where}; "
            f"set the weight of at least one source above 0"
        )
    return [weight / total for weight in current]


def _weight_at(pairs: int, schedule: WeightSchedule) -> Fraction:
    """Linear interpolation between points, constant before the first and after the last."""
    after = bisect_right([point for point, _ in schedule], pairs)
    if after in (0, len(schedule)):
        return exact_fraction(schedule[max(0, after - 1)][1])

    (start, start_weight), (end, end_weight) = schedule[after - 1], schedule[after]
    left, right = exact_fraction(start_weight), exact_fraction(end_weight)
    return left + (right - left) * Fraction(pairs - start, end - start)
