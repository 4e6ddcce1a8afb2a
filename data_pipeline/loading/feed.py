"""Batches by number, made here or in worker processes: the machinery under `loader.py`.

A batch is a pure function of its number, so workers can make them in any order and torch's
DataLoader hands them over in the right one. Workers come from a fork server: a forked copy of the
training process would inherit threads (object stores, CUDA) that do not live in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipeline.common import errors
from data_pipeline.common.errors import DataError, StorageError, VlmError
from data_pipeline.content.recipe import Recipe
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.collate import BatchRows, PackedBatch
from data_pipeline.loading.schedules import Schedule, shard_starts
from data_pipeline.loading.worker_process import fork_server, prepare_worker
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import Batch, RawSample, SampleProblem, SampleRef
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest

ASK_AGAIN_SECONDS = 5.0
"""Pause before a store that gave nothing of a whole batch is asked again."""
POLL_SECONDS = 5
"""How often a waiting trainer looks whether its workers still live."""


class Failure(NamedTuple):
    """An error that a worker hands over as a value: a raised one would arrive as a traceback in
    text."""

    kind: str
    message: str

    def error(self) -> VlmError:
        """The error again, as it was raised."""
        kind = getattr(errors, self.kind, DataError)
        found = kind(self.message)
        assert isinstance(found, VlmError)
        return found


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How batches are read: plain facts, so that a worker can open everything itself."""

    manifests: tuple[Manifest, ...]
    tokenizer: Tokenizer
    settings: DataConfig
    max_open: int
    """Shards held open."""


class BatchMaker(Dataset[PackedBatch | Failure]):
    """Map-style dataset of whole batches."""

    def __init__(self, reading: Reading, recipe: Recipe, schedule: Schedule) -> None:
        self._reading, self._recipe, self._schedule = reading, recipe, schedule
        self._starts = shard_starts(reading.manifests)
        self._reader: Reader | None = None
        self._store: ShardStore | None = None
        self._ahead: FetchAhead | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Open files and threads stay in their process.
        return self.__dict__ | {"_reader": None, "_store": None, "_ahead": None}

    def __getitem__(self, number: int) -> PackedBatch | Failure:
        try:
            return self.make(number)
        except VlmError as error:
            return Failure(type(error).__name__, str(error))

    def make(self, number: int) -> PackedBatch:
        """One batch.

        Raises:
            VlmError: Something is wrong with the run, such as its settings. Bad samples and shards
            are no
                error: the samples are named in the batch's `problems`.
        """
        start = time.perf_counter()
        reader, tokenizer, recipe = self._opened(number), self._reading.tokenizer, self._recipe
        refs = self._schedule.refs(number)
        rows = BatchRows(
            len(refs),
            image_size=recipe.image_size,
            context_length=recipe.context_length,
            pad_id=tokenizer.pad_id,
        )
        problems: list[SampleProblem] = []
        raws = self._read(reader, refs, start)
        for slot, (ref, raw) in enumerate(zip(refs, raws, strict=True)):
            number_of_sample = int(self._starts[ref.shard]) + ref.sample
            if isinstance(raw, SampleProblem):
                problems.append(raw._replace(id=number_of_sample))
                continue
            try:
                rows.add(recipe.make(raw, ref.epoch, tokenizer, rows.place), number_of_sample, slot)
            except DataError as error:
                if not error.slug:
                    raise
                problems.append(
                    SampleProblem(raw.shard, raw.key, error.slug, str(error), number_of_sample)
                )
        return rows.packed(problems, time.perf_counter() - start)

    def _read(
        self, reader: Reader, refs: list[SampleRef], start: float
    ) -> list[RawSample | SampleProblem]:
        """The samples of a batch; waits for a store of which nothing at all can be had.

        One shard that cannot be had costs its samples. When a whole batch cannot, the network or
        the credentials are at fault, and going on would use up the data: the store is asked again
        until the batch is due.

        Raises:
            StorageError: It never answered.
        """
        settings, places = self._reading.settings, [(ref.shard, ref.sample) for ref in refs]
        found = reader.read_many(places)
        while found and all(
            isinstance(raw, SampleProblem) and raw.reason == "unreachable" for raw in found
        ):
            spent = time.perf_counter() - start
            if spent + ASK_AGAIN_SECONDS + settings.shard_seconds > settings.timeout_seconds:
                problem = found[0]
                assert isinstance(problem, SampleProblem)
                raise StorageError(
                    f"not one sample of a whole batch could be had in {spent:.0f} s: {problem.detail}. Look at the "
                    f"network and the credentials; the same command goes on from the last checkpoint"
                )
            time.sleep(ASK_AGAIN_SECONDS)
            reader.forget_troubles()
            found = reader.read_many(places)
        return found

    def close(self) -> None:
        """End what was started in this process: a thread that fetches, and open files."""
        if self._ahead is not None:
            self._ahead.close()
        if self._store is not None:
            self._store.close()
        self._reader = self._store = self._ahead = None

    def _opened(self, number: int) -> Reader:
        """The reader, made with the first batch of this process."""
        if self._reader is None:
            known = self._reading
            self._store = ShardStore(known.manifests, known.settings, max_open=known.max_open)
            self._reader = Reader(self._store)
            if known.settings.fetch_ahead:
                self._ahead = FetchAhead(self._store, self._schedule.shards_from, number)
        if self._ahead is not None:
            self._ahead.reached(number)
        return self._reader


