"""A simulated training run that records samples in a ledger without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data_pipeline.loading.batch_samplers import TrainBatchSampler, shard_starts
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.ledger_check import LedgerReport, PhaseOrder, check_ledger
from data_pipeline.loading.ledger_metadata import LedgerMetadata
from data_pipeline.loading.sources import Source, data_fingerprint, make_order
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch, SampleProblem
from data_pipeline.settings import SourceConfig
from data_pipeline.shards.manifest import Manifest

SEED, SHUFFLE_WINDOW, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 4, 2, 16, 2
CORRUPT_SAMPLE, FILTERED_SAMPLE = 5, 9


@dataclass
class SimulatedTraining:
    """A run that records the samples that it would have read."""

    sources: tuple[Source, ...]
    folder: Path
    state: LoaderState = field(default_factory=lambda: LoaderState(seed=SEED))
    steps: int = 0
    """Steps done at the last checkpoint."""
    end_position: int = 0
    """Position after the last `train`."""

    def __post_init__(self) -> None:
        self.order = make_order(self.sources, SEED, SHUFFLE_WINDOW)
        self.starts = shard_starts([source.manifest for source in self.sources])
        self.state = replace(self.state, data=data_fingerprint(self.sources, SHUFFLE_WINDOW))

    def train(self, steps: int, world_size: int = 1) -> None:
        """Record the samples of `steps` steps after the last checkpoint."""
        ledgers = [self._open_ledger(rank, world_size) for rank in range(world_size)]
        samplers = [self._sampler(rank, world_size) for rank in range(world_size)]
        micro_batches = samplers[0].micro_batches
        before = self.state.position
        for step in range(steps):
            after = samplers[0].step_end(step)
            indices = range(step * micro_batches, (step + 1) * micro_batches)
            for ledger, sampler in zip(ledgers, samplers, strict=True):
                batches = [self._batch(sampler, index) for index in indices]
                ledger.add(self.steps + step + 1, before, after, batches)
            before = after

        for ledger in ledgers:
            ledger.sync()
            ledger.close()
        self.end_position = before

    def save(self, steps: int) -> None:
        """Save a checkpoint at the end of the last `train`, which had `steps` steps."""
        self.steps += steps
        self.state = replace(self.state, position=self.end_position)

    @property
    def phases(self) -> list[PhaseOrder]:
        """The only phase."""
        return [PhaseOrder(1, self.order, self.starts)]

    def check(self) -> LedgerReport:
        """Compare the ledger with the order."""
        skip = LedgerMetadata.read(self.folder).skip
        return check_ledger(self.folder, self.phases, skip)

    def sample_ids(self, count: int) -> list[int]:
        """Ids, over all sources, of the first `count` samples of the order."""
        return [int(self.starts[ref.shard]) + ref.sample for ref in self.order.samples(0, count)]

    def _open_ledger(self, rank: int, world_size: int) -> Ledger:
        return Ledger.open(
            self.folder,
            rank=rank,
            world_size=world_size,
            micro_batch_size=MICRO_BATCH_SIZE,
            resumed_step=self.steps,
            metadata=LedgerMetadata.of(self.sources, SHUFFLE_WINDOW, self.state),
        )

    def _sampler(self, rank: int, world_size: int) -> TrainBatchSampler:
        return TrainBatchSampler(
            order=self.order,
            origin=self.state.position,
            skip=self.state.skip,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=MICRO_BATCH_SIZE,
            micro_batches=GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE // world_size,
            rank=rank,
            world_size=world_size,
        )

    def _batch(self, sampler: TrainBatchSampler, index: int) -> Batch:
        refs = sampler.refs(index)
        return batch_of([int(self.starts[ref.shard]) + ref.sample for ref in refs])


def batch_of(ids: Sequence[int]) -> Batch:
    """A batch without contents, in which `CORRUPT_SAMPLE` and `FILTERED_SAMPLE` are problems."""
    reasons = {CORRUPT_SAMPLE: "corrupt-image", FILTERED_SAMPLE: "filter:min-side"}
    problems = [SampleProblem("s", "k", reasons[i], "d", i) for i in ids if i in reasons]
    delivered = torch.tensor([i for i in ids if i not in reasons], dtype=torch.int64)
    empty = torch.empty(0)
    return Batch(empty, empty, empty, empty, empty, (), (), tuple(problems), 0.0, delivered)


def simulated_training(manifests: Sequence[Manifest], folder: Path) -> SimulatedTraining:
    """A run over two sources with weights 3 and 1."""
    sources = [
        Source(manifest=manifest, config=SourceConfig(shards=manifest.url, weight=weight))
        for manifest, weight in zip(manifests, (3.0, 1.0), strict=True)
    ]
    return SimulatedTraining(tuple(sources), folder)
