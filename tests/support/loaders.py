"""Loaders over a few small shards that differ in little, for tests of what they deliver."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.loader import Loader, read_all
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest
from tests.support.small_shards import settings

COUNT, STEP, FORWARD = 30, 8, 2


@dataclasses.dataclass(frozen=True)
class Setup:
    """Opens loaders that differ in few things."""

    manifest: Manifest
    tokenizer: str

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
            manifests=[self.manifest],
            tokenizer_path=self.tokenizer,
            data=data or settings(),
            image_size=8,
            context_length=16,
            seed=seed,
            rank=rank,
            world_size=world_size,
            global_batch_size=STEP,
            micro_batch_size=FORWARD,
            state=state,
        )

    def evaluate(self, **more: object) -> Iterator[Batch]:
        arguments: dict[str, object] = {
            "tokenizer": Tokenizer.load(self.tokenizer),
            "data": settings(),
            "image_size": 8,
            "context_length": 16,
            "micro_batch_size": 4,
        }
        return read_all(self.manifest, **(arguments | more))  # type: ignore[arg-type]


def keys_of(batches: Sequence[Batch]) -> list[str]:
    """Keys of all samples, the bad ones too."""
    return [
        key
        for batch in batches
        for key in (*batch.keys, *(problem.key for problem in batch.problems))
    ]


def take(loader: Loader, steps: int) -> tuple[list[list[Batch]], list[LoaderState]]:
    """The first steps and the states after them."""
    with closing(loader):
        found = list(itertools.islice(loader.steps(), steps))
    return [batches for batches, _ in found], [state for _, state in found]


def same(left: Batch, right: Batch) -> bool:
    """Whether two batches hold the same."""
    tensors = zip((*left[:5], left.ids), (*right[:5], right.ids), strict=True)
    return all(torch.equal(a, b) for a, b in tensors) and left[5:8] == right[5:8]


def all_same(left: list[list[Batch]], right: list[list[Batch]]) -> bool:
    """Whether steps hold the same batches."""
    pairs = zip(itertools.chain(*left), itertools.chain(*right), strict=True)
    return all(same(a, b) for a, b in pairs)
