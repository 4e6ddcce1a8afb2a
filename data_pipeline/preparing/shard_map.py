"""Applies a function to every shard, in several processes, with resumable results.

The function returns one small `bytes` result per shard. With a work directory the results are
stored there: the work can be divided over the tasks of a job array, and an interrupted command
resumes, because a shard with a stored result is not read again. A final call without `--part` reads
the stored results and combines them.

An unavailable shard is not treated as corrupt: nothing is stored for it, and the next call tries it
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError
from data_pipeline.common.logs import Progress
from data_pipeline.common.processes import SINGLE_PART, Part, map_in_processes
from data_pipeline.preparing.shard_access import ShardUnavailableError
from data_pipeline.preparing.tasks import ShardTask


class UnavailableShard(NamedTuple):
    """A shard that could not be read; returned in place of its result."""

    task: ShardTask
    reason: str
    """`unreachable`, `missing-shard` or `corrupt-index`."""
    detail: str


ShardFunction = Callable[[ShardTask], bytes]
"""Returns the result of one shard; may raise `ShardUnavailableError`. Must be picklable."""


@dataclass(frozen=True, kw_only=True)
class ShardMap:
    """Options for mapping a function over shards."""

    label: str
    """Text of the progress line."""
    workers: int = 0
    """Number of processes; 0 uses this process."""
    work_dir: str = ""
    """Folder for results, local or in an object store; empty stores none."""
    settings: str = ""
    """Everything that a result depends on besides the shard. Results stored for other settings are
    ignored."""

    def run(
        self, tasks: Sequence[ShardTask], function: ShardFunction
    ) -> Iterator[tuple[ShardTask, bytes | UnavailableShard]]:
        """Every task with its result, in order; unavailable shards do not raise."""
        settings_hash = hashlib.sha256(self.settings.encode()).hexdigest()[:16]
        stored = _StoredFunction(function, self.work_dir, settings_hash)
        total = sum(task.num_samples for task in tasks)

        with Progress(self.label, total, "samples") as progress:
            workers = min(self.workers, len(tasks)) if len(tasks) > 1 else 0
            for index, result in map_in_processes(stored, tasks, workers):
                progress.update(tasks[index].num_samples)
                yield tasks[index], result


@dataclass(frozen=True)
class _StoredFunction:
    """Wraps a shard function: returns a stored result if there is one, else stores a new one."""

    function: ShardFunction
    work_dir: str
    settings_hash: str

    def __call__(self, task: ShardTask) -> bytes | UnavailableShard:
        if not self.work_dir:
            return self._call(task)

        # The key includes the shard's SHA-256, so a rewritten shard is read again.
        key = repr((task.entry.sha256, task.entry.name, task.samples))
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        url = storage.join(self.work_dir, f"{self.settings_hash}/{name}")
        if storage.exists(url):
            return storage.read_bytes(url)

        result = self._call(task)
        if not isinstance(result, UnavailableShard):
            storage.write_bytes(url, result)
        return result

    def _call(self, task: ShardTask) -> bytes | UnavailableShard:
        try:
            return self.function(task)
        except ShardUnavailableError as error:
            return UnavailableShard(task, error.slug, str(error))


def require_work_dir(part: Part, work_dir: str) -> None:
    """Check that a part of the work stores its results.

    Raises:
        ConfigError: `part` is not the whole work, and there is no work directory.
    """
    if part != SINGLE_PART and not work_dir:
        raise ConfigError(
            "--part needs --work-dir FOLDER, a folder shared by all tasks where results are stored"
        )
