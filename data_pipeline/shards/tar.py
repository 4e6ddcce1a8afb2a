"""A strict reader of tar headers that reports truncated and corrupt archives.

Common readers stop without an error at the first header that they cannot read, and the rest of the
shard is silently lost. Here every header's checksum is checked, every member must be complete, and
an archive must end with an end-of-archive marker (a block of zeros) and only zeros after it.

Formats: v7, ustar, GNU long names, and pax extended headers (path and size).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from data_pipeline.common.errors import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTRA_BYTES = 1 << 20
"""Maximum size of a long-name or pax header; typical ones have a few hundred bytes."""
_SEARCH_BYTES = 1 << 20
_MAGIC_OFFSET = 257


class TarMember(NamedTuple):
    """One file of an archive; offsets are from the start of the archive."""

    name: str
    start: int
    """Offset of its first header, including extended headers."""
    data: int
    """Offset of its contents."""
    size: int
    end: int
    """End of its contents and their padding to a full block."""


class Source(Protocol):
    """Reads bytes of an archive; `walk` never reads before the last member that it yielded."""

    def __call__(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer only at the end of the archive."""


def walk(read: Source, total_bytes: int, where: str, *, start: int = 0) -> Iterator[TarMember]:
    """Iterate over the regular files of an archive, in order.

    Args:
        read: Reads its bytes.
        total_bytes: Its size.
        where: Its name, for messages.
        start: Offset of the header to start from.

    Raises:
        DataError: A header is corrupt, a member or the end-of-archive marker is missing (slug
            `corrupt-tar` or `truncated`), or a member is neither a file nor a folder.
    """
    position = start
    while position < total_bytes:
        header = read(position, BLOCK)
        if header == _ZEROS:
            _check_rest_is_zero(read, position, total_bytes, where)
            return
        member = _next_member(read, header, position, total_bytes, where)
        position = member.end
        if member.name:
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
            if is_aligned and _is_header(chunk[header : header + BLOCK]):
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
    """The member whose headers start at `start`; its name is empty if it is a folder."""
    position, long_name, long_size = start, "", -1
    while True:
        _check_header(header, position, where)
        kind, size = header[156:157], _number(header[124:136], position, where)
        if long_size >= 0 and kind not in b"xgL":
            size = long_size
        data = position + BLOCK
        end = data + (size + BLOCK - 1) // BLOCK * BLOCK
        if end > total_bytes:
            raise DataError(
                f"{where}: the member at byte {position} needs {end - position} bytes, but only "
                f"{total_bytes - position} are left: the archive was truncated; copy or write it "
                f"again",
                slug="truncated",
            )
        if kind not in b"Lxg":
            break
        if size > _MAX_EXTRA_BYTES:
            raise DataError(
                f"{where}: the extended header at byte {position} has {size} bytes, more than "
                f"{_MAX_EXTRA_BYTES}",
                slug="corrupt-tar",
            )
        extra = read(data, size)
        if kind == b"L":
            long_name = _text(extra)
        elif kind == b"x":
            records = _pax_records(extra, position, where)
            long_name = records.get("path", long_name)
            long_size = int(records.get("size", long_size))
        position = end
        header = read(position, BLOCK)

    if kind not in b"0\x0075":
        raise DataError(
            f"{where}: the member at byte {position} is a link or device (type {kind!r}), not a "
            f"file; write the shard with regular files",
            slug="corrupt-tar",
        )
    name = long_name or _header_name(header)
    is_folder = kind == b"5" or name.endswith("/")
    return TarMember("" if is_folder else name, start, data, size, end)


def _check_header(header: bytes, position: int, where: str) -> None:
    if len(header) < BLOCK:
        raise DataError(
            f"{where} was truncated inside a header at byte {position}", slug="truncated"
        )
    actual, expected = _checksum(header), _number(header[148:156], position, where)
    if actual != expected:
        raise DataError(
            f"{where}: the tar header at byte {position} is corrupt (its checksum is {actual}, but "
            f"{expected} is stored); copy or write the shard again",
            slug="corrupt-tar",
        )


def _checksum(header: bytes) -> int:
    """Sum of the bytes of a header, with blanks in place of the checksum field.

    The lower half of an Adler-32 is one more than the sum modulo 65521, and a sum of 256 bytes is
    always smaller: this is `sum(header)` in a tenth of the time.
    """
    halves = (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2
    return halves - sum(header[148:156]) + 8 * 0x20


def _is_header(header: bytes) -> bool:
    try:
        _check_header(header, 0, "")
    except DataError:
        return False
    return True


def _number(field: bytes, position: int, where: str) -> int:
    """Value of an octal field, or of GNU's binary format for members of 8 GiB and more."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():  # int() also accepts signs and underscores
        raise DataError(
            f"{where}: there is no valid tar header at byte {position}", slug="corrupt-tar"
        )
    try:
        return int(digits, 8)
    except ValueError:
        raise DataError(
            f"{where}: there is no valid tar header at byte {position}", slug="corrupt-tar"
        ) from None


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    # Old GNU archives store times where ustar stores the folder of a long name.
    prefix = _text(header[345:500]) if header[345] and header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    r"""A name up to its NUL; bytes that are not UTF-8 are escaped as `\xff`."""
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax_records(data: bytes, position: int, where: str) -> dict[str, str]:
    r"""The `length key=value\n` records, where length counts the whole record."""
    records: dict[str, str] = {}
    text, start = data.rstrip(b"\0"), 0
    while start < len(text):
        blank = text.find(b" ", start, start + 9)
        digits = text[start : max(blank, start)]
        end = start + int(digits) if digits.isdigit() else start
        key, equals, value = text[blank + 1 : max(end - 1, blank + 1)].partition(b"=")
        # The end must be after the blank, or the next record would start before this one.
        if not equals or not start < blank < end <= len(text) or text[end - 1] != 0x0A:
            raise DataError(
                f"{where}: the extended header at byte {position} is corrupt", slug="corrupt-tar"
            )
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        start = end

    size = records.get("size", "0")
    if not size.isascii() or not size.isdigit() or len(size) > 18:
        raise DataError(
            f"{where}: the extended header at byte {position} has an invalid size",
            slug="corrupt-tar",
        )
    return records


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
