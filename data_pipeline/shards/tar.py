"""Tar headers read by hand: strict, because a damaged shard must never look like a short one.

The usual readers stop without a word at the first header they cannot read; half a shard is then
missing and nobody knows. Here every header's checksum is checked, every member must be complete, and
an archive must end in its end mark (a block of zeros) with nothing but zeros after it.

Formats: ustar, GNU long names, and pax extended headers (path and size).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from data_pipeline.common.errors import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTRA_BYTES = 1 << 20
"""Most bytes of a long-name or pax header; real ones have some hundred."""


class TarMember(NamedTuple):
    """One file of an archive; positions are bytes from the archive's (or buffer's) start."""

    name: str
    start: int
    """Its first header, extended headers included."""
    data: int
    """Its first byte of content."""
    size: int
    end: int
    """After its content and the padding to a whole block."""


class Source(Protocol):
    """Random access to bytes."""

    def __call__(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer only at the end."""


def walk(read: Source, total_bytes: int, where: str) -> Iterator[TarMember]:
    """Every regular file of a whole archive, in order.

    Args:
        read: Gives its bytes.
        total_bytes: Its length.
        where: Its name, for messages.

    Raises:
        DataError: A header is damaged, a member or the end mark is missing (slug `bad-tar` or
            `truncated`), or a member is neither a file nor a folder.
    """
    position = 0
    while position < total_bytes:
        if read(position, BLOCK) == _ZEROS:
            _check_rest_is_zero(read, position, total_bytes, where)
            return
        member = _next_member(read, position, total_bytes, where)
        position = member.end
        if member.name:
            yield member
    raise DataError(
        f"{where} ends after {total_bytes} bytes without the end mark of a tar archive: it was cut off; "
        f"copy or write it again",
        slug="truncated",
    )


def members_of(extent: bytes, where: str) -> Iterator[TarMember]:
    """The files in a piece of an archive that begins at a header and ends after a member's padding.

    Raises:
        DataError: As for `walk`.
    """

    def read(offset: int, count: int) -> bytes:
        return extent[offset : offset + count]

    position = 0
    while position < len(extent):
        member = _next_member(read, position, len(extent), where)
        position = member.end
        if member.name:
            yield member


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, as WebDataset has them: `a/b.c.jpg` is `("a/b", "c.jpg")`.

    The extension is in lower case; a name without one gives `("", "")` and belongs to no sample.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension:
        return "", ""
    return folder + slash + stem, extension.lower()


def _next_member(read: Source, start: int, total_bytes: int, where: str) -> TarMember:
    """The member whose headers begin at `start`; its name is empty if it is a folder."""
    position, long_name, long_size = start, "", -1
    while True:
        header = read(position, BLOCK)
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
        if kind in (b"L", b"x", b"g"):
            if size > _MAX_EXTRA_BYTES:
                raise DataError(
                    f"{where}: the extended header at byte {position} has {size} bytes", slug="bad-tar"
                )
            extra = read(data, size)
            if kind == b"L":
                long_name = _text(extra)
            elif kind == b"x":
                records = _pax_records(extra, position, where)
                long_name = records.get("path", long_name)
                long_size = int(records.get("size", long_size))
            position = end
            continue
        if kind not in (b"0", b"\0", b"7", b"5"):
            raise DataError(
                f"{where}: the member at byte {position} is a link or device (type {kind!r}), not a file; "
                f"write the shard with plain files",
                slug="bad-tar",
            )
        name = "" if kind == b"5" else long_name or _header_name(header)
        return TarMember(name, start, data, size, end)


def _check_header(header: bytes, position: int, where: str) -> None:
    if len(header) < BLOCK:
        raise DataError(f"{where} was cut off inside a header at byte {position}", slug="truncated")
    # The checksum counts its own eight bytes as blanks.
    found = sum(header) - sum(header[148:156]) + 8 * 0x20
    expected = _number(header[148:156], position, where)
    if found != expected:
        raise DataError(
            f"{where}: the tar header at byte {position} is damaged (its bytes sum to {found}, it says "
            f"{expected}); copy or write the shard again",
            slug="bad-tar",
        )


def _number(field: bytes, position: int, where: str) -> int:
    """An octal field, or GNU's binary form for members of 8 GiB and more."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise DataError(
            f"{where}: at byte {position} there is no tar header, but other bytes", slug="bad-tar"
        ) from None


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    # Old GNU archives keep times where ustar keeps the folder part of a long name.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes, position: int, where: str) -> dict[str, str]:
    """`length key=value\\n` records, where length counts the whole record."""
    records: dict[str, str] = {}
    rest = data
    while rest.strip(b"\0"):
        length_text, blank, _ = rest.partition(b" ")
        length = int(length_text) if length_text.isdigit() else 0
        key, equals, value = rest[len(length_text) + 1 : length - 1].partition(b"=")
        if not blank or not equals or not len(length_text) < length <= len(rest):
            raise DataError(f"{where}: the extended header at byte {position} is damaged", slug="bad-tar")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        rest = rest[length:]
    if not records.get("size", "0").isdigit():
        raise DataError(f"{where}: the extended header at byte {position} has a damaged size", slug="bad-tar")
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
