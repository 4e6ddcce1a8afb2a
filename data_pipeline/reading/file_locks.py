"""File operations of the shard cache: locks, allocation and modification times."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

TOUCH_SECONDS = 60.0

_ALLOCATE_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def touch(fd: int) -> None:
    """Update a file's modification time, at most once per `TOUCH_SECONDS`."""
    with contextlib.suppress(OSError):
        if time.time() - os.fstat(fd).st_mtime > TOUCH_SECONDS:
            os.utime(fd)


def try_lock(fd: int, operation: int) -> bool:
    """Lock an open file (`fcntl.LOCK_SH` or `LOCK_EX`); False if another process holds a lock.

    Raises:
        OSError: The file system does not support locks.
    """
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_file_at(fd: int, path: Path) -> bool:
    """Whether a path still refers to an open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def allocate(fd: int, size: int) -> None:
    """Set the length of a file, reserving disk space where the file system supports it.

    Raises:
        OSError: The disk is full.
    """
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _ALLOCATE_UNSUPPORTED:
            raise
        os.ftruncate(fd, size)
