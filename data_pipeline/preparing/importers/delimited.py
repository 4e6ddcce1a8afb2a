"""Rows of delimited text files (CSV and TSV): dialect, strict quoting, and a count of all lines.

Two dialects of quoting:

- `csv` (RFC 4180): a field may be enclosed in double quotes; inside, two of them stand for one, and
  line breaks belong to the field. Anything else is an error, not a guess.
- `none`: a quotation mark is a character, as in most tab-separated files.

A quotation mark that is never closed would otherwise swallow the following rows. In a file that is
valid CSV by accident, the swallowed lines are complete rows; that is an error unless `csv` was set
explicitly. The lines are counted a second time, in the bytes of the file.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}
"""Delimiters that are detected, with their names."""
QUOTING = ("auto", "csv", "none")
_MAX_FIELD_CHARS = 10_000_000
_HEAD_BYTES = 1 << 16
_BOMS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_SEPARATOR_LINE = re.compile(r'"?sep=(?P<delimiter>.)"?', re.IGNORECASE)

IsRow = Callable[[Sequence[str]], bool]
"""Whether fields look like a complete row of the table."""


class Dialect(NamedTuple):
    """How a file is divided into rows and fields."""

    encoding: str
    delimiter: str
    quoting: str
    """`csv` or `none`."""
    skip_lines: int
    """Lines before the header: 1 with Excel's `sep=;`, else 0."""
    check_rows: bool
    """Reject fields that contain complete rows."""


class Row(NamedTuple):
    """One row of a file."""

    line: int
    """Its first line, from 1."""
    num_lines: int
    fields: list[str]
    """Empty for a blank line, and for a `sep=` line."""


def detect_dialect(
    url: str, delimiter: str, quoting: str, is_header: Callable[[Sequence[str]], bool]
) -> Dialect:
    """The dialect of a file, from its first bytes.

    Args:
        url: The file.
        delimiter: Of the fields; empty detects it. A file named .tsv or .tab has tabs and another
            one commas, unless its first line has the expected columns only with another delimiter.
        quoting: One of `QUOTING`. `auto` is `none` for tabs, unless the first line has a quoted
            field; else `csv`.
        is_header: Whether fields have the expected columns.

    Raises:
        DataError: The file cannot be read, or is not text.
    """
    head = _read_head(url)
    encoding = _encoding(head, url)
    lines = re.split(r"\r\n|\r|\n", head.decode(encoding, "replace"), maxsplit=2)
    skip_lines = 0
    if match := _SEPARATOR_LINE.fullmatch(lines[0].strip("\ufeff")):
        skip_lines, delimiter = 1, delimiter or match["delimiter"]
    first = lines[skip_lines] if len(lines) > skip_lines else ""

    default = "\t" if url.lower().endswith((".tsv", ".tab")) else ","
    candidates = [delimiter] if delimiter else [default, *(d for d in DELIMITERS if d != default)]
    for candidate in candidates:
        resolved = quoting
        if quoting == "auto":
            has_quotes = re.search(rf'(^|{re.escape(candidate)})"[^"]*"', first)
            resolved = "none" if candidate == "\t" and not has_quotes else "csv"
        dialect = Dialect(encoding, candidate, resolved, skip_lines, quoting == "auto")
        if delimiter or is_header(_split_header(first, dialect)):
            return dialect
    # No delimiter gives the expected columns; the error is about the columns.
    return detect_dialect(url, default, quoting, is_header)


def read_rows(url: str, dialect: Dialect, is_row: IsRow) -> Iterator[Row]:
    """All rows, blank lines included, so that the lines of the rows add up to those of the file.

    Args:
        url: The file; in an object store, it is read completely into memory.
        dialect: From `detect_dialect`.
        is_row: Decides whether a line inside a quoted field looks like a row.

    Raises:
        DataError: The file cannot be read, is not text in its encoding, is not valid CSV, or rows
            are inside a quoted field.
    """
    name = storage.redact(url)
    old_limit = csv.field_size_limit(_MAX_FIELD_CHARS)
    line = 0
    try:
        lines = read_lines(url)
        for _ in range(dialect.skip_lines):
            line += 1
            next(lines)
            yield Row(line, 1, [])
        rows = _csv_rows if dialect.quoting == "csv" else _raw_rows
        for text, fields in rows(lines, dialect.delimiter):
            if dialect.check_rows and len(text) > 1:
                _reject_swallowed_rows(text, line + 1, name, dialect, is_row)
            yield Row(line + 1, len(text), fields)
            line += len(text)
    except csv.Error as error:
        delimiter = DELIMITERS.get(dialect.delimiter, repr(dialect.delimiter))
        raise DataError(
            f"{name} line {line + 1}: not valid CSV with {delimiter} delimiters: {error}. If "
            f"quotation marks are ordinary characters in this file, set --quoting none; else "
            f"enclose the field in quotes and double those inside"
        ) from error
    finally:
        csv.field_size_limit(old_limit)


