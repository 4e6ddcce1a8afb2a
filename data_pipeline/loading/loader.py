"""The data loader: endless training steps from a state, and one pass for evaluation.

`Loader.steps()` yields the micro-batches of one optimizer step and the state after it; a new loader
with that state resumes with the next sample, on any number of ranks and workers. The stages from
the order of samples to a batch are in `pipeline.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.problems import check_sections
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_samplers import ListBatchSampler, TrainBatchSampler
from data_pipeline.loading.batch_spec import SINGLE_RANK, BatchSpec, RankInfo
from data_pipeline.loading.batch_stream import BatchStream
from data_pipeline.loading.pipeline import BatchPipeline, eval_processor, train_processor
from data_pipeline.loading.sources import (
    Source,
    as_source,
    data_fingerprint,
    make_order,
    open_sources,
)
from data_pipeline.order.micro_batches import largest_micro_batch_size, micro_batches_per_step
from data_pipeline.order.order import Order
from data_pipeline.order.state import LoaderState, enter_phase
from data_pipeline.reading.store import check_cache_dir
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest

__all__ = ["BatchSpec", "Loader", "RankInfo", "data_fingerprint", "read_all"]

_EXTRA_OPEN_SHARDS = 8
"""Shards that are open in addition to those of a window, at the boundary between two windows."""
_MAX_OPEN_IN_ONE_PASS = 16


class Loader:
    """One rank's part of every global batch, from a state on, without end."""

    def __init__(
        self,
        *,
        sources: Sequence[Source | Manifest],
        tokenizer: Tokenizer,
        data: DataConfig,
        batch: BatchSpec,
        global_batch_size: int,
        seed: int,
        state: LoaderState,
        ranks: RankInfo = SINGLE_RANK,
    ) -> None:
        """Set up the loader; worker processes start with the first step.

        Args:
            sources: The mixture; a manifest is a source without a weight.
            tokenizer: Tokenizer for captions.
            data: How to read.
            batch: Shape of a micro-batch.
            global_batch_size: Pairs per step, over all ranks.
            seed: Seed of the order and of every sample's augmentation.
            state: Where to begin; `LoaderState()` is the start.
            ranks: This rank, and the number of ranks that share each global batch.

        Raises:
            ConfigError: `data` is invalid, the global batch cannot be divided among the ranks, the
                state has another seed or phase, or a source with a weight above 0 has no samples.
            DataError: The state was saved with other shards, weights, drop-lists or another window,
                and `data.phase` is the same.
        """
        check_sections(data)
        self._micro_batches = micro_batches_per_step(
            global_batch_size, batch.micro_batch_size, ranks.world_size
        )
        self.sources = tuple(as_source(source) for source in sources)
        if not self.sources:
            raise ConfigError("the data loader has no sources; set data.train")

        fingerprint = data_fingerprint(self.sources, data.shuffle_window)
        state = enter_phase(state, seed=seed, fingerprint=fingerprint, phase=data.phase)
        self._state = state
        self._data = data
        self._sampler = TrainBatchSampler(
            order=make_order(
                self.sources, state.order_seed, data.shuffle_window, state.phase_begin
            ),
            origin=state.position,
            skip=state.skip,
            global_batch_size=global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            micro_batches=self._micro_batches,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )

        self._pipeline = self._make_pipeline(tokenizer, batch, state.order_seed)
        self._stream: BatchStream | None = None
        self._steps_done = 0

    @classmethod
    def open(
        cls,
        data: DataConfig,
        *,
        image_size: int,
        context_length: int,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        ranks: RankInfo = SINGLE_RANK,
        seed: int = 0,
        state: LoaderState | None = None,
    ) -> Loader:
        """A loader of the sources and the tokenizer that `data` names.

        Args:
            data: Sources (`train`), tokenizer, and how to read.
            image_size: Side of the square images, pixels.
            context_length: Maximum number of text positions, start and end tokens included.
            global_batch_size: Pairs per step, over all ranks.
            micro_batch_size: Pairs of a micro-batch; None for one micro-batch per rank and step.
            ranks: This rank, and the number of ranks that share each global batch.
            seed: Seed of the order and of every sample's augmentation.
            state: Where to begin; None for the start.

        Raises:
            ConfigError: Settings are invalid, or `data` names no tokenizer.
            DataError: A manifest is missing or corrupt, or see the constructor.
            TokenizerError: There is no tokenizer at `data.tokenizer`.
        """
        check_sections(data)
        if not data.tokenizer:
            raise ConfigError("data.tokenizer is empty; name a SentencePiece model")
        sources = open_sources(data.sources, timeout_seconds=data.timeout_seconds)
        check_cache_dir((source.manifest for source in sources), data)
        return cls(
            sources=sources,
            tokenizer=Tokenizer.load(data.tokenizer),
            data=data,
            batch=BatchSpec(
                image_size=image_size,
                context_length=context_length,
                micro_batch_size=largest_micro_batch_size(global_batch_size, ranks.world_size)
                if micro_batch_size is None
                else micro_batch_size,
            ),
            global_batch_size=global_batch_size,
            seed=seed,
            state=state or LoaderState(seed=seed),
            ranks=ranks,
        )

    @property
    def order(self) -> Order:
        """The order of training, e.g. to get each source's progress at a position."""
        return self._sampler.order

    @property
    def state(self) -> LoaderState:
        """The state after the last step that was yielded."""
        return self._state

    def steps(self) -> Iterator[tuple[list[Batch], LoaderState]]:
        """This rank's micro-batches of each step, and the state after it; a second call continues
        after the last step.

        Raises:
            DataError: No batch within `data.timeout_seconds`, or a worker process died. Corrupt
                samples and shards raise no error: the samples are listed in `Batch.problems`.
        """
        if self._stream is None:
            self._stream = BatchStream(
                self._pipeline,
                itertools.count(),
                workers=self._data.workers,
                prefetch=self._data.prefetch,
                timeout_seconds=self._data.timeout_seconds,
            )

        while True:
            batches = list(itertools.islice(self._stream, self._micro_batches))
            if len(batches) < self._micro_batches:
                return  # closed
            self._state = replace(self._state, position=self._sampler.step_end(self._steps_done))
            self._steps_done += 1
            yield batches, self._state
            del batches  # free the buffers while waiting for the next batches

    def close(self) -> None:
        """Stop the worker processes."""
        if self._stream is not None:
            self._stream.close()

    def _make_pipeline(self, tokenizer: Tokenizer, batch: BatchSpec, seed: int) -> BatchPipeline:
        data = self._data
        processors = [
            train_processor(data.for_source(source.config), batch, seed) for source in self.sources
        ]
        return BatchPipeline(
            [source.manifest for source in self.sources],
            data,
            sampler=self._sampler,
            processors=processors,
            tokenizer=tokenizer,
            max_open=len(self.sources) * data.shuffle_window + _EXTRA_OPEN_SHARDS,
        )


