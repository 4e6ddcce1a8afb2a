"""Which columns of a parquet file contain the image, the captions and the key.

Hugging Face datasets describe their columns in the metadata of the schema, key `huggingface`:

    {"info": {"features": {"image": {"_type": "Image"},
                           "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}

A column of the type `ClassLabel` has the index of a class, and its caption is the class name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.common.errors import DataError

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "img", "picture", "image_bytes", "bytes")
CAPTION_COLUMNS = ("caption", "captions", "txt", "text", "title", "description")
CLASS_COLUMNS = ("label", "labels")
KEY_COLUMNS = ("key", "__key__", "id")


@dataclass(frozen=True, kw_only=True)
class CaptionColumn:
    """A column of captions, or of classes whose names are captions."""

    name: str
    classes: tuple[str, ...] = ()
    """Names of the classes by index; empty for a column of text."""


@dataclass(frozen=True, kw_only=True)
class ParquetColumns:
    """The columns by their role."""

    image: str
    captions: tuple[CaptionColumn, ...]
    key: str = ""
    others: tuple[str, ...] = ()
    """Columns for the `.json` member, including those of classes."""

    @property
    def names(self) -> list[str]:
        """All columns but the key, without duplicates."""
        captions = (column.name for column in self.captions)
        return list(dict.fromkeys([self.image, *captions, *self.others]))


def find_columns(
    schema: Any, path: str, *, image: str = "", captions: Sequence[str] = (), key: str = ""
) -> ParquetColumns:
    """The columns of a file.

    Args:
        schema: Its Arrow schema.
        path: For messages.
        image: Name of the image column; empty finds it.
        captions: Names of the caption columns; if empty, the first of `CAPTION_COLUMNS`, else the
            column of classes.
        key: Name of the key column; empty finds it.

    Raises:
        DataError: There is no image or caption column, a given column is missing, or one has the
            wrong type.
    """
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{path} has two columns of the same name: {', '.join(schema.names)}")
    features = _hugging_face_features(schema)
    image = _image_column(schema, image, features, path)
    caption_columns = _caption_columns(schema, captions, features, path)
    key = _given_column(schema, key, path) or _first_of(KEY_COLUMNS, schema.names)
    used = {image, key, *(column.name for column in caption_columns if not column.classes)}
    others = tuple(
        field.name for field in schema if field.name not in used and not _is_bytes(field.type)
    )
    return ParquetColumns(image=image, captions=caption_columns, key=key, others=others)


def _hugging_face_features(schema: Any) -> Mapping[str, Any]:
    """Descriptions of the columns by name; empty if the file is not of a Hugging Face dataset."""
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        return dict(content["info"]["features"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


def _class_names(feature: Any) -> tuple[str, ...]:
    """Names of the classes of a column, or of each class in its lists; empty for other columns."""
    if isinstance(feature, list) and len(feature) == 1:
        return _class_names(feature[0])
    if not isinstance(feature, dict):
        return ()
    names = feature.get("names")
    if feature.get("_type") == "ClassLabel" and isinstance(names, list):
        return tuple(map(str, names))
    is_list = feature.get("_type") in ("Sequence", "List", "LargeList")
    return _class_names(feature.get("feature")) if is_list else ()


def _image_column(schema: Any, name: str, features: Mapping[str, Any], path: str) -> str:
    described = [
        column
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "Image" and column in schema.names
    ]
    candidates = [column for column in (*IMAGE_COLUMNS, *described) if column in schema.names]
    if name:
        candidates = [_given_column(schema, name, path)]
    for column in candidates:
        if _is_bytes(schema.field(column).type):
            return column
    for column in candidates:
        if _is_path(schema.field(column).type):
            raise DataError(
                f"{path}: the column {column!r} has only the paths of images "
                f"({schema.field(column).type}), not their bytes; {how_to_embed()}"
            )
    if name:
        raise DataError(
            f"{path}: the column {name!r} has type {schema.field(name).type}, expected bytes"
        )
    raise DataError(
        f"{path} has no column of image bytes (default names: {', '.join(IMAGE_COLUMNS)}; its "
        f"columns are {', '.join(schema.names)}). If it is beside .tar files, it only contains "
        f"their metadata: index the .tar files with `vlmoe data index`. Otherwise set "
        f"--image-column"
    )


def how_to_embed() -> str:
    """What to do with a file that has paths instead of images."""
    return (
        "embed the images (datasets: `push_to_hub(embed_external_files=True)`), or write the paths "
        "and captions to a table and use `vlmoe data write csv`"
    )


def _caption_columns(
    schema: Any, names: Sequence[str], features: Mapping[str, Any], path: str
) -> tuple[CaptionColumn, ...]:
    classes = {
        name: _class_names(features.get(name))
        for name in schema.names
        if _is_list_or_value(schema.field(name).type, _is_integer)
    }
    if not names:
        names = [_default_caption_column(schema, [n for n in classes if classes[n]], path)]
    for name in names:
        column_type = schema.field(_given_column(schema, name, path)).type
        if classes.get(name) or _is_list_or_value(column_type, _is_text):
            continue
        hint = (
            "; the file has no class names for it (key `huggingface` of the schema's metadata)"
            if name in classes
            else ""
        )
        raise DataError(
            f"{path}: the column {name!r} has type {column_type}, expected text, lists of text or "
            f"classes with names{hint}; set another one with --caption-column"
        )
    return tuple(CaptionColumn(name=name, classes=classes.get(name, ())) for name in names)


def _default_caption_column(schema: Any, class_columns: Sequence[str], path: str) -> str:
    if name := _first_of(CAPTION_COLUMNS, schema.names) or _first_of(CLASS_COLUMNS, class_columns):
        return name
    if len(class_columns) == 1:
        return class_columns[0]
    if class_columns:
        raise DataError(
            f"{path} has no caption column, but several columns of classes: "
            f"{', '.join(class_columns)}; choose with --caption-column"
        )
    raise DataError(
        f"{path} has no caption column (default names: {', '.join(CAPTION_COLUMNS)}) and no column "
        f"of classes with names; its columns are {', '.join(schema.names)}. Set --caption-column"
    )


def _given_column(schema: Any, name: str, path: str) -> str:
    """The name, which may be empty; an error if the file has no such column."""
    if name and name not in schema.names:
        raise DataError(f"{path} has no column {name!r}; its columns are {', '.join(schema.names)}")
    return name


def _first_of(defaults: Sequence[str], names: Sequence[str]) -> str:
    return next((default for default in defaults if default in names), "")


def _is_bytes(arrow_type: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(arrow_type):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in arrow_type)
    return bool(types.is_binary(arrow_type) or types.is_large_binary(arrow_type))


def _is_path(arrow_type: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(arrow_type):
        return any(field.name == "path" for field in arrow_type)
    return _is_text(arrow_type)


def _is_list_or_value(arrow_type: Any, is_type: Callable[[Any], bool]) -> bool:
    import pyarrow.types as types

    is_list = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    if any(check(arrow_type) for check in is_list):
        arrow_type = arrow_type.value_type
    return is_type(arrow_type)


def _is_text(arrow_type: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(check(arrow_type) for check in checks)


def _is_integer(arrow_type: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_integer(arrow_type) or types.is_null(arrow_type))
