"""A strict reader of tar headers that reports truncated and corrupt archives.

Common readers stop without an error at the first header that they cannot read, and the rest of the
shard is silently lost. Here every header's checksum is checked, every member must be complete, and
an archive must end with an end-of-archive marker (a block of zeros) and only zeros after it.

Formats: v7, ustar, GNU long names, and pax extended headers (path and size). Sparse files and links
are recognized, but their contents are not in one piece at their place in the archive, so a sample
cannot have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from data_pipeline.common.errors import DataError
from data_pipeline.shards.compression import check_not_compressed
from data_pipeline.shards.tar_headers import (
    BLOCK,
    check_header,
    header_name,
    header_text,
    is_header,
    number,
    pax_records,
)

__all__ = ["BLOCK", "FILE", "FOLDER", "LABEL", "TarMember", "find_header", "split_name", "walk"]

FILE, FOLDER, LABEL = "file", "folder", "volume label"
_KINDS = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": FOLDER,
    b"6": "named pipe",
    b"D": FOLDER,
    b"M": "part of a file in several archives",
    b"S": "sparse file",
    b"V": LABEL,
}
"""Kinds of members by the type in their header."""
_EXTENDED = b"LKxXg"
"""Types of headers that describe the next member: GNU's long name and long target of a link, pax
for one member (POSIX and Solaris) and pax for all members."""
_WITHOUT_CONTENTS = b"123456"
"""Types whose size is not that of contents after the header."""
_SPARSE_PREFIX = "GNU.sparse."
_ZEROS = bytes(BLOCK)
_MAX_EXTRA_BYTES = 1 << 20
"""Maximum size of a long-name or pax header; typical ones have a few hundred bytes."""
_SEARCH_BYTES = 1 << 20
_MAGIC_OFFSET = 257


class TarMember(NamedTuple):
    """One member of an archive; offsets are from the start of the archive."""

    name: str
    start: int
    """Offset of its first header, including extended headers."""
    data: int
    """Offset of its contents."""
    size: int
    end: int
    """End of its contents and their padding to a full block."""
    kind: str = FILE
    """`FILE`, `FOLDER`, `LABEL`, or what else it is: `sparse file`, `hard link` ..."""
    target: str = ""
    """Of a link."""


class Source(Protocol):
    """Reads bytes of an archive; `walk` never reads before the last member that it yielded."""

    def __call__(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer only at the end of the archive."""


def walk(read: Source, total_bytes: int, where: str, *, start: int = 0) -> Iterator[TarMember]:
    """Iterate over the members of an archive, in order.

    Args:
        read: Reads its bytes.
        total_bytes: Its size.
        where: Its name, for messages.
        start: Offset of the header to start from.

    Raises:
        DataError: A header is corrupt, a member or the end-of-archive marker is missing (slug
            `corrupt-tar` or `truncated`), or the archive is compressed (slug `unsupported-tar`).
    """
    position = start
    while position < total_bytes:
        header = read(position, BLOCK)
        if position == 0 and not is_header(header):
            check_not_compressed(header, where)
        if header == _ZEROS:
            _check_rest_is_zero(read, position, total_bytes, where)
            return
        member = _next_member(read, header, position, total_bytes, where)
        position = member.end
        yield member
    raise DataError(
        f"{where} ends after {total_bytes} bytes without an end-of-archive marker: it was "
        f"truncated; copy or write it again",
        slug="truncated",
    )


def find_header(read: Source, start: int, total_bytes: int) -> int:
    """Offset of the next valid header at or after `start`; `total_bytes` if there is none.

    Used to continue after corruption. Only headers with the magic of ustar, GNU or pax are
    recognized.
    """
    for base in range(start, total_bytes, _SEARCH_BYTES):
        chunk = read(base, _SEARCH_BYTES)
        magic = chunk.find(b"ustar")
        while magic >= 0:
            header = magic - _MAGIC_OFFSET
            is_aligned = header >= 0 and header % BLOCK == 0
            if is_aligned and is_header(chunk[header : header + BLOCK]):
                return base + header
            magic = chunk.find(b"ustar", magic + 1)
    return total_bytes


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, as in WebDataset: `a/b.c.jpg` is `("a/b", "c.jpg")`.

    The extension is in lower case. A name without one gives `("", "")` and belongs to no sample, as
    do the names that WebDataset reserves (`__name__`).
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension:
        return "", ""
    if name.startswith("__") and _is_meta(name):
        return "", ""
    return folder + slash + stem, extension.lower()