def read_lines(url: str) -> Iterator[str]:
    """The lines of a text file with their line breaks, in UTF-8, or UTF-16 or -32 with a mark.

    Raises:
        DataError: The file cannot be read, is not text in its encoding, or the number of lines
            differs from an independent count.
    """
    encoding, num_lines = _encoding(_read_head(url), url), 0
    try:
        with _open_text(url, encoding) as file:
            for line in file:
                num_lines += 1
                yield line
    except UnicodeDecodeError as error:
        raise DataError(_encoding_message(url, encoding)) from error
    if num_lines != (expected := _count_lines(url, encoding)):
        raise DataError(
            f"{storage.redact(url)} has {expected} lines, but {num_lines} were read; it may have "
            f"been changed meanwhile"
        )


def _encoding(head: bytes, url: str) -> str:
    """Encoding by the byte-order mark; UTF-8 without one."""
    encoding = next((name for bom, name in _BOMS.items() if head.startswith(bom)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in head:
        raise DataError(
            f"{storage.redact(url)} contains null bytes; it must be UTF-8 text, or UTF-16 with a "
            f"byte-order mark"
        )
    return encoding


def _count_lines(url: str, encoding: str) -> int:
    """Lines of a text file, counted in its bytes."""
    data = storage.read_bytes(url)
    if encoding in ("utf-16", "utf-32"):
        data = data.decode(encoding, "replace").encode()
    data = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return data.count(b"\n") + (len(data) > 0 and not data.endswith(b"\n"))


def _csv_rows(lines: Iterator[str], delimiter: str) -> Iterator[tuple[list[str], list[str]]]:
    """The lines and the fields of each row."""
    consumed: list[str] = []

    def feed() -> Iterator[str]:
        for line in lines:
            consumed.append(line)
            yield line

    for fields in csv.reader(feed(), delimiter=delimiter, strict=True):
        yield consumed.copy(), fields
        consumed.clear()


def _raw_rows(lines: Iterator[str], delimiter: str) -> Iterator[tuple[list[str], list[str]]]:
    for line in lines:
        text = line.rstrip("\r\n")
        yield [line], text.split(delimiter) if text else []


def _split_header(line: str, dialect: Dialect) -> list[str]:
    try:
        rows = _csv_rows if dialect.quoting == "csv" else _raw_rows
        return next((fields for _, fields in rows(iter([line]), dialect.delimiter)), [])
    except csv.Error:
        return []


def _reject_swallowed_rows(
    text: Sequence[str], line: int, name: str, dialect: Dialect, is_row: IsRow
) -> None:
    for offset, inner in enumerate(text[1:], 1):
        if is_row(inner.rstrip("\r\n").split(dialect.delimiter)):
            raise DataError(
                f"{name}: a quoted field extends from line {line} to line {line + len(text) - 1}, "
                f"but line {line + offset} looks like a row: {inner.strip()[:80]!r}. If quotation "
                f"marks are ordinary characters in this file, set --quoting none; if the field "
                f"really contains these lines, set --quoting csv"
            )


def _read_head(url: str) -> bytes:
    if not storage.is_local(url):
        return storage.read_bytes(url)[:_HEAD_BYTES]
    try:
        with open(storage.local_path(url), "rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {url}: {error.strerror}; check the path") from error


def _open_text(url: str, encoding: str) -> io.TextIOBase:
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    if not storage.is_local(url):
        return io.TextIOWrapper(io.BytesIO(storage.read_bytes(url)), encoding, newline="")
    return open(storage.local_path(url), encoding=encoding, newline="")


def _encoding_message(url: str, encoding: str) -> str:
    """Where a file is not in its encoding, and how to convert it."""
    for number, line in enumerate(storage.read_bytes(url).split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            if encoding.startswith("utf-8"):
                return (
                    f"{storage.redact(url)} line {number} is not UTF-8 (byte 0x{byte:02x}); it may "
                    f"be Windows-1252 or Latin-1; convert it with iconv -f WINDOWS-1252 -t UTF-8"
                )
    return f"{storage.redact(url)} is not valid {encoding.upper()}; convert it to UTF-8"
