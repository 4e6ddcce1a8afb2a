"""Parquet files that hold pictures as bytes: img2dataset's `output_format=parquet`, Hugging Face
datasets.

The columns become a sample: one the picture (bytes, or a struct with a field `bytes`), one the
caption, one the key; numbers, text and lists of the others go to the `.json` member. Rows are read
in small batches by whoever writes the shard, so memory does not grow with the file.

The parquet that img2dataset writes *beside* tar shards has no pictures: those shards need only an
index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.records import LeftOut, Record, stem_of

PICTURE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "img", "picture", "image_bytes", "bytes")
CAPTION_COLUMNS = ("caption", "captions", "txt", "text", "title", "description")
KEY_COLUMNS = ("key", "__key__", "id")
_BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class ParquetColumns:
    """Which column is what."""

    picture: str
    caption: str
    key: str = ""
    others: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """An importer of parquet files, one after the other; local."""

    files: tuple[str, ...]
    picture_column: str = ""
    caption_column: str = ""
    key_column: str = ""

    def __call__(self) -> Iterator[Record | LeftOut]:
        """Every row; picture, captions and fields stay in the file until `rows_of` reads them."""
        for url in self.files:
            path = str(storage.local_path(url))
            with _open(path) as file:
                columns = self.columns(file, path)
                row, name = 0, path.rpartition("/")[2]
                for batch in file.iter_batches(
                    batch_size=4096, columns=[columns.key] if columns.key else []
                ):
                    keys = batch.column(0).to_pylist() if columns.key else [None] * batch.num_rows
                    for key in keys:
                        wanted = str(key) if key is not None else f"{stem_of(name)}/{row:06d}"
                        yield Record(wanted, "", (), {}, f"{name} row {row}", (path, row))
                        row += 1

    def columns(self, file: Any, path: str) -> ParquetColumns:
        """The columns of an open file.

        Raises:
            DataError: There is no picture or caption, or a named column is missing.
        """
        schema = file.schema_arrow
        picture = self._named(schema, self.picture_column, path) or next(
            (
                name
                for name in PICTURE_COLUMNS
                if name in schema.names and _holds_bytes(schema.field(name).type)
            ),
            "",
        )
        if not picture:
            raise DataError(
                f"{path} has no column of picture bytes (looked for {', '.join(PICTURE_COLUMNS)}; its columns are "
                f"{', '.join(schema.names)}). If it lies beside .tar files, it only describes them: index those "
                f"with `vlmoe data index`. Otherwise name the column with --image-column"
            )
        if not _holds_bytes(schema.field(picture).type):
            raise DataError(
                f"{path}: the column {picture!r} is {schema.field(picture).type}, not bytes"
            )
        caption = self._named(schema, self.caption_column, path) or next(
            (name for name in CAPTION_COLUMNS if name in schema.names), ""
        )
        if not caption:
            raise DataError(f"{path} has no column of captions; name it with --caption-column")
        key = self._named(schema, self.key_column, path) or next(
            (name for name in KEY_COLUMNS if name in schema.names), ""
        )
        used = {picture, caption, key}
        others = [
            field.name
            for field in schema
            if field.name not in used and not _holds_bytes(field.type)
        ]
        return ParquetColumns(picture=picture, caption=caption, key=key, others=tuple(others))

    @staticmethod
    def _named(schema: Any, name: str, path: str) -> str:
        if name and name not in schema.names:
            raise DataError(
                f"{path} has no column {name!r}; its columns are {', '.join(schema.names)}"
            )
        return name


def rows_of(
    source: Parquet, path: str, rows: list[int]
) -> Iterator[tuple[bytes, tuple[str, ...], dict[str, object]]]:
    """Picture, captions and fields of some rows of a file.

    Args:
        source: Says which columns.
        path: The file.
        rows: Numbers of the rows, rising.
    """
    with _open(path) as file:
        columns = source.columns(file, path)
        first, wanted, place = 0, set(rows), 0
        groups: list[int] = []
        for number in range(file.num_row_groups):
            size = file.metadata.row_group(number).num_rows
            if rows[0] < first + size and first <= rows[-1]:
                if not groups:
                    place = first
                groups.append(number)
            first += size
        names = [columns.picture, columns.caption, *columns.others]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=names):
            for offset in range(batch.num_rows):
                if place + offset in wanted:
                    yield _row(
                        {name: batch.column(name)[offset].as_py() for name in names}, columns
                    )
            place += batch.num_rows
            if place > rows[-1]:
                return


def _row(
    row: dict[str, Any], columns: ParquetColumns
) -> tuple[bytes, tuple[str, ...], dict[str, object]]:
    picture, caption = row[columns.picture], row[columns.caption]
    if isinstance(picture, dict):
        picture = picture.get("bytes")
    captions = caption if isinstance(caption, list) else [caption]
    texts = tuple(text.strip() for text in captions if isinstance(text, str) and text.strip())
    return bytes(picture or b""), texts, {name: _plain(row[name]) for name in columns.others}


def _plain(value: Any) -> object:
    """A value as JSON; what JSON has no kind for (times, decimals) as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return None if isinstance(value, bytes) else str(value)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _open(path: str) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            "parquet files need the package pyarrow, which is not installed here; `pip install 'vlmoe[parquet]'`"
        ) from error
    try:
        return ParquetFile(path, memory_map=True)
    except (OSError, ArrowException, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as parquet: {str(error).splitlines()[0]}"
        ) from error
