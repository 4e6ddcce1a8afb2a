"""Frees space in a shard cache: removes leftovers, then least recently used copies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection
from pathlib import Path

from data_pipeline.reading.file_locks import try_lock

MISMATCH_SUFFIX, PART_SUFFIX = ".mismatch", ".part"
"""Of copies whose checksum is not that of the manifest, and of incomplete copies."""
RESERVED_DISK_FRACTION = 0.01
"""Fraction of the disk that is left free for other programs."""


def free_space(folder: Path, limit: int, needed: int, keep: Collection[Path]) -> bool:
    """Remove files of a cache until `needed` bytes fit.

    Args:
        folder: Folder of the copies.
        limit: Maximum total size of the copies, bytes.
        needed: Size of the next copy, bytes.
        keep: Copies that must not be removed.

    Returns:
        Whether `needed` bytes fit.
    """
    copies, used = _scan(folder)
    disk = os.statvfs(folder)
    reserved = int(disk.f_blocks * disk.f_frsize * RESERVED_DISK_FRACTION)
    missing = max(used + needed - limit, needed + reserved - disk.f_bavail * disk.f_frsize)

    removable = [
        copy for copy in copies if Path(str(copy[2]).removesuffix(MISMATCH_SUFFIX)) not in keep
    ]
    if missing > sum(size for _, size, _ in removable):
        return False

    for _, size, path in sorted(removable):
        if missing <= 0:
            break
        if _remove_if_unlocked(path):
            missing -= size
    return missing <= 0


def _scan(folder: Path) -> tuple[list[tuple[int, int, Path]], int]:
    """Time of last use, size and path of every copy, and the bytes in use.

    Leftovers of killed processes are removed.
    """
    copies, used = [], 0
    for item in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            status = item.stat()
            is_part = item.name.endswith(PART_SUFFIX)
            if is_part and _remove_if_unlocked(Path(item.path)):
                continue
            if item.name == ".lock":
                continue

            used += status.st_size
            if not is_part:
                copies.append((status.st_mtime_ns, status.st_size, Path(item.path)))
    return copies, used


def _remove_if_unlocked(path: Path) -> bool:
    """Remove a file, unless a process holds a lock on it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not try_lock(fd, fcntl.LOCK_EX):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(fd)
