"""Which samples a person wants to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.preparing.visit import ShardTask, draw, tasks_of
from data_pipeline.shards.manifest import Manifest, load_index


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to look at; all given conditions hold together."""

    shard: str = ""
    """Name of a shard, its last part, or its number from 0 over all datasets; empty is any."""
    key: str = ""
    """Key of the sample."""
    index: int | None = None
    """Number in the shard, or without `shard` over all of them."""
    random: int = 0
    """So many drawn at random; 0 takes the first ones."""
    seed: int = 0
    count: int = 5
    """How many of the first ones."""


def choose_samples(manifests: Sequence[Manifest], choice: Choice) -> list[ShardTask]:
    """Tasks for the samples of a choice.

    Raises:
        ConfigError: There is no such shard or number.
        DataError: No sample has the key.
    """
    if choice.random and not choice.shard:
        return draw(manifests, choice.random, choice.seed)
    tasks = _shards(manifests, choice.shard)
    if choice.key:
        return _with_key(tasks, choice.key)
    if choice.index is not None:
        return _at(tasks, choice.index)
    if choice.random:
        one = [
            replace(manifest, shards=(manifest.shards[task.shard],))
            for task in tasks
            for manifest in [manifests[task.dataset]]
        ]
        return draw(one, choice.random, choice.seed)
    return _first(tasks, choice.count)


def _shards(manifests: Sequence[Manifest], wanted: str) -> list[ShardTask]:
    tasks = tasks_of(manifests)
    if not wanted:
        return tasks
    found = [
        task
        for number, task in enumerate(tasks)
        if wanted in (task.entry.name, task.entry.name.rpartition("/")[2], str(number))
    ]
    if not found:
        raise ConfigError(
            f"there is no shard {wanted!r}; there are {len(tasks)}, the first is {tasks[0].entry.name}"
        )
    return found


def _with_key(tasks: Sequence[ShardTask], key: str) -> list[ShardTask]:
    for task in tasks:
        keys = load_index(task.manifest, task.entry).keys
        if key in keys:
            return [task._replace(samples=(keys.index(key),))]
    raise DataError(f"no sample of {len(tasks)} shards has the key {key!r}")


def _at(tasks: Sequence[ShardTask], index: int) -> list[ShardTask]:
    left = index
    for task in tasks:
        if 0 <= left < task.entry.samples:
            return [task._replace(samples=(left,))]
        left -= task.entry.samples
    raise ConfigError(
        f"--index {index}: there are {sum(task.entry.samples for task in tasks):,} samples"
    )


def _first(tasks: Sequence[ShardTask], count: int) -> list[ShardTask]:
    chosen = []
    for task in tasks:
        take = min(count, task.entry.samples)
        if take > 0:
            chosen.append(task._replace(samples=tuple(range(take))))
        count -= take
    return chosen
