"""The door to the data: endless training steps from a state, and one pass for evaluation.

    manifests -> plan (pure) -> this rank's positions -> read, check, decode, tokenise -> Batch

`Loader.steps()` gives the micro-batches of one optimizer step and the state after it; a new loader
made with that state goes on with the very next sample, on any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.content.recipe import Recipe
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.feed import BatchMaker, BatchStream, Sources, shard_sizes
from data_pipeline.order.plan import LoaderState, Plan, micro_batch_positions, micro_batches_per_step
from data_pipeline.samples import Batch, SampleRef
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest


class Loader:
    """One rank's share of every global batch, from a state on, without end."""

    def __init__(
        self,
        *,
        manifests: Sequence[Manifest],
        tokenizer_path: str,
        data: DataConfig,
        image_size: int,
        text_length: int,
        seed: int,
        rank: int,
        world: int,
        pairs_per_step: int,
        pairs_per_forward: int,
        state: LoaderState,
    ) -> None:
        """Prepare; processes start with the first step.

        Args:
            manifests: The shards to train on.
            tokenizer_path: SentencePiece model file.
            data: How to read.
            image_size: Side of the square pictures, pixels.
            text_length: Most text positions, marks included.
            seed: Decides the order and every sample's augmentation.
            rank: This rank.
            world: Ranks that share each global batch.
            pairs_per_step: Pairs of a global batch.
            pairs_per_forward: Pairs of one rank's micro-batch.
            state: Where to begin; `LoaderState()` is the start.

        Raises:
            ConfigError: The batch does not split, or the state is of another seed.
            DataError: The state was saved with other shards or another shuffle window.
            TokenizerError: There is no tokenizer at `tokenizer_path`.
        """
        self._micro_batches = micro_batches_per_step(pairs_per_step, pairs_per_forward, world)
        self._pairs_per_step = pairs_per_step
        fingerprint = data_fingerprint(manifests, data.shuffle_window)
        _check_state(state, seed, fingerprint)
        self._state = replace(state, seed=seed, data=fingerprint)
        self._data = data
        schedule = _TrainSchedule(
            plan=Plan(shard_sizes(manifests), seed, data.shuffle_window),
            origin=state.position,
            pairs_per_step=pairs_per_step,
            pairs_per_forward=pairs_per_forward,
            micro_batches=self._micro_batches,
            rank=rank,
            world=world,
        )
        recipe = Recipe(
            image_size=image_size,
            text_length=text_length,
            caption_keys=tuple(data.caption_keys),
            caption_weights=tuple(data.caption_weights),
            seed=seed,
            augment=data.augment,
        )
        sources = Sources(
            manifests=tuple(manifests),
            tokenizer=Tokenizer.load(tokenizer_path),
            cache_dir=data.cache_dir,
            verify=False,
            timeout_seconds=data.timeout_seconds,
            # All shards of a window are in use at once; a few more at its borders.
            max_open=data.shuffle_window + 8,
        )
        self._maker = BatchMaker(sources, recipe, schedule)
        self._stream: BatchStream | None = None

    def steps(self) -> Iterator[tuple[list[Batch], LoaderState]]:
        """This rank's micro-batches of each step, and the state after it; goes on where it was left.

        Raises:
            DataError: A shard is missing or not the manifest's, or nothing came in time. Bad samples
                are no error: they are in each batch's `problems`.
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
            self._state = replace(self._state, position=self._state.position + self._pairs_per_step)
            yield batches, self._state

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
    text_length: int,
    pairs_per_forward: int,
    indices: Sequence[int] | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every sample once, in the manifest's order, without augmentation and with its first caption.

    Args:
        manifest: The shards.
        tokenizer: Turns captions into ids.
        data: Where captions are (the first key that has one counts), and how shards are read; its
            `augment`, `shuffle_window`, `workers` and `prefetch` are for training only.
        image_size: Side of the square pictures, pixels.
        text_length: Most text positions, marks included.
        pairs_per_forward: Samples of a batch, bad ones included; the last may have fewer.
        indices: Only these samples (numbers in the manifest's order), in this order; None is all.
        rank: Gives batches `rank, rank + world, ...` of them; the union over ranks is everything, and
            some ranks may get one batch less.
        world: Ranks that share the work.
        workers: Processes that prepare batches; 0 prepares them here.

    Raises:
        ConfigError: `indices` holds numbers of no sample.
        DataError: A shard is missing or not the manifest's.
    """
    numbers = np.arange(manifest.total_samples) if indices is None else np.asarray(indices, dtype=np.int64)
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < manifest.total_samples:
        raise ConfigError(
            f"samples {numbers.min()}..{numbers.max()} were asked for, but {storage.redact(manifest.url)} has "
            f"{manifest.total_samples}"
        )
    recipe = Recipe(
        image_size=image_size,
        text_length=text_length,
        caption_keys=tuple(data.caption_keys),
        caption_weights=tuple(data.caption_weights),
    )
    sources = Sources(
        manifests=(manifest,),
        tokenizer=tokenizer,
        cache_dir=data.cache_dir,
        verify=False,
        timeout_seconds=data.timeout_seconds,
        max_open=16,
    )
    schedule = _ListSchedule(shard_sizes([manifest]), numbers, pairs_per_forward)
    stream = BatchStream(
        BatchMaker(sources, recipe, schedule),
        range(rank, -(-len(numbers) // pairs_per_forward), world),
        workers=workers,
        prefetch=2,
        timeout_seconds=data.timeout_seconds,
    )
    try:
        yield from stream
    finally:
        stream.close()


def data_fingerprint(manifests: Sequence[Manifest], shuffle_window: int) -> str:
    """A name for everything but the seed that decides the order; folders may move."""
    facts = [[shard.name, shard.samples, shard.sha256] for manifest in manifests for shard in manifest.shards]
    return hashlib.sha256(json.dumps([shuffle_window, facts]).encode()).hexdigest()[:32]


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
            f"the position in the data (sample {state.position}) was saved with other shards or another "
            f"data.shuffle_window (fingerprint {state.data}, now {fingerprint}): the order would be another; "
            f"give the same data or start a new run"
        )


@dataclass(frozen=True, kw_only=True)
class _TrainSchedule:
    """Batch number n is micro-batch `n mod micro_batches` of step `n div micro_batches` after `origin`."""

    plan: Plan
    origin: int
    pairs_per_step: int
    pairs_per_forward: int
    micro_batches: int
    rank: int
    world: int

    def refs(self, number: int) -> list[SampleRef]:
        """This rank's samples of one micro-batch."""
        step, micro = divmod(number, self.micro_batches)
        positions = micro_batch_positions(
            self.origin + step * self.pairs_per_step,
            micro,
            self.rank,
            pairs_per_forward=self.pairs_per_forward,
            world=self.world,
        )
        return self.plan.samples(positions.start, len(positions))


class _ListSchedule:
    """Batch number n is the n-th piece of a list of samples."""

    def __init__(self, sizes: Sequence[int], numbers: np.ndarray, pairs_per_forward: int) -> None:
        self._ends, self._numbers, self._pairs = np.cumsum(sizes), numbers, pairs_per_forward

    def refs(self, number: int) -> list[SampleRef]:
        """Shard and place of each sample of one batch."""
        chosen = self._numbers[number * self._pairs : (number + 1) * self._pairs]
        shards = np.searchsorted(self._ends, chosen, side="right")
        starts = np.concatenate([[0], self._ends])[shards]
        return [SampleRef(0, *pair) for pair in zip(shards.tolist(), (chosen - starts).tolist(), strict=True)]
