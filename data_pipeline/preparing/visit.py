"""Going through datasets shard by shard, in several processes, with results that outlive a restart.

A visit makes one small result file a shard (`bytes`, of whatever kind the visitor likes). With a
work folder the results are kept there, so that work can be divided over the tasks of a job array
and goes on where it was stopped: a shard whose result is there is not read again. The last call,
without a part, finds most results made and puts them together.

A shard that cannot be had now is not a damaged one: it has no result, nothing of it is kept, and
the next call asks for it again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common import object_store, storage
from data_pipeline.common.errors import ConfigError, DataError, StorageError
from data_pipeline.common.logs import Progress
from data_pipeline.common.processes import WHOLE, Part, in_processes
from data_pipeline.common.seeds import rng
from data_pipeline.common.store_errors import Kind
from data_pipeline.samples import RawSample
from data_pipeline.shards.manifest import Manifest, ShardEntry, load_index, load_manifest
from data_pipeline.shards.shard_index import ShardIndex

MAX_SAMPLE_BYTES = 256 << 20
"""A larger sample is not read, as it is not read in training."""
_SECONDS = 120.0
"""Longest time for one sample of a store, all tries together."""
_REQUESTS_IN_FLIGHT = 16


class ShardTask(NamedTuple):
    """One shard of the datasets that are visited; small enough to be sent to a process."""

    manifest: Manifest
    """With this shard only."""
    dataset: int
    """Number of the dataset among those that were given."""
    shard: int
    """Number of the shard in its dataset."""
    samples: tuple[int, ...] | None = None
    """Numbers of the samples to look at; None is all."""

    @property
    def entry(self) -> ShardEntry:
        """The shard's row of the manifest."""
        return self.manifest.shards[0]

    @property
    def num_samples(self) -> int:
        """Samples to look at."""
        return self.entry.samples if self.samples is None else len(self.samples)


class UnreadError(DataError):
    """A shard or its index cannot be had: the store or the file server is away, refuses, or does
    not have it.

    That may be otherwise tomorrow, so nothing that lasts may follow from it.
    """


class Unread(NamedTuple):
    """Instead of a result: why there is none."""

    task: ShardTask
    reason: str
    """`unreachable`, `missing-shard` or `bad-index`."""
    detail: str


Visitor = Callable[[ShardTask], bytes]
"""Makes the result of one shard, or lets `UnreadError` pass; must be something that can be sent to
a process."""


def open_datasets(addresses: Sequence[str]) -> list[Manifest]:
    """The manifests of datasets: folders or `manifest.json` files, local or in a store, with
    braces.

    Raises:
        DataError: One has no manifest.
    """
    from braceexpand import braceexpand

    found = []
    for address in addresses:
        try:
            urls = list(braceexpand(address))
        except ValueError as error:
            raise DataError(f"{storage.redact(address)}: its braces do not close") from error
        for url in urls:
            if url.endswith(".tar"):
                raise DataError(
                    f"{storage.redact(url)} is a shard; give the folder of its manifest (`vlmoe data index` makes one)"
                )
            found.append(load_manifest(url))
    return found


def tasks_of(manifests: Sequence[Manifest], part: Part = WHOLE) -> list[ShardTask]:
    """A task for every shard, or for one share of them."""
    tasks = [
        ShardTask(replace(manifest, shards=(entry,), about={}), dataset, shard)
        for dataset, manifest in enumerate(manifests)
        for shard, entry in enumerate(manifest.shards)
    ]
    return tasks[part[0] :: part[1]]


