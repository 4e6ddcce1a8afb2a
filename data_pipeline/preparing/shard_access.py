"""Verified reads of one shard's samples, from a local file or an object store.

An unavailable shard differs from a corrupt one: it may be readable later, so callers must not
record a permanent result for it. `ShardUnavailableError` marks that case.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data_pipeline.common import object_store, storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.store_errors import ErrorKind
from data_pipeline.preparing.tasks import ShardTask
from data_pipeline.samples import RawSample
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


class OpenShard:
    """A shard opened for reading: its index, and its samples by index."""

    def __init__(
        self, task: ShardTask, index: ShardIndex, size: int, pread: Callable[[int, int], bytes]
    ) -> None:
        self.task, self.index = task, index
        self.size = size
        """Actual size of the shard, in bytes."""
        self.pread = pread
        """`pread(count, offset)`: bytes of the shard; fewer at the end of a truncated shard."""

    def samples(self) -> Iterator[tuple[int, RawSample | DataError]]:
        """Index and content of every sample of the task, or the error of `read` for it.

        Raises:
            ShardUnavailableError: The shard became unavailable.
        """
        indices = range(len(self.index)) if self.task.samples is None else self.task.samples
        if self.task.samples is None or storage.is_local(self.task.manifest.base):
            for index in indices:
                yield index, self._read_or_error(index)
            return

        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            yield from zip(indices, pool.map(self._read_or_error, indices), strict=True)

    def read(self, index: int) -> RawSample:
        """Read one sample and verify its CRC-32.

        Raises:
            DataError: The sample is corrupt; slug `oversize`, `truncated` or `crc-mismatch`.
            ShardUnavailableError: The shard became unavailable.
        """
        offset, count = int(self.index.offsets[index]), int(self.index.extents[index])
        if count > MAX_SAMPLE_BYTES:
            raise DataError(
                f"the sample has {count} bytes; the limit is {MAX_SAMPLE_BYTES}", slug="oversize"
            )

        extent = self.pread(count, offset)
        if len(extent) < count:
            raise DataError(
                f"read {len(extent)} of {count} bytes at offset {offset}", slug="truncated"
            )
        if zlib.crc32(extent) != int(self.index.crc32[index]):
            raise DataError(
                f"the bytes at offset {offset} do not match the CRC-32 in the index",
                slug="crc-mismatch",
            )

        members = {
            m.extension: extent[m.start : m.start + m.size] for m in self.index.members(index)
        }
        return RawSample(self.task.entry.name, self.index.key(index), members)

    def _read_or_error(self, index: int) -> RawSample | DataError:
        try:
            return self.read(index)
        except ShardUnavailableError:
            raise
        except DataError as error:
            return error


@contextmanager
def open_shard(task: ShardTask) -> Iterator[OpenShard]:
    """Open the shard of a task.

    From an object store, a whole shard is downloaded to a temporary file; for selected samples only
    their byte ranges are requested.

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
            with _as_unavailable():
                storage.fetch_to_file(url, copy)
            with _open_file(task, index, copy) as shard:
                yield shard
    else:
        yield OpenShard(task, index, task.entry.bytes, partial(_read_range, url, task.entry.bytes))


@contextmanager
def _open_file(task: ShardTask, index: ShardIndex, path: Path) -> Iterator[OpenShard]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        slug = "missing-shard" if isinstance(error, FileNotFoundError) else "unreachable"
        raise ShardUnavailableError(
            f"cannot open shard {path}: {error.strerror}", slug=slug
        ) from error

    try:
        yield OpenShard(task, index, os.fstat(fd).st_size, partial(_pread, fd))
    finally:
        os.close(fd)


@contextmanager
def _as_unavailable() -> Iterator[None]:
    """Convert errors of an object store to `ShardUnavailableError` with a slug."""
    try:
        yield
    except StorageError as error:
        slug = "missing-shard" if error.kind == ErrorKind.MISSING else "unreachable"
        raise ShardUnavailableError(str(error), slug=slug) from error


def _pread(fd: int, count: int, offset: int) -> bytes:
    chunks = []
    while count > 0:
        try:
            chunk = os.pread(fd, count, offset)
        except OSError as error:
            raise ShardUnavailableError(
                f"cannot read {count} bytes at offset {offset}: {error.strerror}",
                slug="unreachable",
            ) from error
        if not chunk:
            break
        chunks.append(chunk)
        count, offset = count - len(chunk), offset + len(chunk)

    return b"".join(chunks)


def _read_range(url: str, size: int, count: int, offset: int) -> bytes:
    with _as_unavailable():
        try:
            return object_store.read_range(
                url, offset, offset + count, timeout_seconds=_REQUEST_TIMEOUT_SECONDS, size=size
            )
        except StorageError as error:
            # The object's size differs from the manifest's: corrupt, not unavailable.
            if error.kind == ErrorKind.CHANGED:
                raise DataError(str(error), slug="truncated") from error
            raise
