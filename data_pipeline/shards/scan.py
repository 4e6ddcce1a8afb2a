"""One pass over a shard, front to back, that learns all there is to know: its index and its
SHA-256.

The shard comes as a stream of pieces, so it may lie in a store and be larger than memory. A damaged
one is an error; with `salvage` the samples that can still be read are kept, and what cannot is
said.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.shards.pieces import opened
from data_pipeline.shards.shard_index import Member, SampleRow, ShardIndex
from data_pipeline.shards.tar import BLOCK, TarMember, find_header, split_name, walk

_KEPT_BYTES = 4 << 20
"""How far the walk may look back: much more than a member's headers take."""
_TOLD = 10
"""Pieces of damage that are told one by one."""


def index_shard(path: str | os.PathLike[str], *, salvage: bool = False) -> ShardIndex:
    """The index of a local shard.

    Raises:
        DataError: As for `scan`.
        StorageError: The file cannot be read, or changed meanwhile.
    """
    where = os.fspath(path)
    with opened(where, timeout_seconds=0) as shard:
        return scan(shard.pieces, shard.total_bytes, where, salvage=salvage)


def scan(
    pieces: Iterable[bytes], total_bytes: int, where: str, *, salvage: bool = False, **notes: str
) -> ShardIndex:
    """Walk a shard from end to end and note where its samples lie.

    A shard may hold no samples at all, if it holds no other files either.

    Args:
        pieces: Its bytes, in order.
        total_bytes: How many there will be.
        where: Its address, for messages.
        salvage: Keep what can be read of a damaged shard; the index says in `damage` what is lost.
        notes: For the index: `etag`, `made_from`.

    Raises:
        DataError: The archive is damaged or cut off, two samples share a key (or one sample's files
            are not next to each other), or it holds files but no samples.
        StorageError: More or fewer bytes came than were announced.
    """
    stream = _Stream(pieces, total_bytes, where)
    samples = _Samples(stream, where, strict=not salvage)
    position, damage, was_cut = 0, list[str](), False
    while position < total_bytes or not damage:
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
            damage.append(str(error).removeprefix(where).lstrip(": "))
            samples.interrupt()
            if error.slug == "truncated":
                was_cut = True
                break
            position = find_header(stream.read, max(position + BLOCK, stream.first), total_bytes)
    rows, left_out = samples.finish()
    if left_out:
        damage = [
            *damage[:_TOLD],
            f"left out the samples {_first_of(list(map(repr, left_out)), ', ')}",
        ]
    if was_cut:
        damage.append("what came after that is not in the file, and nobody can say how much it was")
    return ShardIndex.build(
        rows,
        shard_bytes=total_bytes,
        sha256=stream.sha256(),
        damage=_first_of(damage, "; "),
        **notes,
    )


def _first_of(texts: list[str], separator: str) -> str:
    more = f"{separator}and {len(texts) - _TOLD - 1} more" if len(texts) > _TOLD + 1 else ""
    return separator.join(texts[: _TOLD + 1]) + more


