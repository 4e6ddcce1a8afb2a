"""Finds duplicate samples: equal image files, near-duplicate images, or equal captions.

The first sample of each group is kept, in the order of the datasets; every dropped sample is a
duplicate of a kept one. Datasets to compare against (held-out sets) come first and lose no samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from data_pipeline.common.errors import ConfigError
from data_pipeline.preparing.hamming import MAX_DISTANCE, pairs_within, representatives
from data_pipeline.preparing.sample_hashes import HAS_CAPTION, HAS_PERCEPTUAL, READABLE, Hashes

Criterion = Literal["exact", "near", "caption", "pair"]
CRITERIA: tuple[Criterion, ...] = ("exact", "near", "caption", "pair")
"""Equal image file; equal or near-duplicate image; equal caption; near-duplicate image *and* equal
caption."""


class SampleLocation(NamedTuple):
    """Dataset, shard and sample index."""

    dataset: int
    shard: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups of duplicates."""

    representative: np.ndarray
    """int64 `[n]`: row of the sample that is kept for each row; the row itself if it is kept."""
    protected: np.ndarray
    """bool `[n]`: samples that are only compared against, never dropped."""

    @property
    def dropped(self) -> np.ndarray:
        """int64: rows to drop, ascending."""
        is_duplicate = self.representative != np.arange(len(self.representative))
        return np.flatnonzero(is_duplicate & ~self.protected)

    def members(self) -> list[list[int]]:
        """Rows of each group with dropped samples, the kept row first; largest group first."""
        groups: dict[int, list[int]] = {}
        for row in self.dropped.tolist():
            groups.setdefault(int(self.representative[row]), []).append(row)
        return sorted(
            ([kept, *rows] for kept, rows in groups.items()),
            key=lambda group: (-len(group), group[0]),
        )


def find_groups(
    hashes: Hashes, criterion: Criterion, *, distance: int = 3, against: int = 0
) -> Groups:
    """Group duplicates.

    Args:
        hashes: Hashes of all samples.
        criterion: When two samples count as duplicates.
        distance: Maximum Hamming distance between the perceptual hashes of near-duplicates.
        against: Number of leading datasets whose samples are never dropped.

    Raises:
        ConfigError: The distance is out of range.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(f"--distance {distance}: must be in 0..{MAX_DISTANCE}")

    protected = hashes.dataset < against
    readable, has_caption = hashes.has(READABLE), hashes.has(HAS_CAPTION)
    exact = _first_equal(hashes.file, readable)
    if criterion == "exact":
        return Groups(representative=exact, protected=protected)
    if criterion == "caption":
        same_caption = _first_equal(hashes.caption, has_caption)
        return Groups(representative=same_caption, protected=protected)

    near = _first_near(hashes, exact, distance, protected)
    if criterion == "pair":
        pairs = np.stack([near.astype(np.uint64), hashes.caption], axis=1)
        same_pair = _first_equal(pairs, readable & has_caption)
        return Groups(representative=same_pair, protected=protected)
    return Groups(representative=near, protected=protected)


def sample_location(hashes: Hashes, row: int) -> SampleLocation:
    """The location of the sample in a row."""
    return SampleLocation(int(hashes.dataset[row]), int(hashes.shard[row]), int(hashes.sample[row]))


def dropped_samples(hashes: Hashes, groups: Groups, dataset: int) -> dict[int, list[int]]:
    """Indices of the samples to drop from one dataset, by shard index."""
    dropped: dict[int, list[int]] = {}
    for row in groups.dropped.tolist():
        if hashes.dataset[row] == dataset:
            dropped.setdefault(int(hashes.shard[row]), []).append(int(hashes.sample[row]))
    return dropped


def _first_equal(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """For each row, the first valid row with the same value; invalid rows map to themselves."""
    representative = np.arange(len(valid), dtype=np.int64)
    rows = np.flatnonzero(valid)
    if len(rows):
        _, first, inverse = np.unique(values[rows], axis=0, return_index=True, return_inverse=True)
        representative[rows] = rows[first[inverse.reshape(-1)]]
    return representative


def _first_near(
    hashes: Hashes, exact: np.ndarray, distance: int, protected: np.ndarray
) -> np.ndarray:
    """For each row, the kept row with a near-duplicate image or the same file."""
    representative = exact.copy()
    rows = np.flatnonzero(hashes.has(HAS_PERCEPTUAL))
    if not len(rows):
        return representative

    values, first, inverse = np.unique(
        hashes.perceptual[rows], return_index=True, return_inverse=True
    )
    # In order of first occurrence, so that of two near-duplicates the earlier one is kept.
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    pairs = pairs_within(values[order], distance)
    first_rows = rows[first[order]]
    kept = representatives(len(order), pairs, protected[first_rows])
    representative[rows] = first_rows[kept[rank[inverse.reshape(-1)]]]
    return representative
