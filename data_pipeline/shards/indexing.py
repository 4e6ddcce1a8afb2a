"""`vlmoe data index`: make the manifest of shards that somebody else wrote.

Each shard is walked from end to end once; a damaged one is an error here, before any training.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.common.logs import Progress
from data_pipeline.shards.manifest import (
    MANIFEST_NAME,
    RESERVED,
    Manifest,
    ShardEntry,
    describe_shard,
    write_manifest,
)
from data_pipeline.shards.shard_index import INDEX_SUFFIX, sidecar_path

logger = logging.getLogger(__name__)


def index_shards(
    shards: str | Sequence[str],
    out: str = "",
    *,
    about: Mapping[str, Any] | None = None,
    timeout_seconds: float = 300.0,
) -> Manifest:
    """Index shards, writing an index beside each and a manifest for all.

    Args:
        shards: A folder (all its `.tar` files), or shards: paths or addresses, with braces
            (`s3://bucket/train-{000..127}.tar`) or, if local, wildcards.
        out: The manifest's folder; empty is the folder that holds all the shards.
        about: More to say in the manifest; None keeps what an older manifest of the folder says
            (sources, licences).
        timeout_seconds: Longest wait for one request to a store.

    Raises:
        DataError: There are no shards, one is damaged, or they do not lie under `out`.
    """
    urls = expand([shards] if isinstance(shards, str) else shards)
    folder = (out or _common_folder(urls)).rstrip("/") or "/"
    names = [_name_under(url, folder) for url in urls]
    entries = []
    with Progress("indexing", len(urls), "shards") as progress:
        for url, name in zip(urls, names, strict=True):
            entries.append(_describe(url, name, timeout_seconds))
            progress.update()
    return write_manifest(folder, entries, _older_about(folder) if about is None else about)


def expand(patterns: Sequence[str]) -> list[str]:
    """Addresses of the shards that folders, braces and wildcards stand for, each once, in order.

    Raises:
        DataError: One of them stands for nothing.
    """
    from braceexpand import braceexpand

    found: dict[str, None] = {}
    for pattern in patterns:
        before = len(found)
        try:
            urls = list(braceexpand(pattern))
        except ValueError as error:
            raise DataError(f"{storage.redact(pattern)}: its braces do not close; write {{000..127}}") from error
        for url in urls:
            found.update(dict.fromkeys(_shards_at(url)))
        if len(found) == before:
            raise DataError(
                f"no shards at {storage.redact(pattern)}; give a folder that holds .tar files, or their paths"
            )
    return list(found)


def _shards_at(url: str) -> list[str]:
    """One address as a list: the shards of a folder, the matches of a wildcard, or itself."""
    if url.endswith(".tar") and not glob.has_magic(url):
        return [url]
    if storage.is_local(url):
        path = storage.local_path(url)
        if glob.has_magic(str(path)):
            return sorted(name for name in glob.glob(str(path), recursive=True) if name.endswith(".tar"))
        if path.is_file():
            return [str(path)]
    return [storage.join(url, name) for name in storage.list_names(url) if name.endswith(".tar")]


def _common_folder(urls: Sequence[str]) -> str:
    folders = [storage.parent(url) for url in urls]
    if not all(map(storage.is_local, urls)):
        return folders[0]
    if len({os.path.isabs(folder) for folder in folders}) > 1:
        folders = [os.path.abspath(folder) for folder in folders]
    return os.path.commonpath(folders) or "."


def _name_under(url: str, folder: str) -> str:
    """A shard's path relative to the manifest's folder."""
    if storage.is_local(url) and storage.is_local(folder):
        name = os.path.relpath(storage.local_path(url), storage.local_path(folder))
    else:
        name = url.removeprefix(f"{folder}/") if url.startswith(f"{folder}/") else ".."
    if name.startswith(".."):
        raise DataError(
            f"shard {storage.redact(url)} does not lie under {storage.redact(folder)}; a manifest describes "
            f"the shards of its own folder"
        )
    return name


def _older_about(folder: str) -> dict[str, Any]:
    """What the manifest that is replaced says beside its shards.

    Read by hand: a manifest that no longer fits its shards is a reason to index them again.
    """
    url = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(url):
        return {}
    try:
        older = dict(json.loads(storage.read_bytes(url)))
    except (ValueError, TypeError) as error:
        logger.warning("%s is no manifest (%s); what it said about the data is lost", storage.redact(url), error)
        return {}
    return {key: value for key, value in older.items() if key not in RESERVED}


def _describe(url: str, name: str, timeout_seconds: float) -> ShardEntry:
    if storage.is_local(url):
        return describe_shard(storage.local_path(url), name)
    with tempfile.TemporaryDirectory(prefix="vlmoe-index-") as folder:
        copy = Path(folder) / "shard.tar"
        storage.fetch_to_file(url, copy, timeout_seconds=timeout_seconds)
        try:
            entry = describe_shard(copy, name)
        except DataError as error:
            raise DataError(str(error).replace(str(copy), storage.redact(url))) from error
        storage.write_bytes(url + INDEX_SUFFIX, sidecar_path(copy).read_bytes())
    return entry
