"""An open shard: its index and, if it is on this machine, its file.

Training opens shards in `store.py`, the dataset commands in `preparing/shard_access.py`; samples of
both are verified and split here. Only `preparing/check.py` verifies samples itself, in chunks.
"""

from __future__ import annotations

import os
from zlib import crc32

from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.shard_index import ShardIndex

_COLUMN_NAMES = (
    "offsets",
    "extents",
    "crc32",
    "key_ends",
    "key_text",
    "member_ends",
    "member_extension",
    "member_start",
    "member_size",
)


class OpenShard:
    """A shard whose index is loaded; its file is open if it is on this machine.

    A sample is read in two steps, because its bytes may also come from a store:
    `shard.verify(i, shard.read(i))`.
    """

    __slots__ = (
        "__weakref__",
        "columns",
        "copy_is_corrupt",
        "entry",
        "fd",
        "index",
        "is_copy",
        "name",
        "url",
    )

    def __init__(
        self, entry: ShardEntry, url: str, index: ShardIndex, fd: int, *, is_copy: bool
    ) -> None:
        self.entry, self.name, self.url, self.index = entry, entry.name, url, index
        self.fd = fd
        """Open for `os.pread`; -1 if there is no file on this machine."""
        self.is_copy = is_copy
        """Whether the shard is remote, so that its file is a cached copy."""
        self.copy_is_corrupt = False
        """Whether a sample in the cached copy failed its checksum."""
        self.columns = _columns(index)
        """`_COLUMN_NAMES` of the index, in this order."""

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def detach_file(self) -> None:
        """Close the file, and replace the memory-mapped index (which counts as an open file) by a
        copy in memory."""
        self.close()
        self.index = ShardIndex.from_bytes(self.index.to_bytes(), self.name)
        self.columns = _columns(self.index)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self.fd).st_size

    def pread(self, count: int, offset: int) -> bytes:
        """Bytes of the file; fewer if it ends before.

        Raises:
            OSError: The file cannot be read.
        """
        data = b""
        # One call returns at most 2 GiB, and network file systems may return less.
        while len(data) < count and (
            more := os.pread(self.fd, count - len(data), offset + len(data))
        ):
            data += more
        return data

    def read(self, i: int) -> bytes:
        """The bytes of sample `i` from the file, as `pread`."""
        offset, count = self.columns[0][i], self.columns[1][i]
        data = os.pread(self.fd, count, offset)
        if len(data) < count:
            data += self.pread(count - len(data), offset + len(data))
        return data

    def verify(self, i: int, data: bytes) -> RawSample | SampleProblem:
        """Sample `i`, whose bytes are `data`; a problem if they are truncated or corrupt."""
        checksum, expected = crc32(data), self.columns[2][i]
        if checksum == expected:
            return self.split(i, data)
        offset, count = self.columns[0][i], self.columns[1][i]
        if len(data) < count:
            detail = f"{len(data)} of {count} bytes at byte {offset}"
            return self.problem(i, "truncated", detail)

        detail = f"CRC-32 {checksum:08x} at byte {offset}, but the index expects {expected:08x}"
        return self.problem(i, "crc-mismatch", detail)

    def split(self, i: int, data: bytes) -> RawSample:
        """The files of sample `i`; `data` is its whole extent, with a verified checksum."""
        _, _, _, key_ends, key_text, ends, extensions, starts, sizes = self.columns
        names, member_range = self.index.extensions, slice(ends[i - 1] if i else 0, ends[i])

        members = {}
        for extension, start, size in zip(
            extensions[member_range], starts[member_range], sizes[member_range], strict=True
        ):
            members[names[extension]] = data[start : start + size]

        key = bytes(key_text[key_ends[i - 1] if i else 0 : key_ends[i]])
        return RawSample(self.name, key.decode("utf-8", "backslashreplace"), members)

    def oversize_problem(self, i: int, max_bytes: int) -> SampleProblem | None:
        """The problem with sample `i` if it has more than `max_bytes`."""
        if self.columns[1][i] <= max_bytes:
            return None
        detail = f"the sample has {self.columns[1][i]} bytes, more than {max_bytes}"
        return self.problem(i, "oversize", detail)

    def problem(self, i: int, reason: str, detail: str) -> SampleProblem:
        """A problem of sample `i`."""
        return SampleProblem(self.name, self.index.key(i), reason, detail)


def _columns(index: ShardIndex) -> tuple[memoryview, ...]:
    """Columns of an index as memoryviews, whose items are several times faster to access than
    those of arrays."""
    return tuple(index.columns[name].data for name in _COLUMN_NAMES)
