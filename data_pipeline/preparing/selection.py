"""Selects samples to inspect: by shard, key or index, or at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.tables import counted
from data_pipeline.preparing.tasks import ShardTask, sample_tasks, shard_tasks
from data_pipeline.shards.manifest import Manifest, load_index


@dataclass(frozen=True, kw_only=True)
class SampleSelection:
    """Which samples to inspect; all given conditions apply."""

    shard: str = ""
    """Name of a shard, the last component of its name, or its index over all datasets; empty
    matches every shard."""
    key: str = ""
    """Key of the sample."""
    index: int | None = None
    """Index in the shard, or without `shard` over all shards."""
    random: int = 0
    """Number of random samples; 0 selects none at random."""
    seed: int = 0
    count: int = 5
    """Number of samples if none of `key`, `index` and `random` is given: the first ones."""


def select_samples(manifests: Sequence[Manifest], selection: SampleSelection) -> list[ShardTask]:
    """Tasks for the selected samples.

    Raises:
        ConfigError: There is no such shard or index.
        DataError: No sample has the key.
    """
    if selection.random and not selection.shard:
        return sample_tasks(manifests, selection.random, selection.seed)

    tasks = _matching_shards(manifests, selection.shard)
    if selection.key:
        return _with_key(tasks, selection.key)
    if selection.index is not None:
        return _at_index(tasks, selection.index)
    if selection.random:
        single_shard_manifests = []
        for task in tasks:
            manifest = manifests[task.dataset]
            single_shard_manifests.append(replace(manifest, shards=(manifest.shards[task.shard],)))
        return sample_tasks(single_shard_manifests, selection.random, selection.seed)
    return _first(tasks, selection.count)


def _matching_shards(manifests: Sequence[Manifest], shard: str) -> list[ShardTask]:
    tasks = shard_tasks(manifests)
    if not shard:
        return tasks

    matches = []
    for index, task in enumerate(tasks):
        name = task.entry.name
        if shard in (name, name.rpartition("/")[2], str(index)):
            matches.append(task)

    if not matches:
        raise ConfigError(
            f"there is no shard {shard!r}; there are {len(tasks)}, the first is "
            f"{tasks[0].entry.name}"
        )
    return matches


def _with_key(tasks: Sequence[ShardTask], key: str) -> list[ShardTask]:
    for task in tasks:
        keys = load_index(task.manifest, task.entry).keys
        if key in keys:
            return [task._replace(samples=(keys.index(key),))]
    raise DataError(f"no sample in {counted(len(tasks), 'shard')} has the key {key!r}")


def _at_index(tasks: Sequence[ShardTask], index: int) -> list[ShardTask]:
    remaining = index
    for task in tasks:
        if 0 <= remaining < task.entry.samples:
            return [task._replace(samples=(remaining,))]
        remaining -= task.entry.samples

    total = sum(task.entry.samples for task in tasks)
    raise ConfigError(f"--index {index}: not below {counted(total, 'sample')}")


def _first(tasks: Sequence[ShardTask], count: int) -> list[ShardTask]:
    selected = []
    for task in tasks:
        num_samples = min(count, task.entry.samples)
        if num_samples > 0:
            selected.append(task._replace(samples=tuple(range(num_samples))))
        count -= num_samples
    return selected
