"""Tar headers read by hand: strict, because a damaged shard must never look like a short one.

The usual readers stop without a word at the first header they cannot read; half a shard is then
missing and nobody knows. Here every header's checksum is checked, every member must be complete,
and an archive must end in its end mark (a block of zeros) with nothing but zeros after it.

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
"""Most bytes of a long-name or pax header; real ones have some hundred."""
_SEARCH_BYTES = 1 << 20


class TarMember(NamedTuple):
    """One file of an archive; positions are bytes from the archive's start."""

    name: str
    start: int
    """Its first header, extended headers included."""
    data: int
    """Its first byte of content."""
    size: int
    end: int
    """After its content and the padding to a whole block."""


class Source(Protocol):
    """Access to bytes; `walk` never asks for what lies before the last member that it gave."""

    def __call__(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer only at the end."""


def walk(read: Source, total_bytes: int, where: str, *, start: int = 0) -> Iterator[TarMember]:
    """Every regular file of a whole archive, in order.

    Args:
        read: Gives its bytes.
        total_bytes: Its length.
        where: Its name, for messages.
        start: Where to begin: at a header.

    Raises:
        DataError: A header is damaged, a member or the end mark is missing (slug `bad-tar` or
            `truncated`), or a member is neither a file nor a folder.
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
        f"{where} ends after {total_bytes} bytes without the end mark of a tar archive: it was cut off; "
        f"copy or write it again",
        slug="truncated",
    )


def find_header(read: Source, start: int, total_bytes: int) -> int:
    """First byte at or after `start` where a whole, undamaged header of a member lies; or
    `total_bytes`.

    How a reader goes on after damage. Only headers with the mark of ustar, GNU or pax are
    recognized.
    """
    for base in range(start, total_bytes, _SEARCH_BYTES):
        piece = read(base, _SEARCH_BYTES)
        found = piece.find(b"ustar")
        while found >= 0:
            begin = found - 257
            if begin >= 0 and begin % BLOCK == 0 and _is_header(piece[begin : begin + BLOCK]):
                return base + begin
            found = piece.find(b"ustar", found + 1)
    return total_bytes


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, as WebDataset has them: `a/b.c.jpg` is `("a/b", "c.jpg")`.

    The extension is in lower case. A name without one gives `("", "")` and belongs to no sample,
    and so does WebDataset's own `__name__` of shards.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension:
        return "", ""
    if name.startswith("__") and _is_meta(name):
        return "", ""
    return folder + slash + stem, extension.lower()


def _is_meta(name: str) -> bool:
    """Whether WebDataset passes a name over: its first part is `__..__`."""
    first = name.partition("/")[0]
    return len(first) >= 4 and first.endswith("__")


def _next_member(
    read: Source, header: bytes, start: int, total_bytes: int, where: str
) -> TarMember:
    """The member whose headers begin at `start`; its name is empty if it is a folder."""
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
                f"{total_bytes - position} are left: the archive was cut off; copy or write it again",
                slug="truncated",
            )
        if kind in b"Lxg":
            if size > _MAX_EXTRA_BYTES:
                raise DataError(
                    f"{where}: the extended header at byte {position} has {size} bytes",
                    slug="bad-tar",
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
            continue
        if kind not in b"0\x0075":
            raise DataError(
                f"{where}: the member at byte {position} is a link or device (type {kind!r}), not a file; "
                f"write the shard with plain files",
                slug="bad-tar",
            )
        name = long_name or _header_name(header)
        is_folder = kind == b"5" or name.endswith("/")
        return TarMember("" if is_folder else name, start, data, size, end)


def _check_header(header: bytes, position: int, where: str) -> None:
    if len(header) < BLOCK:
        raise DataError(f"{where} was cut off inside a header at byte {position}", slug="truncated")
    found, expected = _checksum(header), _number(header[148:156], position, where)
    if found != expected:
        raise DataError(
            f"{where}: the tar header at byte {position} is damaged (its bytes sum to {found}, it says "
            f"{expected}); copy or write the shard again",
            slug="bad-tar",
        )


def _checksum(header: bytes) -> int:
    """Sum of a header's bytes, the checksum's own eight counted as blanks.

    The lower half of an Adler-32 is one more than the sum modulo 65521, which the sum of 256 bytes
    never reaches: the same number as `sum(header)` in a tenth of its time.
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
    """An octal field, or GNU's binary form for members of 8 GiB and more."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():  # int() would take signs and underscores too
        raise DataError(
            f"{where}: at byte {position} there is no tar header, but other bytes", slug="bad-tar"
        )
    try:
        return int(digits, 8)
    except ValueError:
        raise DataError(
            f"{where}: at byte {position} there is no tar header, but other bytes", slug="bad-tar"
        ) from None


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    # Old GNU archives keep times where ustar keeps the folder part of a long name.
    prefix = _text(header[345:500]) if header[345] and header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    """A name up to its NUL; bytes that are not UTF-8 are written as `\\xff`, so that it can be
    shown."""
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax_records(data: bytes, position: int, where: str) -> dict[str, str]:
    """`length key=value\\n` records, where length counts the whole record."""
    records: dict[str, str] = {}
    text, start = data.rstrip(b"\0"), 0
    while start < len(text):
        blank = text.find(b" ", start, start + 9)
        digits = text[start : max(blank, start)]
        end = start + int(digits) if digits.isdigit() else start
        key, equals, value = text[blank + 1 : max(end - 1, blank + 1)].partition(b"=")
        # Beyond the blank, or the next record would begin before this one.
        if not equals or not start < blank < end <= len(text) or text[end - 1] != 0x0A:
            raise DataError(
                f"{where}: the extended header at byte {position} is damaged", slug="bad-tar"
            )
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        start = end
    size = records.get("size", "0")
    if not size.isascii() or not size.isdigit() or len(size) > 18:
        raise DataError(
            f"{where}: the extended header at byte {position} has a damaged size", slug="bad-tar"
        )
    return records


def _check_rest_is_zero(read: Source, position: int, total_bytes: int, where: str) -> None:
    """Zeros in the middle of an archive would hide all that follows from other readers."""
    step = 1 << 20
    for offset in range(position, total_bytes, step):
        if read(offset, min(step, total_bytes - offset)).strip(b"\0"):
            raise DataError(
                f"{where}: an end mark at byte {position}, but there is data after it: part of the archive "
                f"was overwritten with zeros, or two archives were joined; write the shard again",
                slug="bad-tar",
            )
