"""Writes WebDataset shards with webdataset's own writer, then their indices and manifest.

Equal samples give equal bytes: no times, no user names, and the number of processes does not
matter. Every file is written aside and renamed (or put into the store whole), a shard's index after
the shard and the manifest last, so a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple, Protocol

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.processes import WHOLE, Part, in_processes
from data_pipeline.shards.manifest import (
    Manifest,
    ShardEntry,
    entry_of,
    withdraw_manifest,
    write_manifest,
)
from data_pipeline.shards.pieces import PIECE_BYTES
from data_pipeline.shards.scan import scan
from data_pipeline.shards.shard_index import ShardIndex, index_name
from data_pipeline.shards.tar import split_name

logger = logging.getLogger(__name__)

_UPLOAD_SECONDS = 3600.0


class LazySample(Protocol):
    """A sample that is made where it is written, so that many processes can read the files of a
    data set.

    Give a small dataclass, which can be sent to a process and whose `repr` says all that its
    contents depend on. It may have an attribute `bytes`: about how many it will have.
    """

    def load(self) -> Mapping[str, object]:
        """The sample, as `write_shards` takes it.

        Raises:
            DataError: It cannot be made.
        """


Sample = Mapping[str, object] | LazySample


def write_shards(
    samples: Iterable[Sample],
    folder: str | os.PathLike[str],
    *,
    prefix: str = "shard",
    samples_per_shard: int = 512,
    bytes_per_shard: int = 0,
    workers: int = 1,
    resume: bool = False,
    part: Part = WHOLE,
    about: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write samples as `folder/prefix-000000.tar`, ... with indices and a manifest.

    Args:
        samples: WebDataset
        samples: `__key__` (no dot after the last slash), and contents by extension, e.g.
            `{"__key__": "a/7", "png": b"...", "txt": "...", "json": {...}}`; or `LazySample`s that
            make them. Taken as they are needed.
        folder: Local or in a store; its old manifest is withdrawn first.
        prefix: How the files' names begin.
        samples_per_shard: Samples of a shard; the last may have fewer.
        bytes_per_shard: Most bytes of the contents of a shard with more than one sample; 0 is no
            limit.
        workers: Processes; 1 does the work in this one.
        resume: Keep the shards that an earlier call with `resume` wrote from the same samples.
        part: `(i, n)` writes only every n-th shard from the i-th on, with `resume`, and no
            manifest; when all parts are done, a call with `resume` but no part brings them
            together. For job arrays.
        about: More to say in the manifest.

    Returns:
        The manifest; with a `part`, only of its shards, and not written.

    Raises:
        DataError: There are no samples, a key is unusable or comes twice in a shard, or a member
            cannot be written.
        StorageError: The disk is full, or the store refuses.
    """
    base, resume = os.fspath(folder), resume or part != WHOLE
    withdraw_manifest(base)
    jobs = (
        _Job(base, f"{prefix}-{number:06d}.tar", chunk, resume)
        for number, chunk in enumerate(_chunks(samples, samples_per_shard, bytes_per_shard))
        if number % part[1] == part[0]
    )
    done = in_processes(_write_one, jobs, workers if workers > 1 else 0, ordered=False)
    entries = sorted((entry for _, entry in done), key=lambda entry: entry.name)
    if part != WHOLE:
        return Manifest(url=base, shards=tuple(entries))
    if not entries:
        raise DataError(f"no samples to write to {storage.redact(base)}")
    _warn_of_others(base, prefix, {entry.name for entry in entries})
    return write_manifest(base, entries, about)


def put_shard(
    samples: Iterable[Sample], folder: str, name: str, *, made_from: str = ""
) -> ShardEntry:
    """Write one shard and its index; both appear whole or not at all, the index last.

    Args:
        samples: As for `write_shards`; taken one at a time. None at all gives an empty shard.
        folder: Its folder, local or in a store.
        name: Path of the shard in it, which should end in `.tar`.
        made_from: A note for the index, by which the caller will know the shard again.

    Returns:
        Its row for `write_manifest`.

    Raises:
        DataError: A key is unusable or comes twice, or a member cannot be written.
        StorageError: The disk is full, or the store refuses.
    """
    url = storage.join(folder, name)
    shown = storage.redact(url)
    if storage.is_local(url):
        with (
            storage.replacing(storage.local_path(url)) as fd,
            open(fd, "r+b", closefd=False) as file,
        ):
            index = _write_tar(samples, file, shown, made_from)
    else:
        with tempfile.NamedTemporaryFile(prefix="vlmoe-shard-") as file:
            index = _write_tar(samples, file, shown, made_from)
            storage.upload_file(file.name, url, timeout_seconds=_UPLOAD_SECONDS)
    data = index.to_bytes()
    storage.write_bytes(index_name(url), data)
    return entry_of(index, name, data)


class _Job(NamedTuple):
    """One shard to write."""

    folder: str
    name: str
    samples: tuple[Sample, ...]
    resume: bool


