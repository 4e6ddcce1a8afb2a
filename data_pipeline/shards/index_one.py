"""The work on one shard while many are indexed, in whichever process: read it once, write its
index.

An index that is there already is kept if its shard has not changed since: it has its length and, in
a store, its ETag; a local shard must be older than its index, and some samples must have their
checksum.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.shards.pieces import PIECE_BYTES, opened
from data_pipeline.shards.scan import scan
from data_pipeline.shards.shard_entry import ShardEntry, entry_of
from data_pipeline.shards.shard_index import ShardIndex


class IndexJob(NamedTuple):
    """One shard to index; small, as it is sent to another process."""

    url: str
    name: str
    index_url: str
    may_have_index: bool
    """Whether to look for one that an earlier call left."""
    salvage: bool
    timeout_seconds: float


class Indexed(NamedTuple):
    """What became of it."""

    entry: ShardEntry | None
    reused: bool
    problem: str
    """Why there is no entry."""


def index_one(job: IndexJob) -> Indexed:
    """Index one shard, unless it has an index that fits; what is wrong with it is an answer, not an
    error.

    Raises:
        StorageError: The index cannot be written.
    """
    try:
        with opened(job.url, timeout_seconds=job.timeout_seconds) as shard:
            older = _older_row(job, shard.total_bytes, shard.etag) if job.may_have_index else None
            if older is not None:
                return Indexed(older, True, "")
            index = scan(
                shard.pieces,
                shard.total_bytes,
                storage.redact(job.url),
                salvage=job.salvage,
                etag=shard.etag,
            )
    except DataError as error:
        return Indexed(None, False, str(error))
    data = index.to_bytes()
    storage.write_bytes(job.index_url, data)
    return Indexed(entry_of(index, job.name, data), False, "")


def _older_row(job: IndexJob, total_bytes: int, etag: str) -> ShardEntry | None:
    """The row that an earlier call's index gives, if the shard has not changed since."""
    local = storage.is_local(job.url)
    if local and not _is_newer(job.index_url, storage.local_path(job.url)):
        return None
    try:
        data = storage.read_bytes(job.index_url)
        index = ShardIndex.from_bytes(data, storage.redact(job.index_url))
    except DataError:  # none, of an older version, or half of one
        return None
    if index.shard_bytes != total_bytes or index.etag != etag or not (local or etag):
        return None
    if index.damage and not job.salvage:
        return None
    return (
        entry_of(index, job.name, data)
        if not local or _agrees(index, storage.local_path(job.url))
        else None
    )


def _is_newer(index_url: str, shard: Path) -> bool:
    """Whether an index was written after its shard; one in a store has no time that could be
    compared."""
    try:
        return storage.local_path(index_url).stat().st_mtime_ns >= shard.stat().st_mtime_ns
    except (OSError, StorageError):
        return False


def _agrees(index: ShardIndex, shard: Path) -> bool:
    """Whether some samples have their checksum: a copy may have kept another file's time."""
    with open(shard, "rb") as file:
        for i in {0, len(index) // 2, len(index) - 1} if len(index) else ():
            file.seek(int(index.offsets[i]))
            left, found = int(index.extents[i]), 0
            while piece := file.read(min(left, PIECE_BYTES)):
                found, left = zlib.crc32(piece, found), left - len(piece)
            if left or found != index.crc32[i]:
                return False
    return True
