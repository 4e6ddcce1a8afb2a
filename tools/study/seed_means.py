"""Means with standard deviations over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class SeedMean(NamedTuple):
    """Mean over seeds."""

    mean: float
    deviation: float
    """Sample standard deviation; NaN for a single seed."""
    seeds: int

    def text(self, digits: int = 2, *, signed: bool = False) -> str:
        """`1.23 ± 0.04`; only the mean for a single seed, `-` without values."""
        if not self.seeds:
            return "-"
        mean = f"{self.mean:{'+' if signed else ''},.{digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:,.{digits}f}"


def seed_mean(values: Sequence[float | None]) -> SeedMean:
    """Mean and standard deviation of the values that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return SeedMean(math.nan, math.nan, 0)
    mean = sum(known) / len(known)
    if len(known) == 1:
        return SeedMean(mean, math.nan, 1)
    variance = sum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return SeedMean(mean, math.sqrt(variance), len(known))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> SeedMean:
    """Mean of first - second per seed; effects of the seed on both, such as data order, cancel."""
    return seed_mean([a - b for a, b in zip(first, second, strict=True)])


def lookup(result: Mapping[str, Any] | None, path: Sequence[str]) -> float | None:
    """The number at a path of nested keys; None if it does not exist or is None."""
    value: Any = result
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return None if value is None else float(value)