def _is_meta(name: str) -> bool:
    """Whether WebDataset ignores a name: its first component is `__..__`."""
    first = name.partition("/")[0]
    return len(first) >= 4 and first.endswith("__")


def _next_member(
    read: Source, header: bytes, start: int, total_bytes: int, where: str
) -> TarMember:
    """The member whose headers start at `start`."""
    position, long_name, long_target = start, "", ""
    records: dict[str, str] = {}
    while True:
        check_header(header, position, where)
        kind, size = header[156:157], number(header[124:136], position, where)
        if kind not in _EXTENDED:
            break
        end = _end_of(position + BLOCK, size, position, total_bytes, where)
        if size > _MAX_EXTRA_BYTES:
            raise DataError(
                f"{where}: the extended header at byte {position} has {size} bytes, more than "
                f"{_MAX_EXTRA_BYTES}",
                slug="corrupt-tar",
            )
        extra = read(position + BLOCK, size)
        if kind == b"L":
            long_name = header_text(extra)
        elif kind == b"K":
            long_target = header_text(extra)
        elif kind != b"g":
            records |= pax_records(extra, position, where)
        elif changed := _member_records(pax_records(extra, position, where)):
            raise DataError(
                f"{where}: the extended header at byte {position} sets {changed[0]!r} for all "
                f"members, which is not supported; write the shard with another program",
                slug="unsupported-tar",
            )
        position = end
        header = read(position, BLOCK)

    name = records.get("path") or long_name or header_name(header)
    what = _KINDS.get(kind, f"member of the unknown type {kind!r}")
    if what == FILE and name.endswith("/"):
        what = FOLDER
    if records and any(key.startswith(_SPARSE_PREFIX) for key in records):
        what, name = "sparse file", records.get("GNU.sparse.name", name)
    size = 0 if kind in _WITHOUT_CONTENTS else int(records.get("size", size))
    data = _after_sparse_map(read, header, position) if kind == b"S" else position + BLOCK
    end = _end_of(data, size, position, total_bytes, where)
    if kind not in b"12":
        return TarMember(name, start, data, size, end, what)
    target = records.get("linkpath") or long_target or header_text(header[157:257])
    return TarMember(name, start, data, size, end, what, target)


def _member_records(records: dict[str, str]) -> list[str]:
    """The keys of pax records that change how a member is read."""
    keys = ("path", "linkpath", "size")
    return [key for key in records if key in keys or key.startswith(_SPARSE_PREFIX)]


def _end_of(data: int, size: int, position: int, total_bytes: int, where: str) -> int:
    """End of contents of `size` bytes from `data`, padded to a full block."""
    end = data + (size + BLOCK - 1) // BLOCK * BLOCK
    if end > total_bytes:
        raise DataError(
            f"{where}: the member at byte {position} needs {end - position} bytes, but only "
            f"{total_bytes - position} are left: the archive was truncated; copy or write it "
            f"again",
            slug="truncated",
        )
    return end


def _after_sparse_map(read: Source, header: bytes, position: int) -> int:
    """Start of the contents of an old GNU sparse file: its map may continue after the header."""
    data, is_continued = position + BLOCK, header[482]
    while is_continued:
        block = read(data, BLOCK)
        data += BLOCK
        is_continued = len(block) == BLOCK and block[504]
    return data


def _check_rest_is_zero(read: Source, position: int, total_bytes: int, where: str) -> None:
    """Check that only zeros follow the end-of-archive marker: other readers ignore the rest."""
    step = 1 << 20
    for offset in range(position, total_bytes, step):
        if read(offset, min(step, total_bytes - offset)).strip(b"\0"):
            raise DataError(
                f"{where}: there is data after the end-of-archive marker at byte {position}: part "
                f"of the archive was overwritten with zeros, or two archives were joined; write "
                f"the shard again",
                slug="corrupt-tar",
            )
