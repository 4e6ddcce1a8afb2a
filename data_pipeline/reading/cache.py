"""Copies of remote shards on a node's disk, shared by all its processes, within a limit.

    FOLDER/shards/SHA-NAME          a whole copy (`SHA-NAME.other`: whole, but not what the manifest says)
    FOLDER/shards/SHA-NAME.part     being made, and locked by whoever makes it
    FOLDER/shards/.lock             held for moments: while room is made and reserved
    FOLDER/slots/N                  locked by those who copy: so many copies at a time on a node
    FOLDER/bad/SHA                  a shard that could not be had, and why; believed for a while

All locks are `flock`: the kernel frees those of a process that was killed. A copy gets its name
when it is whole, so a half one is never taken for it; leftovers are removed when room is next made.
Readers hold a shared lock on what they have open, so that copies in use are not removed; and if one
is, its readers keep it until they close it. The copies unused longest go first (the time of
modification is the time of last use). A full disk is taken as the limit. Nothing is forced to the
disk: what a power failure leaves is noticed by the samples' checksums.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from threading import Event

from data_pipeline.common import object_store
from data_pipeline.common.open_files import is_out_of_files
from data_pipeline.shards.manifest import ShardEntry

logger = logging.getLogger(__name__)

COPIES_AT_ONCE = 8
"""Shards that the processes of a node copy at a time, each with 4 connections."""
COPY_TRIES = 3
"""How often a shard is copied that is not what the manifest says, before it is kept as it came."""
SPARE_SHARE = 0.01
"""Part of the disk that is left free for others."""
TOUCH_SECONDS = 60.0

_GIB = 1 << 30
_NO_PROMISES = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_OTHER, _PART = ".other", ".part"


class Made(Enum):
    """How an attempt to copy a shard ended."""

    HERE = "it is in the cache"
    BUSY = "another process copies it"
    CROWDED = "enough others are being copied"
    FULL = "there is no room: all that is there is in use"


class ShardCache:
    """The copies below one folder; any number of processes may use it at once."""

    def __init__(self, folder: str | os.PathLike[str], limit_gib: float) -> None:
        """Know the folder; it is made with the first copy.

        Args:
            folder: On a disk of this machine.
            limit_gib: Most that the copies may take together; 0 keeps none.
        """
        self.folder = Path(folder)
        self._shards, self._limit = self.folder / "shards", int(limit_gib * _GIB)
        self._told = False

    def path(self, entry: ShardEntry) -> Path:
        """Where the copy of a shard is, or would be; another shard never has the same place."""
        name = os.fsencode(entry.name.rpartition("/")[2])[-100:]  # file systems count bytes
        return self._shards / f"{entry.sha256[:32]}-{name.decode(errors='ignore')}"

    def open(self, entry: ShardEntry) -> int | None:
        """A file descriptor of a shard's copy, which stays in the cache as long as it is open; None
        without one.

        Raises:
            OSError: There are too many open files.
        """
        path = self.path(entry)
        for place in (path, Path(f"{path}{_OTHER}")):
            try:
                fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if is_out_of_files(error):
                    raise
                continue
            if place == path and os.fstat(fd).st_size != entry.bytes:
                os.close(fd)  # a power failure; it will be made again
                with contextlib.suppress(OSError):
                    place.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):  # without locks it can be read all the same
                _try_lock(
                    fd, fcntl.LOCK_SH
                )  # if it is being removed this moment, it is still whole for us
            touch(fd)
            return fd
        return None

    def has(self, entry: ShardEntry) -> bool:
        """Whether there is a copy."""
        path = self.path(entry)
        return path.exists() or Path(f"{path}{_OTHER}").exists()

    def drop(self, entry: ShardEntry) -> None:
        """Remove a shard's copy, because it is damaged."""
        path = self.path(entry)
        for place in (path, Path(f"{path}{_OTHER}")):
            place.unlink(missing_ok=True)

    def make(
        self,
        entry: ShardEntry,
        url: str,
        *,
        timeout_seconds: float,
        request_seconds: float,
        keep: Collection[Path] = (),
        cancel: Event | None = None,
    ) -> Made:
        """Copy a shard, unless it is there or somebody else does.

        Args:
            entry: The shard.
            url: Where it is.
            timeout_seconds: Longest time without progress.
            request_seconds: Longest time for one request.
            keep: Copies (by `path`) that are not removed to make room.
            cancel: Set by another thread to give up.

        Raises:
            StorageError: The shard cannot be had.
            OSError: There are too many open files.
        """
        if self.has(entry):
            return Made.HERE
        if not 0 < entry.bytes <= self._limit:
            return Made.FULL
        try:
            with self._slot() as free:
                if not free:
                    return Made.CROWDED
                part = self._reserve(entry, keep)
                if isinstance(part, Made):
                    return part
                return self._fill(part, entry, url, timeout_seconds, request_seconds, cancel)
        except OSError as error:
            if is_out_of_files(error):
                raise
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) and not self._told:
                self._told = True
                logger.warning(
                    "no shard can be copied into %s: %s; samples come without copies",
                    self._shards,
                    error,
                )
            return Made.FULL

    def _reserve(self, entry: ShardEntry, keep: Collection[Path]) -> int | Made:
        """An empty, locked file of the shard's length, with room made for it."""
        path, part = self.path(entry), self._part(entry)
        with self._locked():
            if self.has(entry):
                return Made.HERE
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if not _try_lock(fd, fcntl.LOCK_EX):
                    os.close(fd)
                    return Made.BUSY
                if self.has(entry):  # finished since the first look: what was opened is a new file
                    part.unlink(missing_ok=True)
                    os.close(fd)
                    return Made.HERE
                if not _is_at(
                    fd, part
                ):  # given up by somebody since it was opened: no others see this file
                    os.close(fd)
                    return Made.BUSY
                os.ftruncate(fd, 0)  # somebody who was killed may have left something
                if not self._make_room(entry.bytes, {*keep, path}):
                    part.unlink()
                    os.close(fd)
                    return Made.FULL
                _allocate(fd, entry.bytes)  # the others count it as taken from now on
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
    ) -> Made:
        part, path = self._part(entry), self.path(entry)
        try:
            for _ in range(COPY_TRIES):
                found = object_store.fetch(
                    url,
                    fd,
                    timeout_seconds=timeout_seconds,
                    request_seconds=request_seconds,
                    cancel=cancel,
                )
                if right := (found.size, found.sha256) == (entry.bytes, entry.sha256):
                    break
            if not right:
                logger.warning(
                    "%s: %d bytes with SHA-256 %s, but its manifest expects %d and %s; samples are checked one by one",
                    object_store.redact(url),
                    found.size,
                    found.sha256[:16],
                    entry.bytes,
                    entry.sha256[:16],
                )
            if not _is_at(fd, part):
                return Made.BUSY  # somebody removed it, and there may be another one's by now
            os.rename(part, path if found.size == entry.bytes else f"{path}{_OTHER}")
        except BaseException:
            if _is_at(fd, part):
                part.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return Made.HERE

    def _make_room(self, wanted: int, keep: Collection[Path]) -> bool:
        """Remove leftovers and what was unused longest until `wanted` bytes fit; whether they
        do."""
        copies, taken = [], 0
        for found in os.scandir(self._shards):
            with contextlib.suppress(FileNotFoundError):
                status = found.stat()
                if found.name.endswith(_PART) and self._remove(Path(found.path)):
                    continue  # nobody is making it any more
                if found.name == ".lock":
                    continue
                taken += status.st_size
                if not found.name.endswith(_PART):
                    copies.append((status.st_mtime_ns, status.st_size, Path(found.path)))
        disk = os.statvfs(self._shards)
        spare = int(disk.f_blocks * disk.f_frsize * SPARE_SHARE)
        missing = max(taken + wanted - self._limit, wanted + spare - disk.f_bavail * disk.f_frsize)
        copies = [copy for copy in copies if Path(str(copy[2]).removesuffix(_OTHER)) not in keep]
        if missing > sum(size for _, size, _ in copies):
            return False
        for _, size, path in sorted(copies):
            if missing <= 0:
                break
            if self._remove(path):
                missing -= size
        return missing <= 0

    def _remove(self, path: Path) -> bool:
        """Remove a file, unless somebody has it locked."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if not _try_lock(fd, fcntl.LOCK_EX):
                return False
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(fd)

    def _part(self, entry: ShardEntry) -> Path:
        return Path(f"{self.path(entry)}{_PART}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes; held only for moments."""
        self._shards.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._shards / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _slot(self) -> Iterator[bool]:
        """One of the node's places for copying; False when all are taken."""
        folder = self.folder / "slots"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(COPIES_AT_ONCE):
            fd = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if _try_lock(fd, fcntl.LOCK_EX):
                    yield True
                    return
            finally:
                os.close(fd)
        yield False


def touch(fd: int) -> None:
    """Say that a copy is used, at most once in `TOUCH_SECONDS`."""
    with contextlib.suppress(OSError):
        if time.time() - os.fstat(fd).st_mtime > TOUCH_SECONDS:
            os.utime(fd)


def _try_lock(fd: int, kind: int) -> bool:
    """Lock an open file; False when somebody else has it locked.

    Raises:
        OSError: The file system knows no locks.
    """
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def _allocate(fd: int, size: int) -> None:
    """Make a file so long, with room for it on the disk where the file system can promise that.

    Raises:
        OSError: The disk is full.
    """
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_PROMISES:
            raise
        os.ftruncate(fd, size)
