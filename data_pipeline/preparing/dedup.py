"""Finds samples that come more than once: the same file, nearly the same picture, or the same
caption.

Of each group the first sample is kept, in the order of the datasets; whoever is dropped is like
somebody who is kept. Samples of datasets to compare *against* (held-out sets) come first and are
never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from data_pipeline.common.errors import ConfigError
from data_pipeline.preparing.hashing import HAS_CAPTION, HAS_LOOKS, READABLE, Hashes
from data_pipeline.preparing.near import MAX_DISTANCE, leaders, near_pairs

Kind = Literal["exact", "near", "caption", "pair"]
KINDS: tuple[Kind, ...] = ("exact", "near", "caption", "pair")
"""The same picture file; that or one that looks nearly the same; the same caption; near *and* the
same caption."""


class Where(NamedTuple):
    """A sample."""

    dataset: int
    shard: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Who is like whom."""

    leader: np.ndarray
    """int64 `[n]`: row of the sample that is kept for each; itself if it is kept."""
    free: np.ndarray
    """bool `[n]`: samples that are only compared against."""

    @property
    def dropped(self) -> np.ndarray:
        """int64: rows to drop, rising."""
        return np.flatnonzero((self.leader != np.arange(len(self.leader))) & ~self.free)

    def members(self) -> list[list[int]]:
        """Groups that lose a sample, largest first: the row that is kept, then the dropped ones."""
        groups: dict[int, list[int]] = {}
        for row in self.dropped.tolist():
            groups.setdefault(int(self.leader[row]), []).append(row)
        return sorted(
            ([kept, *rows] for kept, rows in groups.items()),
            key=lambda group: (-len(group), group[0]),
        )


def find_groups(hashes: Hashes, kind: Kind, *, distance: int = 3, against: int = 0) -> Groups:
    """Group samples.

    Args:
        hashes: Of all samples.
        kind: What makes two samples alike.
        distance: Most bits in which perceptual hashes of pictures that are nearly the same differ.
        against: The first so many datasets are never dropped from.

    Raises:
        ConfigError: The distance is out of range.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ConfigError(f"--distance {distance}: must lie in 0..{MAX_DISTANCE}")
    free = hashes.dataset < against
    readable = hashes.has(READABLE)
    exact = _first_of(hashes.contents, readable)
    if kind == "exact":
        return Groups(leader=exact, free=free)
    if kind == "caption":
        return Groups(leader=_first_of(hashes.caption, hashes.has(HAS_CAPTION)), free=free)
    near = _near(hashes, exact, distance, free)
    if kind == "pair":
        both = np.stack([near.astype(np.uint64), hashes.caption], axis=1)
        return Groups(leader=_first_of(both, readable & hashes.has(HAS_CAPTION)), free=free)
    return Groups(leader=near, free=free)


def where(hashes: Hashes, row: int) -> Where:
    """The sample of a row."""
    return Where(int(hashes.dataset[row]), int(hashes.shard[row]), int(hashes.sample[row]))


def drops(hashes: Hashes, groups: Groups, dataset: int) -> dict[int, list[int]]:
    """Numbers of the samples to drop from one dataset, by number of their shard."""
    found: dict[int, list[int]] = {}
    for row in groups.dropped.tolist():
        if hashes.dataset[row] == dataset:
            found.setdefault(int(hashes.shard[row]), []).append(int(hashes.sample[row]))
    return found


def _first_of(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each row the first one with the same value; itself where it does not count."""
    leader = np.arange(len(counts), dtype=np.int64)
    rows = np.flatnonzero(counts)
    if len(rows):
        _, first, inverse = np.unique(values[rows], axis=0, return_index=True, return_inverse=True)
        leader[rows] = rows[first[inverse.reshape(-1)]]
    return leader


def _near(hashes: Hashes, exact: np.ndarray, distance: int, free: np.ndarray) -> np.ndarray:
    """For each row the kept one that looks nearly the same, or is the same file."""
    leader = exact.copy()
    rows = np.flatnonzero(hashes.has(HAS_LOOKS))
    if not len(rows):
        return leader
    values, first, inverse = np.unique(hashes.looks[rows], return_index=True, return_inverse=True)
    # In the order in which they come first, so that the earlier of two is the one that is kept.
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    pairs = near_pairs(values[order], distance)
    heads = rows[first[order]]
    kept = leaders(len(order), pairs, free[heads])
    leader[rows] = heads[kept[rank[inverse.reshape(-1)]]]
    return leader
