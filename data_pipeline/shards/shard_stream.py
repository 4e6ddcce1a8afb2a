"""Reads a shard from start to end as a stream of chunks, local or from a store."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from data_pipeline.common import object_store, storage
from data_pipeline.common.errors import StorageError

CHUNK_BYTES = object_store.PART_BYTES
CHUNKS_IN_FLIGHT = 4


class ShardStream(NamedTuple):
    """An open shard."""

    total_bytes: int
    etag: str
    """ETag in its store; empty for a local file."""
    chunks: Iterator[bytes]
    """Its bytes in order; raises StorageError if the shard is replaced meanwhile."""


@contextmanager
def open_shard_stream(url: str, *, timeout_seconds: float) -> Iterator[ShardStream]:
    """Open a shard to be read once from its first to its last byte, with bounded memory.

    Args:
        url: Local or in a store.
        timeout_seconds: Limit for one chunk from a store, all attempts together.

    Raises:
        StorageError: It is missing, cannot be read, or is replaced while it is read.
    """
    if storage.is_local(url):
        path = storage.local_path(url)
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                yield ShardStream(size, "", iter(lambda: file.read(CHUNK_BYTES), b""))
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}; check the path") from error
        return

    info = object_store.head(url, timeout_seconds)
    assert info is not None
    with ThreadPoolExecutor(CHUNKS_IN_FLIGHT) as pool:
        try:
            yield ShardStream(info.size, info.etag, _chunks(pool, url, info, timeout_seconds))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _chunks(
    pool: ThreadPoolExecutor, url: str, info: object_store.ObjectInfo, timeout_seconds: float
) -> Iterator[bytes]:
    """The chunks of an object in order; the next ones are requested ahead."""
    pending: deque[Future[bytes]] = deque()
    starts = iter(range(0, info.size, CHUNK_BYTES))
    while True:
        while len(pending) < CHUNKS_IN_FLIGHT and (start := next(starts, None)) is not None:
            future = pool.submit(
                object_store.read_range,
                url,
                start,
                min(start + CHUNK_BYTES, info.size),
                timeout_seconds=timeout_seconds,
                etag=info.etag,
                size=info.size,
            )
            pending.append(future)
        if not pending:
            return
        yield pending.popleft().result()
