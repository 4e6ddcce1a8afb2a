"""CSV and TSV files: a column names the picture, one or more hold captions, the others are kept as
JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.pictures_at import picture_address
from data_pipeline.preparing.importers.records import LeftOut, Record, stem_of

PICTURE_COLUMNS = (
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
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "txt", "description", "raw")
"""Names that are understood without being told, in this order; capitals do not matter."""
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,17})?([eE][-+]?[0-9]{1,3})?")
_MAX_FIELD_CHARS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Table:
    """An importer of CSV or TSV files."""

    files: tuple[str, ...]
    pictures: str = ""
    """Folder of the pictures; empty is the folder of each file."""
    picture_column: str = ""
    caption_columns: tuple[str, ...] = ()
    key_column: str = ""
    """Column of the key; empty names a sample after its picture."""
    header: tuple[str, ...] = ()
    """Names of the columns, for files without a first line that says so."""
    delimiter: str = ""
    """Empty is a tab for .tsv and .tab, else a comma."""
    group: bool = False
    """Rows that follow each other with the same picture are one sample with several captions."""

    def __call__(self) -> Iterator[Record | LeftOut]:
        """Every row, in order."""
        for url in self.files:
            rows = _rows(url, self.delimiter)
            names = self.header or next(rows, (0, []))[1]
            columns = _Columns.find(names, self, storage.redact(url))
            folder = self.pictures or storage.parent(url)
            records = (_record(row, line, url, folder, columns) for line, row in rows)
            yield from grouped(records) if self.group else records


@dataclass(frozen=True, kw_only=True)
class _Columns:
    names: tuple[str, ...]
    picture: int
    captions: tuple[int, ...]
    key: int | None

    @staticmethod
    def find(names: Sequence[str], wanted: Table, where: str) -> _Columns:
        """The columns by name, or by what names they usually have."""
        names = tuple(name.strip().lstrip("\ufeff") for name in names)
        lower = [name.lower() for name in names]

        def index(name: str) -> int:
            if name not in names:
                raise DataError(
                    f"{where} has no column {name!r}; its columns are {', '.join(names) or 'none'}"
                )
            return names.index(name)

        def guess(known: Sequence[str], what: str, option: str) -> int:
            for name in known:
                if name in lower:
                    return lower.index(name)
            raise DataError(
                f"{where}: no column is called like {what} ({', '.join(known)}); its columns are "
                f"{', '.join(names)[:300] or 'none'}. Say which with {option}, or name them all with --header"
            )

        picture = (
            index(wanted.picture_column)
            if wanted.picture_column
            else guess(PICTURE_COLUMNS, "a picture", "--image-column")
        )
        captions = tuple(map(index, wanted.caption_columns)) or (
            guess(CAPTION_COLUMNS, "a caption", "--caption-column"),
        )
        key = index(wanted.key_column) if wanted.key_column else None
        return _Columns(names=names, picture=picture, captions=captions, key=key)


def _rows(url: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields, blank lines left out."""
    where = storage.redact(url)
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
            f"{where} cannot be read as a table: {error}; it must be UTF-8 with {delimiter!r} between the fields"
        ) from error
    finally:
        csv.field_size_limit(old_limit)


def open_text(url: str) -> io.TextIOBase:
    """A text file by address, UTF-8, with or without a byte-order mark; of a store it comes whole.

    Raises:
        DataError: It cannot be read.
    """
    if not storage.is_local(url):
        return io.StringIO(storage.read_bytes(url).decode("utf-8-sig"), newline="")
    try:
        return open(storage.local_path(url), encoding="utf-8-sig", newline="")
    except OSError as error:
        raise DataError(f"cannot read {url}: {error.strerror}; check the path") from error


def _record(
    row: list[str], line: int, url: str, folder: str, columns: _Columns
) -> Record | LeftOut:
    origin = f"{storage.redact(url).rpartition('/')[2]} line {line}"
    if len(row) != len(columns.names):
        return LeftOut(
            origin, "bad-row", f"{len(row)} fields, but there are {len(columns.names)} columns"
        )
    captions = tuple(text for number in columns.captions if (text := row[number].strip()))
    if not captions:
        return LeftOut(origin, "no-caption", "its caption is empty")
    name = row[columns.picture]
    try:
        address = picture_address(name, folder)
    except DataError as error:
        return LeftOut(origin, error.slug, str(error))
    used = {columns.picture, *columns.captions, columns.key}
    fields = {columns.names[i]: value_of(text) for i, text in enumerate(row) if i not in used}
    key = row[columns.key] if columns.key is not None else stem_of(key_name(name))
    return Record(key, address, captions, fields, origin)


def key_name(name: str) -> str:
    """What of a picture's address may name its sample: a relative path whole, else the last
    part."""
    name = name.strip()
    absolute = name.startswith(("/", "file:")) or "://" in name
    return name.rpartition("/")[2] if absolute else name


def value_of(text: str) -> object:
    """A field as JSON: numbers and true/false as such, an empty one as null, all else as text.

    `007` stays text, as do numbers of more digits than a float keeps.
    """
    if text in ("true", "false", "True", "False"):
        return text.lower() == "true"
    if _NUMBER.fullmatch(text):
        value = json.loads(text)
        return value if abs(value) < 1e300 else text
    return text or None


def grouped(records: Iterator[Record | LeftOut]) -> Iterator[Record | LeftOut]:
    """Neighbors with the same picture as one record with all their captions; fields are the first
    one's."""
    waiting: Record | None = None
    for record in records:
        if isinstance(record, LeftOut):
            yield record
        elif waiting and record.picture == waiting.picture:
            waiting = waiting._replace(captions=(*waiting.captions, *record.captions))
        else:
            if waiting:
                yield waiting
            waiting = record
    if waiting:
        yield waiting
