"""Writes drop-lists, one file per dataset, because shards of two datasets may share names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipeline.common import storage
from data_pipeline.common.tables import counted
from data_pipeline.order.drop_list import make_drop_list, write_drop_list
from data_pipeline.shards.manifest import Manifest


def write_drop_lists(
    url: str,
    manifests: Sequence[Manifest],
    dropped: Sequence[Mapping[int, Iterable[int]]],
    about: Mapping[str, Any],
) -> list[str]:
    """Write a drop-list for each dataset.

    With several datasets, `drop.json` becomes `drop-0.json`, `drop-1.json`, ...

    Args:
        url: The file; local or in an object store.
        manifests: The datasets.
        dropped: For each dataset, sample indices by shard index.
        about: Metadata: the command and its settings.

    Returns:
        A summary line for each file.
    """
    lines = []
    for index, (manifest, samples) in enumerate(zip(manifests, dropped, strict=True)):
        target = url if len(manifests) == 1 else _numbered(url, index)
        drop_list = make_drop_list(manifest, samples, about)
        write_drop_list(target, drop_list)

        ratio = drop_list.total_samples / max(1, manifest.total_samples)
        lines.append(
            f"{storage.redact(target)}: drops {drop_list.total_samples:,} of "
            f"{counted(manifest.total_samples, 'sample')} ({ratio:.2%}) of "
            f"{storage.redact(manifest.url)}"
        )

    return lines


def _numbered(url: str, index: int) -> str:
    stem, dot, extension = url.rpartition(".")
    return f"{stem or url}-{index}{dot}{extension if dot else ''}"