def _chunks(
    samples: Iterable[Sample], most_samples: int, most_bytes: int
) -> Iterator[tuple[Sample, ...]]:
    """The samples of each shard; a function of the samples alone, so that any number of processes
    agree."""
    chunk, chunk_bytes = list[Sample](), 0
    for sample in samples:
        count = _about_bytes(sample) if most_bytes else 0
        if chunk and (len(chunk) == most_samples or chunk_bytes + count > most_bytes > 0):
            yield tuple(chunk)
            chunk, chunk_bytes = [], 0
        chunk.append(sample)
        chunk_bytes += count
    if chunk:
        yield tuple(chunk)


def _about_bytes(sample: Sample) -> int:
    if not isinstance(sample, Mapping):
        return int(getattr(sample, "bytes", 0))
    return sum(
        len(value)
        for value in sample.values()
        if isinstance(value, (bytes, bytearray, memoryview, str))
    )


def _write_one(job: _Job) -> ShardEntry:
    """Write one shard, unless it is there."""
    made_from = _fingerprint(job.samples) if job.resume else ""
    if found := _written(job, made_from):
        return found
    return put_shard(job.samples, job.folder, job.name, made_from=made_from)


def _fingerprint(samples: Iterable[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _written(job: _Job, made_from: str) -> ShardEntry | None:
    """The row of a shard that an earlier call wrote from the same samples, if it is still there."""
    url = storage.join(job.folder, job.name)
    if not made_from or not storage.exists(index_name(url)) or not storage.exists(url):
        return None
    try:
        data = storage.read_bytes(index_name(url))
        index = ShardIndex.from_bytes(data, url)
    except DataError:
        return None
    fits = index.made_from == made_from and storage.size(url) == index.shard_bytes
    return entry_of(index, job.name, data) if fits else None


def _warn_of_others(folder: str, prefix: str, names: set[str]) -> None:
    """Say which shards of an earlier, larger set are left, which other readers would take for part
    of this one."""
    try:
        found = storage.list_names(folder)
    except StorageError:
        return
    others = [
        name
        for name in found
        if re.fullmatch(re.escape(prefix) + r"-\d{6}\.tar", name) and name not in names
    ]
    if others:
        logger.warning(
            "%s also holds %d older shards, from %s on, that are not part of what was written; remove them "
            "with their indices",
            storage.redact(folder),
            len(others),
            others[0],
        )


def _write_tar(
    samples: Iterable[Sample], file: IO[bytes], where: str, made_from: str
) -> ShardIndex:
    """Write the archive, and walk through what was written."""
    from webdataset import TarWriter  # slow to import, and only writers need it

    keys = []
    # mtime 0 and webdataset's fixed owner: the same samples are the same bytes on any day.
    # Its own encoder would pickle some kinds of members: ours knows bytes, text and JSON.
    with TarWriter(file, mtime=0, encoder=_encoded) as tar:
        for given in samples:
            sample = _loaded(given, where)
            keys.append(_checked_key(sample))
            try:
                tar.write(sample)
            except (ValueError, TypeError) as error:
                raise DataError(f"{where}: cannot write sample {keys[-1]!r}: {error}") from error
    total_bytes = file.tell()
    file.flush()
    file.seek(0)
    index = scan(iter(lambda: file.read(PIECE_BYTES), b""), total_bytes, where, made_from=made_from)
    if index.keys != keys:
        odd = next(
            (key for key, found in zip(keys, index.keys, strict=False) if key != found), keys[-1]
        )
        raise DataError(
            f"{where}: sample {odd!r} cannot be told from its neighbors, or has no files; give each sample a key of "
            f"its own and at least one file"
        )
    return index


def _loaded(sample: Sample, where: str) -> Mapping[str, object]:
    if isinstance(sample, Mapping):
        return sample
    try:
        return sample.load()
    except OSError as error:
        raise StorageError(f"{where}: cannot make the sample {sample!r}: {error}") from error


def _encoded(sample: Mapping[str, object]) -> dict[str, object]:
    return {
        name: value if name.startswith("_") else _bytes(name, value)
        for name, value in sample.items()
    }


def _bytes(extension: str, value: object) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if extension.rpartition(".")[2] == "json":
        return json.dumps(value, ensure_ascii=False).encode()
    if isinstance(value, str):
        return value.encode()
    raise TypeError(
        f"its .{extension} is a {type(value).__name__}; give bytes, or text for .txt, or JSON for .json"
    )


def _checked_key(sample: Mapping[str, object]) -> str:
    key = sample.get("__key__")
    if not isinstance(key, str) or split_name(f"{key}.x") != (key, "x") or "\0" in key:
        raise DataError(
            f"the sample key {key!r} is unusable: WebDataset ends a key at the first dot of the file "
            f"name and passes over `__names__`, so give a string without dots there"
        )
    return key
