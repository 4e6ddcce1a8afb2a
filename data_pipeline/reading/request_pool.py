"""Threads for concurrent requests, and a limit on the bytes in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class RequestPool:
    """A thread pool that is created on first use: most processes read from a local disk."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Run a function in a thread of the pool."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(
                self._num_threads, thread_name_prefix="remote-samples"
            )
        return self._executor.submit(function, *arguments)


class ByteBudget:
    """Limits the number of bytes in flight; a request above the limit waits for the whole
    budget."""

    def __init__(self, total: int) -> None:
        self._total = self._available = total
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Wait until `count` bytes are available, and hold them until the end of the block."""
        count = min(count, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._available >= count)
            self._available -= count
        try:
            yield
        finally:
            with self._changed:
                self._available += count
                self._changed.notify_all()