class BatchStream:
    """Batches in the order of `numbers`, made ahead by `workers` processes (0: made when asked)."""

    def __init__(
        self,
        maker: BatchMaker,
        numbers: Iterable[int],
        *,
        workers: int,
        prefetch: int,
        timeout_seconds: float,
    ) -> None:
        self._timeout, self._maker = timeout_seconds, maker
        more: dict[str, Any] = {}
        if workers:
            # The server imports torch and this package once; its children then start in no time.
            context = fork_server(preload=__name__)
            more = {
                "multiprocessing_context": context,
                "worker_init_fn": prepare_worker,
                "prefetch_factor": max(1, prefetch),
                "timeout": POLL_SECONDS,
            }
        loader = DataLoader(
            maker,
            batch_size=None,
            sampler=_Numbers(numbers),
            num_workers=workers,
            collate_fn=_as_it_is,
            # Its own generator: the loader draws a seed, and must not take it from the run's.
            generator=torch.Generator(),
            **more,
        )
        self._batches: Iterator[PackedBatch | Failure] | None = iter(loader)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        found = self._wait()
        if isinstance(found, Failure):
            self.close()
            raise found.error()
        return found.unpack()

    def close(self) -> None:
        """End the worker processes, and what was opened here."""
        self._batches = None  # torch ends them when nothing refers to the iterator any more
        self._maker.close()

    def _wait(self) -> PackedBatch | Failure:
        if self._batches is None:
            raise StopIteration
        start = time.monotonic()
        while True:
            try:
                return next(self._batches)
            except RuntimeError as error:
                text = str(error)
                if text.startswith("DataLoader worker (pid"):
                    raise self._worker_died(text) from None
                # Asking again after a time-out is allowed: torch kept its place. Short waits
                # instead of one long one, because only between them does torch notice that a worker
                # has died.
                if not text.startswith(f"DataLoader timed out after {POLL_SECONDS} seconds"):
                    raise
                if time.monotonic() - start > self._timeout:
                    self.close()
                    raise DataError(
                        f"no batch came within {self._timeout:g} s (data.timeout_seconds): the disk or store "
                        f"with the shards does not answer, or is too slow"
                    ) from None
            except (EOFError, ConnectionError, FileNotFoundError) as error:
                if str(error).startswith("Caught "):
                    raise  # of code in a worker, with its traceback
                # A worker that dies while its batch is on the way leaves a broken connection.
                raise self._worker_died(f"its connection broke: {type(error).__name__}") from None

    def _worker_died(self, what: str) -> DataError:
        self.close()
        return DataError(
            f"a loader process ended unexpectedly ({what}); it may have run out of memory or of space in "
            f"/dev/shm: try fewer data.workers or a smaller data.prefetch"
        )


class _Numbers(Sampler[int]):
    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)


def _as_it_is(batch: Any) -> Any:
    return batch
