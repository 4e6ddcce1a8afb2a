"""Which samples batch number `n` holds: of training, and of one pass over everything.

A schedule is made of plain facts and travels to worker processes; each worker asks it for its
batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipeline.order.order import Order
from data_pipeline.order.plan import micro_batch_positions
from data_pipeline.order.state import Ranges, delivered
from data_pipeline.samples import SampleRef
from data_pipeline.shards.manifest import Manifest


class Schedule(Protocol):
    """Must travel to another process."""

    def refs(self, number: int) -> list[SampleRef]:
        """A batch's samples, in order."""

    def shards_from(self, number: int) -> Iterator[list[int]]:
        """Shards in the order in which they are needed from a batch on, those needed together in
        one list."""


@dataclass(frozen=True, kw_only=True)
class TrainSchedule:
    """Batch number n is micro-batch `n mod micro_batches` of step `n div micro_batches` after
    `origin`."""

    order: Order
    origin: int
    """Position of the first step."""
    skip: Ranges
    """Positions that are jumped."""
    global_batch_size: int
    micro_batch_size: int
    micro_batches: int
    """Of one rank in one step."""
    rank: int
    world_size: int

    def refs(self, number: int) -> list[SampleRef]:
        """This rank's samples of one micro-batch."""
        return [
            ref
            for part in self.positions(number)
            for ref in self.order.samples(part.start, len(part))
        ]

    def positions(self, number: int) -> list[range]:
        """This rank's positions of one micro-batch, as ranges."""
        step, micro = divmod(number, self.micro_batches)
        places = micro_batch_positions(
            step * self.global_batch_size,
            micro,
            self.rank,
            micro_batch_size=self.micro_batch_size,
            world_size=self.world_size,
        )
        return delivered(self.origin, self.skip, places.start, len(places))

    def shards_from(self, number: int) -> Iterator[list[int]]:
        """Windows of all ranks: on a node most shards serve several of them."""
        return self.order.shards_from(self.positions(number)[0].start)

    def step_end(self, step: int) -> int:
        """The position after step number `step`, 0 for the first after `origin`."""
        return delivered(self.origin, self.skip, (step + 1) * self.global_batch_size - 1, 1)[0].stop


class ListSchedule:
    """Batch number n is the n-th piece of a list of samples, each given by its number over all
    shards."""

    def __init__(self, manifest: Manifest, numbers: np.ndarray, micro_batch_size: int) -> None:
        self._starts, self._numbers, self._pairs = (
            shard_starts([manifest]),
            numbers,
            micro_batch_size,
        )

    def refs(self, number: int) -> list[SampleRef]:
        """Shard and place of each sample of one batch."""
        chosen = self._numbers[number * self._pairs : (number + 1) * self._pairs]
        shards = self._shards(chosen)
        places = (chosen - self._starts[shards]).tolist()
        return [SampleRef(0, *pair) for pair in zip(shards.tolist(), places, strict=True)]

    def shards_from(self, number: int) -> Iterator[list[int]]:
        """Each shard once, where it is needed first."""
        seen: set[int] = set()
        for start in range(number * self._pairs, len(self._numbers), 4096):
            for shard in self._shards(self._numbers[start : start + 4096]).tolist():
                if shard not in seen:
                    seen.add(shard)
                    yield [shard]

    def _shards(self, numbers: np.ndarray) -> np.ndarray:
        # From the right: of several shards that begin at a number, all but the last are empty.
        return np.searchsorted(self._starts, numbers, side="right") - 1


def shard_starts(manifests: Sequence[Manifest]) -> np.ndarray:
    """int64: number of the first sample of each shard, counted over all manifests in order."""
    sizes = np.array(
        [shard.samples for manifest in manifests for shard in manifest.shards], dtype=np.int64
    )
    return np.cumsum(sizes) - sizes
