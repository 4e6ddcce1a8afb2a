"""One row of a manifest: name, size, number of samples and hashes of a shard."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_pipeline.common.errors import DataError
from data_pipeline.shards.shard_index import ShardIndex, index_name


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard of a manifest."""

    name: str
    """Path relative to the manifest's `base`."""
    samples: int
    """0 for an empty shard."""
    bytes: int
    sha256: str
    index: str
    """Path of its index (`shard_index.py`), relative to the manifest's folder."""
    index_sha256: str
    etag: str = ""
    """ETag in the store when it was indexed; empty if unknown."""
    corruption: str = ""
    """What could not be read when it was indexed with `--salvage`; empty for an intact shard."""

    def __post_init__(self) -> None:
        for name in (self.name, self.index):
            parts = PurePosixPath(name).parts if isinstance(name, str) else ()
            if not parts or ".." in parts or name.startswith("/") or "://" in name or "\0" in name:
                raise DataError(f"the shard name {name!r} is not a path in the manifest's folder")
        are_integers = all(type(count) is int for count in (self.samples, self.bytes))
        if not are_integers or self.samples < 0 or self.bytes < min(self.samples, 1):
            raise DataError(f"shard {self.name!r} has {self.samples} samples in {self.bytes} bytes")
        for digest in (self.sha256, self.index_sha256):  # used in file names of the cache
            if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
                raise DataError(f"shard {self.name!r} has an invalid SHA-256: {digest!r}")
        for text in (self.etag, self.corruption):
            if not isinstance(text, str):
                raise DataError(f"shard {self.name!r} has {text!r} where a string is expected")


def make_entry(index: ShardIndex, name: str, index_data: bytes) -> ShardEntry:
    """The manifest's row for a shard.

    Args:
        index: Its index.
        name: Its path relative to the manifest's `base`.
        index_data: The index as bytes, as written to its file.
    """
    return ShardEntry(
        name=name,
        samples=len(index),
        bytes=index.shard_bytes,
        sha256=index.sha256,
        index=index_name(name),
        index_sha256=hashlib.sha256(index_data).hexdigest(),
        etag=index.etag,
        corruption=index.corruption,
    )
