"""Batch samplers: the samples of batch `n`, for training and for one pass over a dataset.

Unlike torch's `BatchSampler`, these have random access. They can be pickled; every worker process
has a copy and computes the samples of its batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipeline.order.micro_batches import micro_batch_positions
from data_pipeline.order.order import Order
from data_pipeline.order.state import Ranges, delivered_positions
from data_pipeline.samples import SampleRef
from data_pipeline.shards.manifest import Manifest

_LOOKUP_SIZE = 4096
"""Number of samples whose shards are looked up at a time."""


class BatchSampler(Protocol):
    """Maps batch indices to samples; must be picklable."""

    def refs(self, index: int) -> list[SampleRef]:
        """The samples of a batch, in order."""

    def shards_from(self, index: int) -> Iterator[list[int]]:
        """Shards in the order in which they are needed from a batch on; shards that are in use at
        the same time are in one list."""


@dataclass(frozen=True, kw_only=True)
class TrainBatchSampler:
    """Batches of one rank in training.

    Batch n is micro-batch `n % micro_batches` of step `n // micro_batches` after `origin`.
    """

    order: Order
    origin: int
    """Position of the first step."""
    skip: Ranges
    """Positions that are not delivered."""
    global_batch_size: int
    micro_batch_size: int
    micro_batches: int
    """Per rank and step."""
    rank: int
    world_size: int

    def refs(self, index: int) -> list[SampleRef]:
        """This rank's samples of one micro-batch."""
        refs = []
        for positions in self.positions(index):
            refs += self.order.samples(positions.start, len(positions))
        return refs

    def positions(self, index: int) -> list[range]:
        """This rank's positions of one micro-batch, as ranges."""
        step, micro = divmod(index, self.micro_batches)
        positions = micro_batch_positions(
            step * self.global_batch_size,
            micro,
            self.rank,
            micro_batch_size=self.micro_batch_size,
            world_size=self.world_size,
        )
        return delivered_positions(self.origin, self.skip, positions.start, len(positions))

    def shards_from(self, index: int) -> Iterator[list[int]]:
        """Windows of all ranks: the ranks of a node share most shards."""
        return self.order.shards_from(self.positions(index)[0].start)

    def step_end(self, step: int) -> int:
        """The position after a step; 0 is the first step after `origin`."""
        last = (step + 1) * self.global_batch_size - 1
        return delivered_positions(self.origin, self.skip, last, 1)[0].stop


class ListBatchSampler:
    """Consecutive batches of a list of samples, each given by its index over all shards."""

    def __init__(self, manifest: Manifest, sample_ids: np.ndarray, micro_batch_size: int) -> None:
        self._starts = shard_starts([manifest])
        self._sample_ids, self._batch_size = sample_ids, micro_batch_size

    def refs(self, index: int) -> list[SampleRef]:
        """The samples of one batch."""
        sample_ids = self._sample_ids[index * self._batch_size : (index + 1) * self._batch_size]
        shards = self._shards(sample_ids)
        samples = (sample_ids - self._starts[shards]).tolist()
        return [SampleRef(0, *pair) for pair in zip(shards.tolist(), samples, strict=True)]

    def shards_from(self, index: int) -> Iterator[list[int]]:
        """Every shard once, in the order of first use."""
        seen: set[int] = set()
        for start in range(index * self._batch_size, len(self._sample_ids), _LOOKUP_SIZE):
            sample_ids = self._sample_ids[start : start + _LOOKUP_SIZE]
            for shard in self._shards(sample_ids).tolist():
                if shard not in seen:
                    seen.add(shard)
                    yield [shard]

    def _shards(self, sample_ids: np.ndarray) -> np.ndarray:
        # side="right": of several shards with the same start, all but the last are empty.
        return np.searchsorted(self._starts, sample_ids, side="right") - 1


def shard_starts(manifests: Sequence[Manifest]) -> np.ndarray:
    """int64: index of the first sample of each shard, counted over all manifests in order."""
    sizes = np.array(
        [shard.samples for manifest in manifests for shard in manifest.shards], dtype=np.int64
    )
    return np.cumsum(sizes) - sizes
