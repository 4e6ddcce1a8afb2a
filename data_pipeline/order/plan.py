"""The order of one source: a pure function of its shard sizes, a seed and a window.

Epochs follow each other without end. In each epoch the shards are shuffled; then, window by window
of `shuffle_window` shards, all samples of the window are shuffled together, so a reader needs only
that many open shards. Index `k` is the sample that follows `k` others of this source. The order
does not depend on the number of ranks or workers.

    epoch 0: [ window 0: shards 7 2 | window 1: shards 0 5 | ... ]  epoch 1: ...
    index    0 1 2 3 ...

Empty shards, and samples in a drop-list, are not part of the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.seeds import rng
from data_pipeline.common.tables import counted
from data_pipeline.samples import SampleRef


class Window(NamedTuple):
    """Shards whose samples are shuffled together."""

    first: int
    """Index of the first sample of the window."""
    shards: list[int]


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in shuffled order, and where its windows begin."""

    shards: np.ndarray
    window_starts: np.ndarray = field(repr=False)
    """int64 `[windows + 1]`: first index in the epoch of each window, then the epoch's length."""


@dataclass(frozen=True)
class _Window:
    """One shuffled window of an epoch."""

    shards: np.ndarray
    starts: np.ndarray
    """int64: offset of each shard when the shards are concatenated."""
    order: np.ndarray
    """A permutation of all offsets in the window."""


class Plan:
    """Maps sample indices of a source to samples; see the module docstring.

    Looking up `count` samples costs `O(count)` if their windows are cached; a window costs one
    permutation of its samples.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        seed: int,
        shuffle_window: int,
        *,
        dropped: Mapping[int, np.ndarray] | None = None,
        first_shard: int = 0,
    ) -> None:
        """Plan the order over shards of these sizes.

        Args:
            shard_sizes: Samples of each shard; 0 is allowed, but not for all of them.
            seed: Seed of the shuffles.
            shuffle_window: Number of shards whose samples are shuffled together.
            dropped: Shard index -> indices of samples to exclude, ascending; see `drop_list.py`.
            first_shard: Index of this source's first shard among the shards of all sources.

        Raises:
            ConfigError: There are no samples, or the window is below 1.
        """
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._dropped = {
            shard: np.asarray(samples) for shard, samples in (dropped or {}).items() if len(samples)
        }
        # For each dropped sample, the number of kept samples before it. Kept sample k has index k +
        # (number of dropped samples before it); these are the dropped samples with a value <= k.
        self._kept_before = {
            shard: samples - np.arange(len(samples)) for shard, samples in self._dropped.items()
        }
        self._kept = self._sizes.copy()
        for shard, samples in self._dropped.items():
            self._kept[shard] -= len(samples)

        self.samples_per_epoch = int(self._kept.sum())
        if self.samples_per_epoch < 1 or self._kept.min() < 0 or shuffle_window < 1:
            raise ConfigError(
                f"a plan needs shards with samples and a shuffle_window of at least 1, got "
                f"{counted(len(self._sizes), 'shard')} with "
                f"{counted(self.samples_per_epoch, 'sample')} and shuffle_window {shuffle_window}"
            )

        self._nonempty = np.flatnonzero(self._kept)
        self._seed, self._window, self._first_shard = seed, shuffle_window, first_shard
        # A batch spans at most a few epochs and windows; others are computed again when needed.
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)
        self._order = lru_cache(maxsize=3)(self._make_window)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle the arguments, not the caches.
        return _rebuild, (self._sizes, self._seed, self._window, self._dropped, self._first_shard)

    def sample_at(self, index: int) -> SampleRef:
        """The sample at one index."""
        return self.samples(index, 1)[0]

    def samples(self, start: int, count: int) -> list[SampleRef]:
        """The samples at indices `start` to `start + count - 1`."""
        if start < 0 or count < 0:
            raise ValueError(f"start {start} and count {count} must not be negative")

        refs: list[SampleRef] = []
        while len(refs) < count:
            epoch, first = divmod(start + len(refs), self.samples_per_epoch)
            refs += self._window_samples(epoch, first, count - len(refs))
        return refs

    def windows_from(self, index: int) -> Iterator[Window]:
        """The window that contains a sample index and all windows after it, without end."""
        epoch, offset = divmod(index, self.samples_per_epoch)
        window = int(np.searchsorted(self._epoch(epoch).window_starts, offset, side="right")) - 1
        while True:
            starts = self._epoch(epoch).window_starts
            for current in range(window, len(starts) - 1):
                first = epoch * self.samples_per_epoch + int(starts[current])
                shards = self._window_shards(epoch, current) + self._first_shard
                yield Window(first, shards.tolist())
            epoch, window = epoch + 1, 0

    def _window_samples(self, epoch: int, first: int, max_count: int) -> list[SampleRef]:
        """Up to `max_count` samples of one window, starting at index `first` of an epoch."""
        starts = self._epoch(epoch).window_starts
        window_index = int(np.searchsorted(starts, first, side="right")) - 1
        window = self._order(epoch, window_index)
        begin = first - int(starts[window_index])

        # Offset in the window -> shard and index among the kept samples of the shard.
        offsets = window.order[begin : begin + max_count]
        slots = np.searchsorted(window.starts, offsets, side="right") - 1
        shards = window.shards[slots].tolist()
        samples = (offsets - window.starts[slots]).tolist()
        if self._kept_before:
            samples = [
                self._index_in_shard(shard, kept)
                for shard, kept in zip(shards, samples, strict=True)
            ]

        return [
            SampleRef(epoch, self._first_shard + shard, sample)
            for shard, sample in zip(shards, samples, strict=True)
        ]

    def _index_in_shard(self, shard: int, kept: int) -> int:
        """Index in the shard of the `kept`-th sample that is not dropped."""
        kept_before = self._kept_before.get(shard)
        if kept_before is None:
            return kept
        return kept + int(np.searchsorted(kept_before, kept, side="right"))

    def _window_shards(self, epoch: int, window: int) -> np.ndarray:
        return self._epoch(epoch).shards[window * self._window : (window + 1) * self._window]

    def _make_epoch(self, epoch: int) -> _Epoch:
        permutation = rng(self._seed, "shard order", epoch).permutation(len(self._nonempty))
        shards = self._nonempty[permutation]
        ends = np.cumsum(self._kept[shards])
        inner = ends[self._window - 1 :: self._window]
        starts = np.concatenate([[0], inner[inner < ends[-1]], ends[-1:]])
        return _Epoch(shards, starts)

    def _make_window(self, epoch: int, window: int) -> _Window:
        shards = self._window_shards(epoch, window)
        ends = np.cumsum(self._kept[shards])
        order = np.arange(int(ends[-1]), dtype=np.int32 if ends[-1] < 2**31 else np.int64)
        rng(self._seed, "sample order", epoch, window).shuffle(order)
        return _Window(shards, ends - self._kept[shards], order)


def _rebuild(
    sizes: np.ndarray, seed: int, window: int, dropped: Mapping[int, np.ndarray], first_shard: int
) -> Plan:
    return Plan(sizes, seed, window, dropped=dropped, first_shard=first_shard)
