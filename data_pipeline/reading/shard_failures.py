"""Record of unavailable shards, shared by the processes of a node: only one waits for a timeout.

A store that does not respond costs one process `data.shard_seconds`; the others use its record
until it expires, then some process tries again. Refused requests are not shared: another process
may have valid credentials. A record applies to one location of a shard only; a mirror may be
available.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common.errors import StorageError
from data_pipeline.common.json_file import write_json
from data_pipeline.common.store_errors import ErrorKind
from data_pipeline.shards.manifest import Manifest, ShardEntry

logger = logging.getLogger(__name__)

FAILURE_TTL_SECONDS: dict[str, float] = {
    ErrorKind.MISSING: 300.0,
    ErrorKind.REFUSED: 60.0,
    ErrorKind.UNREACHABLE: 30.0,
    ErrorKind.TOO_SLOW: 30.0,
}
"""Lifetime of a record, by kind of error; errors of other kinds concern single samples."""
_MAX_TTL_SECONDS = max(FAILURE_TTL_SECONDS.values())


class ShardFailure(NamedTuple):
    """Why a shard is unavailable."""

    reason: str
    """`missing-shard`, `corrupt-index` or `unreachable`."""
    detail: str
    until: float
    """Expiration on `time.time()`, which all processes of a node share."""


class ShardFailures:
    """Unavailable shards, in memory and in a folder that is shared with other processes."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        """Set the folder (None: do not share); it is created with the first record."""
        self._folder = Path(folder) if folder is not None else None
        self._failures: dict[str, ShardFailure] = {}
        self._cleared_at = 0.0
        """Time of the last `clear`; other processes' records from before it are ignored."""

    def get(self, manifest: Manifest, entry: ShardEntry) -> ShardFailure | None:
        """The current record of a shard."""
        key = _key(manifest, entry)
        failure = self._failures.get(key) or self._read(key)
        if failure is not None and failure.until < time.time():
            self._remove(key)
            return None
        return failure

    def record(
        self, manifest: Manifest, entry: ShardEntry, error: StorageError, reason: str = ""
    ) -> ShardFailure:
        """Record that a shard is unavailable; `reason` defaults to `failure_reason(error)`."""
        seconds = FAILURE_TTL_SECONDS.get(error.kind, 0.0)
        failure = ShardFailure(reason or failure_reason(error), str(error), time.time() + seconds)

        if seconds and self.get(manifest, entry) is None:
            logger.warning(
                "shard %s: %s; its samples are skipped for %.0f s", entry.name, error, seconds
            )
            key = _key(manifest, entry)
            self._failures[key] = failure
            if self._folder is not None and error.kind != ErrorKind.REFUSED:
                # If the disk is full, every process detects the failure on its own.
                with contextlib.suppress(StorageError):
                    write_json(self._folder / key, failure, indent=None)
        return failure

    def clear(self) -> None:
        """Discard all records of stores that did not respond or refused access: try them again.

        This includes the records of other processes. Records of missing shards stay, because their
        store did respond.
        """
        self._cleared_at = time.time()
        for key, failure in list(self._failures.items()):
            if _is_transient(failure):
                self._remove(key)

    def _remove(self, key: str) -> None:
        self._failures.pop(key, None)
        if self._folder is not None:
            with contextlib.suppress(OSError):  # the file of another user
                (self._folder / key).unlink()

    def _read(self, key: str) -> ShardFailure | None:
        """A record of another process."""
        if self._folder is None:
            return None

        path = self._folder / key
        try:
            reason, detail, until = json.loads(path.read_bytes())
            # Limit the lifetime: the file may hold any value, or the clock may have changed.
            limited = min(time.time() + _MAX_TTL_SECONDS, float(until))
            failure = ShardFailure(str(reason), str(detail), limited)
            if _is_transient(failure) and path.stat().st_mtime < self._cleared_at:
                return None
        except (OSError, ValueError, TypeError):
            return None

        self._failures[key] = failure
        return failure


def failure_reason(error: StorageError) -> str:
    """The reason by which samples affected by a storage error are counted."""
    if error.kind == ErrorKind.MISSING:
        return "missing-shard"
    return "truncated" if error.kind == ErrorKind.CHANGED else "unreachable"


def _is_transient(failure: ShardFailure) -> bool:
    return failure.reason == "unreachable"


def _key(manifest: Manifest, entry: ShardEntry) -> str:
    """File name for one shard at one location; includes the location of its index, which may be
    what is unavailable."""
    location = (manifest.shard_url(entry), manifest.index_url(entry), entry.sha256)
    return hashlib.sha256("\n".join(location).encode()).hexdigest()
