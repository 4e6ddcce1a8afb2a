"""The order of training: a pure function of the shards' sizes, the seed and a window.

Epochs follow each other without end. In each, the shards are shuffled; then, window by window of
`shuffle_window` shards, all their samples are shuffled together (so a reader needs only that many
shards at hand). Position `p` means: `p` samples were consumed since the start of training. Nothing
here knows ranks or workers, so no number of them can change the order.

    epoch 0: [ window 0: shards 7 2 | window 1: shards 0 5 | ... ]  epoch 1: ...
    positions 0 1 2 3 ... cut into global batches; batches may span epochs
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.seeds import rng
from data_pipeline.samples import SampleRef


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where training is in its data; all that must be kept to go on with the next sample."""

    version: int = 1
    position: int = 0
    """Samples consumed since the start of training, over all ranks."""
    seed: int = 0
    """Seed of the order and of every sample's augmentation."""
    data: str = ""
    """Fingerprint of the shards and the window, which make the order; empty before the first step."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @staticmethod
    def from_json(value: str | dict[str, Any]) -> LoaderState:
        """Read what `to_json` gave, as an object or as text.

        Raises:
            DataError: It is not such a state, or of another version.
        """
        try:
            found = dict(json.loads(value) if isinstance(value, str) else value)
            if found.get("version") != 1:
                raise DataError(f"the loader state has version {found.get('version')!r}, but 1 was expected")
            return LoaderState(**found)
        except (TypeError, ValueError) as error:
            raise DataError(f"not a loader state: {error}") from error


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in shuffled order, and where its windows begin."""

    shards: np.ndarray
    window_starts: np.ndarray = field(repr=False)
    """int64 `[windows + 1]`, first position of each window in the epoch; the epoch's end last."""


class Plan:
    """Which sample comes when; see the module's text.

    Asking for `count` samples costs `O(count)` once the windows that they lie in are known; a window
    costs one permutation of its samples.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, shuffle_window: int) -> None:
        """Plan over shards with these numbers of samples.

        Args:
            shard_sizes: Samples of each shard, all at least 1.
            seed: Changes the order.
            shuffle_window: Shards whose samples are shuffled together.

        Raises:
            ConfigError: There are no shards, an empty one, or no window.
        """
        if not shard_sizes or min(shard_sizes) < 1 or shuffle_window < 1:
            raise ConfigError(
                f"a plan needs shards with samples and a window of at least 1, got {len(shard_sizes)} shards "
                f"and shuffle_window {shuffle_window}"
            )
        self.samples_per_epoch = int(sum(shard_sizes))
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._seed, self._window = seed, shuffle_window
        # A batch touches at most a few epochs and windows at once; the rest is made again when asked.
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._order = lru_cache(maxsize=4)(self._make_window)

    def __reduce__(self) -> tuple[Any, ...]:
        # To another process go the numbers it is made of, not the caches.
        return Plan, (self._sizes.tolist(), self._seed, self._window)

    def sample_at(self, position: int) -> SampleRef:
        """The sample consumed at one position."""
        return self.samples(position, 1)[0]

    def samples(self, start: int, count: int) -> list[SampleRef]:
        """The samples consumed at positions `start` to `start + count - 1`."""
        if start < 0 or count < 0:
            raise ValueError(f"positions from {start} on, {count} of them")
        found: list[SampleRef] = []
        while len(found) < count:
            epoch, first = divmod(start + len(found), self.samples_per_epoch)
            found += self._piece(epoch, first, count - len(found))
        return found

    def _piece(self, epoch: int, first: int, most: int) -> list[SampleRef]:
        """Up to `most` samples from place `first` of an epoch, all of one window."""
        starts = self._epoch(epoch).window_starts
        window = int(np.searchsorted(starts, first, side="right")) - 1
        shards, order = self._order(epoch, window)
        low = first - int(starts[window])
        # Number in the window -> shard and number in the shard.
        chosen = order[low : low + most]
        bounds = np.cumsum(self._sizes[shards])
        slot = np.searchsorted(bounds, chosen, side="right")
        index = chosen - (bounds - self._sizes[shards])[slot]
        pairs = zip(shards[slot].tolist(), index.tolist(), strict=True)
        return [SampleRef(epoch, shard, place) for shard, place in pairs]

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = rng(self._seed, "shard order", epoch).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[shards])
        inner = ends[self._window - 1 :: self._window]
        starts = np.concatenate([[0], inner[inner < ends[-1]], ends[-1:]])
        return _Epoch(shards, starts)

    def _make_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        shards = self._epoch(epoch).shards[window * self._window : (window + 1) * self._window]
        order = rng(self._seed, "sample order", epoch, window).permutation(int(self._sizes[shards].sum()))
        return shards, order


def micro_batch_positions(
    step_position: int, micro: int, rank: int, *, pairs_per_forward: int, world: int
) -> range:
    """Positions of one rank's micro-batch.

    The global batch of a step is cut into rounds of `world` micro-batches, rank after rank, so the
    union over ranks is the same positions for any world.

    Args:
        step_position: First position of the step.
        micro: Number of the micro-batch in the step.
        rank: This rank.
        pairs_per_forward: Pairs of one micro-batch.
        world: Ranks.
    """
    first = step_position + (micro * world + rank) * pairs_per_forward
    return range(first, first + pairs_per_forward)


def micro_batches_per_step(pairs_per_step: int, pairs_per_forward: int, world: int) -> int:
    """Micro-batches of one rank in one step, exactly.

    Raises:
        ConfigError: The step is not a whole number of rounds over the ranks.
    """
    round_pairs = pairs_per_forward * world
    count, rest = divmod(pairs_per_step, round_pairs)
    if rest or count < 1:
        nearest = max(1, round(pairs_per_step / round_pairs)) * round_pairs
        raise ConfigError(
            f"batch.pairs_per_step is {pairs_per_step}, not a positive multiple of "
            f"{pairs_per_forward} (batch.pairs_per_forward) x {world} ranks = {round_pairs}; "
            f"the nearest is {nearest}"
        )
    return count
