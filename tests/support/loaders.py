"""Loaders over a few small shards, and comparisons of their batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec, RankInfo
from data_pipeline.loading.loader import Loader, read_all
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest
from tests.support.small_shards import make_data_config

NUM_SAMPLES, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 30, 8, 2


@dataclasses.dataclass(frozen=True)
class LoaderFactory:
    """Creates loaders over one dataset."""

    manifest: Manifest
    tokenizer: Tokenizer

    def open(
        self,
        *,
        data: DataConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
    ) -> Loader:
        return self.resume(
            LoaderState(position=position), data=data, rank=rank, world_size=world_size
        )

    def resume(
        self,
        state: LoaderState,
        *,
        data: DataConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 9,
    ) -> Loader:
        return Loader(
            sources=[self.manifest],
            tokenizer=self.tokenizer,
            data=data or make_data_config(),
            batch=BatchSpec(
                image_size=8,
                context_length=16,
                micro_batch_size=MICRO_BATCH_SIZE,
            ),
            seed=seed,
            ranks=RankInfo(rank=rank, world_size=world_size),
            global_batch_size=GLOBAL_BATCH_SIZE,
            state=state,
        )

    def evaluate(
        self,
        *,
        data: DataConfig | None = None,
        context_length: int = 16,
        indices: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> Iterator[Batch]:
        return read_all(
            self.manifest,
            tokenizer=self.tokenizer,
            data=data or make_data_config(),
            batch=BatchSpec(image_size=8, context_length=context_length, micro_batch_size=4),
            indices=indices,
            ranks=RankInfo(rank=rank, world_size=world_size),
            workers=workers,
        )


def sample_keys(batches: Sequence[Batch]) -> list[str]:
    """Keys of all samples, including corrupt ones."""
    return [
        key
        for batch in batches
        for key in (*batch.keys, *(problem.key for problem in batch.problems))
    ]


def take_steps(loader: Loader, steps: int) -> tuple[list[list[Batch]], list[LoaderState]]:
    """The first steps, and the state after each of them."""
    with closing(loader):
        taken = list(itertools.islice(loader.steps(), steps))
    return [batches for batches, _ in taken], [state for _, state in taken]


def batches_equal(left: Batch, right: Batch) -> bool:
    """Whether tensors, ids, keys, captions and problems of two batches are equal."""
    tensors = zip((*left[:5], left.ids), (*right[:5], right.ids), strict=True)
    return all(torch.equal(a, b) for a, b in tensors) and left[5:8] == right[5:8]


def steps_equal(left: list[list[Batch]], right: list[list[Batch]]) -> bool:
    """Whether all batches of all steps are equal."""
    pairs = zip(itertools.chain(*left), itertools.chain(*right), strict=True)
    return all(batches_equal(a, b) for a, b in pairs)
