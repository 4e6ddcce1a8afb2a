"""Drop-lists of several datasets: each gets a file of its own, as shards of two may have the same
name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipeline.common import storage
from data_pipeline.order.drop import make_drop_list, write_drop_list
from data_pipeline.shards.manifest import Manifest


def write_drop_lists(
    url: str,
    manifests: Sequence[Manifest],
    dropped: Sequence[Mapping[int, Iterable[int]]],
    about: Mapping[str, Any],
) -> list[str]:
    """Write a drop-list for each dataset; of several, `drop.json` becomes `drop-0.json`,
    `drop-1.json`, ...

    Args:
        url: The file; local or in a store.
        manifests: The datasets.
        dropped: For each of them, numbers of samples by number of their shard.
        about: Who made it and why.

    Returns:
        What was written, one line a file.
    """
    lines = []
    for number, (manifest, samples) in enumerate(zip(manifests, dropped, strict=True)):
        stem, dot, extension = url.rpartition(".")
        target = (
            url if len(manifests) == 1 else f"{stem or url}-{number}{dot}{extension if dot else ''}"
        )
        drop = make_drop_list(manifest, samples, about)
        write_drop_list(target, drop)
        share = drop.total_samples / max(1, manifest.total_samples)
        lines.append(
            f"{storage.redact(target)}: drops {drop.total_samples:,} of {manifest.total_samples:,} samples "
            f"({share:.2%}) of {storage.redact(manifest.url)}"
        )
    return lines
