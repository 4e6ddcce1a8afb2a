"""The share of each source in the stream, and how much of it is due at any position: exact.

A source has a weight, or weights at some positions (a schedule). At every position where any
schedule has a point, the weights of all sources are turned into shares that sum to 1; between such
points the shares go in straight lines, before the first and after the last they stay. What a source
is due after `t` pairs is the integral of its share over `[0, t]`: a parabola between two points.
All of it is kept in whole numbers (weights are taken as they are written: 0.1 is one tenth), so
that nothing drifts or depends on the machine.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from data_pipeline.common.errors import ConfigError

Points = Sequence[tuple[int, float | Fraction]]
"""A schedule: `(pairs, weight)`, pairs rising; one point is a constant weight."""

_HALF = Fraction(1, 2)


class _Term(NamedTuple):
    """Of one source in one piece: `(base + (slope + bend * x) * x) // scale` is its due,
    rounded."""

    base: int
    slope: int
    bend: int


class _Piece(NamedTuple):
    """Between two points; x counts from `start`."""

    start: int
    scale: int
    terms: tuple[_Term, ...]


class Shares:
    """Shares of some sources, made from their weights."""

    def __init__(self, weights: Sequence[Points]) -> None:
        """Turn weights into shares.

        Args:
            weights: A schedule for each source.

        Raises:
            ConfigError: There is a position at which all weights are 0.
        """
        points = sorted({0} | {pairs for schedule in weights for pairs, _ in schedule})
        shares = [_shares_at(point, weights) for point in points]
        self.count = len(weights)
        self._points, self._shares = points, shares
        self._due = [[Fraction(0)] * self.count]
        for number in range(1, len(points)):
            length = points[number] - points[number - 1]
            both = zip(self._due[-1], shares[number - 1], shares[number], strict=True)
            self._due.append([due + length * (low + high) / 2 for due, low, high in both])
        self._pieces = [self._piece(number) for number in range(len(points))]

    def at(self, pairs: int) -> list[Fraction]:
        """Every source's share at one position."""
        number = bisect_right(self._points, pairs) - 1
        if number == len(self._points) - 1:
            return self._shares[-1]
        done = Fraction(
            pairs - self._points[number], self._points[number + 1] - self._points[number]
        )
        both = zip(self._shares[number], self._shares[number + 1], strict=True)
        return [low + done * (high - low) for low, high in both]

    def due(self, pairs: int) -> list[int]:
        """What each source is due after so many pairs: the integral of its share, plus 1/2,
        floored."""
        piece = self._pieces[bisect_right(self._points, pairs) - 1]
        x, scale = pairs - piece.start, piece.scale
        return [(base + (slope + bend * x) * x) // scale for base, slope, bend in piece.terms]

    def ever_due(self, source: int, number: int) -> int | None:
        """The first position after which a source is due more than `number` samples; None is
        never."""
        if Fraction(number) + _HALF > self._due[-1][source]:
            last = self._shares[-1][source]
            if not last:
                return None
            high = self._points[-1] + math.ceil((number + 1 - self._due[-1][source]) / last) + 1
        else:
            high = self._points[-1]
        low = 0
        while low < high:
            middle = (low + high) // 2
            if self.due(middle)[source] > number:
                high = middle
            else:
                low = middle + 1
        return low

    def is_ever_drawn(self, source: int) -> bool:
        """Whether its share is above 0 anywhere."""
        return any(shares[source] for shares in self._shares)

    def described(self) -> list[list[object]]:
        """All of it as JSON values: each point with every source's share."""
        return [
            [point, [str(share) for share in row]]
            for point, row in zip(self._points, self._shares, strict=True)
        ]

    def _piece(self, number: int) -> _Piece:
        start, due, shares = self._points[number], self._due[number], self._shares[number]
        bends = [Fraction(0)] * self.count
        if number + 1 < len(self._points):
            length = self._points[number + 1] - start
            both = zip(shares, self._shares[number + 1], strict=True)
            bends = [(high - low) / (2 * length) for low, high in both]
        exact = [
            (base + _HALF, slope, bend)
            for base, slope, bend in zip(due, shares, bends, strict=True)
        ]
        scale = math.lcm(*(value.denominator for row in exact for value in row))
        return _Piece(
            start, scale, tuple(_Term(*(int(value * scale) for value in row)) for row in exact)
        )


def as_written(weight: float | Fraction) -> Fraction:
    """A weight as people write it: 0.1 is one tenth, not the binary number next to it."""
    return weight if isinstance(weight, Fraction) else Fraction(repr(weight))


def _shares_at(pairs: int, weights: Sequence[Points]) -> list[Fraction]:
    found = [_weight_at(pairs, schedule) for schedule in weights]
    total = sum(found)
    if not total:
        where = f" at {pairs} pairs" if any(len(schedule) > 1 for schedule in weights) else ""
        raise ConfigError(
            f"data.train: the weights of all sources are 0{where}; give one of them a weight above 0"
        )
    return [weight / total for weight in found]


def _weight_at(pairs: int, schedule: Points) -> Fraction:
    """Straight lines between the points, constant before the first and after the last."""
    after = bisect_right([point for point, _ in schedule], pairs)
    if after in (0, len(schedule)):
        return as_written(schedule[max(0, after - 1)][1])
    (left, low), (right, high) = schedule[after - 1], schedule[after]
    return as_written(low) + (as_written(high) - as_written(low)) * Fraction(
        pairs - left, right - left
    )
