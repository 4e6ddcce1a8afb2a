"""Paths of run files and folders. Paths in run files are relative to the file that contains them.

A path that exists only relative to the working directory, and one of the command line, is relative
to that. The `config.yaml` of a run folder has absolute paths, so that it can be read from anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.addresses import without_secrets
from data_pipeline.common.errors import DataError
from data_pipeline.common.literal_paths import PATTERN_CHARACTERS, split_literal

CONFIG_FILE, DEEPSPEED_FILE, TOKENIZER_FILE = "config.yaml", "deepspeed.json", "tokenizer.model"
"""Files of a run folder: the resolved settings, and a copy of the tokenizer."""
CHECKPOINTS_FOLDER = "checkpoints"
_MANIFEST = re.compile(r"(^|/)manifest\.json$")


def relative_to_file(mapping: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of a run file in which paths that exist beside the file are absolute.

    Args:
        mapping: The settings, as read; invalid values are unchanged.
        folder: The folder of the file.
    """

    def resolve(path: str) -> str:
        absolute = folder.resolve() / path
        return str(absolute) if _exists(absolute) else path

    return _map_paths(mapping, resolve)


def absolute_paths(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which relative paths are absolute, from the working directory."""
    return _map_paths(mapping, os.path.abspath)


def normalized_address(shards: str) -> str:
    """The folder of a set of shards that is given by its manifest or by its folder, without
    secrets, so that spellings of one address compare equal."""
    folder = _MANIFEST.sub(r"\1", without_secrets(shards).removeprefix("file:"))
    return folder.rstrip("/") if "://" in folder else os.path.normpath(folder or ".")


def _map_paths(mapping: Mapping[str, Any], function: Callable[[str], str]) -> dict[str, Any]:
    """Apply a function to every relative local path of the settings."""

    def convert(value: Any) -> Any:
        prefix = "@" if isinstance(value, str) and value.startswith("@") else ""
        if not isinstance(value, str) or not _is_relative(value.removeprefix("@")):
            return value
        return prefix + function(value.removeprefix("@"))

    def convert_entries(entries: Any, names: tuple[str, ...]) -> Any:
        if not isinstance(entries, list | tuple):
            return entries
        return [
            {key: convert(item) if key in names else item for key, item in entry.items()}
            if isinstance(entry, Mapping)
            else convert(entry)
            for entry in entries
        ]

    result = dict(mapping)
    if isinstance(data := mapping.get("data"), Mapping):
        paths = {key: convert(data[key]) for key in ("tokenizer", "cache_dir") if key in data}
        if "train" in data:
            paths["train"] = convert_entries(data["train"], ("shards", "drop"))
        result["data"] = dict(data) | paths
    if isinstance(evaluation := mapping.get("eval"), Mapping) and "sets" in evaluation:
        sets = convert_entries(evaluation["sets"], ("shards", "labels"))
        result["eval"] = dict(evaluation) | {"sets": sets}
    return result


def _is_relative(path: str) -> bool:
    try:
        return bool(path) and storage.is_local(path) and not os.path.isabs(path)
    except DataError:  # not a valid address; reported where it is opened
        return False


def _exists(path: Path) -> bool:
    """Whether a file or folder exists; of a pattern, the folder before it."""
    rest = split_literal(str(path))[1]
    name = rest.removeprefix("/").partition("/")[0]
    return not rest or PATTERN_CHARACTERS.search(name) is not None
