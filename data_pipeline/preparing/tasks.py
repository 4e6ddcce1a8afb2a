"""Tasks: shards, or selected samples of shards, for a command to process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from data_pipeline.common.processes import SINGLE_PART, Part, usable_cpus
from data_pipeline.common.seeds import rng
from data_pipeline.shards.manifest import Manifest, ShardEntry
from data_pipeline.shards.patterns import expand_braces, is_shard_name
from data_pipeline.shards.run_indexing import open_manifest


class ShardTask(NamedTuple):
    """One shard to process; small enough to send to a worker process."""

    manifest: Manifest
    """The dataset's manifest, reduced to this shard."""
    dataset: int
    """Index of the dataset among the given ones."""
    shard: int
    """Index of the shard in its dataset."""
    samples: tuple[int, ...] | None = None
    """Indices of the samples to read; None reads all."""

    @property
    def entry(self) -> ShardEntry:
        """The shard's entry in the manifest."""
        return self.manifest.shards[0]

    @property
    def num_samples(self) -> int:
        """Number of samples to read."""
        return self.entry.samples if self.samples is None else len(self.samples)


def open_datasets(addresses: Sequence[str]) -> list[Manifest]:
    """Load the manifests of datasets; shards without a manifest are indexed for this command.

    Args:
        addresses: Folders, `manifest.json` files or shards, local or in an object store; braces
            are expanded, and each folder is a dataset.

    Raises:
        DataError: There are neither a manifest nor shards at an address, shards are corrupt, or an
            address is a malformed pattern.
    """
    return [
        open_manifest(url, salvage=False, workers=usable_cpus())
        for address in addresses
        for url in _datasets_of(address)
    ]


def _datasets_of(address: str) -> list[str]:
    """The datasets of an address: braces over folders are several, over shards one."""
    urls = expand_braces(address)
    are_shards = any(is_shard_name(url.partition("?")[0]) for url in urls)
    return [address] if are_shards else urls


def shard_tasks(manifests: Sequence[Manifest], part: Part = SINGLE_PART) -> list[ShardTask]:
    """A task for every shard of the datasets; for part I of N, shards I, I + N, I + 2N, ..."""
    tasks = [
        ShardTask(replace(manifest, shards=(entry,), metadata={}), dataset, shard)
        for dataset, manifest in enumerate(manifests)
        for shard, entry in enumerate(manifest.shards)
    ]
    index, count = part
    return tasks[index::count]


def tasks_for(
    manifests: Sequence[Manifest], samples: Mapping[tuple[int, int], Sequence[int]]
) -> list[ShardTask]:
    """One task per shard in `samples`, which maps (dataset, shard) to sample indices."""
    tasks = {(task.dataset, task.shard): task for task in shard_tasks(manifests)}
    return [
        tasks[location]._replace(samples=tuple(sorted(samples[location])))
        for location in sorted(samples)
    ]


def sample_tasks(manifests: Sequence[Manifest], count: int, seed: int) -> list[ShardTask]:
    """Tasks for `count` samples, chosen uniformly without replacement over all datasets.

    All samples if `count` is 0 or at least their number.
    """
    tasks = shard_tasks(manifests)
    total = sum(task.num_samples for task in tasks)
    if not 0 < count < total:
        return tasks

    indices = np.sort(rng("samples", seed).choice(total, count, replace=False))
    starts = np.cumsum([0, *(task.num_samples for task in tasks)])
    per_shard = np.split(indices, np.searchsorted(indices, starts[1:-1]))
    return [
        task._replace(samples=tuple((selected - start).tolist()))
        for task, selected, start in zip(tasks, per_shard, starts, strict=False)
        if len(selected)
    ]
