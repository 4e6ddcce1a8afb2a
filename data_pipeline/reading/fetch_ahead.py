"""Copies the shards that come next into the node's cache, in a thread of its own.

Every process of a node has such a thread and knows the same order; whoever is free takes the next
shard that nobody else copies, and no more than `cache.COPIES_AT_ONCE` are copied at a time on a
node. All shards of the window that is read are wanted, and `data.fetch_ahead` beyond it. What is
wanted is never removed to make room: when the cache is full of it, the thread waits, and samples
come by ranged requests.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.open_files import is_out_of_files
from data_pipeline.common.store_errors import Kind
from data_pipeline.reading.cache import Made
from data_pipeline.reading.store import ShardStore

logger = logging.getLogger(__name__)

SHORTEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 2.0
"""Between two looks when there is nothing to do; the waits grow."""
AGAIN_SECONDS = 30.0
"""After which a shard is tried again that could not be copied."""


class FetchAhead:
    """A running thread; ends with `close`, or with the process."""

    def __init__(
        self, store: ShardStore, windows_from: Callable[[int], Iterator[list[int]]], number: int = 0
    ) -> None:
        """Start copying, if there is anything to copy and a place for it.

        Args:
            store: Its shards, and its cache.
            windows_from: Gives, for the number of a batch, lists of shards that are needed
                together, in the order of need from that batch on; may be endless.
            number: The first batch.
        """
        self._store, self._windows_from = store, windows_from
        self._number, self._planned = number, -1
        """The batch that was begun last, and the one for which `_wanted` is."""
        self._wanted: list[int] = []
        """Shards that may be copied, in the order of need, each once."""
        self._here: set[int] = set()
        self._later: dict[int, float] = {}
        self.looks = 0
        """How often it was looked for something to copy."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)
        if store.cache is not None and any(store.is_remote(number) for number in range(len(store))):
            self._thread.start()

    def reached(self, number: int) -> None:
        """A batch is begun. What its number does not say is never guessed: small data comes again
        and again."""
        self._number = number

    def close(self, timeout_seconds: float = 30.0) -> None:
        """End the thread; it stops after the requests that are under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        wait = SHORTEST_WAIT_SECONDS
        self._stop.wait(random.SystemRandom().uniform(0, SHORTEST_WAIT_SECONDS))  # not all at once
        while not self._stop.is_set():
            try:
                moved = self._one_round()
            except (OSError, DataError) as error:  # of the cache's disk
                if is_out_of_files(error):
                    self._store.short_of_files = True
                else:
                    logger.warning("shards are not copied ahead for now: %s", error)
                moved = False
            self.looks += 1
            wait = SHORTEST_WAIT_SECONDS if moved else min(2 * wait, LONGEST_WAIT_SECONDS)
            if not moved:
                self._stop.wait(wait)

    def _one_round(self) -> bool:
        """Copy the first shard that can be copied; whether there was one."""
        wanted = self.plan()
        for number in wanted:
            if number in self._here or self._later.get(number, 0.0) > time.monotonic():
                continue
            made = self._copy(number, wanted)
            if made is Made.HERE:
                self._here.add(number)
                return True
            if made in (Made.FULL, Made.CROWDED) or self._stop.is_set():
                return False
        return False

    def _copy(self, number: int, keep: Collection[int]) -> Made | None:
        """One shard and its index; None if it cannot be had now."""
        store = self._store
        if not store.is_remote(number):
            return Made.HERE
        try:
            if store.trouble(number) is not None:
                raise StorageError("it is known to be missing")
            store.load_index(number, store.settings.shard_seconds)
            return store.copy(number, keep=keep, cancel=self._stop)
        except DataError as error:
            if is_out_of_files(error):
                raise
            self._later[number] = time.monotonic() + AGAIN_SECONDS
            if isinstance(error, StorageError) and error.kind in (Kind.MISSING, Kind.REFUSED):
                store.note_trouble(number, error)
            elif not self._stop.is_set():
                logger.debug("shard %s is not copied ahead: %s", store.name(number), error)
            return None

    def plan(self) -> list[int]:
        """Shards that may be copied: all of the current batch's window, and `data.fetch_ahead` of
        those after it."""
        if (reached := self._number) == self._planned:
            return self._wanted
        coming = self._windows_from(reached)
        wanted = dict.fromkeys(next(coming, []))
        allowed = len(wanted) + self._store.settings.fetch_ahead
        # A small dataset comes again and again, and there is nothing new in it.
        for window in islice(coming, len(self._store) + 1):
            new = [shard for shard in window if shard not in wanted]
            wanted.update(dict.fromkeys(new[: allowed - len(wanted)]))
            if len(wanted) >= allowed:
                break
        self._planned, self._wanted = reached, list(wanted)
        self._here.intersection_update(
            wanted
        )  # what is needed no more may be removed, and be needed again later
        return self._wanted
