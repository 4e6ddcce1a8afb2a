"""Copies the shards that come next into the node's cache, in a thread of its own.

Every process of a node has such a thread and knows the same order; whoever is free takes the next shard that
nobody else copies, and no more than `cache.COPIES_AT_ONCE` are copied at a time on a node. All shards of the window
that is read are wanted, and `data.fetch_ahead` beyond it. What is wanted is never removed to make room: when the
cache is full of it, the thread waits, and samples come by ranged requests.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from itertools import islice

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.store_errors import Kind
from data_pipeline.reading.cache import Made
from data_pipeline.reading.store import ShardStore

logger = logging.getLogger(__name__)

SHORTEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 2.0
"""Between two looks when there is nothing to do; the waits grow."""
AGAIN_SECONDS = 30.0
"""After which a shard is tried again that could not be copied."""
_PASSED = 8
"""Windows before the current one that are remembered, because batches overlap."""


class FetchAhead:
    """A running thread; ends with `close`, or with the process."""

    def __init__(self, store: ShardStore, windows: Iterator[list[int]]) -> None:
        """Start copying, if there is anything to copy and a place for it.

        Args:
            store: Its shards, and its cache.
            windows: Lists of shards that are needed together, in the order of need; may be endless.
        """
        self._store, self._coming = store, windows
        self._windows: deque[list[int]] = deque()
        """The current one, and those of which something may be copied."""
        self._passed: deque[list[int]] = deque(maxlen=_PASSED)
        self._here: set[int] = set()
        self._later: dict[int, float] = {}
        self._read: set[int] = set()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fetch-ahead", daemon=True)
        if store.cache is not None and any(store.is_remote(number) for number in range(len(store))):
            store.on_read = self._note_read
            self._thread.start()

    def close(self, timeout_seconds: float = 30.0) -> None:
        """End the thread; it stops after the requests that are under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _note_read(self, shards: Collection[int]) -> None:
        with self._lock:
            self._read.update(shards)

    def _run(self) -> None:
        wait = SHORTEST_WAIT_SECONDS
        self._stop.wait(random.SystemRandom().uniform(0, SHORTEST_WAIT_SECONDS))  # not all at once
        while not self._stop.is_set():
            try:
                moved = self._one_round()
            except OSError as error:  # of the cache's disk
                logger.warning("shards are not copied ahead for now: %s", error)
                moved = False
            wait = SHORTEST_WAIT_SECONDS if moved else min(2 * wait, LONGEST_WAIT_SECONDS)
            if not moved:
                self._stop.wait(wait)

    def _one_round(self) -> bool:
        """Copy the first shard that can be copied; whether there was one."""
        self._advance()
        wanted = self._wanted()
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
            if store.troubles.of(store.entry(number)) is not None:
                raise StorageError("it is known to be missing")
            store.load_index(number, store.settings.shard_seconds)
            return store.copy(number, keep=keep, cancel=self._stop)
        except DataError as error:
            self._later[number] = time.monotonic() + AGAIN_SECONDS
            if isinstance(error, StorageError) and error.kind in (Kind.MISSING, Kind.REFUSED):
                store.troubles.add(store.entry(number), error)
            elif not self._stop.is_set():
                logger.debug("shard %s is not copied ahead: %s", store.name(number), error)
            return None

    def _wanted(self) -> list[int]:
        """Shards that may be copied, in the order of need, each once."""
        if not self._windows:
            self._windows.extend(islice(self._coming, 1))
        wanted = dict.fromkeys(self._windows[0]) if self._windows else {}
        allowed, place = len(wanted) + self._store.settings.fetch_ahead, 1
        while len(wanted) < allowed:
            if place == len(self._windows):
                window = next(self._coming, None)
                # A small dataset comes again and again, and there is nothing new in it.
                if window is None or place > len(self._store) + 1:
                    if window is not None:
                        self._windows.append(window)
                    break
                self._windows.append(window)
            wanted.update(dict.fromkeys(islice(self._windows[place], allowed - len(wanted))))
            place += 1
        return list(wanted)

    def _advance(self) -> None:
        """Drop the windows that are over, by what has been read."""
        with self._lock:
            read, self._read = self._read, set()
        if not self._windows:
            return
        read -= {*self._windows[0], *(number for window in self._passed for number in window)}
        reached = 0
        for number in read:
            reached = max(reached, next((place for place, window in enumerate(self._windows) if number in window), 0))
        for _ in range(reached):
            self._passed.append(self._windows.popleft())
        if reached:
            needed = {number for window in self._windows for number in window}
            self._here &= needed  # what is needed no more may be removed, and be needed again later
