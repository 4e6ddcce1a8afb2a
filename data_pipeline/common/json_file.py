"""Writes values as JSON files, atomically, to local disks and object stores."""

from __future__ import annotations

import json
import os
from typing import Any

from data_pipeline.common import storage


def write_json(url: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as UTF-8, replacing an existing file or object; creates a local folder.

    Args:
        url: A path or an address of a store.
        value: Mappings, lists, strings, numbers, booleans and None.
        indent: Spaces per level; None writes one line.

    Raises:
        StorageError: The disk is full, or the store refuses access.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # File names that are not UTF-8 contain surrogates; JSON can only write them as escapes, whose
    # form is that of `backslashreplace`.
    storage.write_bytes(os.fspath(url), text.encode("utf-8", "backslashreplace") + b"\n")