@dataclass(frozen=True, kw_only=True)
class Visits:
    """How shards are visited."""

    label: str
    """What the progress line calls it."""
    workers: int = 0
    """Processes; 0 is this one."""
    work: str = ""
    """Folder for results, local or in a store; empty keeps none."""
    settings: str = ""
    """Everything on which a result depends beside the shard; results of other settings are not
    used."""

    def each(
        self, tasks: Sequence[ShardTask], visitor: Visitor
    ) -> Iterator[tuple[ShardTask, bytes | Unread]]:
        """Every task with its result, in order; shards that cannot be had do not end the visit."""
        kept = _Kept(visitor, self.work, hashlib.sha256(self.settings.encode()).hexdigest()[:16])
        with Progress(self.label, sum(task.num_samples for task in tasks), "samples") as progress:
            workers = min(self.workers, len(tasks)) if len(tasks) > 1 else 0
            for number, result in in_processes(kept, tasks, workers):
                progress.update(tasks[number].num_samples)
                yield tasks[number], result


@dataclass(frozen=True)
class _Kept:
    """A visitor that first looks whether the result is there, and keeps a new one."""

    visitor: Visitor
    work: str
    settings: str

    def __call__(self, task: ShardTask) -> bytes | Unread:
        if not self.work:
            return self._visited(task)
        # By contents, not by name: a shard that is written anew is visited anew.
        which = hashlib.sha256(
            repr((task.entry.sha256, task.entry.name, task.samples)).encode()
        ).hexdigest()[:32]
        url = storage.join(self.work, f"{self.settings}/{which}")
        if storage.exists(url):
            return storage.read_bytes(url)
        result = self._visited(task)
        if not isinstance(result, Unread):
            storage.write_bytes(url, result)
        return result

    def _visited(self, task: ShardTask) -> bytes | Unread:
        try:
            return self.visitor(task)
        except UnreadError as error:
            return Unread(task, error.slug, str(error))


class OpenShard:
    """A shard that is being visited: its index, and its samples by number."""

    def __init__(
        self, task: ShardTask, index: ShardIndex, size: int, pread: Callable[[int, int], bytes]
    ) -> None:
        self.task, self.index = task, index
        self.size = size
        """Bytes of the shard as it is."""
        self.pread = pread
        """`pread(count, offset)`: bytes of the shard; fewer where it ends too soon."""

    def samples(self) -> Iterator[tuple[int, RawSample | DataError]]:
        """Number and contents of every sample to look at, or what is wrong with it (as for `read`).

        Raises:
            UnreadError: The shard cannot be had any more.
        """
        numbers = range(len(self.index)) if self.task.samples is None else self.task.samples
        if self.task.samples is None or storage.is_local(self.task.manifest.base):
            for number in numbers:
                yield number, self._read_or_error(number)
            return
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            yield from zip(numbers, pool.map(self._read_or_error, numbers), strict=True)

    def read(self, number: int) -> RawSample:
        """One sample, checked.

        Raises:
            DataError: With slug `oversize`, `truncated` or `crc-mismatch`.
            UnreadError: The shard cannot be had any more.
        """
        offset, count = int(self.index.offsets[number]), int(self.index.extents[number])
        if count > MAX_SAMPLE_BYTES:
            raise DataError(
                f"the sample has {count} bytes, more than {MAX_SAMPLE_BYTES}", slug="oversize"
            )
        extent = self.pread(count, offset)
        if len(extent) < count:
            raise DataError(f"{len(extent)} of {count} bytes at byte {offset}", slug="truncated")
        if zlib.crc32(extent) != int(self.index.crc32[number]):
            raise DataError(
                f"the bytes at {offset} have another CRC-32 than the index", slug="crc-mismatch"
            )
        members = {
            m.extension: extent[m.start : m.start + m.size] for m in self.index.members(number)
        }
        return RawSample(self.task.entry.name, self.index.key(number), members)

    def _read_or_error(self, number: int) -> RawSample | DataError:
        try:
            return self.read(number)
        except UnreadError:
            raise
        except DataError as error:
            return error


