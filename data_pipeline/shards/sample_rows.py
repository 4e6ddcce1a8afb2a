"""Groups the members of a shard into samples: neighboring files with the same key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from data_pipeline.common.errors import DataError
from data_pipeline.shards.shard_index import Member, SampleRow
from data_pipeline.shards.tar import TarMember, split_name

Crc32 = Callable[[int, int, int], int]
"""`crc32(start, end, value)`: continues the CRC-32 `value` with the shard's bytes in a range."""


class SampleRows:
    """Collects samples; files without an extension belong to none."""

    def __init__(self, crc32: Crc32, where: str, *, strict: bool) -> None:
        """Start with no samples.

        Args:
            crc32: Computes checksums of the shard's bytes.
            where: Address of the shard, for messages.
            strict: Raise errors; otherwise skip invalid samples.
        """
        self._crc32, self._where, self._strict = crc32, where, strict
        self._rows: list[SampleRow] = []
        self._next_to_corruption: set[int] = set()
        """Indices of rows next to corruption, which may lack files."""
        self._keys: set[str] = set()
        self._duplicate_keys: set[str] = set()
        self._ignored_files = 0

        self._key, self._members = "", list[Member]()
        self._offset = self._end = self._crc = 0
        self._interrupted = False

    def add(self, member: TarMember) -> None:
        """Add the next member."""
        key, extension = split_name(member.name)
        if not key:
            self._ignored_files += 1
            return
        if key != self._key:
            self._close_sample()
            self._key, self._offset, self._end, self._crc = key, member.start, member.start, 0
            if self._interrupted:
                self._next_to_corruption.add(len(self._rows))
                self._interrupted = False
        elif any(other.extension == extension for other in self._members):
            self._handle_duplicate(
                f"sample {key!r} has two files with the same extension; write it again"
            )
        # From the end of the previous file: what is between files is part of the sample's extent.
        self._crc = self._crc32(self._end, member.end, self._crc)
        self._end = member.end
        self._members.append(Member(extension, member.data - self._offset, member.size))

    def interrupt(self) -> None:
        """Mark that the walk stops here or continues after a corrupt range."""
        if self._key:
            self._next_to_corruption.add(len(self._rows))
        self._close_sample()
        self._interrupted = True

    def finish(self) -> tuple[list[SampleRow], list[str]]:
        """All samples, and the keys of those that were skipped.

        Raises:
            DataError: There are files but no samples.
        """
        self._close_sample()
        if not self._rows and self._ignored_files and self._strict:
            raise DataError(
                f"{self._where} has {self._ignored_files} files but no samples: a sample is a "
                f"group of files with one name and different extensions, e.g. 000.jpg and 000.txt"
            )
        return self._complete_rows()

    def _close_sample(self) -> None:
        if not self._key:
            return
        key = self._key
        if key in self._keys:
            self._handle_duplicate(
                f"the key {key!r} occurs twice: either two samples have the same key, or the files "
                f"of one sample are not next to each other; write the shard with its files sorted "
                f"by name"
            )
        self._keys.add(key)
        extent = self._end - self._offset
        self._rows.append(SampleRow(key, self._offset, extent, self._crc, tuple(self._members)))
        self._key, self._members = "", []

    def _handle_duplicate(self, problem: str) -> None:
        """Raise if strict; otherwise mark the current key, so that `finish` skips it."""
        if self._strict:
            raise DataError(f"{self._where}: {problem}")
        self._duplicate_keys.add(self._key)

    def _complete_rows(self) -> tuple[list[SampleRow], list[str]]:
        """The rows to keep, and the keys of the skipped ones.

        Skipped are samples with duplicate keys, and samples next to corruption that lack a file
        extension which most other samples have.
        """
        extensions = [frozenset(member.extension for member in row.members) for row in self._rows]
        counts = Counter(
            kinds for i, kinds in enumerate(extensions) if i not in self._next_to_corruption
        )
        if counts:
            usual = counts.most_common(1)[0][0]
        else:
            usual = max(extensions, key=len, default=frozenset())

        rows, skipped = [], []
        for i, row in enumerate(self._rows):
            is_partial = i in self._next_to_corruption and not usual <= extensions[i]
            if is_partial or row.key in self._duplicate_keys:
                skipped.append(row.key)
            else:
                rows.append(row)
        return rows, skipped