def read_all(
    manifest: Manifest,
    *,
    tokenizer: Tokenizer,
    data: DataConfig,
    batch: BatchSpec,
    indices: Sequence[int] | None = None,
    ranks: RankInfo = SINGLE_RANK,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every sample once, in the manifest's order, without augmentation and with its first caption;
    the others are in `Batch.all_captions`.

    Args:
        manifest: The shards.
        tokenizer: Tokenizer for captions.
        data: Where captions are (the first key with a caption is used), and how shards are read;
            `augment`, `filters`, `shuffle_window`, `workers` and `prefetch` apply to training only.
        batch: Shape of a batch; the last one may have fewer samples.
        indices: Read only these samples (indices in the manifest's order), in this order.
        ranks: Yields batches `rank, rank + world_size, ...`; some ranks may get one batch less.
        workers: Worker processes; 0 reads in this process.

    Raises:
        ConfigError: `indices` are out of range.
        DataError: No batch within `data.timeout_seconds`. Corrupt samples raise no error, see
            `Loader.steps`.
    """
    sample_ids = _sample_ids(manifest, indices)
    pipeline = BatchPipeline(
        [manifest],
        data,
        sampler=ListBatchSampler(manifest, sample_ids, batch.micro_batch_size),
        processors=[eval_processor(data, batch)],
        tokenizer=tokenizer,
        max_open=_MAX_OPEN_IN_ONE_PASS,
    )
    num_batches = -(-len(sample_ids) // batch.micro_batch_size)
    stream = BatchStream(
        pipeline,
        range(ranks.rank, num_batches, ranks.world_size),
        workers=workers,
        prefetch=2,
        timeout_seconds=data.timeout_seconds,
    )
    try:
        yield from stream
    finally:
        stream.close()


def _sample_ids(manifest: Manifest, indices: Sequence[int] | None) -> np.ndarray:
    """int64: the samples to read."""
    total = manifest.total_samples
    if indices is None:
        return np.arange(total)

    sample_ids = np.asarray(indices, dtype=np.int64)
    if len(sample_ids) and not 0 <= sample_ids.min() <= sample_ids.max() < total:
        raise ConfigError(
            f"sample indices {sample_ids.min()}..{sample_ids.max()} are out of range: "
            f"{storage.redact(manifest.url)} has {total} samples"
        )
    return sample_ids
