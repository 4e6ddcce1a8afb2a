"""Background thread that copies upcoming shards into the node's cache.

Every process of a node runs such a thread with the same order of shards; each copies the next shard
that no other process is copying, and at most `cache.MAX_CONCURRENT_COPIES` are copied at a time on
a node. All shards of the current shuffle window are copied, and `data.fetch_ahead` shards beyond
it. These shards are never removed to free space: when the cache is full of them, the thread waits,
and samples are read by ranged requests.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.open_files import is_too_many_open_files
from data_pipeline.common.store_errors import ErrorKind
from data_pipeline.reading.cache import CopyResult
from data_pipeline.reading.store import ShardStore

logger = logging.getLogger(__name__)

MIN_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.1, 2.0
"""Pauses between two rounds when there is nothing to copy; they double up to the maximum."""
RETRY_SECONDS = 30.0
"""Delay before a failed copy is tried again."""


class FetchAhead:
    """A running thread; ends with `close`, or with the process."""

    def __init__(
        self,
        store: ShardStore,
        windows_from: Callable[[int], Iterator[list[int]]],
        first_batch: int = 0,
    ) -> None:
        """Start the thread, unless there is no cache or no remote shard.

        Args:
            store: The shards and their cache.
            windows_from: Takes the index of a batch; returns lists of shards that are in use at the
                same time, in the order in which they are needed from that batch on. May be endless.
            first_batch: Index of the first batch.
        """
        self._store, self._windows_from = store, windows_from
        self._batch = first_batch
        """The batch that was started last."""
        self._planned_batch = -1
        """The batch that `_wanted` was computed for."""
        self._wanted: list[int] = []
        """Shards to copy, in the order in which they are needed, without duplicates."""
        self._cached: set[int] = set()
        self._retry_at: dict[int, float] = {}
        self.rounds = 0
        """Number of completed rounds."""

        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)
        if store.cache is not None and any(store.is_remote(shard) for shard in range(len(store))):
            self._thread.start()

    def start_batch(self, batch: int) -> None:
        """Report the index of the batch that is being read.

        The position is never inferred from the shards: small datasets repeat the same ones.
        """
        self._batch = batch

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Stop the thread; it ends after the requests in progress."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def plan(self) -> list[int]:
        """Shards to copy: those of the current window and the `data.fetch_ahead` next ones."""
        batch = self._batch
        if batch == self._planned_batch:
            return self._wanted

        windows = self._windows_from(batch)
        wanted = dict.fromkeys(next(windows, []))
        limit = len(wanted) + self._store.settings.fetch_ahead
        # A small dataset repeats its windows without end; stop when there can be no new shard.
        for window in islice(windows, len(self._store) + 1):
            new = [shard for shard in window if shard not in wanted]
            wanted.update(dict.fromkeys(new[: limit - len(wanted)]))
            if len(wanted) >= limit:
                break

        self._planned_batch, self._wanted = batch, list(wanted)
        # Shards that are not wanted any more may be evicted, and be needed again later.
        self._cached.intersection_update(wanted)
        return self._wanted

    def _run(self) -> None:
        wait = MIN_WAIT_SECONDS
        # Random, so that the processes of a node do not start at the same time.
        self._stop.wait(random.SystemRandom().uniform(0, MIN_WAIT_SECONDS))
        while not self._stop.is_set():
            try:
                copied = self._copy_next()
            except (OSError, DataError) as error:  # a problem with the cache's disk
                if is_too_many_open_files(error):
                    self._store.out_of_files = True
                else:
                    logger.warning("shards are not copied ahead of time: %s", error)
                copied = False

            self.rounds += 1
            wait = MIN_WAIT_SECONDS if copied else min(2 * wait, MAX_WAIT_SECONDS)
            if not copied:
                self._stop.wait(wait)

    def _copy_next(self) -> bool:
        """Copy the first shard that can be copied; returns whether there was one."""
        wanted = self.plan()
        for shard in wanted:
            if shard in self._cached or self._retry_at.get(shard, 0.0) > time.monotonic():
                continue

            result = self._copy(shard, wanted)
            if result is CopyResult.CACHED:
                self._cached.add(shard)
                return True
            if result in (CopyResult.NO_SPACE, CopyResult.SLOTS_TAKEN) or self._stop.is_set():
                return False
        return False

    def _copy(self, shard: int, keep: Collection[int]) -> CopyResult | None:
        """Copy one shard and its index; None if it is unavailable."""
        store = self._store
        if not store.is_remote(shard):
            return CopyResult.CACHED

        try:
            if store.failure(shard) is not None:
                raise StorageError("the shard is recorded as unavailable")
            store.load_index(shard, store.settings.shard_seconds)
            return store.cache_shard(shard, keep=keep, cancel=self._stop)
        except DataError as error:
            if is_too_many_open_files(error):
                raise
            self._retry_at[shard] = time.monotonic() + RETRY_SECONDS
            if isinstance(error, StorageError) and error.kind in (
                ErrorKind.MISSING,
                ErrorKind.REFUSED,
            ):
                store.record_failure(shard, error)
            elif not self._stop.is_set():
                logger.debug("shard %s is not copied ahead of time: %s", store.name(shard), error)
            return None
