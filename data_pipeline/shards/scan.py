"""Builds the index of a shard, and its SHA-256, in one pass from start to end.

The shard is a stream of chunks, so it can be in a store and larger than memory. A corrupt shard is
an error; with `salvage` the readable samples are kept and the rest is described.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.tables import counted, join_counts
from data_pipeline.shards.sample_rows import LostSamples, SampleRows, ignoring_rule
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.shard_stream import open_shard_stream
from data_pipeline.shards.tar import BLOCK, find_header, walk

_BUFFER_BYTES = 4 << 20
"""How far back the walk can read: much more than the headers of a member need."""
_MAX_LISTED = 10
"""Number of problems that are described one by one."""


def index_shard(path: str | os.PathLike[str], *, salvage: bool = False) -> ShardIndex:
    """The index of a local shard.

    Raises:
        DataError: As for `scan`.
        StorageError: The file cannot be read, or changed meanwhile.
    """
    where = os.fspath(path)
    with open_shard_stream(where, timeout_seconds=0) as shard:
        return scan(shard.chunks, shard.total_bytes, where, salvage=salvage)


def count_ignored(path: str | os.PathLike[str]) -> dict[str, int]:
    """Number of members of a local shard that belong to no sample, by rule; reads only headers.

    Raises:
        DataError: A header is corrupt.
        OSError: The file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:

        def read(offset: int, count: int) -> bytes:
            return os.pread(file.fileno(), count, offset)

        members = walk(read, os.fstat(file.fileno()).st_size, os.fspath(path))
        counts = Counter(rule for member in members if (rule := ignoring_rule(member)))
    return dict(sorted(counts.items()))


def scan(
    chunks: Iterable[bytes],
    total_bytes: int,
    where: str,
    *,
    salvage: bool = False,
    **optional_metadata: str,
) -> ShardIndex:
    """Walk through a shard and index its samples.

    A shard may have no samples if it has no other files either.

    Args:
        chunks: Its bytes, in order.
        total_bytes: Its size.
        where: Its address, for messages.
        salvage: Keep what can be read of a corrupt shard; the index describes in `corruption` what
            is lost.
        optional_metadata: Stored in the index: `etag`, `source_hash`.

    Raises:
        DataError: The archive is corrupt, truncated or compressed, a sample has a link or a sparse
            file, two samples have the same key (or the files of a sample are not next to each
            other), or it has files but no samples.
        StorageError: The stream has another size than `total_bytes`.
    """
    stream = _Stream(chunks, total_bytes, where)
    samples = SampleRows(stream.crc32, where, strict=not salvage)
    problems, is_truncated = _add_members(samples, stream, total_bytes, where, salvage=salvage)
    rows, lost = samples.finish()
    problems = _first(problems)
    if lost.samples:
        problems.append(_describe_lost(lost))
    if is_truncated:
        problems.append("everything after that is missing, and its size is unknown")
    return ShardIndex.build(
        rows,
        shard_bytes=total_bytes,
        sha256=stream.sha256(),
        ignored=samples.ignored,
        corruption="; ".join(problems),
        **optional_metadata,
    )


def _add_members(
    samples: SampleRows, stream: _Stream, total_bytes: int, where: str, *, salvage: bool
) -> tuple[list[str], bool]:
    """Add the members of the archive to the samples.

    Returns:
        Descriptions of what could not be read, and whether the end of the archive is missing.
    """
    position, problems, is_truncated = 0, list[str](), False
    while position < total_bytes or not problems:
        try:
            for member in walk(stream.read, total_bytes, where, start=position):
                samples.add(member)
                position = member.end
            break
        except StorageError:
            raise
        except DataError as error:
            if not salvage:
                raise
            problems.append(str(error).removeprefix(where).lstrip(": "))
            samples.interrupt()
            if error.slug == "truncated":
                is_truncated = True
                break
            if position == 0 and error.slug == "unsupported-tar":
                break
            start = max(position + BLOCK, stream.first_header)
            end = find_header(stream.read, start, total_bytes)
            problems[-1] += f" (bytes {position:,} to {end:,} are lost)"
            position = end
    return problems, is_truncated


def _describe_lost(lost: LostSamples) -> str:
    keys = ", ".join(_first(list(map(repr, lost.keys))))
    reasons = join_counts(lost.reasons)
    samples, files = counted(lost.samples, "sample"), counted(lost.files, "file")
    return f"skipped {samples} with {files} ({reasons}): {keys}"


def _first(texts: list[str]) -> list[str]:
    """The first texts, and the number of the others."""
    others = len(texts) - _MAX_LISTED
    return [*texts[:_MAX_LISTED], f"and {others:,} more"] if others > 0 else texts


class _Stream:
    """Random access to the last chunks of a stream; computes its SHA-256."""

    def __init__(self, chunks: Iterable[bytes], total_bytes: int, where: str) -> None:
        self._chunks: Iterator[bytes] = iter(chunks)
        self._total_bytes, self._where = total_bytes, where
        self._buffer: deque[tuple[int, bytes]] = deque()
        """Chunks with their offsets."""
        self._end = 0
        self._sha256 = hashlib.sha256()

    @property
    def first_header(self) -> int:
        """Offset of the first header that can still be read."""
        return -(-(self._buffer[0][0] if self._buffer else self._end) // BLOCK) * BLOCK

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`, fewer only at the end; see `tar.Source`."""
        end = min(offset + count, self._total_bytes)
        self._load(end, keep_from=offset - _BUFFER_BYTES)
        start, last_chunk = self._buffer[-1] if self._buffer else (0, b"")
        if offset >= start:  # the usual case
            return last_chunk[offset - start : end - start]
        return b"".join(self._parts(offset, end))

    def crc32(self, start: int, end: int, value: int) -> int:
        """Continue the CRC-32 `value` with the bytes from `start` to `end`."""
        while start < end:
            self._load(min(start + 1, end), keep_from=start)
            for part in self._parts(start, min(end, self._end)):
                value = zlib.crc32(part, value)
                start += len(part)
        return value

    def sha256(self) -> str:
        """SHA-256 of the whole stream, which is read to its end."""
        self._load(self._total_bytes, keep_from=self._total_bytes)
        if next(self._chunks, b""):
            raise StorageError(f"{self._where} grew while it was read; start again")
        return self._sha256.hexdigest()

    def _parts(self, start: int, end: int) -> Iterator[memoryview]:
        if not self._buffer or start < self._buffer[0][0]:
            raise DataError(
                f"{self._where}: the headers before byte {end} are too long", slug="corrupt-tar"
            )
        for base, chunk in tuple(self._buffer):
            if base < end and start < base + len(chunk):
                yield memoryview(chunk)[max(0, start - base) : end - base]

    def _load(self, end: int, keep_from: int) -> None:
        """Read up to `end`; bytes before `keep_from` may be dropped."""
        while self._end < end:
            while self._buffer and self._buffer[0][0] + len(self._buffer[0][1]) <= keep_from:
                self._buffer.popleft()
            chunk = next(self._chunks, b"")
            if not chunk or self._end + len(chunk) > self._total_bytes:
                raise StorageError(
                    f"{self._where} changed while it was read: it had {self._total_bytes} bytes "
                    f"and now has {'fewer' if not chunk else 'more'}; start again"
                )
            self._sha256.update(chunk)
            self._buffer.append((self._end, chunk))
            self._end += len(chunk)
