"""Map-style dataset of whole batches, for the training process or for worker processes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from data_pipeline.common import errors
from data_pipeline.common.errors import DataError, StorageError, VlmError
from data_pipeline.content.sample_processor import SampleProcessor
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_samplers import BatchSampler, shard_starts
from data_pipeline.loading.collate import BatchBuilder, PackedBatch
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem, SampleRef
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest

STORE_RETRY_SECONDS = 5.0
"""Pause before a batch is read again if all of its samples were unreachable."""


class WorkerError(NamedTuple):
    """An error that a worker returns as a value; torch would pass on a raised one only as the text
    of its traceback."""

    kind: str
    message: str

    def error(self) -> VlmError:
        """The original error."""
        error_class = getattr(errors, self.kind, DataError)
        error = error_class(self.message)
        assert isinstance(error, VlmError)
        return error


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How batches are read; can be pickled, so that every worker opens its own files."""

    manifests: tuple[Manifest, ...]
    tokenizer: Tokenizer
    settings: DataConfig
    max_open: int
    """Maximum number of open shards."""


class BatchDataset(Dataset[PackedBatch | WorkerError]):
    """Map-style dataset whose items are whole batches."""

    def __init__(
        self, config: ReaderConfig, processor: SampleProcessor, sampler: BatchSampler
    ) -> None:
        self._config, self._processor, self._sampler = config, processor, sampler
        self._starts = shard_starts(config.manifests)
        self._reader: Reader | None = None
        self._store: ShardStore | None = None
        self._fetch_ahead: FetchAhead | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Open files and threads cannot be pickled.
        return self.__dict__ | {"_reader": None, "_store": None, "_fetch_ahead": None}

    def __getitem__(self, index: int) -> PackedBatch | WorkerError:
        try:
            return self.make(index)
        except VlmError as error:
            return WorkerError(type(error).__name__, str(error))

    def make(self, index: int) -> PackedBatch:
        """Build one batch.

        Raises:
            VlmError: A problem of the whole run, such as its settings. Corrupt samples and shards
                raise no error: the samples are listed in the batch's `problems`.
        """
        start = time.perf_counter()
        reader = self._open_reader(index)
        processor, tokenizer = self._processor, self._config.tokenizer
        refs = self._sampler.refs(index)
        builder = BatchBuilder(
            len(refs),
            image_size=processor.image_size,
            context_length=processor.context_length,
            pad_id=tokenizer.pad_id,
        )

        problems: list[SampleProblem] = []
        raw_samples = self._read(reader, refs, start)
        for slot, (ref, raw) in enumerate(zip(refs, raw_samples, strict=True)):
            sample_id = int(self._starts[ref.shard]) + ref.sample
            if isinstance(raw, SampleProblem):
                problems.append(raw._replace(id=sample_id))
                continue

            try:
                sample = processor.process(raw, ref.epoch, tokenizer, builder.image_slot)
                builder.add(sample, sample_id, slot)
            except DataError as error:
                if not error.slug:
                    raise
                problems.append(
                    SampleProblem(raw.shard, raw.key, error.slug, str(error), sample_id)
                )
        return builder.packed(problems, time.perf_counter() - start)

    def close(self) -> None:
        """Stop the thread and close the files that were opened in this process."""
        if self._fetch_ahead is not None:
            self._fetch_ahead.close()
        if self._store is not None:
            self._store.close()
        self._reader = self._store = self._fetch_ahead = None

    def _read(
        self, reader: Reader, refs: list[SampleRef], start: float
    ) -> list[RawSample | SampleProblem]:
        """The samples of a batch; waits while every one of them is unreachable.

        If one shard is unavailable, its samples are skipped. If a whole batch is unreachable, the
        cause is the network or the credentials, and continuing would skip all data: the store is
        tried again until the time limit of the batch.

        Raises:
            StorageError: The store did not respond in time.
        """
        settings = self._config.settings
        results = reader.read_many(refs)
        while results and all(
            isinstance(result, SampleProblem) and result.reason == "unreachable"
            for result in results
        ):
            elapsed = time.perf_counter() - start
            if elapsed + STORE_RETRY_SECONDS + settings.shard_seconds > settings.timeout_seconds:
                problem = results[0]
                assert isinstance(problem, SampleProblem)
                raise StorageError(
                    f"no sample of a whole batch was readable within {elapsed:.0f} s: "
                    f"{problem.detail}. Check the network and the credentials; the same command "
                    f"resumes from the last checkpoint"
                )

            time.sleep(STORE_RETRY_SECONDS)
            reader.clear_failures()
            results = reader.read_many(refs)
        return results

    def _open_reader(self, index: int) -> Reader:
        """The reader, opened with the first batch of this process."""
        if self._reader is None:
            config = self._config
            self._store = ShardStore(config.manifests, config.settings, max_open=config.max_open)
            self._reader = Reader(self._store)
            if config.settings.fetch_ahead:
                self._fetch_ahead = FetchAhead(self._store, self._sampler.shards_from, index)

        if self._fetch_ahead is not None:
            self._fetch_ahead.start_batch(index)
        return self._reader
