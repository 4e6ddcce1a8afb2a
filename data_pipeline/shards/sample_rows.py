"""Groups the members of a shard into samples: neighboring files with the same key.

Every member is part of a sample, ignored by a rule (`ignored`), or of a sample that is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from data_pipeline.common.errors import DataError
from data_pipeline.common.tables import counted, join_counts
from data_pipeline.shards.shard_index import Member, SampleRow
from data_pipeline.shards.tar import FILE, FOLDER, LABEL, TarMember, split_name

Crc32 = Callable[[int, int, int], int]
"""`crc32(start, end, value)`: continues the CRC-32 `value` with the shard's bytes in a range."""


class LostSamples(NamedTuple):
    """Samples that were found but cannot be used."""

    samples: int
    files: int
    keys: tuple[str, ...]
    """Unique, in the order of the shard."""
    reasons: dict[str, int]
    """Number of samples or files by what is wrong with them."""


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
        self._unusable_keys: set[str] = set()
        self._reasons: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        """Number of members that belong to no sample, by rule."""

        self._key, self._members = "", list[Member]()
        self._offset = self._end = self._crc = 0
        self._interrupted = False

    def add(self, member: TarMember) -> None:
        """Add the next member.

        Raises:
            DataError: It is neither a file nor a folder (slug `unsupported-tar`), or its name
                occurs twice in a sample; only if strict.
        """
        key, extension = split_name(member.name)
        if not key or member.kind in (FOLDER, LABEL):
            self.ignored[ignoring_rule(member)] += 1
            return
        if key != self._key:
            self._close_sample()
            self._key, self._offset, self._end, self._crc = key, member.start, member.start, 0
            if self._interrupted:
                self._next_to_corruption.add(len(self._rows))
                self._interrupted = False
        elif any(other.extension == extension for other in self._members):
            self._handle_problem(
                "two files with the same extension",
                f"sample {key!r} has two files with the same extension, the second is "
                f"{member.name!r}; write it again",
            )
        if member.kind != FILE:
            self._handle_problem(member.kind, _describe(member), slug="unsupported-tar")
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

    def finish(self) -> tuple[list[SampleRow], LostSamples]:
        """All usable samples, and what is lost.

        Raises:
            DataError: There are files but no samples.
        """
        self._close_sample()
        files = sum(self.ignored.values()) - self.ignored[FOLDER] - self.ignored[LABEL]
        if not self._rows and files and self._strict:
            raise DataError(
                f"{self._where} has {counted(files, 'file')} but no samples "
                f"({join_counts(self.ignored)}): a sample is a group of files with one name and "
                f"different extensions, e.g. 000.jpg and 000.txt"
            )
        return self._complete_rows()

    def _close_sample(self) -> None:
        if not self._key:
            return
        key = self._key
        if key in self._keys:
            self._handle_problem(
                "key occurs twice",
                f"the key {key!r} occurs twice: either two samples have the same key, or the files "
                f"of one sample are not next to each other; write the shard with its files sorted "
                f"by name",
            )
        self._keys.add(key)
        extent = self._end - self._offset
        self._rows.append(SampleRow(key, self._offset, extent, self._crc, tuple(self._members)))
        self._key, self._members = "", []

    def _handle_problem(self, reason: str, problem: str, slug: str = "") -> None:
        """Raise if strict; otherwise mark the current key, so that `finish` skips it."""
        if self._strict:
            raise DataError(f"{self._where}: {problem}", slug=slug)
        self._unusable_keys.add(self._key)
        self._reasons[reason] += 1

    def _complete_rows(self) -> tuple[list[SampleRow], LostSamples]:
        """The rows to keep, and the others.

        Lost are samples with duplicate keys or unusable files, and samples next to corruption that
        lack a file extension which most other samples have.
        """
        extensions = [frozenset(member.extension for member in row.members) for row in self._rows]
        counts = Counter(
            kinds for i, kinds in enumerate(extensions) if i not in self._next_to_corruption
        )
        if counts:
            usual = counts.most_common(1)[0][0]
        else:
            usual = max(extensions, key=len, default=frozenset())

        rows, lost = [], []
        for i, row in enumerate(self._rows):
            if row.key in self._unusable_keys:
                lost.append(row)
            elif i in self._next_to_corruption and not usual <= extensions[i]:
                self._reasons["incomplete next to corruption"] += 1
                lost.append(row)
            else:
                rows.append(row)
        return rows, _count_lost(lost, self._reasons)


def ignoring_rule(member: TarMember) -> str:
    """By which rule a member belongs to no sample; empty if it belongs to one."""
    if member.kind in (FOLDER, LABEL):
        return member.kind
    if split_name(member.name)[0]:
        return ""
    base = member.name.rpartition("/")[2]
    if base.startswith("."):
        return "hidden file"
    return "reserved name" if base.partition(".")[2] else "no extension"


def _describe(member: TarMember) -> str:
    """Why a member cannot be used, and what to do."""
    target = f" to {member.target!r}" if member.target else ""
    if member.kind == "sparse file":
        remedy = (
            "write the archive again without sparse files: GNU tar without -S (--sparse), bsdtar "
            "(macOS) with --no-read-sparse"
        )
    elif "link" in member.kind:
        remedy = (
            "write the archive again with files instead of links: tar with --dereference "
            "--hard-dereference, or from a copy made with `cp -L`"
        )
    else:
        remedy = "write the archive again with regular files only"
    return f"the member {member.name!r} at byte {member.start} is a {member.kind}{target}; {remedy}"


def _count_lost(rows: list[SampleRow], reasons: Counter[str]) -> LostSamples:
    """Count samples, not rows: the files of one sample may be in several places.

    Rows with one key are parts of one sample unless an extension occurs several times in them.
    """
    extensions: dict[str, Counter[str]] = {}
    for row in rows:
        names: Iterable[str] = (member.extension for member in row.members)
        extensions.setdefault(row.key, Counter()).update(names)
    return LostSamples(
        samples=sum(max(counts.values()) for counts in extensions.values()),
        files=sum(len(row.members) for row in rows),
        keys=tuple(extensions),
        reasons=dict(reasons),
    )
