"""Local shards: the check at startup that they exist, and opening them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.common.tables import counted
from data_pipeline.shards.manifest import Manifest, ShardEntry

logger = logging.getLogger(__name__)

COPY_OR_REINDEX = (
    "copy it again, or run `vlmoe data index` again if the shard was changed on purpose"
)


def check_local_shards(manifests: Sequence[Manifest], max_corrupt_ratio: float = 0.01) -> None:
    """Check every local shard, so that a long run does not detect missing shards only after hours.

    Remote shards are not checked. Shards whose length differs from their manifest are logged as
    warnings.

    Args:
        manifests: All manifests that a run reads.
        max_corrupt_ratio: Maximum fraction of the samples that may be in missing shards.

    Raises:
        DataError: More samples are in missing shards; the message names the first such shard.
    """
    num_shards, num_missing, missing_samples, first_missing = 0, 0, 0, ""
    for manifest in manifests:
        if not storage.is_local(manifest.base):
            continue

        for entry in manifest.shards:
            num_shards += 1
            problem = _missing_message(manifest, entry)
            if problem:
                num_missing += 1
                missing_samples += entry.samples
                first_missing = first_missing or problem

    if not num_missing:
        return

    total = sum(manifest.total_samples for manifest in manifests)
    summary = (
        f"{num_missing} of {num_shards} shards are missing, with {missing_samples} of {total} "
        f"samples"
    )
    if missing_samples > max_corrupt_ratio * total:
        raise DataError(
            f"{first_missing}; {COPY_OR_REINDEX} "
            f"({summary}, more than data.max_corrupt_ratio {max_corrupt_ratio:g})"
        )
    logger.warning("%s; %s: their samples are left out", first_missing, summary)


def _missing_message(manifest: Manifest, entry: ShardEntry) -> str:
    """Why a shard cannot be read; empty if it can be. A different size is only logged."""
    path = storage.local_path(manifest.shard_url(entry))
    try:
        size = path.stat().st_size
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        if isinstance(error, FileNotFoundError):
            problem = "is missing"
        return (
            f"shard {path} {problem}, but its manifest expects {counted(entry.samples, 'sample')} "
            f"in {entry.bytes} bytes there"
        )

    if size != entry.bytes:
        logger.warning(
            "shard %s has %d bytes, but its manifest expects %d; corrupt and truncated samples "
            "are skipped",
            path,
            size,
            entry.bytes,
        )
    return ""


def open_local_shard(path: Path) -> int:
    """File descriptor of a local shard.

    Raises:
        DataError: It is missing or cannot be opened; has a slug.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(
            f"shard {path} is missing; {COPY_OR_REINDEX}", slug="missing-shard"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot open shard {path}: {error.strerror}", slug="unreachable"
        ) from error
