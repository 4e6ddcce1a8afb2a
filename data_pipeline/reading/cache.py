"""Cache of remote shards on a node's disk, shared by all processes of the node, limited in size.

    FOLDER/shards/SHA-NAME          a complete copy (`SHA-NAME.mismatch`: complete, but its size or
                                    SHA-256 differ from the manifest)
    FOLDER/shards/SHA-NAME.part     a copy in progress, locked by the process that writes it
    FOLDER/shards/.lock             held briefly while space is freed and reserved
    FOLDER/slots/N                  locked by processes that copy: limits concurrent copies per node
    FOLDER/failures/SHA             a shard that is unavailable, and why (`shard_failures.py`)

All locks are `flock` locks: the kernel releases those of a killed process. A copy is renamed to its
final name when it is complete, so an incomplete one is never used; incomplete copies of killed
processes are removed when space is freed. Readers hold a shared lock on their open files, so copies
in use are not removed; if one is removed anyway, its readers can read it until they close it.
Copies are evicted in least-recently-used order (the modification time is the time of last use). A
full disk counts as a full cache. Files are not fsynced: corruption after a power failure is
detected by sample checksums.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from threading import Event

from data_pipeline.common import object_store
from data_pipeline.common.open_files import is_too_many_open_files
from data_pipeline.reading.cache_eviction import MISMATCH_SUFFIX, PART_SUFFIX, free_space
from data_pipeline.reading.file_locks import allocate, is_file_at, touch, try_lock
from data_pipeline.shards.manifest import ShardEntry

logger = logging.getLogger(__name__)

MAX_CONCURRENT_COPIES = 8
"""Shards that the processes of a node copy at a time, each with 4 connections."""
MAX_COPY_ATTEMPTS = 3
"""Attempts to copy a shard that does not match its manifest, before it is kept as it is."""

_GIB = 1 << 30


class CopyResult(Enum):
    """Result of an attempt to copy a shard."""

    CACHED = "the shard is in the cache"
    BUSY = "another process is copying the shard"
    SLOTS_TAKEN = "the maximum number of copies is in progress"
    NO_SPACE = "the cache is full of shards in use"


class ShardCache:
    """The copies in one folder; any number of processes may use it concurrently."""

    def __init__(self, folder: str | os.PathLike[str], limit_gib: float) -> None:
        """Set the folder; it is created with the first copy.

        Args:
            folder: On a local disk.
            limit_gib: Maximum total size of the copies; 0 caches nothing.
        """
        self.folder = Path(folder)
        self._shards, self._limit = self.folder / "shards", int(limit_gib * _GIB)
        self._warned = False

    def path(self, entry: ShardEntry) -> Path:
        """Path of a shard's copy, whether or not it exists; unique per shard content."""
        name = os.fsencode(entry.name.rpartition("/")[2])[-100:]  # file systems limit bytes
        return self._shards / f"{entry.sha256[:32]}-{name.decode(errors='ignore')}"

    def open(self, entry: ShardEntry) -> int | None:
        """File descriptor of a shard's copy; None if there is none.

        The copy stays in the cache while the descriptor is open.

        Raises:
            OSError: There are too many open files.
        """
        path = self.path(entry)
        for candidate in (path, _mismatch_path(path)):
            try:
                fd = os.open(candidate, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if is_too_many_open_files(error):
                    raise
                continue

            if candidate == path and os.fstat(fd).st_size != entry.bytes:
                # Truncated, e.g. by a power failure: remove it, so that it is copied again.
                os.close(fd)
                with contextlib.suppress(OSError):
                    candidate.unlink(missing_ok=True)
                continue

            # If the lock fails because the copy is being removed, the open file is still complete.
            # File systems without locks can be read as well.
            with contextlib.suppress(OSError):
                try_lock(fd, fcntl.LOCK_SH)
            touch(fd)
            return fd
        return None

    def has(self, entry: ShardEntry) -> bool:
        """Whether there is a copy."""
        path = self.path(entry)
        return path.exists() or _mismatch_path(path).exists()

    def remove(self, entry: ShardEntry) -> None:
        """Remove a shard's copy, e.g. because it is corrupt."""
        path = self.path(entry)
        for candidate in (path, _mismatch_path(path)):
            candidate.unlink(missing_ok=True)

    def fetch(
        self,
        entry: ShardEntry,
        url: str,
        *,
        timeout_seconds: float,
        request_seconds: float,
        keep: Collection[Path] = (),
        cancel: Event | None = None,
    ) -> CopyResult:
        """Copy a shard, unless it is cached or another process copies it.

        Args:
            entry: The shard.
            url: Its address.
            timeout_seconds: Maximum time without progress.
            request_seconds: Maximum time per request.
            keep: Copies (by `path`) that must not be removed to free space.
            cancel: Set by another thread to abort.

        Raises:
            StorageError: The shard is unavailable.
            OSError: There are too many open files.
        """
        if self.has(entry):
            return CopyResult.CACHED
        if not 0 < entry.bytes <= self._limit:
            return CopyResult.NO_SPACE

        try:
            with self._slot() as acquired:
                if not acquired:
                    return CopyResult.SLOTS_TAKEN

                reserved = self._reserve(entry, keep)
                if isinstance(reserved, CopyResult):
                    return reserved
                return self._fill(reserved, entry, url, timeout_seconds, request_seconds, cancel)
        except OSError as error:
            if is_too_many_open_files(error):
                raise
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) and not self._warned:
                self._warned = True
                logger.warning(
                    "cannot copy shards to %s: %s; samples are read by ranged requests",
                    self._shards,
                    error,
                )
            return CopyResult.NO_SPACE

    def _reserve(self, entry: ShardEntry, keep: Collection[Path]) -> int | CopyResult:
        """Free space for a shard, and allocate a locked file of its length.

        Returns:
            The file descriptor, or why there is none.
        """
        path, part = self.path(entry), self._part(entry)
        with self._locked():
            if self.has(entry):
                return CopyResult.CACHED

            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if not try_lock(fd, fcntl.LOCK_EX):
                    os.close(fd)
                    return CopyResult.BUSY
                if self.has(entry):  # finished since the check above: `part` is a new file
                    part.unlink(missing_ok=True)
                    os.close(fd)
                    return CopyResult.CACHED
                if not is_file_at(fd, part):  # removed by its writer since it was opened
                    os.close(fd)
                    return CopyResult.BUSY

                os.ftruncate(fd, 0)  # a killed process may have left data
                if not free_space(self._shards, self._limit, entry.bytes, {*keep, path}):
                    part.unlink()
                    os.close(fd)
                    return CopyResult.NO_SPACE
                allocate(fd, entry.bytes)  # other processes count this space as used
            except OSError:
                part.unlink(missing_ok=True)
                os.close(fd)
                raise
            return fd

    def _fill(
        self,
        fd: int,
        entry: ShardEntry,
        url: str,
        timeout_seconds: float,
        request_seconds: float,
        cancel: Event | None,
    ) -> CopyResult:
        """Download a shard into its reserved file and give it its final name."""
        part, path = self._part(entry), self.path(entry)
        try:
            for _ in range(MAX_COPY_ATTEMPTS):
                result = object_store.fetch(
                    url,
                    fd,
                    timeout_seconds=timeout_seconds,
                    request_seconds=request_seconds,
                    cancel=cancel,
                )
                matches = (result.size, result.sha256) == (entry.bytes, entry.sha256)
                if matches:
                    break

            if not matches:
                logger.warning(
                    "%s has %d bytes with SHA-256 %s, but its manifest expects %d and %s; "
                    "each sample is verified by its checksum",
                    object_store.redact(url),
                    result.size,
                    result.sha256[:16],
                    entry.bytes,
                    entry.sha256[:16],
                )
            if not is_file_at(fd, part):
                # Removed by another process, which may have created a new one.
                return CopyResult.BUSY
            os.rename(part, path if result.size == entry.bytes else _mismatch_path(path))
        except BaseException:
            if is_file_at(fd, part):
                part.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return CopyResult.CACHED

    def _part(self, entry: ShardEntry) -> Path:
        return Path(f"{self.path(entry)}{PART_SUFFIX}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the cache's lock, which excludes all other processes; only briefly."""
        self._shards.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._shards / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _slot(self) -> Iterator[bool]:
        """Hold one of the node's copy slots; yields False if all are taken."""
        folder = self.folder / "slots"
        folder.mkdir(parents=True, exist_ok=True)
        for slot in range(MAX_CONCURRENT_COPIES):
            fd = os.open(folder / str(slot), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if try_lock(fd, fcntl.LOCK_EX):
                    yield True
                    return
            finally:
                os.close(fd)
        yield False


def _mismatch_path(path: Path) -> Path:
    return Path(f"{path}{MISMATCH_SUFFIX}")
