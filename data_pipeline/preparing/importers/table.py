"""CSV and TSV files: an image column, one or more caption columns; other columns become JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.common.tables import counted
from data_pipeline.preparing.importers.delimited import Row, detect_dialect, read_rows
from data_pipeline.preparing.importers.image_url import resolve_image_url
from data_pipeline.preparing.importers.records import (
    Ignored,
    Record,
    SkippedRow,
    strip_extension,
)

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


@dataclass(frozen=True, kw_only=True)
class Table:
    """Importer for CSV or TSV files."""

    unit: ClassVar[str] = "lines"
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
    """Empty detects it."""
    quoting: str = "auto"
    """One of `delimited.QUOTING`."""
    group: bool = False
    """Merge consecutive rows with the same image into one sample with several captions."""

    def __call__(self) -> Iterator[Record | SkippedRow | Ignored]:
        """Every row, in order; header and blank lines are ignored.

        Raises:
            DataError: A file cannot be read as a table, or its lines do not add up.
        """
        for url in self.files:
            records = self._records(url)
            yield from group_by_image(records) if self.group else records

    def _records(self, url: str) -> Iterator[Record | SkippedRow | Ignored]:
        label = storage.redact(url)
        dialect = detect_dialect(url, self.delimiter, self.quoting, self._is_header)
        columns = _Columns.find(self.header, self, label) if self.header else None
        folder = self.image_folder or storage.parent(url)
        is_row = _LooksLikeRow()
        for row in read_rows(url, dialect, is_row):
            if not row.fields:
                rule = "sep= line" if row.line <= dialect.skip_lines else "blank line"
                yield Ignored(f"{label} line {row.line}", rule, row.num_lines)
            elif columns is None:
                columns = _Columns.find(row.fields, self, label)
                yield Ignored(f"{label} line {row.line}", "header", row.num_lines)
            else:
                is_row.columns = columns
                yield _record(row, url, folder, columns)
        if columns is None:
            _Columns.find([], self, label)

    def _is_header(self, fields: Sequence[str]) -> bool:
        """Whether the first line has the expected columns: names, or values if names are given."""
        if self.header:
            looks_like_row = _LooksLikeRow()
            looks_like_row.columns = _Columns.find(self.header, self, "--header")
            return looks_like_row(fields)
        try:
            _Columns.find(fields, self, "")
        except DataError:
            return False
        return True


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
    if names and names[0].startswith("{"):
        raise DataError(
            f"{problem.partition(':')[0]} seems to contain JSON lines, not a table; write it as "
            f"CSV or TSV with a column of the image files and one of the captions"
        )
    raise DataError(
        f"{problem} ({', '.join(defaults)}); columns: {', '.join(names)[:300] or 'none'}. "
        f"Set --{option}-column, name all columns with --header, or set --delimiter"
    )


class _LooksLikeRow:
    """Whether a line inside a quoted field is a row: as many fields, one of them an image name."""

    columns: _Columns | None = None

    def __call__(self, fields: Sequence[str]) -> bool:
        columns = self.columns
        if columns is None or len(fields) != len(columns.names):
            return False
        name = fields[columns.image].strip()
        return bool(name) and not re.search(r"\s", name)


def _record(row: Row, url: str, folder: str, columns: _Columns) -> Record | SkippedRow:
    origin = f"{storage.redact(url).rpartition('/')[2]} line {row.line}"
    texts, size = row.fields, row.num_lines
    if len(texts) != len(columns.names):
        detail = f"{counted(len(texts), 'field')}, but there are {len(columns.names)} columns"
        if len(texts) > len(columns.names):
            detail += "; a field that contains the delimiter must be in double quotes"
        return SkippedRow(origin, "malformed-row", detail, size)

    captions = tuple(text for index in columns.captions if (text := texts[index].strip()))
    if not captions:
        return SkippedRow(origin, "no-caption", "the caption is empty", size)

    name = texts[columns.image]
    try:
        image = resolve_image_url(name, folder)
    except DataError as error:
        return SkippedRow(origin, error.slug, str(error), size)

    used = {columns.image, *columns.captions, columns.key}
    fields = {columns.names[i]: parse_value(text) for i, text in enumerate(texts) if i not in used}
    key = texts[columns.key] if columns.key is not None else strip_extension(_key_name(name))
    return Record(key, image, captions, fields, origin, inputs=size)


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


def group_by_image(
    records: Iterator[Record | SkippedRow | Ignored],
) -> Iterator[Record | SkippedRow | Ignored]:
    """Merge consecutive records of the same image: all captions, fields of the first record."""
    current: Record | None = None
    for record in records:
        if not isinstance(record, Record):
            yield record
        elif current and record.image == current.image:
            current = current._replace(
                captions=(*current.captions, *record.captions),
                inputs=current.inputs + record.inputs,
            )
        else:
            if current:
                yield current
            current = record
    if current:
        yield current
