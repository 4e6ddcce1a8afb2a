"""The door to the data: endless training steps from a state, and one pass for evaluation.

    sources -> order (pure) -> this rank's positions -> read, check, decode, tokenize -> Batch

`Loader.steps()` gives the micro-batches of one optimizer step and the state after it; a new loader
made with that state goes on with the very next sample, on any number of ranks and workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.recipe import Recipe
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.feed import BatchMaker, BatchStream, Reading
from data_pipeline.loading.schedules import ListSchedule, TrainSchedule
from data_pipeline.loading.sources import Source, data_fingerprint, make_order, plain_source
from data_pipeline.order.order import Order
from data_pipeline.order.plan import micro_batches_per_step
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest

__all__ = ["Loader", "data_fingerprint", "read_all"]


class Loader:
    """One rank's share of every global batch, from a state on, without end."""

    def __init__(
        self,
        *,
        sources: Sequence[Source] = (),
        manifests: Sequence[Manifest] = (),
        tokenizer_path: str,
        data: DataConfig,
        image_size: int,
        context_length: int,
        seed: int,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        state: LoaderState,
    ) -> None:
        """Prepare; processes start with the first step.

        Args:
            sources: The mixture to train on.
            manifests: Instead of it: manifests, each a source of its own without a weight.
            tokenizer_path: SentencePiece model file.
            data: How to read.
            image_size: Side of the square pictures, pixels.
            context_length: Most text positions, marks included.
            seed: Decides the order and every sample's augmentation.
            rank: This rank.
            world_size: Ranks that share each global batch.
            global_batch_size: Pairs of a global batch.
            micro_batch_size: Pairs of one rank's micro-batch.
            state: Where to begin; `LoaderState()` is the start.

        Raises:
            ConfigError: The batch does not split, the state is of another seed, or a source that is
            drawn
                from has no samples.
            DataError: The state was saved with other shards, weights, drop-lists or another window.
            TokenizerError: There is no tokenizer at `tokenizer_path`.
        """
        self._micro_batches = micro_batches_per_step(
            global_batch_size, micro_batch_size, world_size
        )
        self.sources = tuple(sources) or tuple(plain_source(manifest) for manifest in manifests)
        if not self.sources or (sources and manifests):
            raise ConfigError("give a loader sources or manifests to train on: one of the two")
        fingerprint = data_fingerprint(self.sources, data.shuffle_window)
        _check_state(state, seed, fingerprint)
        self._state = replace(state, seed=seed, data=fingerprint)
        self._data = data
        self._schedule = TrainSchedule(
            order=make_order(self.sources, seed, data.shuffle_window),
            origin=state.position,
            skip=state.skip,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            micro_batches=self._micro_batches,
            rank=rank,
            world_size=world_size,
        )
        recipe = Recipe(
            image_size=image_size,
            context_length=context_length,
            caption_keys=tuple(data.caption_keys),
            caption_weights=tuple(data.caption_weights),
            seed=seed,
            augment=data.augment,
            filters=data.filters,
            limits=data.limits,
        )
        reading = Reading(
            manifests=tuple(source.manifest for source in self.sources),
            tokenizer=Tokenizer.load(tokenizer_path),
            settings=data,
            # All shards of a window are in use at once; a few more at its borders.
            max_open=len(self.sources) * data.shuffle_window + 8,
        )
        self._maker = BatchMaker(reading, recipe, self._schedule)
        self._stream: BatchStream | None = None
        self._steps_done = 0

    @property
    def order(self) -> Order:
        """The order of training: what of each source was consumed before a position, and more."""
        return self._schedule.order

    @property
    def state(self) -> LoaderState:
        """After the last step that was given."""
        return self._state

    def steps(self) -> Iterator[tuple[list[Batch], LoaderState]]:
        """This rank's micro-batches of each step, and the state after it; goes on where it was
        left.

        Raises:
            DataError: Nothing came in time, or a worker process ended. Bad samples and bad shards
            are no
                error: every sample concerned is in its batch's `problems`.
        """
        if self._stream is None:
            self._stream = BatchStream(
                self._maker,
                itertools.count(),
                workers=self._data.workers,
                prefetch=self._data.prefetch,
                timeout_seconds=self._data.timeout_seconds,
            )
        while True:
            batches = list(itertools.islice(self._stream, self._micro_batches))
            if len(batches) < self._micro_batches:
                return  # closed
            self._state = replace(self._state, position=self._schedule.step_end(self._steps_done))
            self._steps_done += 1
            yield batches, self._state
            del batches  # else it would be held while the next are waited for

    def close(self) -> None:
        """End the worker processes."""
        if self._stream is not None:
            self._stream.close()


def read_all(
    manifest: Manifest,
    *,
    tokenizer: Tokenizer,
    data: DataConfig,
    image_size: int,
    context_length: int,
    micro_batch_size: int,
    indices: Sequence[int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every sample once, in the manifest's order, without augmentation and with its first caption.

    Args:
        manifest: The shards.
        tokenizer: Turns captions into ids.
        data: Where captions are (the first key that has one counts), and how shards are read; its
            `augment`, `filters`, `shuffle_window`, `workers` and `prefetch` are for training only.
        image_size: Side of the square pictures, pixels.
        context_length: Most text positions, marks included.
        micro_batch_size: Samples of a batch, bad ones included; the last may have fewer.
        indices: Only these samples (numbers in the manifest's order), in this order; None is all.
        rank: Gives batches `rank, rank + world, ...` of them; the union over ranks is everything,
            and some ranks may get one batch less.
        world_size: Ranks that share the work.
        workers: Processes that prepare batches; 0 prepares them here.

    Raises:
        ConfigError: `indices` holds numbers of no sample.
        DataError: Nothing came in time. Bad samples are no error, see `Loader.steps`.
    """
    numbers = (
        np.arange(manifest.total_samples)
        if indices is None
        else np.asarray(indices, dtype=np.int64)
    )
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < manifest.total_samples:
        raise ConfigError(
            f"samples {numbers.min()}..{numbers.max()} were asked for, but {storage.redact(manifest.url)} has "
            f"{manifest.total_samples}"
        )
    recipe = Recipe(
        image_size=image_size,
        context_length=context_length,
        caption_keys=tuple(data.caption_keys),
        caption_weights=tuple(data.caption_weights),
        limits=data.limits,
    )
    reading = Reading(manifests=(manifest,), tokenizer=tokenizer, settings=data, max_open=16)
    schedule = ListSchedule(manifest, numbers, micro_batch_size)
    stream = BatchStream(
        BatchMaker(reading, recipe, schedule),
        range(rank, -(-len(numbers) // micro_batch_size), world_size),
        workers=workers,
        prefetch=2,
        timeout_seconds=data.timeout_seconds,
    )
    try:
        yield from stream
    finally:
        stream.close()


def _check_state(state: LoaderState, seed: int, fingerprint: str) -> None:
    """A position means nothing in another order."""
    if not state.data:
        return
    if state.seed != seed:
        raise ConfigError(
            f"seed is {seed}, but this position in the data was saved with seed {state.seed}: the order "
            f"would be another; set seed back or start a new run"
        )
    if state.data != fingerprint:
        raise DataError(
            f"the position in the data (sample {state.position}) was saved with other shards, weights or drop-lists, "
            f"or another data.shuffle_window (fingerprint {state.data}, now {fingerprint}): the order would be "
            f"another; give the same data or start a new run"
        )
