"""Drop-lists: samples that are never read, by shard and number.

    {"version": 1, "about": {"made by": "vlmoe data dedup", ...},
     "shards": {"shard-000007.tar": {"sha256": "...", "samples": [3, 17]}, ...}}

A shard is named as in its manifest, and its SHA-256 is kept: in a shard that was written anew the
numbers would mean other samples. The order of training is planned over the samples that are left,
so a dropped one costs nothing and every batch is as full as before.
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
from data_pipeline.shards.manifest import Manifest

logger = logging.getLogger(__name__)

DROP_VERSION = 1

Dropped = Mapping[int, np.ndarray]
"""Numbers of dropped samples (int64, rising) by number of the shard in its manifest."""


@dataclass(frozen=True, kw_only=True)
class DroppedShard:
    """The samples to drop of one shard."""

    sha256: str
    """Of the shard that the numbers were made for."""
    samples: tuple[int, ...]
    """Numbers in the shard, rising."""


@dataclass(frozen=True, kw_only=True)
class DropList:
    """Samples to leave out."""

    shards: Mapping[str, DroppedShard]
    """By the shard's name in its manifest."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Who made it, from what and why; must be JSON."""

    @property
    def total_samples(self) -> int:
        """Samples that it names."""
        return sum(len(shard.samples) for shard in self.shards.values())


def make_drop_list(
    manifest: Manifest, dropped: Mapping[int, Iterable[int]], about: Mapping[str, Any] | None = None
) -> DropList:
    """A drop-list for some samples of a manifest.

    Args:
        manifest: The shards.
        dropped: Numbers of samples by number of the shard; in any order, twice is once.
        about: Who made it and why.
    """
    shards = {}
    for number in sorted(dropped):
        entry, samples = (
            manifest.shards[number],
            tuple(sorted({int(sample) for sample in dropped[number]})),
        )
        if samples:
            shards[entry.name] = DroppedShard(sha256=entry.sha256, samples=samples)
    return DropList(shards=shards, about=dict(about or {}))


def write_drop_list(url: str | os.PathLike[str], drop: DropList) -> None:
    """Write a drop-list as JSON; local or to a store.

    Raises:
        StorageError: The place cannot be written.
    """

    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    # One shard a line: people compare such files.
    rows = (
        f"{text(name)}: {text({'sha256': row.sha256, 'samples': list(row.samples)})}"
        for name, row in drop.shards.items()
    )
    head = f'{{"version": {DROP_VERSION},\n "about": {text(dict(drop.about))},\n "shards": {{\n  '
    content = head + ",\n  ".join(rows) + "\n }\n}\n"
    storage.write_bytes(os.fspath(url), content.encode())


def read_drop_list(url: str | os.PathLike[str], *, timeout_seconds: float = 60.0) -> DropList:
    """Read what `write_drop_list` wrote.

    Raises:
        DataError: It is missing, or not a drop-list.
    """
    data = storage.read_bytes(os.fspath(url), timeout_seconds=timeout_seconds)
    where = storage.redact(os.fspath(url))
    try:
        found = json.loads(data)
        version, rows, about = (
            found["version"],
            dict(found["shards"]),
            dict(found.get("about") or {}),
        )
        shards = {str(name): _shard(row) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{where} is not a drop-list ({type(error).__name__}: {error}); expected "
            f'{{"version": {DROP_VERSION}, "shards": {{NAME: {{"sha256": ..., "samples": [...]}}}}}}'
        ) from None
    if version != DROP_VERSION:
        raise DataError(
            f"{where} has version {version!r}, but this program reads version {DROP_VERSION}"
        )
    return DropList(shards=shards, about=about)


def apply_drop_list(
    drop: DropList, manifest: Manifest, where: str = "the drop-list"
) -> dict[int, np.ndarray]:
    """What a drop-list drops from a manifest.

    A list may name shards that the manifest lacks, as one list may serve parts of a dataset; that
    is said in the log.

    Args:
        drop: The list.
        manifest: The shards.
        where: The list's address, for messages.

    Returns:
        int64 numbers of samples, rising, by number of the shard.

    Raises:
        DataError: A shard is another than the list was made for, or none of them is in the
        manifest.
    """
    url = storage.redact(manifest.url)
    found: dict[int, np.ndarray] = {}
    for number, entry in enumerate(manifest.shards):
        row = drop.shards.get(entry.name)
        if row is None:
            continue
        if row.sha256 != entry.sha256:
            raise DataError(
                f"{where} was made for another {entry.name} (SHA-256 {row.sha256[:16]}..., the manifest in {url} "
                f"has {entry.sha256[:16]}...): its numbers would drop other samples; make the list again"
            )
        if row.samples and row.samples[-1] >= entry.samples:
            raise DataError(
                f"{where} drops sample {row.samples[-1]} of {entry.name}, which has {entry.samples}"
            )
        if row.samples:
            found[number] = np.array(row.samples, dtype=np.int64)
    unknown = len(drop.shards) - len({entry.name for entry in manifest.shards} & set(drop.shards))
    if drop.shards and unknown == len(drop.shards):
        raise DataError(f"{where} names none of the shards of {url}: it was made for other data")
    if unknown:
        logger.warning(
            "%s: %d of its %d shards are not in %s", where, unknown, len(drop.shards), url
        )
    return found


def dropped_fingerprint(dropped: Dropped) -> str:
    """A name for what is dropped; empty where nothing is."""
    if not dropped:
        return ""
    digest = hashlib.sha256()
    for number in sorted(dropped):
        digest.update(f"{number}:{len(dropped[number])}:".encode())
        digest.update(np.ascontiguousarray(dropped[number], dtype="<i8").tobytes())
    return digest.hexdigest()[:32]


def _shard(row: Mapping[str, Any]) -> DroppedShard:
    samples = row["samples"]
    if not isinstance(samples, list) or not all(
        type(sample) is int and sample >= 0 for sample in samples
    ):
        raise ValueError("`samples` is not a list of numbers")
    if not isinstance(row["sha256"], str):
        raise ValueError("`sha256` is not text")
    return DroppedShard(sha256=row["sha256"], samples=tuple(sorted(set(samples))))
