"""A shard with its index at hand, and the way from a sample's bytes to its files."""

from __future__ import annotations

import os
from zlib import crc32

from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.shard_index import ShardIndex


class OpenShard:
    """A shard whose index is at hand, and its file if it has one here."""

    __slots__ = (
        "__weakref__",
        "damaged_copy",
        "entry",
        "fd",
        "index",
        "is_copy",
        "name",
        "rows",
        "url",
    )

    def __init__(
        self, entry: ShardEntry, url: str, index: ShardIndex, fd: int, *, is_copy: bool
    ) -> None:
        self.entry, self.name, self.url, self.index = entry, entry.name, url, index
        self.fd = fd
        """Open for `os.pread`; -1 while there is no file here."""
        self.is_copy = is_copy
        """Whether the file is (or would be) a copy of a remote shard."""
        self.damaged_copy = False
        """Whether a sample of the copy was not what it should be."""
        self.rows = _rows(index)

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def into_memory(self) -> None:
        """Close the file, and hold the index without one (a mapped file counts as open)."""
        self.close()
        self.index = ShardIndex.from_bytes(self.index.to_bytes(), self.name)
        self.rows = _rows(self.index)

    def read(self, i: int) -> bytes:
        """The bytes of sample `i` from the file; fewer where it ends before.

        Raises:
            OSError: The file cannot be read.
        """
        offset, count = self.rows[0][i], self.rows[1][i]
        data = os.pread(self.fd, count, offset)
        while len(data) < count and (
            more := os.pread(self.fd, count - len(data), offset + len(data))
        ):
            data += more  # one call gives at most 2 GiB, and network file systems may give less
        return data


def cut_up(shard: OpenShard, i: int, data: bytes) -> RawSample:
    """The files of sample `i`; `data` is its whole extent, with the right checksum."""
    _, _, _, key_ends, key_text, ends, extensions, starts, sizes = shard.rows
    names, rows = shard.index.extensions, slice(ends[i - 1] if i else 0, ends[i])
    members = {}
    for extension, start, size in zip(extensions[rows], starts[rows], sizes[rows], strict=True):
        members[names[extension]] = data[start : start + size]
    key = bytes(key_text[key_ends[i - 1] if i else 0 : key_ends[i]])
    return RawSample(shard.name, key.decode("utf-8", "backslashreplace"), members)


def damaged(shard: OpenShard, i: int, data: bytes) -> SampleProblem:
    """What is wrong with `data`, which should be sample `i`."""
    offset, count, expected = (row[i] for row in shard.rows[:3])
    if len(data) < count:
        return problem(shard, i, "truncated", f"{len(data)} of {count} bytes at byte {offset}")
    found = f"CRC-32 {crc32(data):08x} at byte {offset}, but the index expects {expected:08x}"
    return problem(shard, i, "crc-mismatch", found)


def problem(shard: OpenShard, i: int, reason: str, detail: str) -> SampleProblem:
    """Sample `i` as one that cannot be used."""
    return SampleProblem(shard.name, shard.index.key(i), reason, detail)


def _rows(index: ShardIndex) -> tuple[memoryview, ...]:
    """Columns of an index: views of memory give Python's numbers several times faster than arrays
    do."""
    columns = index.columns
    return tuple(
        columns[name].data
        for name in (
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
    )
