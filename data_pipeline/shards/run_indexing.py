"""Indexes shards that have no manifest: training and all commands can read any shards.

The manifests of a run are stored in its folder, so that a resumed run uses the same data; those of
other commands in a temporary folder.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.literal_paths import is_pattern
from data_pipeline.common.processes import SINGLE_PART, Part
from data_pipeline.common.tables import counted
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest, load_manifest
from data_pipeline.shards.patterns import expand_patterns, is_shard_name

logger = logging.getLogger(__name__)


def run_manifest_folder(run_folder: str | os.PathLike[str], address: str, phase: int = 1) -> str:
    """Where a run stores the manifest of the shards at an address, which may have changed between
    phases (`data.phase`)."""
    name = hashlib.sha256(_absolute(address).encode()).hexdigest()[:16]
    return os.path.join(run_folder, "manifests", name if phase == 1 else f"{name}-phase{phase}")


def needs_indexing(address: str, *, timeout_seconds: float = 60.0) -> bool:
    """Whether an address names shards that have no manifest; `@FILE` names a list of shards.

    False if there are neither: opening the manifest then raises a more specific error.

    Args:
        address: An address of `data.train`.
        timeout_seconds: Limit for one operation on a store.
    """
    path = address.partition("?")[0] if address.startswith(("http://", "https://")) else address
    if path.endswith(".json"):
        return False
    if address.startswith("@") or is_shard_name(path) or is_pattern(path):
        return True
    if storage.exists(storage.join(address, MANIFEST_NAME), timeout_seconds=timeout_seconds):
        return False
    try:
        names = storage.list_names(address, timeout_seconds=timeout_seconds)
    except StorageError:
        return False
    return any(map(is_shard_name, names))


def open_manifest(
    address: str, *, salvage: bool = True, workers: int = 1, timeout_seconds: float = 60.0
) -> Manifest:
    """The manifest of an address; shards without one are indexed for this process.

    Args:
        address: A manifest, its folder, or shards: a file, a folder, braces, wildcards or `@FILE`.
        salvage: Use what can be read of corrupt shards; otherwise they are an error.
        workers: Number of processes that read shards.
        timeout_seconds: Limit for one operation on a store.

    Raises:
        DataError: There are neither a manifest nor shards, or they cannot be read.
    """
    if not needs_indexing(address, timeout_seconds=timeout_seconds):
        return load_manifest(address, timeout_seconds=timeout_seconds)
    logger.info(
        "%s has no manifest: its shards are read once to count their samples; `vlmoe data index` "
        "creates one",
        storage.redact(address),
    )
    return index_shards(
        address,
        run_manifest_folder(_temporary_folder(), address),
        workers=workers,
        salvage=salvage,
        timeout_seconds=timeout_seconds,
    )


@cache
def _temporary_folder() -> str:
    """A folder that is removed when this process ends."""
    folder, pid = tempfile.mkdtemp(prefix="vlmoe-manifests-"), os.getpid()

    def remove() -> None:
        if os.getpid() == pid:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def index_for_run(
    shards: str | Sequence[str],
    folder: str,
    *,
    workers: int = 1,
    part: Part = SINGLE_PART,
    timeout_seconds: float = 300.0,
) -> Manifest:
    """Index shards without a manifest at the start of a run, into a local folder.

    If the folder already has a manifest of the same addresses, it is used unchanged, even if shards
    were added or changed since, so that a resumed run continues with the same data. Corrupt shards
    do not stop a run; what can be read of them is used. With several ranks, each rank calls this
    with its `part` and waits for the others; then one rank calls it without `part`, and the others
    load the manifest of `folder`.

    Args:
        shards: As for `index_shards`.
        folder: Folder for manifest and indices, accessible to all ranks; one per data source.
        workers: Number of processes of this rank.
        part: `(rank, world_size)`.
        timeout_seconds: As for `index_shards`.

    Raises:
        DataError: There are no shards, or they cannot be read.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    indexed_from = [storage.redact(_absolute(pattern)) for pattern in patterns]
    if storage.exists(storage.join(folder, MANIFEST_NAME)):
        manifest = load_manifest(folder)
        if manifest.metadata.get("indexed_from") == indexed_from:
            if part == SINGLE_PART:
                _warn_about_other_shards(manifest, patterns)
            return manifest

    parts_are_done = part == SINGLE_PART and any(storage.local_path(folder).glob("**/*.index"))
    if part[0] == 0 and not parts_are_done:
        logger.warning(
            "%s has no manifest: its shards are first read once from end to end. This is repeated "
            "for every new run, and shards that are already corrupt cannot be detected. To avoid "
            "both, run `vlmoe data index` once on intact shards",
            ", ".join(indexed_from),
        )
    return index_shards(
        shards,
        folder,
        workers=workers,
        part=part,
        salvage=True,
        metadata={"indexed_from": indexed_from},
        timeout_seconds=timeout_seconds,
    )


def _absolute(address: str) -> str:
    """The address, from the working directory if it is a relative path: `config.yaml` of a run
    folder has absolute ones."""
    prefix = "@" if address.startswith("@") else ""
    path = address.removeprefix("@")
    if storage.is_local(path) and not path.startswith(("/", "file:")):
        return prefix + os.path.abspath(path)
    return address


def _warn_about_other_shards(manifest: Manifest, patterns: Sequence[str]) -> None:
    """Warn if the addresses now have other shards than the manifest of the run."""
    try:
        now = set(expand_patterns(patterns))
    except DataError:  # reading the shards reports what is wrong
        return
    known = {manifest.shard_url(entry) for entry in manifest.shards}
    added, removed = len(now - known), len(known - now)
    if added or removed:
        logger.warning(
            "%s: %s added and %d removed since the run indexed them; the run continues with those "
            "that it knows. Train on others in a new phase (data.phase)",
            ", ".join(map(storage.redact, patterns)),
            counted(added, "shard was", "shards were"),
            removed,
        )
