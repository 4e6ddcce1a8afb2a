"""The output of importers: records that become samples, skipped rows, and what is ignored by rule.

An importer is a callable without arguments; every call returns the same stream. It reads tables and
lists, but not images: those are read when a shard is written (`load_samples.py`).

Every input (a line of a table, a file of a folder, a row of a parquet file) is part of exactly one
element of the stream, so that the numbers of inputs add up to those of the source.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

MAX_KEY_BYTES = 90
"""Maximum length of a key. The oldest tar header format has 100 bytes for a member's name,
extension included."""


class Record(NamedTuple):
    """An image-text pair: captions and fields are loaded, the image is only referenced."""

    key: str
    """Key from the source; `UniqueKeys` makes it valid and unique."""
    image: str
    """Path or URL of the image file; empty for a parquet row, which contains the image."""
    captions: tuple[str, ...]
    """The first becomes the `.txt` member; several also go to the field `captions` of the `.json`
    member."""
    fields: Mapping[str, object]
    """Further content of the `.json` member."""
    origin: str
    """Location in the source, for reports: `pairs.csv line 17`."""
    row: tuple[str, int] | None = None
    """Parquet file and row that contain image, captions and fields; these are then empty here."""
    inputs: int = 1
    """Number of inputs that it consists of, such as lines of a table."""


class SkippedRow(NamedTuple):
    """A row of the source that does not become a sample."""

    origin: str
    reason: str
    """Short identifier, as in `DataError.slug`: `no-caption`, `missing-image` ..."""
    detail: str
    inputs: int = 1


class Ignored(NamedTuple):
    """Inputs that a rule excludes, which are counted but not listed."""

    origin: str
    rule: str
    """Such as `blank line` or `hidden file`."""
    inputs: int = 1


Importer = Callable[[], Iterator[Record | SkippedRow | Ignored]]


class UniqueKeys:
    """Makes keys that are valid in WebDataset and unique."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def make(self, key: str) -> str:
        """The key with invalid characters replaced, and a number appended if it is in use."""
        unique = base = safe_key(key)
        number = 1
        while unique in self._used:
            number += 1
            unique = f"{base}-{number}"
        self._used.add(unique)
        return unique


def safe_key(key: str) -> str:
    """A key of letters, digits, `_`, `-` and `/`, with other characters replaced by `_`.

    Keys that are long or have no letter or digit end in a hash of the original. There is no dot
    (WebDataset ends a key at the first one), no leading slash and no `..`.
    """
    parts = [
        re.sub(r"[^A-Za-z0-9_-]", "_", part)
        for part in key.split("/")
        if part not in ("", ".", "..")
    ]
    safe = "/".join(parts)

    # Eight bytes remain for the number that makes a key unique.
    if len(safe) > MAX_KEY_BYTES - 8 or not re.search("[A-Za-z0-9]", safe):
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        safe = f"{safe[: MAX_KEY_BYTES - 24].rstrip('/_') or 'sample'}-{digest}"
    return safe


def class_caption(name: str, template: str) -> str:
    """The caption for the name of a class: `template` with the name, in words, instead of `{}`."""
    return template.replace("{}", name.replace("_", " ").replace("-", " ").strip())


def strip_extension(name: str) -> str:
    """A path without its extension: `a/b.c.jpg` becomes `a/b.c`."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.rpartition(".")
    return folder + slash + (stem if dot and stem else base)
