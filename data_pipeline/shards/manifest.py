"""The manifest of a folder of shards: `manifest.json`, the file that training starts from.

    {"version": 3, "total_samples": 1024,
     "shards": [{"name": "shard-000000.tar", "samples": 512, "bytes": ..., "sha256": "...",
                 "index": "shard-000000.tar.index", "index_sha256": "..."}, ...],
     ... and metadata of the dataset (licenses, sources) ...}

The number of samples is known before any shard is read, so the order of training can be planned,
and a shard that is missing, truncated or replaced is detected.

A manifest and its indices can be in another folder than the shards (e.g. if their bucket is
read-only): then `"base"` is the folder of the shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.json_file import write_json
from data_pipeline.common.object_store import REQUEST_SECONDS
from data_pipeline.common.store_errors import ErrorKind
from data_pipeline.common.tables import counted
from data_pipeline.shards.index_cache import RemoteIndex, open_cached, read_index
from data_pipeline.shards.shard_entry import ShardEntry, make_entry
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.shard_paths import resolve_base

__all__ = [
    "INPUTS_FIELD",
    "MANIFEST_NAME",
    "RESERVED_KEYS",
    "SKIPPED_FIELD",
    "SKIPPED_NAME",
    "Manifest",
    "ShardEntry",
    "make_entry",
    "load_index",
    "load_manifest",
    "parse_manifest",
    "invalidate_manifest",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
SKIPPED_NAME = "skipped.jsonl"
"""List of the source's rows that are not in the shards, written by `vlmoe data write`."""
VERSION = 3
_UNFINISHED = {"version": VERSION, "unfinished": True}
INPUTS_FIELD, SKIPPED_FIELD = "inputs", "skipped"
"""Metadata of `vlmoe data write`: numbers of inputs, and of skipped rows by reason."""
RESERVED_KEYS = ("version", "base", "shards", "total_samples")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards of one folder, in order."""

    url: str
    """The folder of the manifest and the indices."""
    base: str = ""
    """The folder that shard names are relative to; empty becomes the manifest's folder."""
    shards: tuple[ShardEntry, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """All other keys of the file: sources, licenses."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", self.base or self.url)

    @property
    def total_samples(self) -> int:
        """Number of samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def shard_url(self, shard: ShardEntry) -> str:
        """Address of a shard."""
        return storage.join(self.base, shard.name)

    def index_url(self, shard: ShardEntry) -> str:
        """Address of a shard's index."""
        return storage.join(self.url, shard.index)

    def fingerprint(self) -> str:
        """SHA-256 of the shards' contents and order, independent of their location."""
        rows = [[shard.name, shard.samples, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def load_manifest(
    url_or_folder: str | os.PathLike[str], *, timeout_seconds: float = 60.0
) -> Manifest:
    """Read the manifest of a folder of shards.

    Args:
        url_or_folder: The folder, or the manifest file itself (its name ends in `.json`); local or
            in a store.
        timeout_seconds: Time limit for a store.

    Raises:
        DataError: It does not exist, or is not a manifest.
    """
    address = os.fspath(url_or_folder)
    is_file = address.partition("?")[0].endswith(".json")
    url = address if is_file else storage.join(address, MANIFEST_NAME)
    folder = storage.parent(url)
    try:
        data = storage.read_bytes(url, timeout_seconds=timeout_seconds)
    except StorageError as error:
        is_missing = error.kind == ErrorKind.MISSING or isinstance(
            error.__cause__ or error.__context__, FileNotFoundError
        )
        if not is_missing:
            raise StorageError(f"cannot load the manifest of the shards: {error}") from error
        raise StorageError(
            f"no manifest of shards: {error}. If the folder contains shards, create the manifest "
            f"with `vlmoe data index {storage.redact(folder)}`"
        ) from error
    return parse_manifest(data, folder, storage.redact(url))


def parse_manifest(data: bytes, folder: str, where: str) -> Manifest:
    """Parse the contents of a manifest file.

    Args:
        data: The contents.
        folder: The folder of the file.
        where: Its address, for messages.

    Raises:
        DataError: The contents are not a manifest, or are inconsistent.
    """
    remedy = f"create it again with `vlmoe data index {storage.redact(folder)}`"
    try:
        content = json.loads(data)
        if content == _UNFINISHED:
            raise DataError(
                "these shards are still being written, or writing was interrupted; run the command "
                "again to complete them"
            )
        version = content["version"]
        # Rows of another version would fail with a less helpful error.
        rows = content["shards"] if version == VERSION else []
        total, entries = content["total_samples"], tuple(ShardEntry(**row) for row in rows)
        base = resolve_base(content.get("base", ""), folder)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where} is not a manifest ({type(error).__name__}: {error}); {remedy}"
        ) from error

    if version != VERSION:
        raise DataError(
            f"{where} has version {version!r}, but version {VERSION} is required; {remedy}"
        )
    if duplicate := _duplicate([entry.name for entry in entries]):
        raise DataError(f"{where} lists the shard {duplicate!r} twice; {remedy}")
    metadata = {key: value for key, value in content.items() if key not in RESERVED_KEYS}
    manifest = Manifest(url=folder, base=base, shards=entries, metadata=metadata)
    if manifest.total_samples != total or not total:
        raise DataError(
            f"{where} has total_samples {total}, but lists "
            f"{counted(manifest.total_samples, 'sample')} in {counted(len(entries), 'shard')}; "
            f"{remedy}"
        )
    return manifest


def load_index(
    manifest: Manifest,
    shard: ShardEntry,
    *,
    cache_dir: str = "",
    timeout_seconds: float = 60.0,
    request_seconds: float = REQUEST_SECONDS,
) -> ShardIndex:
    """Open and check the index of one shard.

    Args:
        manifest: The shard's manifest.
        shard: One of its shards.
        cache_dir: Local folder for copies of indices in a store, shared by all processes of a
            machine; if it is empty or cannot be used, the index is read into memory.
        timeout_seconds: Limit for a store, all attempts together.
        request_seconds: Timeout of one request to it.

    Raises:
        DataError: It is missing, has another hash than in the manifest, or does not match the shard
            (slug `corrupt-index`).
        StorageError: It cannot be read.
    """
    url = manifest.index_url(shard)
    where = storage.redact(url)
    remote = RemoteIndex(url, shard.index_sha256, timeout_seconds, request_seconds)
    if storage.is_local(url):
        index = ShardIndex.open(storage.local_path(url), where, sha256=shard.index_sha256)
    elif cache_dir:
        index = open_cached(remote, Path(cache_dir) / "index")
    else:
        index = read_index(remote)

    if (len(index), index.shard_bytes, index.sha256) != (shard.samples, shard.bytes, shard.sha256):
        raise DataError(
            f"{where} describes {len(index)} samples in a shard of {index.shard_bytes} bytes with "
            f"SHA-256 {index.sha256}, but the manifest has {shard.samples} in {shard.bytes} with "
            f"{shard.sha256}; create it again with "
            f"`vlmoe data index {storage.redact(manifest.base)}`",
            slug="corrupt-index",
        )
    return index


def write_manifest(
    folder: str | os.PathLike[str],
    entries: Sequence[ShardEntry],
    metadata: Mapping[str, Any] | None = None,
    *,
    base: str = "",
    name: str = MANIFEST_NAME,
) -> Manifest:
    """Write `folder/manifest.json` atomically, replacing an existing one.

    Args:
        folder: Folder of the manifest and the indices; local or in a store.
        entries: Its shards, in order.
        metadata: Further keys about the dataset; must be JSON.
        base: Folder of the shards if it is another one: an address, or a path relative to `folder`.
        name: Name of the file; must end in `.json`.

    Raises:
        DataError: There are no samples, a shard name occurs twice, or `metadata` uses a reserved
            key.
    """
    metadata = dict(metadata or {})
    names = [entry.name for entry in entries]
    where = storage.redact(os.fspath(folder))
    if not any(entry.samples for entry in entries):
        raise DataError(
            f"{where}: there is no sample in its {counted(len(names), 'shard')} {names[:5]}"
        )
    if duplicate := _duplicate(names):
        raise DataError(f"{where}: two shards have the name {duplicate!r}")
    if reserved := sorted(set(metadata) & set(RESERVED_KEYS)):
        raise DataError(f"metadata has the keys {reserved}, which the manifest itself uses")

    url = os.fspath(folder)
    manifest = Manifest(
        url=url, base=resolve_base(base, url), shards=tuple(entries), metadata=metadata
    )
    content: dict[str, Any] = {"version": VERSION, "total_samples": manifest.total_samples}
    content |= {"base": base} if manifest.base != manifest.url else {}
    content |= {"shards": [_row(entry) for entry in entries], **metadata}

    write_json(storage.join(url, name), content, indent=1)
    return manifest


def invalidate_manifest(folder: str | os.PathLike[str]) -> None:
    """Remove a folder's manifest, if there is one, before its shards are changed.

    Raises:
        StorageError: It cannot be removed.
    """
    url = storage.join(os.fspath(folder), MANIFEST_NAME)
    if storage.is_local(url):
        try:
            storage.local_path(url).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot replace {url}: {error.strerror}; check the folder's permissions"
            ) from error
    elif storage.exists(url):
        # Overwritten instead of deleted: write access to a bucket may not include deletion.
        write_json(url, _UNFINISHED, indent=None)


def _row(entry: ShardEntry) -> dict[str, Any]:
    optional = ("etag", "corruption")
    return {key: value for key, value in asdict(entry).items() if value or key not in optional}


def _duplicate(names: Sequence[str]) -> str | None:
    """A name that occurs twice, if there is one."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