@contextmanager
def opened(task: ShardTask) -> Iterator[OpenShard]:
    """The shard of a task.

    Of a store, a whole shard is copied and the copy is gone afterwards; of some samples only their
    bytes are asked for.

    Raises:
        UnreadError: The index cannot be had (slug `bad-index`), the shard is missing
        (`missing-shard`) or cannot
            be had (`unreachable`).
        DataError: The index is damaged (slug `bad-index`).
    """
    try:
        index = load_index(task.manifest, task.entry)
    except StorageError as error:
        raise UnreadError(str(error), slug="bad-index") from error
    except DataError as error:
        raise DataError(str(error), slug=error.slug or "bad-index") from error
    url = task.manifest.shard_url(task.entry)
    if storage.is_local(url):
        with _opened_file(task, index, storage.local_path(url)) as shard:
            yield shard
    elif task.samples is None:
        with tempfile.TemporaryDirectory(prefix="vlmoe-visit-") as folder:
            copy = Path(folder) / "shard.tar"
            with _named_trouble():
                storage.fetch_to_file(url, copy)
            with _opened_file(task, index, copy) as shard:
                yield shard
    else:
        yield OpenShard(task, index, task.entry.bytes, partial(_read_range, url, task.entry.bytes))


@contextmanager
def _opened_file(task: ShardTask, index: ShardIndex, path: Path) -> Iterator[OpenShard]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        slug = "missing-shard" if isinstance(error, FileNotFoundError) else "unreachable"
        raise UnreadError(f"cannot open shard {path}: {error.strerror}", slug=slug) from error
    try:
        yield OpenShard(task, index, os.fstat(fd).st_size, partial(_pread, fd))
    finally:
        os.close(fd)


@contextmanager
def _named_trouble() -> Iterator[None]:
    """Give a store's errors the word by which they are counted."""
    try:
        yield
    except StorageError as error:
        slug = "missing-shard" if error.kind == Kind.MISSING else "unreachable"
        raise UnreadError(str(error), slug=slug) from error


def _pread(fd: int, count: int, offset: int) -> bytes:
    pieces = []
    while count > 0:
        try:
            piece = os.pread(fd, count, offset)
        except OSError as error:
            raise UnreadError(
                f"cannot read {count} bytes at {offset}: {error.strerror}", slug="unreachable"
            ) from error
        if not piece:
            break
        pieces.append(piece)
        count, offset = count - len(piece), offset + len(piece)
    return b"".join(pieces)


def _read_range(url: str, size: int, count: int, offset: int) -> bytes:
    with _named_trouble():
        try:
            return object_store.read_range(
                url, offset, offset + count, timeout_seconds=_SECONDS, size=size
            )
        except StorageError as error:
            if error.kind == Kind.CHANGED:  # it has another length than its manifest says
                raise DataError(str(error), slug="truncated") from error
            raise


def pick(
    manifests: Sequence[Manifest], chosen: Mapping[tuple[int, int], Sequence[int]]
) -> list[ShardTask]:
    """Tasks for some samples: their numbers by (dataset, shard)."""
    tasks = {(task.dataset, task.shard): task for task in tasks_of(manifests)}
    return [tasks[where]._replace(samples=tuple(sorted(chosen[where]))) for where in sorted(chosen)]


def draw(manifests: Sequence[Manifest], count: int, seed: int) -> list[ShardTask]:
    """Tasks for `count` samples drawn from all of them alike; for all, if there are no more."""
    tasks = tasks_of(manifests)
    total = sum(task.num_samples for task in tasks)
    if not 0 < count < total:
        return tasks
    numbers = np.sort(rng("samples", seed).choice(total, count, replace=False))
    starts = np.cumsum([0, *(task.num_samples for task in tasks)])
    pieces = np.split(numbers, np.searchsorted(numbers, starts[1:-1]))
    return [
        task._replace(samples=tuple((piece - start).tolist()))
        for task, piece, start in zip(tasks, pieces, starts, strict=False)
        if len(piece)
    ]


def need_work_for(part: Part, work: str, option: str = "--work") -> None:
    """A share of the work is of use only where its results are kept.

    Raises:
        ConfigError: They are not.
    """
    if part != WHOLE and not work:
        raise ConfigError(
            f"--part needs {option} FOLDER, seen by all tasks, where the results are kept"
        )
