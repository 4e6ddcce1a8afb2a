"""One sample by number: a read of known length, its checksum, and the files in it.

The index says where a sample lies, so nothing is scanned and any sample costs the same. A sample that
does not have the checksum it was indexed with is a `DataError` with a slug: the batch goes on without
it and names it. Errors without a slug concern a whole shard and end training.
"""

from __future__ import annotations

import os
import zlib

from data_pipeline.common.errors import DataError
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample
from data_pipeline.shards.tar import members_of, split_name

MAX_SAMPLE_BYTES = 256 << 20
"""Largest sample that is read; a larger one would take the memory of the whole loader."""


class Reader:
    """Reads samples of a `ShardStore`."""

    def __init__(self, store: ShardStore, *, max_sample_bytes: int = MAX_SAMPLE_BYTES) -> None:
        self._store, self._max_bytes = store, max_sample_bytes

    def name(self, shard: int, index: int) -> tuple[str, str]:
        """Shard name and key of a sample, for reports; see `read` for errors."""
        found = self._store.open(shard)
        return found.name, found.index.keys[index]

    def read(self, shard: int, index: int) -> RawSample:
        """The files of one sample.

        Args:
            shard: Number of the shard in the store.
            index: Number of the sample in the shard.

        Raises:
            DataError: With slug `crc-mismatch`, `truncated`, `oversize` or `bad-tar`, this sample is
                damaged; without one, its shard is missing, unreadable or another than the manifest's.
        """
        found = self._store.open(shard)
        key = found.index.keys[index]
        offset, count = int(found.index.offsets[index]), int(found.index.extents[index])
        if count > self._max_bytes:
            raise DataError(f"the sample has {count} bytes, more than {self._max_bytes}", slug="oversize")
        try:
            extent = os.pread(found.fd, count, offset)
        except OSError as error:
            raise DataError(
                f"cannot read shard {found.path} at byte {offset}: {error.strerror}; check the disk or the "
                f"network file system"
            ) from error
        if len(extent) < count:
            raise DataError(f"{len(extent)} of {count} bytes at byte {offset}", slug="truncated")
        checksum = zlib.crc32(extent)
        if checksum != found.index.crc32[index]:
            raise DataError(
                f"CRC-32 {checksum:08x} at byte {offset}, but the index expects "
                f"{int(found.index.crc32[index]):08x}",
                slug="crc-mismatch",
            )
        members: dict[str, bytes] = {}
        for member in members_of(extent, found.path):
            member_key, extension = split_name(member.name)
            if member_key and member_key != key:
                raise DataError(f"a file of sample {member_key!r} lies in it", slug="bad-tar")
            if member_key:
                members[extension] = extent[member.data : member.data + member.size]
        return RawSample(found.name, key, members)
