"""Reads the samples of whole batches: opens the shards on first use, and waits during an outage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_pipeline.common.errors import StorageError
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem, SampleRef
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest

STORE_RETRY_SECONDS = 5.0
"""Pause before a batch is read again if all of its samples were unreachable."""


class BatchReader:
    """Reads batches; can be pickled, and every process opens its own files."""

    def __init__(
        self,
        manifests: Sequence[Manifest],
        data: DataConfig,
        shards_from: Callable[[int], Iterator[list[int]]],
        *,
        max_open: int,
    ) -> None:
        """Set the shards; none is opened yet.

        Args:
            manifests: Their shards, concatenated, are numbered 0, 1, ...
            data: The cache, timeouts of stores, and how many shards are fetched ahead.
            shards_from: Shards in the order in which they are needed from a batch on, as
                `BatchSampler.shards_from`.
            max_open: Maximum number of open shards.
        """
        self._manifests, self._data, self._max_open = tuple(manifests), data, max_open
        self._shards_from = shards_from
        self._reader: Reader | None = None
        self._store: ShardStore | None = None
        self._fetch_ahead: FetchAhead | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Open files and threads cannot be pickled.
        return self.__dict__ | {"_reader": None, "_store": None, "_fetch_ahead": None}

    def read(self, index: int, refs: Sequence[SampleRef]) -> list[RawSample | SampleProblem]:
        """The samples of a batch; waits while every one of them is unreachable.

        If one shard is unavailable, its samples are skipped. If a whole batch is unreachable, the
        cause is the network or the credentials, and continuing would skip all data: the store is
        tried again until the time limit of the batch.

        Args:
            index: Index of the batch.
            refs: Its samples.

        Raises:
            StorageError: The store did not respond in time.
        """
        start, data = time.perf_counter(), self._data
        reader = self._open(index)
        results = reader.read_many(refs)
        while results and all(
            isinstance(result, SampleProblem) and result.reason == "unreachable"
            for result in results
        ):
            elapsed = time.perf_counter() - start
            if elapsed + STORE_RETRY_SECONDS + data.shard_seconds > data.timeout_seconds:
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

    def close(self) -> None:
        """Stop the thread and close the files that were opened in this process."""
        if self._fetch_ahead is not None:
            self._fetch_ahead.close()
        if self._store is not None:
            self._store.close()
        self._reader = self._store = self._fetch_ahead = None

    def _open(self, index: int) -> Reader:
        """The reader, opened with the first batch of this process."""
        if self._reader is None:
            self._store = ShardStore(self._manifests, self._data, max_open=self._max_open)
            self._reader = Reader(self._store)
            if self._data.fetch_ahead:
                self._fetch_ahead = FetchAhead(self._store, self._shards_from, index)

        if self._fetch_ahead is not None:
            self._fetch_ahead.start_batch(index)
        return self._reader
