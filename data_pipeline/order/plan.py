"""The order of one source: a pure function of its shards' sizes, a seed and a window.

Epochs follow each other without end. In each, the shards are shuffled; then, window by window of
`shuffle_window` shards, all their samples are shuffled together (so a reader needs only that many
shards at hand). Number `k` is the sample that comes after `k` others of this source. Nothing here
knows ranks or workers, so no number of them can change the order.

    epoch 0: [ window 0: shards 7 2 | window 1: shards 0 5 | ... ]  epoch 1: ...
    numbers  0 1 2 3 ...

Shards without samples, and samples that a drop-list names, have no place in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.seeds import rng
from data_pipeline.samples import SampleRef


class Window(NamedTuple):
    """Shards that are read together."""

    first: int
    """Number of its first sample."""
    shards: list[int]


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in shuffled order, and where its windows begin."""

    shards: np.ndarray
    window_starts: np.ndarray = field(repr=False)
    """int64 `[windows + 1]`, first place of each window in the epoch; the epoch's end last."""


@dataclass(frozen=True)
class _Window:
    """One window of an epoch, shuffled."""

    shards: np.ndarray
    starts: np.ndarray
    """int64, where each shard begins when they are laid one after the other."""
    order: np.ndarray
    """A permutation of all places in the window."""


