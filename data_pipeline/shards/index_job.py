"""Indexes one shard, possibly in a worker process: reads it once and writes its index.

An existing index is reused if its shard has not changed since: it must have the same size and, in a
store, the same ETag; a local shard must be older than its index, and the checksums of some of its
samples must match.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.sample_keys import IMAGE_KEYS, image_problem
from data_pipeline.shards.scan import count_ignored, scan
from data_pipeline.shards.shard_entry import ShardEntry, make_entry
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.shard_stream import CHUNK_BYTES, open_shard_stream


class IndexJob(NamedTuple):
    """One shard to index; small, because it is sent to another process."""

    url: str
    name: str
    index_url: str
    may_have_index: bool
    """Whether to look for an existing index."""
    salvage: bool
    """Whether to index what can be read of a corrupt shard."""
    timeout_seconds: float


class IndexResult(NamedTuple):
    """The result of an `IndexJob`."""

    entry: ShardEntry | None
    reused: bool
    problem: str
    """Why there is no entry; empty if there is one."""
    sample_problems: dict[str, tuple[int, str]]
    """Samples without a unique image: number and first example by reason."""
    files: int
    """Number of files in samples."""
    ignored: Mapping[str, int] | None
    """Number of members that belong to no sample, by rule; None if it is not known."""


def run_index_job(job: IndexJob) -> IndexResult:
    """Index one shard, unless it has a valid index; a corrupt shard is a result, not an exception.

    Raises:
        StorageError: The index cannot be written.
    """
    try:
        with open_shard_stream(job.url, timeout_seconds=job.timeout_seconds) as shard:
            if job.may_have_index and (
                existing := _existing_index(job, shard.total_bytes, shard.etag)
            ):
                return _result(existing[0], job, existing[1], reused=True)
            index = scan(
                shard.chunks,
                shard.total_bytes,
                storage.redact(job.url),
                salvage=job.salvage,
                etag=shard.etag,
            )
    except DataError as error:
        return IndexResult(None, False, str(error), {}, 0, {})
    data = index.to_bytes()
    storage.write_bytes(job.index_url, data)
    return _result(index, job, data, reused=False)


def _result(index: ShardIndex, job: IndexJob, data: bytes, *, reused: bool) -> IndexResult:
    problems: dict[str, tuple[int, str]] = {}
    for i in range(len(index)):
        extensions = (member.extension for member in index.members(i))
        if problem := image_problem(extensions, IMAGE_KEYS):
            reason, detail = problem
            count, example = problems.get(reason, (0, f"{index.key(i)}: {detail}"))
            problems[reason] = count + 1, example
    files = len(index.columns["member_size"])
    entry = make_entry(index, job.name, data)
    ignored = _ignored_when_indexed(index, job) if reused else index.ignored
    return IndexResult(entry, reused, "", problems, files, ignored)


def _ignored_when_indexed(index: ShardIndex, job: IndexJob) -> Mapping[str, int] | None:
    """The ignored members of a shard whose index is reused.

    An index without them has none, or is of a version that did not count them. Then the
    headers of a local shard are read; those of a shard in a store would need many requests.
    """
    if index.ignored:
        return index.ignored
    if not storage.is_local(job.url):
        return None
    try:
        return count_ignored(storage.local_path(job.url))
    except (DataError, OSError):
        return None


def _existing_index(job: IndexJob, total_bytes: int, etag: str) -> tuple[ShardIndex, bytes] | None:
    """The existing index and its file, if the shard has not changed since."""
    local = storage.is_local(job.url)
    if local and not _is_newer(job.index_url, storage.local_path(job.url)):
        return None
    try:
        data = storage.read_bytes(job.index_url)
        index = ShardIndex.from_bytes(data, storage.redact(job.index_url))
    except DataError:  # missing, of an older version, or truncated
        return None
    if index.shard_bytes != total_bytes or index.etag != etag or not (local or etag):
        return None
    if index.corruption and not job.salvage:
        return None
    if b"GNUSparseFile." in index.columns["key_text"].tobytes():  # by a version without a check
        return None
    if local and not _checksums_match(index, storage.local_path(job.url)):
        return None
    return index, data


def _is_newer(index_url: str, shard: Path) -> bool:
    """Whether an index was written after its local shard; False for an index in a store."""
    try:
        return storage.local_path(index_url).stat().st_mtime_ns >= shard.stat().st_mtime_ns
    except (OSError, StorageError):
        return False


def _checksums_match(index: ShardIndex, shard: Path) -> bool:
    """Compare some samples with the index: a copied shard can keep an old modification time."""
    with open(shard, "rb") as file:
        for i in {0, len(index) // 2, len(index) - 1} if len(index) else ():
            file.seek(int(index.offsets[i]))
            remaining, crc32 = int(index.extents[i]), 0
            while chunk := file.read(min(remaining, CHUNK_BYTES)):
                crc32, remaining = zlib.crc32(chunk, crc32), remaining - len(chunk)
            if remaining or crc32 != index.crc32[i]:
                return False
    return True
