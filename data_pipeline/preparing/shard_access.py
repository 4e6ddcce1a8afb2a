"""Opens the shards of a task for the dataset commands, and reads their samples.

An unavailable shard differs from a corrupt one: it may be readable later, so callers must not
record a permanent result for it. `ShardUnavailableError` marks that case.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data_pipeline.common import object_store, storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.store_errors import ErrorKind
from data_pipeline.preparing.tasks import ShardTask
from data_pipeline.reading.open_shard import OpenShard
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.manifest import load_index
from data_pipeline.shards.shard_index import ShardIndex

MAX_SAMPLE_BYTES = 256 << 20
"""Larger samples are not read; training does not read them either."""
_REQUEST_TIMEOUT_SECONDS = 120.0
"""Time limit for reading one sample from an object store, all retries included."""
_REQUESTS_IN_FLIGHT = 16


class ShardUnavailableError(DataError):
    """A shard or its index cannot be read now: the store or file server is unreachable, denies
    access, or does not have the object.

    The condition may be temporary, so no permanent result may be derived from it.
    """


def read_samples(task: ShardTask) -> Iterator[tuple[int, RawSample | SampleProblem]]:
    """Index and content of every sample of a task; a problem for a corrupt or too large sample.

    Raises:
        ShardUnavailableError, DataError: As for `open_shard`, and if the shard becomes unavailable.
    """
    with open_shard(task) as shard:
        indices = range(len(shard.index)) if task.samples is None else task.samples
        read = partial(_read_sample, shard)
        if shard.fd >= 0:
            yield from ((index, read(index)) for index in indices)
        else:
            with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
                yield from zip(indices, pool.map(read, indices), strict=True)


@contextmanager
def open_shard(task: ShardTask) -> Iterator[OpenShard]:
    """Open the shard of a task.

    From an object store, a whole shard is downloaded to a temporary file; if samples are selected,
    there is no file, and only their byte ranges are requested.

    Raises:
        ShardUnavailableError: The index is unavailable (slug `corrupt-index`), or the shard is
            missing (`missing-shard`) or unavailable (`unreachable`).
        DataError: The index is corrupt (slug `corrupt-index`).
    """
    try:
        index = load_index(task.manifest, task.entry)
    except StorageError as error:
        raise ShardUnavailableError(str(error), slug="corrupt-index") from error
    except DataError as error:
        raise DataError(str(error), slug=error.slug or "corrupt-index") from error

    url = task.manifest.shard_url(task.entry)
    if storage.is_local(url):
        with _open_file(task, index, storage.local_path(url)) as shard:
            yield shard
    elif task.samples is None:
        with tempfile.TemporaryDirectory(prefix="vlmoe-shard-") as folder:
            copy = Path(folder) / "shard.tar"
            try:
                storage.fetch_to_file(url, copy)
            except StorageError as error:
                raise _unavailable(error) from error
            with _open_file(task, index, copy) as shard:
                yield shard
    else:
        yield OpenShard(task.entry, url, index, -1, is_copy=True)


def read_file(shard: OpenShard, count: int, offset: int) -> bytes:
    """Bytes of an open shard's file; fewer at the end of a truncated shard.

    Raises:
        ShardUnavailableError: The file cannot be read.
    """
    try:
        return shard.pread(count, offset)
    except OSError as error:
        raise ShardUnavailableError(
            f"cannot read {count} bytes at offset {offset}: {error.strerror}", slug="unreachable"
        ) from error


@contextmanager
def _open_file(task: ShardTask, index: ShardIndex, path: Path) -> Iterator[OpenShard]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        slug = "missing-shard" if isinstance(error, FileNotFoundError) else "unreachable"
        raise ShardUnavailableError(
            f"cannot open shard {path}: {error.strerror}", slug=slug
        ) from error

    url = task.manifest.shard_url(task.entry)
    shard = OpenShard(task.entry, url, index, fd, is_copy=not storage.is_local(url))
    try:
        yield shard
    finally:
        shard.close()


def _unavailable(error: StorageError) -> ShardUnavailableError:
    slug = "missing-shard" if error.kind == ErrorKind.MISSING else "unreachable"
    return ShardUnavailableError(str(error), slug=slug)


def _read_sample(shard: OpenShard, i: int) -> RawSample | SampleProblem:
    if problem := shard.oversize_problem(i, MAX_SAMPLE_BYTES):
        return problem

    offset, count = shard.columns[0][i], shard.columns[1][i]
    try:
        data = (read_file if shard.fd >= 0 else _request_range)(shard, count, offset)
    except StorageError as error:
        # The object's size differs from the manifest's: corrupt, not unavailable.
        return shard.problem(i, "truncated", str(error))
    return shard.verify(i, data)


def _request_range(shard: OpenShard, count: int, offset: int) -> bytes:
    """Bytes of a shard in a store.

    Raises:
        StorageError: Its size differs from that in the manifest (kind `CHANGED`).
        ShardUnavailableError: It is unavailable.
    """
    try:
        return object_store.read_range(
            shard.url,
            offset,
            offset + count,
            timeout_seconds=_REQUEST_TIMEOUT_SECONDS,
            size=shard.entry.bytes,
        )
    except StorageError as error:
        if error.kind == ErrorKind.CHANGED:
            raise
        raise _unavailable(error) from error