class Plan:
    """Which sample of a source comes when; see the module's text.

    Asking for `count` samples costs `O(count)` once the windows that they lie in are known; a
    window costs one permutation of its samples.
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
        """Plan over shards with these numbers of samples.

        Args:
            shard_sizes: Samples of each shard; 0 is allowed, but not for all of them.
            seed: Changes the order.
            shuffle_window: Shards whose samples are shuffled together.
            dropped: Numbers of samples to leave out, rising, by shard; see `drop.py`.
            first_shard: Number of the first shard, where others lie before this source.

        Raises:
            ConfigError: There are no samples, or no window.
        """
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        # The k-th sample that is kept is number k + (dropped ones before it), and those are the
        # ones whose number, less the dropped ones before them, is at most k.
        self._dropped = {
            shard: np.asarray(gone) for shard, gone in (dropped or {}).items() if len(gone)
        }
        self._gaps = {shard: gone - np.arange(len(gone)) for shard, gone in self._dropped.items()}
        self._kept = self._sizes.copy()
        for shard, gone in self._dropped.items():
            self._kept[shard] -= len(gone)
        self.samples_per_epoch = int(self._kept.sum())
        if self.samples_per_epoch < 1 or self._kept.min() < 0 or shuffle_window < 1:
            raise ConfigError(
                f"a plan needs shards with samples and a window of at least 1, got {len(self._sizes)} shards "
                f"with {self.samples_per_epoch} samples and shuffle_window {shuffle_window}"
            )
        self._full = np.flatnonzero(self._kept)
        self._seed, self._window, self._first_shard = seed, shuffle_window, first_shard
        # A batch touches at most a few epochs and windows at once; the rest is made again when
        # asked.
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)
        self._order = lru_cache(maxsize=3)(self._make_window)

    def __reduce__(self) -> tuple[Any, ...]:
        # To another process go the numbers it is made of, not the caches.
        return _remade, (self._sizes, self._seed, self._window, self._dropped, self._first_shard)

    def sample_at(self, number: int) -> SampleRef:
        """One sample."""
        return self.samples(number, 1)[0]

    def samples(self, start: int, count: int) -> list[SampleRef]:
        """Samples number `start` to `start + count - 1`."""
        if start < 0 or count < 0:
            raise ValueError(f"samples from {start} on, {count} of them")
        found: list[SampleRef] = []
        while len(found) < count:
            epoch, first = divmod(start + len(found), self.samples_per_epoch)
            found += self._piece(epoch, first, count - len(found))
        return found

    def windows_from(self, number: int) -> Iterator[Window]:
        """The window of one sample and those after it, without end."""
        epoch, place = divmod(number, self.samples_per_epoch)
        window = int(np.searchsorted(self._epoch(epoch).window_starts, place, side="right")) - 1
        while True:
            facts = self._epoch(epoch)
            for slot in range(window, len(facts.window_starts) - 1):
                first = epoch * self.samples_per_epoch + int(facts.window_starts[slot])
                yield Window(first, (self._shards_of(facts, slot) + self._first_shard).tolist())
            epoch, window = epoch + 1, 0

    def _piece(self, epoch: int, first: int, most: int) -> list[SampleRef]:
        """Up to `most` samples from place `first` of an epoch, all of one window."""
        starts = self._epoch(epoch).window_starts
        number = int(np.searchsorted(starts, first, side="right")) - 1
        window = self._order(epoch, number)
        low = first - int(starts[number])
        # Place in the window -> shard and number among the kept ones of the shard.
        chosen = window.order[low : low + most]
        slot = np.searchsorted(window.starts, chosen, side="right") - 1
        shards = window.shards[slot].tolist()
        places = (chosen - window.starts[slot]).tolist()
        if self._gaps:
            places = [self._real(shard, place) for shard, place in zip(shards, places, strict=True)]
        base = self._first_shard
        return [
            SampleRef(epoch, base + shard, place)
            for shard, place in zip(shards, places, strict=True)
        ]

    def _real(self, shard: int, place: int) -> int:
        """The number in its shard of the sample that is number `place` among the kept ones."""
        gaps = self._gaps.get(shard)
        return place if gaps is None else place + int(np.searchsorted(gaps, place, side="right"))

    def _shards_of(self, facts: _Epoch, window: int) -> np.ndarray:
        return facts.shards[window * self._window : (window + 1) * self._window]

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = self._full[rng(self._seed, "shard order", epoch).permutation(len(self._full))]
        ends = np.cumsum(self._kept[shards])
        inner = ends[self._window - 1 :: self._window]
        starts = np.concatenate([[0], inner[inner < ends[-1]], ends[-1:]])
        return _Epoch(shards, starts)

    def _make_window(self, epoch: int, window: int) -> _Window:
        shards = self._shards_of(self._epoch(epoch), window)
        ends = np.cumsum(self._kept[shards])
        order = np.arange(int(ends[-1]), dtype=np.int32 if ends[-1] < 2**31 else np.int64)
        rng(self._seed, "sample order", epoch, window).shuffle(order)
        return _Window(shards, ends - self._kept[shards], order)


def _remade(
    sizes: np.ndarray, seed: int, window: int, dropped: Mapping[int, np.ndarray], first_shard: int
) -> Plan:
    return Plan(sizes, seed, window, dropped=dropped, first_shard=first_shard)


def micro_batch_positions(
    step_position: int, micro: int, rank: int, *, micro_batch_size: int, world_size: int
) -> range:
    """Positions of one rank's micro-batch.

    The global batch of a step is cut into rounds of `world` micro-batches, rank after rank, so the
    union over ranks is the same positions for any world.

    Args:
        step_position: First position of the step.
        micro: Number of the micro-batch in the step.
        rank: This rank.
        micro_batch_size: Pairs of one micro-batch.
        world_size: Ranks.
    """
    first = step_position + (micro * world_size + rank) * micro_batch_size
    return range(first, first + micro_batch_size)


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches of one rank in one step, exactly.

    Raises:
        ConfigError: The step is not a whole number of rounds over the ranks.
    """
    round_pairs = micro_batch_size * world_size
    count, rest = divmod(global_batch_size, round_pairs)
    if rest or count < 1:
        nearest = max(1, round(global_batch_size / round_pairs)) * round_pairs
        raise ConfigError(
            f"batch.global_batch_size is {global_batch_size}, not a positive multiple of "
            f"{micro_batch_size} (batch.micro_batch_size) x {world_size} ranks = {round_pairs}; "
            f"the nearest is {nearest}"
        )
    return count
