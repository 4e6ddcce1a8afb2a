"""Parquet files with image bytes: img2dataset's `output_format=parquet`, Hugging Face datasets.

One column contains the image (bytes, or a struct with a field `bytes`), one or more the captions
(text, lists of text, or classes of which the file has the names), one the key; other columns of
numbers, text and lists go to the `.json` member. Rows are read in small batches when a shard is
written, so memory usage does not grow with the file.

The parquet files that img2dataset writes *beside* tar shards contain no images; those shards only
need an index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.parquet_columns import (
    CaptionColumn,
    ParquetColumns,
    find_columns,
    how_to_embed,
)
from data_pipeline.preparing.importers.records import Record, class_caption, strip_extension

_KEY_BATCH_ROWS = 4096
_BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """Importer for local parquet files, in order."""

    unit: ClassVar[str] = "rows"
    files: tuple[str, ...]
    image_column: str = ""
    caption_columns: tuple[str, ...] = ()
    key_column: str = ""
    template: str = "{}"
    """Caption template for a class name: `a photo of a {}`."""

    def __call__(self) -> Iterator[Record]:
        """Every row; `read_rows` loads its image, captions and fields later.

        Raises:
            DataError: A file cannot be read, lacks a column, or its rows do not add up.
        """
        for url in self.files:
            path = str(storage.local_path(url))
            name = path.rpartition("/")[2]
            with _open(path) as file:
                key_column = self.columns(file, path).key
                row = 0
                for batch in _batches(
                    file, path, _KEY_BATCH_ROWS, [key_column] if key_column else []
                ):
                    keys = batch.column(0).to_pylist() if key_column else [None] * batch.num_rows
                    for value in keys:
                        default_key = f"{strip_extension(name)}/{row:06d}"
                        key = str(value) if value is not None else default_key
                        yield Record(key, "", (), {}, f"{name} row {row}", (path, row))
                        row += 1
                if row != (expected := file.metadata.num_rows):
                    raise DataError(
                        f"{path} has {expected} rows by its metadata, but {row} were read; it is "
                        f"corrupt: write or download it again"
                    )

    def columns(self, file: Any, path: str) -> ParquetColumns:
        """The columns of an open file.

        Raises:
            DataError: As for `find_columns`, or there is a template but no column of classes.
        """
        columns = find_columns(
            file.schema_arrow,
            path,
            image=self.image_column,
            captions=self.caption_columns,
            key=self.key_column,
        )
        if self.template != "{}" and not any(column.classes for column in columns.captions):
            names = ", ".join(repr(column.name) for column in columns.captions)
            raise DataError(
                f"{path}: --template {self.template!r} is for the names of classes, but the "
                f"captions are text (column {names}); omit --template, or name a column of classes "
                f"with --caption-column"
            )
        return columns


class ParquetRow(NamedTuple):
    """The content of a row."""

    image: bytes
    captions: tuple[str, ...]
    fields: dict[str, object]
    why_no_image: str = ""
    why_no_caption: str = ""

    def read_image(self) -> bytes:
        """The image; a `DataError` (slug `no-image`) if the row has only its path."""
        if self.why_no_image:
            raise DataError(self.why_no_image, slug="no-image")
        return self.image


def read_rows(source: Parquet, path: str, rows: list[int]) -> Iterator[ParquetRow]:
    """Image, captions and fields of some rows of a file.

    Args:
        source: Determines the columns.
        path: The file.
        rows: Row indices, ascending.

    Raises:
        DataError: The file cannot be read, or ends before the last of the rows.
    """
    with _open(path) as file:
        columns = source.columns(file, path)
        groups, row = _row_groups(file, rows)
        selected, missing = set(rows), len(rows)
        for batch in _batches(file, path, _BATCH_ROWS, columns.names, groups):
            for offset in range(batch.num_rows):
                if row + offset in selected:
                    values = {name: batch.column(name)[offset].as_py() for name in columns.names}
                    yield _convert_row(values, columns, source.template)
                    missing -= 1
            row += batch.num_rows
            if row > rows[-1]:
                break
    if missing:
        raise DataError(
            f"{path}: {missing} of the rows up to row {rows[-1]} are missing; it was changed while "
            f"it was read, or is corrupt"
        )


def _batches(
    file: Any, path: str, size: int, names: list[str], groups: list[int] | None = None
) -> Iterator[Any]:
    """Batches of rows; an error of a corrupt file becomes a `DataError`."""
    from pyarrow import ArrowException

    try:
        yield from file.iter_batches(batch_size=size, row_groups=groups, columns=names)
    except (OSError, ArrowException) as error:
        raise DataError(
            f"{path} is corrupt: {str(error).splitlines()[0]}; write or download it again"
        ) from error


def _row_groups(file: Any, rows: list[int]) -> tuple[list[int], int]:
    """The row groups that overlap the range of `rows`, and the first row of the first group."""
    groups: list[int] = []
    first, start = 0, 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if rows[0] < first + size and first <= rows[-1]:
            if not groups:
                start = first
            groups.append(group)
        first += size
    return groups, start


def _convert_row(values: dict[str, Any], columns: ParquetColumns, template: str) -> ParquetRow:
    fields = {name: _to_json_value(values[name]) for name in columns.others}
    captions: list[str] = []
    why_no_caption = ""
    for column in columns.captions:
        value = values[column.name]
        items = value if isinstance(value, list) else [value]
        if column.classes:
            names = [_class_name(item, column) for item in items]
            fields.setdefault(f"{column.name}_name", names if items is value else names[0])
            items = [class_caption(name, template) for name in names if name]
            why_no_caption = why_no_caption or ("" if items else _why_no_class(value, column))
        captions += [text.strip() for text in items if isinstance(text, str) and text.strip()]

    image, why_no_image = values[columns.image], ""
    if isinstance(image, dict):
        if image.get("bytes") is None and image.get("path"):
            path = image["path"]
            why_no_image = f"the row has only the path {path!r} of its image; {how_to_embed()}"
        image = image.get("bytes")
    return ParquetRow(bytes(image or b""), tuple(captions), fields, why_no_image, why_no_caption)


def _class_name(index: object, column: CaptionColumn) -> str | None:
    """The name of a class; None for a null or an index without a class, such as -1."""
    if isinstance(index, int) and 0 <= index < len(column.classes):
        return column.classes[index]
    return None


def _why_no_class(value: object, column: CaptionColumn) -> str:
    return (
        f"the class in column {column.name!r} is {'null' if value is None else value}, expected "
        f"0 to {len(column.classes) - 1} (-1 is for unknown classes)"
    )


def _to_json_value(value: Any) -> object:
    """A value as JSON; types that JSON lacks (times, decimals) become text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_to_json_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _to_json_value(item) for key, item in value.items()}
    return None if isinstance(value, bytes) else str(value)


def _open(path: str) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            "parquet files need the package pyarrow, which is not installed; run "
            "`pip install 'vlmoe[parquet]'`"
        ) from error

    try:
        return ParquetFile(path, memory_map=True)
    except (OSError, ArrowException, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as parquet: {str(error).splitlines()[0]}"
        ) from error
