"""What every importer yields: one pair that is to become a sample, or why something is none.

An importer is a function without arguments that can be called again and then gives the same stream.
It reads tables and lists, never pictures: those are read later, by whoever writes the shard
(`fill.py`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

MAX_KEY_BYTES = 90
"""Longest key. The oldest kind of tar header has 100 bytes for a name, extension included."""


class Record(NamedTuple):
    """One pair. Captions and fields are known; the picture is only named."""

    key: str
    """As the source names it; `Keys` makes it safe and unique."""
    picture: str
    """Path or address of the picture's file; empty for a row of a table that holds the bytes."""
    captions: tuple[str, ...]
    """The first becomes the `.txt` member; several go to the field `captions` of the `.json`
    member."""
    fields: Mapping[str, object]
    """More to keep in the `.json` member."""
    origin: str
    """Where it stands in the source, for reports: `pairs.csv line 17`."""
    row: tuple[str, int] | None = None
    """Parquet file and row that hold picture, captions and fields; those are then empty here."""


class LeftOut(NamedTuple):
    """Something of the source that becomes no sample."""

    origin: str
    reason: str
    """One word by which it is counted: `no-caption`, `missing-picture` ..."""
    detail: str


Importer = Callable[[], Iterator[Record | LeftOut]]


class Keys:
    """Makes keys that WebDataset can hold, each once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def make(self, wanted: str) -> str:
        """A key like `wanted`: letters, digits, `_`, `-` and `/`; another number behind it if it is
        taken."""
        key = base = safe_key(wanted)
        number = 1
        while key in self._seen:
            number += 1
            key = f"{base}-{number}"
        self._seen.add(key)
        return key


def safe_key(wanted: str) -> str:
    """`wanted` with every other character as `_`; long or emptied names end in a hash of the whole.

    There is no dot (WebDataset ends a key at the first one), no leading slash and no way up.
    """
    parts = [
        re.sub(r"[^A-Za-z0-9_-]", "_", part)
        for part in wanted.split("/")
        if part not in ("", ".", "..")
    ]
    key = "/".join(parts)
    if len(key) > MAX_KEY_BYTES - 8 or not re.search(
        "[A-Za-z0-9]", key
    ):  # room for what makes it unique
        digest = hashlib.sha256(wanted.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        key = f"{key[: MAX_KEY_BYTES - 24].rstrip('/_') or 'sample'}-{digest}"
    return key


def stem_of(name: str) -> str:
    """A path without its extension: `a/b.c.jpg` is `a/b.c`."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.rpartition(".")
    return folder + slash + (stem if dot and stem else base)
