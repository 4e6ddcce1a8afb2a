"""A lock of the run folder: two trainings in one folder would overwrite each other's checkpoints.

The lock is one of the operating system on `lock`, which ends with the process, also if it is
killed. The file is not deleted: a process that waits for it would lock a deleted file.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from data_pipeline.common.errors import StorageError
from data_pipeline.common.escaping import escape_control

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
_WAIT_SECONDS = 10.0
"""A process of the previous start may still be ending."""
_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)


def lock_run_folder(out: Path, wait_seconds: float = _WAIT_SECONDS) -> BinaryIO:
    """Lock an existing run folder for this process, until the returned file is closed.

    The lock is of the POSIX kind: processes that this one forks do not hold it.

    Args:
        out: The run folder.
        wait_seconds: How long to wait for another process to release it.

    Raises:
        StorageError: Another process holds it.
        OSError: The folder is not writable.
    """
    file = (out / LOCK_FILE).open("a+b")
    deadline = time.monotonic() + wait_seconds
    try:
        while not _try_lock(file, out):
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{out} is in use by {_owner(file)}, which trains in it; wait until it ends, "
                    f"stop it, or choose another --out. If that process does not exist (its "
                    f"computer was lost), delete {out / LOCK_FILE}"
                )
            time.sleep(min(wait_seconds, 0.2))
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    file.flush()
    return file


def _try_lock(file: BinaryIO, out: Path) -> bool:
    """Whether this process now holds the lock, or the file system has none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning(
            "%s is on a file system without locks (%s): a second training in it would not be "
            "noticed",
            out,
            error.strerror,
        )
    return True


def _owner(file: BinaryIO) -> str:
    """What the process that holds the lock has written."""
    file.seek(0)
    return escape_control(file.read(200).decode("utf-8", "replace").strip()) or "another process"
