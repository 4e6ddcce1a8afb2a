"""Drop-lists: samples to exclude from training, by shard and index.

    {"version": 1, "about": {"made by": "vlmoe data dedup", ...},
     "shards": {"shard-000007.tar": {"sha256": "...", "samples": [3, 17]}, ...}}

Shards are named as in their manifest. The SHA-256 of each shard is stored too: in a shard that was
rewritten, the same indices would be other samples. The training order is computed over the
remaining samples, so dropped samples leave no gaps in batches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.common.tables import counted
from data_pipeline.shards.manifest import Manifest

logger = logging.getLogger(__name__)

DROP_VERSION = 1

Dropped = Mapping[int, np.ndarray]
"""Shard index in the manifest -> indices of its dropped samples (int64, ascending)."""


@dataclass(frozen=True, kw_only=True)
class DroppedShard:
    """The dropped samples of one shard."""

    sha256: str
    """SHA-256 of the shard that the indices refer to."""
    samples: tuple[int, ...]
    """Sample indices in the shard, ascending."""


@dataclass(frozen=True, kw_only=True)
class DropList:
    """Samples to exclude."""

    shards: Mapping[str, DroppedShard]
    """Shard name in the manifest -> its dropped samples."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: which command made the list, from what and why. Must be JSON-serializable."""

    @property
    def total_samples(self) -> int:
        """Number of dropped samples."""
        return sum(len(shard.samples) for shard in self.shards.values())


def make_drop_list(
    manifest: Manifest, dropped: Mapping[int, Iterable[int]], about: Mapping[str, Any] | None = None
) -> DropList:
    """Build a drop-list for samples of a manifest.

    Args:
        manifest: The shards.
        dropped: Shard index -> sample indices, in any order; duplicates are allowed.
        about: Provenance.
    """
    shards = {}
    for shard in sorted(dropped):
        entry = manifest.shards[shard]
        samples = tuple(sorted({int(sample) for sample in dropped[shard]}))

        if samples:
            shards[entry.name] = DroppedShard(sha256=entry.sha256, samples=samples)

    return DropList(shards=shards, about=dict(about or {}))


def write_drop_list(url: str | os.PathLike[str], drop: DropList) -> None:
    """Write a drop-list as JSON to a local path or an object store.

    Raises:
        StorageError: The destination cannot be written.
    """

    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    # One shard per line, so that drop-lists can be compared with `diff`.
    rows = (
        f"{dump(name)}: {dump({'sha256': row.sha256, 'samples': list(row.samples)})}"
        for name, row in drop.shards.items()
    )
    header = f'{{"version": {DROP_VERSION},\n "about": {dump(dict(drop.about))},\n "shards": {{\n  '
    content = header + ",\n  ".join(rows) + "\n }\n}\n"
    storage.write_bytes(os.fspath(url), content.encode())


def read_drop_list(url: str | os.PathLike[str], *, timeout_seconds: float = 60.0) -> DropList:
    """Read a drop-list written by `write_drop_list`.

    Raises:
        DataError: The file is missing or is not a drop-list.
    """
    data = storage.read_bytes(os.fspath(url), timeout_seconds=timeout_seconds)
    where = storage.redact(os.fspath(url))

    try:
        content = json.loads(data)
        version = content["version"]
        rows = dict(content["shards"])
        about = dict(content.get("about") or {})
        shards = {str(name): _parse_shard(row) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{where} is not a drop-list ({type(error).__name__}: {error}); expected "
            f'{{"version": {DROP_VERSION}, "shards": '
            f'{{NAME: {{"sha256": ..., "samples": [...]}}}}}}'
        ) from None

    if version != DROP_VERSION:
        raise DataError(
            f"{where} has version {version!r}, but this program reads version {DROP_VERSION}"
        )

    return DropList(shards=shards, about=about)


def apply_drop_list(
    drop: DropList, manifest: Manifest, where: str = "the drop-list"
) -> dict[int, np.ndarray]:
    """Return the samples of a manifest that a drop-list excludes.

    One drop-list may serve several parts of a dataset, so it may name shards that are not in the
    manifest; their number is logged as a warning.

    Args:
        drop: The drop-list.
        manifest: The shards.
        where: Address of the drop-list, for messages.

    Returns:
        Shard index -> sample indices (int64, ascending).

    Raises:
        DataError: A shard changed since the list was made, or no shard of the list is in the
            manifest.
    """
    url = storage.redact(manifest.url)
    dropped: dict[int, np.ndarray] = {}
    for shard, entry in enumerate(manifest.shards):
        row = drop.shards.get(entry.name)
        if row is None:
            continue

        if row.sha256 != entry.sha256:
            raise DataError(
                f"{where} was made for a different version of {entry.name} (SHA-256 "
                f"{row.sha256[:16]}..., but the manifest {url} has {entry.sha256[:16]}...), so its "
                f"indices would drop other samples; create the drop-list again"
            )
        if row.samples and row.samples[-1] >= entry.samples:
            raise DataError(
                f"{where} drops sample {row.samples[-1]} of {entry.name}, which has only "
                f"{counted(entry.samples, 'sample')}"
            )

        if row.samples:
            dropped[shard] = np.array(row.samples, dtype=np.int64)

    unknown = len(drop.shards) - len({entry.name for entry in manifest.shards} & set(drop.shards))
    if drop.shards and unknown == len(drop.shards):
        raise DataError(f"{where} names none of the shards of {url}: it was made for other data")
    if unknown:
        logger.warning(
            "%s: %d of its %d shards are not in %s", where, unknown, len(drop.shards), url
        )

    return dropped


def dropped_fingerprint(dropped: Dropped) -> str:
    """Hash of the dropped samples; empty if no sample is dropped."""
    if not dropped:
        return ""

    digest = hashlib.sha256()
    for shard in sorted(dropped):
        digest.update(f"{shard}:{len(dropped[shard])}:".encode())
        digest.update(np.ascontiguousarray(dropped[shard], dtype="<i8").tobytes())
    return digest.hexdigest()[:32]


def _parse_shard(row: Mapping[str, Any]) -> DroppedShard:
    samples = row["samples"]
    if not isinstance(samples, list) or not all(
        type(sample) is int and sample >= 0 for sample in samples
    ):
        raise ValueError("`samples` is not a list of non-negative integers")
    if not isinstance(row["sha256"], str):
        raise ValueError("`sha256` is not a string")
    return DroppedShard(sha256=row["sha256"], samples=tuple(sorted(set(samples))))