class _Stream:
    """The last few pieces of a stream, by position; hashes what passes."""

    def __init__(self, pieces: Iterable[bytes], total_bytes: int, where: str) -> None:
        self._pieces: Iterator[bytes] = iter(pieces)
        self._total, self._where = total_bytes, where
        self._kept: deque[tuple[int, bytes]] = deque()
        self._end = 0
        self._sha256 = hashlib.sha256()

    @property
    def first(self) -> int:
        """The first header that could still be read."""
        return -(-(self._kept[0][0] if self._kept else self._end) // BLOCK) * BLOCK

    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`, fewer only at the end; see `tar.Source`."""
        end = min(offset + count, self._total)
        self._load(end, keep_from=offset - _KEPT_BYTES)
        start, last = self._kept[-1] if self._kept else (0, b"")
        if offset >= start:  # nearly always
            return last[offset - start : end - start]
        return b"".join(self._parts(offset, end))

    def crc32(self, start: int, end: int, value: int) -> int:
        """`zlib.crc32` of the bytes from `start` to `end`, going on from `value`."""
        while start < end:
            self._load(min(start + 1, end), keep_from=start)
            for part in self._parts(start, min(end, self._end)):
                value = zlib.crc32(part, value)
                start += len(part)
        return value

    def sha256(self) -> str:
        """Of the whole stream, which is read to its end."""
        self._load(self._total, keep_from=self._total)
        if next(self._pieces, b""):
            raise StorageError(f"{self._where} became longer while it was read; start again")
        return self._sha256.hexdigest()

    def _parts(self, start: int, end: int) -> Iterator[memoryview]:
        if not self._kept or start < self._kept[0][0]:
            raise DataError(
                f"{self._where}: the headers before byte {end} are too long", slug="bad-tar"
            )
        for base, piece in tuple(self._kept):
            if base < end and start < base + len(piece):
                yield memoryview(piece)[max(0, start - base) : end - base]

    def _load(self, end: int, keep_from: int) -> None:
        """Have the bytes up to `end`; those before `keep_from` are not needed any more."""
        while self._end < end:
            while self._kept and self._kept[0][0] + len(self._kept[0][1]) <= keep_from:
                self._kept.popleft()
            piece = next(self._pieces, b"")
            if not piece or self._end + len(piece) > self._total:
                raise StorageError(
                    f"{self._where} changed while it was read: it had {self._total} bytes and now has "
                    f"{'fewer' if not piece else 'more'}; start again"
                )
            self._sha256.update(piece)
            self._kept.append((self._end, piece))
            self._end += len(piece)


class _Samples:
    """Neighboring members with the same key; members without an extension belong to none."""

    def __init__(self, stream: _Stream, where: str, *, strict: bool) -> None:
        self._stream, self._where, self._strict = stream, where, strict
        self._rows: list[SampleRow] = []
        self._at_damage: set[int] = set()
        """Rows next to damage, which may lack files."""
        self._seen: set[str] = set()
        self._twice: set[str] = set()
        self._strangers = 0
        self._key, self._members = "", list[Member]()
        self._offset = self._end = self._running_end = 0
        self._crc = self._running = 0
        self._interrupted = False

    def add(self, member: TarMember) -> None:
        """Take the next member."""
        key, extension = split_name(member.name)
        if not key:
            self._strangers += 1
            return
        if key != self._key:
            self._close()
            self._key, self._offset, self._end, self._crc = key, member.start, member.start, 0
            if self._interrupted:
                self._at_damage.add(len(self._rows))
                self._interrupted = False
        elif any(known.extension == extension for known in self._members):
            self._refuse_twice(
                f"sample {key!r} has two files with the same extension; write it again"
            )
        # From the sample's last file on: what lies between belongs to the bytes that are read.
        self._crc = self._stream.crc32(self._end, member.end, self._crc)
        self._end = member.end
        self._members.append(Member(extension, member.data - self._offset, member.size))

    def interrupt(self) -> None:
        """The walk ends here, or goes on elsewhere."""
        if self._key:
            self._at_damage.add(len(self._rows))
        self._close()
        self._interrupted = True

    def finish(self) -> tuple[list[SampleRow], list[str]]:
        """All samples, and the keys of those that were left out."""
        self._close()
        if not self._rows and self._strangers and self._strict:
            raise DataError(
                f"{self._where} holds {self._strangers} files but no samples: a sample is a group of files "
                f"with one name and different extensions, e.g. 000.jpg and 000.txt"
            )
        return self._whole()

    def _close(self) -> None:
        if not self._key:
            return
        key = self._key
        if key in self._seen:
            self._refuse_twice(
                f"the key {key!r} comes twice: either two samples share it, or the files of one sample are "
                f"not next to each other; write the shard with its files sorted by name"
            )
        self._seen.add(key)
        self._rows.append(
            SampleRow(key, self._offset, self._end - self._offset, self._crc, tuple(self._members))
        )
        self._key, self._members = "", []

    def _refuse_twice(self, problem: str) -> None:
        if self._strict:
            raise DataError(f"{self._where}: {problem}")
        self._twice.add(self._key)

    def _whole(self) -> tuple[list[SampleRow], list[str]]:
        """Without samples of doubtful keys, and those next to damage that lack what the others
        have."""
        kinds = [frozenset(member.extension for member in row.members) for row in self._rows]
        whole = Counter(kind for number, kind in enumerate(kinds) if number not in self._at_damage)
        usual = whole.most_common(1)[0][0] if whole else max(kinds, key=len, default=frozenset())
        rows, left_out = [], []
        for number, row in enumerate(self._rows):
            partial = number in self._at_damage and not usual <= kinds[number]
            if partial or row.key in self._twice:
                left_out.append(row.key)
            else:
                rows.append(row)
        return rows, left_out
