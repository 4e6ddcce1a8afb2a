"""Reads shard indices of remote manifests, through a local folder or into memory."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.open_files import is_too_many_open_files
from data_pipeline.shards.shard_index import INDEX_SUFFIX, ShardIndex, check_index_hash

logger = logging.getLogger(__name__)

_reported_folders: set[Path] = set()
"""Cache folders for which a warning was logged."""


class RemoteIndex(NamedTuple):
    """The index of a shard in a store, and the time limits for reading it."""

    url: str
    sha256: str
    timeout_seconds: float
    """Limit for all attempts together."""
    request_seconds: float
    """Timeout of one request."""

    @property
    def where(self) -> str:
        """The address for messages."""
        return storage.redact(self.url)


def read_index(remote: RemoteIndex) -> ShardIndex:
    """Read an index into memory.

    Raises:
        DataError: It is corrupt or has another hash.
        StorageError: It cannot be read.
    """
    data = storage.read_bytes(
        remote.url,
        timeout_seconds=remote.timeout_seconds,
        request_seconds=remote.request_seconds,
    )
    check_index_hash(data, remote.sha256, remote.where)
    return ShardIndex.from_bytes(data, remote.where)


def open_cached(remote: RemoteIndex, folder: Path) -> ShardIndex:
    """Memory-map the local copy of an index, downloading it if needed.

    If the folder cannot be used, a warning is logged once and the index is read into memory.

    Raises:
        DataError: The index is corrupt or has another hash.
        StorageError: It cannot be read.
    """
    try:
        return _open_copy(remote, folder)
    except (StorageError, OSError) as error:
        # Errors of the store have a kind; reading into memory would fail in the same way.
        if getattr(error, "kind", "") or is_too_many_open_files(error):
            raise
        index = read_index(remote)
        if folder not in _reported_folders:
            _reported_folders.add(folder)
            logger.warning(
                "%s cannot be used, so each process reads shard indices into memory: %s; check "
                "data.cache_dir",
                folder,
                error,
            )
        return index


def _open_copy(remote: RemoteIndex, folder: Path) -> ShardIndex:
    """The local copy; it is named by its hash, so a copy is never outdated."""
    path = folder / f"{remote.sha256}{INDEX_SUFFIX}"
    if path.exists():
        try:
            return ShardIndex.open(path, remote.where, sha256=remote.sha256)
        except DataError as error:
            if is_too_many_open_files(error):
                raise
            path.unlink(missing_ok=True)  # corrupt on disk: download it again

    # Two processes may both download it: it is small, and both renames give the same file.
    storage.fetch_to_file(
        remote.url,
        path,
        timeout_seconds=remote.timeout_seconds,
        request_seconds=remote.request_seconds,
    )
    try:
        return ShardIndex.open(path, remote.where, sha256=remote.sha256)
    except DataError as error:
        if not is_too_many_open_files(error):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
