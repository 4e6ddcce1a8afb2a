"""A shard as a stream of pieces, front to back, wherever it lies; memory stays bounded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from data_pipeline.common import object_store, storage
from data_pipeline.common.errors import StorageError

PIECE_BYTES = object_store.PART_BYTES
PIECES_IN_FLIGHT = 4


class Opened(NamedTuple):
    """A shard that is being read."""

    total_bytes: int
    etag: str
    """What its store calls its contents; empty for a local file."""
    pieces: Iterator[bytes]
    """Its bytes in order; all of the same contents, or an error."""


@contextmanager
def opened(url: str, *, timeout_seconds: float) -> Iterator[Opened]:
    """A shard to be read once from its first byte to its last.

    Args:
        url: Local or in a store.
        timeout_seconds: Longest time for one piece of a store, all tries together.

    Raises:
        StorageError: It is missing, cannot be read, or is replaced while it is read.
    """
    if storage.is_local(url):
        path = storage.local_path(url)
        try:
            with open(path, "rb", buffering=0) as file:
                yield Opened(
                    os.fstat(file.fileno()).st_size, "", iter(lambda: file.read(PIECE_BYTES), b"")
                )
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}; check the path") from error
        return
    info = object_store.head(url, timeout_seconds)
    assert info is not None
    with ThreadPoolExecutor(PIECES_IN_FLIGHT) as pool:
        try:
            yield Opened(info.size, info.etag, _fetched(pool, url, info, timeout_seconds))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _fetched(
    pool: ThreadPoolExecutor, url: str, info: object_store.ObjectInfo, timeout_seconds: float
) -> Iterator[bytes]:
    """The parts of an object in order, the next few on their way."""
    waiting: deque[Future[bytes]] = deque()
    starts = iter(range(0, info.size, PIECE_BYTES))
    while True:
        while len(waiting) < PIECES_IN_FLIGHT and (start := next(starts, None)) is not None:
            waiting.append(
                pool.submit(
                    object_store.read_range,
                    url,
                    start,
                    min(start + PIECE_BYTES, info.size),
                    timeout_seconds=timeout_seconds,
                    etag=info.etag,
                    size=info.size,
                )
            )
        if not waiting:
            return
        yield waiting.popleft().result()
