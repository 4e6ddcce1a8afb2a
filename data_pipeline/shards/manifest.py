"""What a folder of shards holds: `manifest.json`, the one file that training starts from.

    {"version": 2, "total_samples": 1024,
     "shards": [{"name": "shard-000000.tar", "samples": 512, "bytes": ..., "sha256": "...",
                 "index": "shard-000000.tar.index", "index_sha256": "..."}, ...],
     ... and what the maker of the data wants to say about it (licenses, sources) ...}

The number of samples is known before anything is read, so the order of training can be planned; and
a shard that is missing, short or different is noticed instead of read as if nothing were wrong.

A manifest and its indices may lie elsewhere than the shards (a bucket that cannot be written to):
then `"base"` names the folder of the shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.object_store import REQUEST_SECONDS
from data_pipeline.common.open_files import is_out_of_files
from data_pipeline.common.store_errors import Kind
from data_pipeline.shards.places import base_folder
from data_pipeline.shards.shard_entry import ShardEntry, entry_of
from data_pipeline.shards.shard_index import INDEX_SUFFIX, ShardIndex, check_index_hash

__all__ = [
    "MANIFEST_NAME",
    "RESERVED",
    "Manifest",
    "ShardEntry",
    "entry_of",
    "load_index",
    "load_manifest",
    "parse_manifest",
    "withdraw_manifest",
    "write_manifest",
]

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
VERSION = 2
_UNFINISHED = {"version": VERSION, "unfinished": True}
RESERVED = ("version", "base", "shards", "total_samples")
_told_of: set[Path] = set()
"""Folders of which it has been said that they cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The shards of one folder, in order."""

    url: str
    """The folder that holds it and the indices."""
    base: str = ""
    """The folder that the shards' names are relative to; empty is made the manifest's own."""
    shards: tuple[ShardEntry, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that the file says: sources, licenses."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", self.base or self.url)

    @property
    def total_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    def shard_url(self, shard: ShardEntry) -> str:
        """Where a shard lies."""
        return storage.join(self.base, shard.name)

    def index_url(self, shard: ShardEntry) -> str:
        """Where a shard's index lies."""
        return storage.join(self.url, shard.index)

    def fingerprint(self) -> str:
        """64 hexadecimal digits that stand for what the shards hold, and in which order; not for
        where."""
        rows = [[shard.name, shard.samples, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def load_manifest(
    url_or_folder: str | os.PathLike[str], *, timeout_seconds: float = 60.0
) -> Manifest:
    """Read the manifest of a folder of shards.

    Args:
        url_or_folder: The folder, or the manifest file itself (its name ends in `.json`); local or
        in
            a store.
        timeout_seconds: Longest wait for a store.

    Raises:
        DataError: There is none, or it is not a manifest.
    """
    given = os.fspath(url_or_folder)
    url = given if given.partition("?")[0].endswith(".json") else storage.join(given, MANIFEST_NAME)
    folder = storage.parent(url)
    try:
        data = storage.read_bytes(url, timeout_seconds=timeout_seconds)
    except StorageError as error:
        missing = error.kind == Kind.MISSING or isinstance(
            error.__cause__ or error.__context__, FileNotFoundError
        )
        index = (
            f". If the shards are there, make it with `vlmoe data index {storage.redact(folder)}`"
        )
        raise StorageError(f"no manifest of shards: {error}{index if missing else ''}") from error
    return parse_manifest(data, folder, storage.redact(url))


def parse_manifest(data: bytes, folder: str, where: str) -> Manifest:
    """A manifest from the contents of its file.

    Args:
        data: The contents.
        folder: Where the file lies.
        where: Its address, for messages.

    Raises:
        DataError: They are no manifest, or contradict themselves.
    """
    remedy = f"make it again with `vlmoe data index {storage.redact(folder)}`"
    try:
        found = json.loads(data)
        if found == _UNFINISHED:
            raise DataError(
                "these shards are still being written, or that was broken off; call it again to end it"
            )
        version = found["version"]
        # Rows of another version would fail for reasons that help nobody.
        rows = found["shards"] if version == VERSION else []
        total, entries = found["total_samples"], tuple(ShardEntry(**row) for row in rows)
        base = base_folder(found.get("base", ""), folder)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where} is not a manifest ({type(error).__name__}: {error}); {remedy}"
        ) from error
    if version != VERSION:
        raise DataError(
            f"{where} has version {version!r}, but this program reads version {VERSION}; {remedy}"
        )
    if twice := _twice([entry.name for entry in entries]):
        raise DataError(f"{where} lists the shard {twice!r} twice; {remedy}")
    about = {key: value for key, value in found.items() if key not in RESERVED}
    manifest = Manifest(url=folder, base=base, shards=entries, about=about)
    if manifest.total_samples != total or not total:
        raise DataError(
            f"{where} announces {total} samples, but its {len(entries)} shards have "
            f"{manifest.total_samples}; {remedy}"
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
        cache_dir: Local folder where the index of a manifest in a store is kept, once for all
            processes of a machine; empty keeps it in memory, as does a folder that cannot be used.
        timeout_seconds: Longest wait for a store, all tries together.
        request_seconds: Longest time for one request to it.

    Raises:
        DataError: It is missing, is not the one the manifest was written with, or does not fit
        (slug
            `bad-index`).
        StorageError: It cannot be read.
    """
    url = manifest.index_url(shard)
    where = storage.redact(url)
    if storage.is_local(url):
        index = ShardIndex.open(storage.local_path(url), where, sha256=shard.index_sha256)
    elif cache_dir:
        index = _open_cached(
            url, where, shard, Path(cache_dir) / "index", timeout_seconds, request_seconds
        )
    else:
        index = _read_index(url, where, shard, timeout_seconds, request_seconds)
    if (len(index), index.shard_bytes, index.sha256) != (shard.samples, shard.bytes, shard.sha256):
        raise DataError(
            f"{where} describes {len(index)} samples in a shard of {index.shard_bytes} bytes with SHA-256 "
            f"{index.sha256}, but the manifest has {shard.samples} in {shard.bytes} with {shard.sha256}; make it "
            f"again with `vlmoe data index {storage.redact(manifest.base)}`",
            slug="bad-index",
        )
    return index


def write_manifest(
    folder: str | os.PathLike[str],
    entries: Sequence[ShardEntry],
    about: Mapping[str, Any] | None = None,
    *,
    base: str = "",
    name: str = MANIFEST_NAME,
) -> Manifest:
    """Write `folder/manifest.json`, replacing an older one at once.

    Args:
        folder: Where it and the indices lie; local or in a store.
        entries: Its shards, in order.
        about: More to say about the data; must be JSON.
        base: The shards' folder if it is another one: an address, or a path relative to `folder`.
        name: The file's name, which must end in `.json`.

    Raises:
        DataError: There are no samples, a name comes twice, or `about` uses a reserved key.
    """
    about = dict(about or {})
    names = [entry.name for entry in entries]
    if not any(entry.samples for entry in entries) or _twice(names):
        raise DataError(
            f"{storage.redact(os.fspath(folder))}: a manifest needs samples, in shards with different names; got "
            f"{names[:5]}"
        )
    if taken := sorted(set(about) & set(RESERVED)):
        raise DataError(f"about uses {taken}, which the manifest needs for itself")
    url = os.fspath(folder)
    manifest = Manifest(url=url, base=base_folder(base, url), shards=tuple(entries), about=about)
    content: dict[str, Any] = {"version": VERSION, "total_samples": manifest.total_samples}
    content |= {"base": base} if manifest.base != manifest.url else {}
    content |= {"shards": [_row(entry) for entry in entries], **about}
    data = json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"
    storage.write_bytes(storage.join(url, name), data)
    return manifest


def withdraw_manifest(folder: str | os.PathLike[str]) -> None:
    """Take a folder's manifest away, if it has one, because its shards are about to change.

    Raises:
        StorageError: It cannot be.
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
        # Overwritten rather than removed: who may write to a bucket may not always delete.
        storage.write_bytes(url, json.dumps(_UNFINISHED).encode())


def _row(entry: ShardEntry) -> dict[str, Any]:
    return {
        key: value for key, value in asdict(entry).items() if value or key not in ("etag", "damage")
    }


def _twice(names: Sequence[str]) -> str | None:
    """One name that comes twice, if any does."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _read_index(
    url: str, where: str, shard: ShardEntry, timeout_seconds: float, request_seconds: float
) -> ShardIndex:
    """An index in memory."""
    data = storage.read_bytes(url, timeout_seconds=timeout_seconds, request_seconds=request_seconds)
    check_index_hash(data, shard.index_sha256, where)
    return ShardIndex.from_bytes(data, where)


def _open_cached(
    url: str,
    where: str,
    shard: ShardEntry,
    folder: Path,
    timeout_seconds: float,
    request_seconds: float,
) -> ShardIndex:
    """The local copy of an index, made if there is none; in memory where the folder cannot be
    used."""
    try:
        return _open_copy(url, where, shard, folder, timeout_seconds, request_seconds)
    except (StorageError, OSError) as error:
        # Trouble of a store has a kind, and it is not mended by reading the same into memory.
        if getattr(error, "kind", "") or is_out_of_files(error):
            raise
        index = _read_index(url, where, shard, timeout_seconds, request_seconds)
        if folder not in _told_of:
            _told_of.add(folder)
            logger.warning(
                "%s cannot be used, so each process reads the indices of shards into memory: %s; look at "
                "data.cache_dir",
                folder,
                error,
            )
        return index


def _open_copy(
    url: str,
    where: str,
    shard: ShardEntry,
    folder: Path,
    timeout_seconds: float,
    request_seconds: float,
) -> ShardIndex:
    """The local copy of an index, made if there is none; its name says its contents, so copies
    never age."""
    path = folder / f"{shard.index_sha256}{INDEX_SUFFIX}"
    if path.exists():
        try:
            return ShardIndex.open(path, where, sha256=shard.index_sha256)
        except DataError as error:
            if is_out_of_files(error):
                raise
            path.unlink(missing_ok=True)  # a damaged disk: fetch it again
    # Two processes may both fetch it: it is small, and the second rename changes nothing.
    storage.fetch_to_file(
        url, path, timeout_seconds=timeout_seconds, request_seconds=request_seconds
    )
    try:
        return ShardIndex.open(path, where, sha256=shard.index_sha256)
    except DataError as error:
        if not is_out_of_files(error):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
