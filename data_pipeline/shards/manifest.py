"""What a folder of shards holds: `manifest.json`, the one file that training starts from.

    {"version": 1, "total_samples": 1024,
     "shards": [{"name": "shard-000000.tar", "samples": 512, "bytes": ..., "sha256": "...",
                 "index": "shard-000000.tar.index.json", "index_sha256": "..."}, ...],
     ... and what the maker of the data wants to say about it (licences, sources) ...}

The number of samples is known before anything is read, so the order of training can be planned; and
a shard that is missing, short or different is noticed instead of read as if nothing were wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.shards.shard_index import ShardIndex, index_shard, sidecar_path

__all__ = [
    "MANIFEST_NAME", "RESERVED", "Manifest", "ShardEntry", "ShardIndex", "describe_shard", "index_shard", "load_index",
    "load_manifest", "write_manifest",
]  # fmt: skip

MANIFEST_NAME = "manifest.json"
RESERVED = ("version", "shards", "total_samples")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard of a manifest."""

    name: str
    """Path relative to the manifest's folder."""
    samples: int
    bytes: int
    sha256: str
    index: str
    """Path of its index (`shard_index.py`), relative to the manifest's folder."""
    index_sha256: str

    def __post_init__(self) -> None:
        for name in (self.name, self.index):
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or name.startswith("/") or "://" in name:
                raise DataError(f"the shard name {name!r} leads out of the manifest's folder")
        if not all(isinstance(number, int) and number > 0 for number in (self.samples, self.bytes)):
            raise DataError(f"shard {self.name!r} has {self.samples} samples in {self.bytes} bytes")
        for digest in (self.sha256, self.index_sha256):  # part of file names in the cache
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise DataError(f"shard {self.name!r} has the SHA-256 {digest!r}, which is none")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards of one folder, in order."""

    url: str
    """The folder."""
    shards: tuple[ShardEntry, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that the file says: sources, licences."""

    @property
    def total_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def shard_url(self, shard: ShardEntry) -> str:
        """Where a shard lies."""
        return storage.join(self.url, shard.name)


def load_manifest(url_or_folder: str | os.PathLike[str], *, timeout_seconds: float = 60.0) -> Manifest:
    """Read the manifest of a folder of shards.

    Args:
        url_or_folder: The folder, or the manifest file itself (its name ends in `.json`); local or in
            a store.
        timeout_seconds: Longest wait for a store.

    Raises:
        DataError: There is none, or it is not a manifest.
    """
    given = os.fspath(url_or_folder)
    url = given if given.endswith(".json") else storage.join(given, MANIFEST_NAME)
    folder = storage.parent(url)
    try:
        data = storage.read_bytes(url, timeout_seconds=timeout_seconds)
    except StorageError as error:
        missing = isinstance(error.__cause__ or error.__context__, FileNotFoundError)
        index = f". If the shards are there, make it with `vlmoe data index {storage.redact(folder)}`"
        raise StorageError(f"no manifest of shards: {error}{index if missing else ''}") from error
    where = storage.redact(url)
    remedy = f"make it again with `vlmoe data index {storage.redact(folder)}`"
    try:
        found = json.loads(data)
        version, rows, total = found["version"], found["shards"], found["total_samples"]
        entries = tuple(ShardEntry(**row) for row in rows)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is not a manifest ({type(error).__name__}: {error}); {remedy}") from error
    if version != 1:
        raise DataError(f"{where} has version {version!r}, but this program reads version 1; {remedy}")
    about = {key: value for key, value in found.items() if key not in RESERVED}
    manifest = Manifest(url=folder, shards=entries, about=about)
    if manifest.total_samples != total or not entries:
        raise DataError(
            f"{where} announces {total} samples, but its {len(entries)} shards have "
            f"{manifest.total_samples}; {remedy}"
        )
    return manifest


def load_index(
    manifest: Manifest, shard: ShardEntry, *, with_members: bool = True, timeout_seconds: float = 60.0
) -> ShardIndex:
    """Read and check the index of one shard.

    Raises:
        DataError: It is missing, is not the one the manifest was written with, or does not fit.
    """
    url = storage.join(manifest.url, shard.index)
    where = storage.redact(url)
    remedy = f"make it again with `vlmoe data index {storage.redact(manifest.url)}`"
    data = storage.read_bytes(url, timeout_seconds=timeout_seconds)
    found = hashlib.sha256(data).hexdigest()
    if found != shard.index_sha256:
        raise DataError(
            f"{where} has SHA-256 {found}, but the manifest expects {shard.index_sha256}: one of the two "
            f"was changed; {remedy}"
        )
    index = ShardIndex.from_json(data, where, with_members=with_members)
    if len(index.keys) != shard.samples or int((index.offsets + index.extents).max()) > shard.bytes:
        raise DataError(
            f"{where} describes {len(index.keys)} samples, but the manifest has {shard.samples} in "
            f"{shard.bytes} bytes; {remedy}"
        )
    return index


def describe_shard(path: str | os.PathLike[str], name: str | None = None) -> ShardEntry:
    """Index one local shard, write the index beside it, and give its row for the manifest.

    Args:
        path: The shard.
        name: How the manifest calls it, if that is not its file name.

    Raises:
        DataError: The shard is damaged or has no samples; see `index_shard`.
    """
    index = index_shard(path)
    data = index.to_json()
    storage.write_bytes(str(sidecar_path(path)), data)
    shown = name or Path(path).name
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardEntry(
        name=shown,
        samples=len(index.keys),
        bytes=Path(path).stat().st_size,
        sha256=sha256,
        index=str(sidecar_path(shown)),
        index_sha256=hashlib.sha256(data).hexdigest(),
    )


def write_manifest(
    folder: str | os.PathLike[str], entries: Sequence[ShardEntry], about: Mapping[str, Any] | None = None
) -> Manifest:
    """Write `folder/manifest.json`, replacing an older one at once.

    Args:
        folder: Where the shards are; local or in a store.
        entries: Its shards, in order.
        about: More to say about the data; must be JSON.

    Raises:
        DataError: There are no shards, a name comes twice, or `about` uses a reserved key.
    """
    about = dict(about or {})
    names = [entry.name for entry in entries]
    if not names or len(set(names)) < len(names):
        raise DataError(f"{os.fspath(folder)}: a manifest needs shards with different names, got {names}")
    if taken := sorted(set(about) & set(RESERVED)):
        raise DataError(f"about uses {taken}, which the manifest needs for itself")
    manifest = Manifest(url=os.fspath(folder), shards=tuple(entries), about=about)
    content = {
        "version": 1,
        "total_samples": manifest.total_samples,
        "shards": [asdict(entry) for entry in entries],
        **about,
    }
    data = json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
    storage.write_bytes(storage.join(manifest.url, MANIFEST_NAME), data)
    return manifest
