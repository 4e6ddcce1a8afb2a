"""CSV and TSV files: an image column, one or more caption columns; other columns become JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.image_url import resolve_image_url
from data_pipeline.preparing.importers.records import Record, SkippedRow, strip_extension

IMAGE_COLUMNS = (
    "image",
    "filepath",
    "file_name",
    "filename",
    "image_path",
    "path",
    "file",
    "img",
    "picture",
)
"""Default names of the image column, in order of priority; case does not matter."""
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "txt", "description", "raw")
"""Default names of the caption column, in order of priority; case does not matter."""
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,17})?([eE][-+]?[0-9]{1,3})?")
_MAX_FIELD_CHARS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Table:
    """Importer for CSV or TSV files."""

    files: tuple[str, ...]
    image_folder: str = ""
    """Folder of the images; empty uses the folder of each file."""
    image_column: str = ""
    caption_columns: tuple[str, ...] = ()
    key_column: str = ""
    """Column of the key; empty derives the key from the image name."""
    header: tuple[str, ...] = ()
    """Column names, for files without a header line."""
    delimiter: str = ""
    """Empty uses a tab for .tsv and .tab, else a comma."""
    group: bool = False
    """Merge consecutive rows with the same image into one sample with several captions."""

    def __call__(self) -> Iterator[Record | SkippedRow]:
        """Every row, in order."""
        for url in self.files:
            rows = _rows(url, self.delimiter)
            names = self.header or next(rows, (0, []))[1]
            columns = _Columns.find(names, self, storage.redact(url))
            folder = self.image_folder or storage.parent(url)
            records = (_record(row, line, url, folder, columns) for line, row in rows)
            yield from group_by_image(records) if self.group else records


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Column names and the indices of the image, captions and key."""

    names: tuple[str, ...]
    image: int
    captions: tuple[int, ...]
    key: int | None

    @staticmethod
    def find(header: Sequence[str], table: Table, label: str) -> _Columns:
        """The columns named by the options of `table`, or by default names."""
        names = tuple(name.strip().lstrip("\ufeff") for name in header)

        if table.image_column:
            image = _index_of(table.image_column, names, label)
        else:
            image = _default_index(IMAGE_COLUMNS, names, f"{label}: no image column", "image")

        captions = tuple(_index_of(name, names, label) for name in table.caption_columns)
        if not captions:
            problem = f"{label}: no caption column"
            captions = (_default_index(CAPTION_COLUMNS, names, problem, "caption"),)

        key = _index_of(table.key_column, names, label) if table.key_column else None
        return _Columns(names=names, image=image, captions=captions, key=key)


def _index_of(name: str, names: tuple[str, ...], label: str) -> int:
    if name not in names:
        raise DataError(
            f"{label} has no column {name!r}; its columns are {', '.join(names) or 'none'}"
        )
    return names.index(name)


def _default_index(
    defaults: Sequence[str], names: tuple[str, ...], problem: str, option: str
) -> int:
    lower = [name.lower() for name in names]
    for name in defaults:
        if name in lower:
            return lower.index(name)
    raise DataError(
        f"{problem} ({', '.join(defaults)}); columns: {', '.join(names)[:300] or 'none'}. "
        f"Set --{option}-column, or name all columns with --header"
    )


def _rows(url: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields, without blank lines."""
    delimiter = delimiter or ("\t" if url.endswith((".tsv", ".tab")) else ",")
    old_limit = csv.field_size_limit(_MAX_FIELD_CHARS)
    try:
        with open_text(url) as file:
            reader = csv.reader(file, delimiter=delimiter, strict=False)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{storage.redact(url)} cannot be read as a table: {error}; it must be UTF-8 with "
            f"{delimiter!r} between the fields"
        ) from error
    finally:
        csv.field_size_limit(old_limit)


def open_text(url: str) -> io.TextIOBase:
    """Open a UTF-8 text file, with or without a byte-order mark.

    A file in an object store is read completely into memory.

    Raises:
        DataError: The file cannot be read.
    """
    if not storage.is_local(url):
        return io.StringIO(storage.read_bytes(url).decode("utf-8-sig"), newline="")
    try:
        return open(storage.local_path(url), encoding="utf-8-sig", newline="")
    except OSError as error:
        raise DataError(f"cannot read {url}: {error.strerror}; check the path") from error


def _record(
    row: list[str], line: int, url: str, folder: str, columns: _Columns
) -> Record | SkippedRow:
    origin = f"{storage.redact(url).rpartition('/')[2]} line {line}"
    if len(row) != len(columns.names):
        detail = f"{len(row)} fields, but there are {len(columns.names)} columns"
        return SkippedRow(origin, "malformed-row", detail)

    captions = tuple(text for index in columns.captions if (text := row[index].strip()))
    if not captions:
        return SkippedRow(origin, "no-caption", "the caption is empty")

    name = row[columns.image]
    try:
        image = resolve_image_url(name, folder)
    except DataError as error:
        return SkippedRow(origin, error.slug, str(error))

    used = {columns.image, *columns.captions, columns.key}
    fields = {columns.names[i]: parse_value(text) for i, text in enumerate(row) if i not in used}
    key = row[columns.key] if columns.key is not None else strip_extension(_key_name(name))
    return Record(key, image, captions, fields, origin)


def _key_name(name: str) -> str:
    """The part of an image name used as the key: a relative path, else the base name."""
    name = name.strip()
    is_absolute = name.startswith(("/", "file:")) or "://" in name
    return name.rpartition("/")[2] if is_absolute else name


def parse_value(text: str) -> object:
    """A field as a JSON value: a number, true or false, null if empty, else text.

    `007` stays text, as do numbers with more digits than a float can represent.
    """
    if text in ("true", "false", "True", "False"):
        return text.lower() == "true"
    if _NUMBER.fullmatch(text):
        value = json.loads(text)
        return value if abs(value) < 1e300 else text
    return text or None


def group_by_image(records: Iterator[Record | SkippedRow]) -> Iterator[Record | SkippedRow]:
    """Merge consecutive records of the same image: all captions, fields of the first record."""
    current: Record | None = None
    for record in records:
        if isinstance(record, SkippedRow):
            yield record
        elif current and record.image == current.image:
            current = current._replace(captions=(*current.captions, *record.captions))
        else:
            if current:
                yield current
            current = record
    if current:
        yield current
