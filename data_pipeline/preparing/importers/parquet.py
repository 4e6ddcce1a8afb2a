"""Parquet files with image bytes: img2dataset's `output_format=parquet`, Hugging Face datasets.

One column contains the image (bytes, or a struct with a field `bytes`), one the caption, one the
key; other columns of numbers, text and lists go to the `.json` member. Rows are read in small
batches when a shard is written, so memory usage does not grow with the file.

The parquet files that img2dataset writes *beside* tar shards contain no images; those shards only
need an index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.records import Record, SkippedRow, strip_extension

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "img", "picture", "image_bytes", "bytes")
CAPTION_COLUMNS = ("caption", "captions", "txt", "text", "title", "description")
KEY_COLUMNS = ("key", "__key__", "id")
_KEY_BATCH_ROWS = 4096
_BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class ParquetColumns:
    """Names of the columns by their role."""

    image: str
    caption: str
    key: str = ""
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """Importer for local parquet files, in order."""

    files: tuple[str, ...]
    image_column: str = ""
    caption_column: str = ""
    key_column: str = ""

    def __call__(self) -> Iterator[Record | SkippedRow]:
        """Every row; `read_rows` loads its image, captions and fields later."""
        for url in self.files:
            path = str(storage.local_path(url))
            name = path.rpartition("/")[2]
            with _open(path) as file:
                key_column = self.columns(file, path).key
                row = 0
                for batch in file.iter_batches(
                    batch_size=_KEY_BATCH_ROWS, columns=[key_column] if key_column else []
                ):
                    keys = batch.column(0).to_pylist() if key_column else [None] * batch.num_rows
                    for value in keys:
                        default_key = f"{strip_extension(name)}/{row:06d}"
                        key = str(value) if value is not None else default_key
                        yield Record(key, "", (), {}, f"{name} row {row}", (path, row))
                        row += 1

    def columns(self, file: Any, path: str) -> ParquetColumns:
        """The columns of an open file.

        Raises:
            DataError: There is no image or caption column, or a given column is missing.
        """
        schema = file.schema_arrow
        image = self._image_column(schema, path)
        caption = _find_column(schema, self.caption_column, CAPTION_COLUMNS, path)
        if not caption:
            raise DataError(f"{path} has no caption column; set --caption-column")

        key = _find_column(schema, self.key_column, KEY_COLUMNS, path)
        used = {image, caption, key}
        others = tuple(
            field.name
            for field in schema
            if field.name not in used and not _contains_bytes(field.type)
        )
        return ParquetColumns(image=image, caption=caption, key=key, others=others)

    def _image_column(self, schema: Any, path: str) -> str:
        defaults = [
            name
            for name in IMAGE_COLUMNS
            if name in schema.names and _contains_bytes(schema.field(name).type)
        ]
        image = _find_column(schema, self.image_column, defaults, path)
        if not image:
            raise DataError(
                f"{path} has no column of image bytes (default names: {', '.join(IMAGE_COLUMNS)}; "
                f"its columns are {', '.join(schema.names)}). If it is beside .tar files, it only "
                f"contains their metadata: index the .tar files with `vlmoe data index`. Otherwise "
                f"set --image-column"
            )

        image_type = schema.field(image).type
        if not _contains_bytes(image_type):
            raise DataError(f"{path}: the column {image!r} has type {image_type}, expected bytes")
        return image


def _find_column(schema: Any, name: str, defaults: Sequence[str], path: str) -> str:
    """The given column, else the first default one in the file, else an empty string."""
    if name and name not in schema.names:
        raise DataError(f"{path} has no column {name!r}; its columns are {', '.join(schema.names)}")
    return name or next((default for default in defaults if default in schema.names), "")


def read_rows(
    source: Parquet, path: str, rows: list[int]
) -> Iterator[tuple[bytes, tuple[str, ...], dict[str, object]]]:
    """Image, captions and fields of some rows of a file.

    Args:
        source: Determines the columns.
        path: The file.
        rows: Row indices, ascending.
    """
    with _open(path) as file:
        columns = source.columns(file, path)
        names = [columns.image, columns.caption, *columns.others]
        groups, row = _row_groups(file, rows)
        selected = set(rows)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=names):
            for offset in range(batch.num_rows):
                if row + offset in selected:
                    values = {name: batch.column(name)[offset].as_py() for name in names}
                    yield _convert_row(values, columns)
            row += batch.num_rows
            if row > rows[-1]:
                return


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


def _convert_row(
    values: dict[str, Any], columns: ParquetColumns
) -> tuple[bytes, tuple[str, ...], dict[str, object]]:
    image, caption = values[columns.image], values[columns.caption]
    if isinstance(image, dict):
        image = image.get("bytes")
    captions = caption if isinstance(caption, list) else [caption]
    texts = tuple(text.strip() for text in captions if isinstance(text, str) and text.strip())
    fields = {name: _to_json_value(values[name]) for name in columns.others}
    return bytes(image or b""), texts, fields


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


def _contains_bytes(arrow_type: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(arrow_type):
        return any(field.name == "bytes" and _contains_bytes(field.type) for field in arrow_type)
    return bool(types.is_binary(arrow_type) or types.is_large_binary(arrow_type))


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
