"""Writes WebDataset shards with their indices and manifest.

Equal samples give equal bytes: files contain no times or user names, and the number of processes
does not matter. Every file is written atomically, a shard's index after the shard and the manifest
last, so a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.processes import SINGLE_PART, Part, map_in_processes
from data_pipeline.common.tables import counted
from data_pipeline.shards.manifest import (
    Manifest,
    ShardEntry,
    invalidate_manifest,
    make_entry,
    write_manifest,
)
from data_pipeline.shards.shard_index import ShardIndex, index_name
from data_pipeline.shards.tar_writer import LazySample, Sample, write_tar

__all__ = ["LazySample", "Sample", "write_shard", "write_shards"]

logger = logging.getLogger(__name__)

_PREFIX = "shard"
_UPLOAD_SECONDS = 3600.0


def write_shards(
    samples: Iterable[Sample],
    folder: str | os.PathLike[str],
    *,
    samples_per_shard: int = 512,
    bytes_per_shard: int = 0,
    workers: int = 1,
    resume: bool = False,
    part: Part = SINGLE_PART,
    metadata: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write samples as `folder/shard-000000.tar`, ... with indices and a manifest.

    Args:
        samples: WebDataset samples: `__key__` (no dot after the last slash), and contents by
            extension, e.g. `{"__key__": "a/7", "png": b"...", "txt": "...", "json": {...}}`; or
            `LazySample`s. Consumed as needed.
        folder: Local or in a store; its existing manifest is removed first.
        samples_per_shard: Number of samples of a shard; the last one may have fewer.
        bytes_per_shard: Maximum size of the contents of a shard with more than one sample; 0 is no
            limit.
        workers: Number of processes; with 1 this process does the work.
        resume: Keep the shards that an earlier call with `resume` wrote from the same samples.
        part: `(i, n)` writes only every n-th shard from the i-th on, with `resume`, and no
            manifest; after all parts, a call with `resume` but no part writes it. For job arrays.
        metadata: Further keys of the manifest.

    Returns:
        The manifest; with `part`, it has only the shards of that part and is not written.

    Raises:
        DataError: There are no samples, a key is invalid or occurs twice in a shard, or a member
            cannot be written.
        StorageError: The disk is full, or the store refuses access.
    """
    base, resume = os.fspath(folder), resume or part != SINGLE_PART
    invalidate_manifest(base)
    jobs = (
        _WriteJob(base, f"{_PREFIX}-{number:06d}.tar", chunk, resume)
        for number, chunk in enumerate(_chunks(samples, samples_per_shard, bytes_per_shard))
        if number % part[1] == part[0]
    )
    results = map_in_processes(_run_write_job, jobs, workers if workers > 1 else 0, ordered=False)
    entries = sorted((entry for _, entry in results), key=lambda entry: entry.name)

    if part != SINGLE_PART:
        return Manifest(url=base, shards=tuple(entries))
    if not entries:
        raise DataError(f"no samples to write to {storage.redact(base)}")
    _warn_of_old_shards(base, {entry.name for entry in entries})
    return write_manifest(base, entries, metadata)


def write_shard(
    samples: Iterable[Sample], folder: str, name: str, *, source_hash: str = ""
) -> ShardEntry:
    """Write one shard and then its index, both atomically.

    Args:
        samples: As for `write_shards`; consumed one at a time. An empty iterable gives an empty
            shard.
        folder: Its folder, local or in a store.
        name: Path of the shard in the folder, which should end in `.tar`.
        source_hash: Stored in the index, so that the caller can recognize the shard later.

    Returns:
        Its row for `write_manifest`.

    Raises:
        DataError: A key is invalid or occurs twice, or a member cannot be written.
        StorageError: The disk is full, or the store refuses access.
    """
    url = storage.join(folder, name)
    where = storage.redact(url)
    if storage.is_local(url):
        with (
            storage.atomic_write(storage.local_path(url)) as fd,
            open(fd, "r+b", closefd=False) as file,
        ):
            index = write_tar(samples, file, where, source_hash)
    else:
        with tempfile.NamedTemporaryFile(prefix="vlmoe-shard-") as file:
            index = write_tar(samples, file, where, source_hash)
            storage.upload_file(file.name, url, timeout_seconds=_UPLOAD_SECONDS)
    data = index.to_bytes()
    storage.write_bytes(index_name(url), data)
    return make_entry(index, name, data)


class _WriteJob(NamedTuple):
    """One shard to write."""

    folder: str
    name: str
    samples: tuple[Sample, ...]
    resume: bool


def _chunks(
    samples: Iterable[Sample], max_samples: int, max_bytes: int
) -> Iterator[tuple[Sample, ...]]:
    """The samples of each shard; depends only on the samples, not on the number of processes."""
    chunk, chunk_bytes = list[Sample](), 0
    for sample in samples:
        size = _approximate_bytes(sample) if max_bytes else 0
        if chunk and (len(chunk) == max_samples or chunk_bytes + size > max_bytes > 0):
            yield tuple(chunk)
            chunk, chunk_bytes = [], 0
        chunk.append(sample)
        chunk_bytes += size
    if chunk:
        yield tuple(chunk)


def _approximate_bytes(sample: Sample) -> int:
    if not isinstance(sample, Mapping):
        return int(getattr(sample, "bytes", 0))
    return sum(
        len(value)
        for value in sample.values()
        if isinstance(value, (bytes, bytearray, memoryview, str))
    )


def _run_write_job(job: _WriteJob) -> ShardEntry:
    """Write one shard, unless it already exists."""
    source_hash = _hash_samples(job.samples) if job.resume else ""
    if entry := _existing_entry(job, source_hash):
        return entry
    return write_shard(job.samples, job.folder, job.name, source_hash=source_hash)


def _hash_samples(samples: Iterable[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _existing_entry(job: _WriteJob, source_hash: str) -> ShardEntry | None:
    """The row of a shard that an earlier call wrote from the same samples."""
    url = storage.join(job.folder, job.name)
    if not source_hash or not storage.exists(index_name(url)) or not storage.exists(url):
        return None
    try:
        data = storage.read_bytes(index_name(url))
        index = ShardIndex.from_bytes(data, url)
    except DataError:
        return None
    if index.source_hash != source_hash or storage.size(url) != index.shard_bytes:
        return None
    return make_entry(index, job.name, data)


def _warn_of_old_shards(folder: str, names: set[str]) -> None:
    """Warn of shards of an earlier, larger set: other readers may use them as part of this one."""
    try:
        files = storage.list_names(folder)
    except StorageError:
        return
    pattern = re.compile(re.escape(_PREFIX) + r"-\d{6}\.tar")
    old = [name for name in files if pattern.fullmatch(name) and name not in names]
    if old:
        logger.warning(
            "%s also contains %s, from %s on, not part of this dataset; remove each with its index",
            storage.redact(folder),
            counted(len(old), "older shard"),
            old[0],
        )
