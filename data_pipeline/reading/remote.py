"""Samples of shards that are in a store: ranged requests, many at once, within one time for all of
them.

Neighbors come in one request. An answer with a wrong checksum is asked for again. A shard that
cannot be had is noted (`troubles.py`), so that neither the rest of the batch nor other processes
wait for it once more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import NamedTuple, TypeVar
from zlib import crc32

from data_pipeline.common import object_store
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.open_files import is_out_of_files
from data_pipeline.common.store_errors import Kind
from data_pipeline.reading.open_shard import OpenShard, cut_up, damaged
from data_pipeline.reading.store import ShardStore
from data_pipeline.reading.troubles import reason_of
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.shard_index import ShardIndex

REQUESTS_AT_ONCE = 16
"""Of one process; small requests wait for the wire most of the time."""
BYTES_IN_FLIGHT = 256 << 20
"""Of one process; a larger sample comes alone."""
JOIN_GAP_BYTES, JOIN_BYTES = 64 << 10, 4 << 20
"""Samples this near to each other come in one request, up to this much."""
CHECKSUM_TRIES = 3


class Wanted(NamedTuple):
    """One sample."""

    place: int
    """In the caller's list."""
    shard: OpenShard
    number: int
    """Of the shard."""
    sample: int
    """Of the sample in the shard."""


Answer = TypeVar("Answer")
Result = RawSample | SampleProblem | DataError


class RemoteReader:
    """Reads from the stores of a `ShardStore`; for one thread."""

    def __init__(self, store: ShardStore) -> None:
        self._store, self._pool = store, _Pool()
        self._budget = _Budget(BYTES_IN_FLIGHT)

    def open(
        self, shards: Mapping[int, OpenShard | None], end: float
    ) -> Iterator[tuple[int, OpenShard | DataError]]:
        """Shards with their indices, or why they cannot be had; those that are open already stay as
        they are.

        Args:
            shards: By number; None is opened.
            end: When to give up, on `time.monotonic()`.

        Returns:
            Number and shard, one after the other: files of earlier ones may be closed for those of
            later ones.
        """
        loading: dict[Future[ShardIndex], int] = {}
        for number, shard in shards.items():
            if trouble := self._trouble(number):
                yield number, trouble
            elif shard is not None:
                yield number, shard
            else:
                loading[self._pool.submit(self._load_index, number, end)] = number
        for future in as_completed(loading):
            number = loading[future]
            opened: OpenShard | DataError
            try:
                opened = self._store.open(number, self._index(future, number, end))
            except DataError as error:
                opened = error
            yield number, opened

    def read(self, wanted: Sequence[Wanted], end: float) -> Iterator[tuple[Wanted, Result]]:
        """Each sample and its result, in any order.

        Args:
            wanted: Samples of open shards, within the limit of size.
            end: When to give up, on `time.monotonic()`.
        """
        whole: dict[int, list[Wanted]] = {}
        jobs = {self._pool.submit(self._read_run, run, end): run for run in _runs(wanted)}
        for job in as_completed(jobs):
            for one, result in self._results(job, jobs[job], end):
                if isinstance(result, StorageError) and result.kind == Kind.NO_RANGES:
                    whole.setdefault(one.number, []).append(one)
                else:
                    yield one, result
        for number, its in whole.items():
            yield from self._read_whole(number, its, end)

    def _index(self, future: Future[ShardIndex], number: int, end: float) -> ShardIndex:
        """What a thread has loaded, or could not for too many open files: only this thread may
        close some."""
        try:
            return future.result()
        except DataError as error:
            if not is_out_of_files(error):
                raise
        return self._store.with_files(lambda: self._load_index(number, end))

    def _results(
        self, job: Future[list[tuple[Wanted, Result]]], run: list[Wanted], end: float
    ) -> list[tuple[Wanted, Result]]:
        """As `_index`, of samples."""
        try:
            return job.result()
        except DataError as error:
            if not is_out_of_files(error):
                raise
        return self._store.with_files(lambda: self._read_run(run, end))

    def _load_index(self, number: int, end: float) -> ShardIndex:
        start = time.monotonic()
        try:
            return self._store.load_index(number, end - start)
        except StorageError as error:
            if not is_out_of_files(error):
                self._note(number, error, start)
            raise

    def _read_run(self, run: list[Wanted], end: float) -> list[tuple[Wanted, Result]]:
        """Samples that lie near each other, in one request if that goes well."""
        start = time.monotonic()
        number, shard = run[0].number, run[0].shard
        if trouble := self._trouble(number):
            return [(one, trouble) for one in run]
        offsets, extents = shard.rows[:2]
        first, last = offsets[run[0].sample], offsets[run[-1].sample] + extents[run[-1].sample]
        try:
            with self._budget.taken(last - first):
                data = self._range(shard, first, last, end)
            pieces = [
                data[(at := offsets[one.sample] - first) : at + extents[one.sample]] for one in run
            ]
        except StorageError as error:
            if is_out_of_files(error):
                raise
            if (
                len(run) > 1 and error.kind == Kind.CHANGED
            ):  # the shard is cut off somewhere in here
                return [pair for one in run for pair in self._read_run([one], end)]
            self._note(number, error, start)
            failed = StorageError(str(error), slug=reason_of(error), kind=error.kind)
            return [(one, failed) for one in run]
        return [
            (one, self._checked(one, piece, end)) for one, piece in zip(run, pieces, strict=True)
        ]

    def _checked(self, one: Wanted, data: bytes, end: float) -> Result:
        """The sample, asked for again while its checksum is wrong."""
        shard, i = one.shard, one.sample
        offset, count, expected = (row[i] for row in shard.rows[:3])
        for attempt in range(1, CHECKSUM_TRIES + 1):
            if crc32(data) == expected:
                return cut_up(shard, i, data)
            if attempt == CHECKSUM_TRIES:
                break
            try:
                with self._budget.taken(count):
                    data = self._range(shard, offset, offset + count, end)
            except StorageError as error:
                if is_out_of_files(error):
                    raise
                break
        return damaged(shard, i, data)

    def _read_whole(
        self, number: int, its: Sequence[Wanted], end: float
    ) -> Iterator[tuple[Wanted, Result]]:
        """From a server without ranges, by way of a copy of the shard."""
        start = time.monotonic()
        try:
            self._store.copy_now(number, end, {one.number for one in its})
            shard = self._store.open(number)
        except DataError as error:
            if isinstance(error, StorageError):
                self._note(number, error, start)
            for one in its:
                yield one, DataError(str(error), slug=error.slug or "unreachable")
            return
        for one in its:
            yield one, self._from_copy(shard, one.sample)

    def _from_copy(self, shard: OpenShard, i: int) -> Result:
        if shard.fd < 0:
            return DataError(
                f"the copy of shard {shard.name} was removed before it was read", slug="unreachable"
            )
        try:
            data = shard.read(i)
        except OSError as error:
            return DataError(
                f"cannot read the copy of shard {shard.name}: {error.strerror}; check the disk of "
                f"data.cache_dir",
                slug="unreachable",
            )
        return (
            cut_up(shard, i, data) if crc32(data) == shard.rows[2][i] else damaged(shard, i, data)
        )

    def _range(self, shard: OpenShard, first: int, last: int, end: float) -> bytes:
        return object_store.read_range(
            shard.url,
            first,
            last,
            timeout_seconds=max(0.0, end - time.monotonic()),
            request_seconds=self._store.settings.request_seconds,
        )

    def _trouble(self, number: int) -> DataError | None:
        """What is known against a shard, unless there is a copy of it."""
        entry, cache = self._store.entry(number), self._store.cache
        known = self._store.trouble(number)
        if known is None or (cache is not None and cache.has(entry)):
            return None
        return StorageError(known.detail, slug=known.reason)

    def _note(self, number: int, error: StorageError, start: float) -> None:
        """Remember a trouble, if it was more than coming last in a batch that took too long."""
        waited = time.monotonic() - start
        if (
            error.kind in (Kind.MISSING, Kind.REFUSED)
            or waited > self._store.settings.shard_seconds / 2
        ):
            self._store.note_trouble(number, error, error.slug or reason_of(error))


def _runs(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Samples of one shard that come in one request."""
    run: list[Wanted] = []
    first = last = 0
    for one in sorted(wanted, key=lambda one: (one.number, one.sample)):
        offset, count = one.shard.rows[0][one.sample], one.shard.rows[1][one.sample]
        near = run and one.number == run[0].number and offset - last <= JOIN_GAP_BYTES
        if near and offset + count - first <= JOIN_BYTES:
            run.append(one)
        else:
            if run:
                yield run
            run, first = [one], offset
        last = offset + count
    if run:
        yield run


class _Pool:
    """Threads, made when they are first needed: most processes read from a disk."""

    def __init__(self) -> None:
        self._made: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[..., Answer], *arguments: object) -> Future[Answer]:
        if self._made is None:
            self._made = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="remote-samples")
        return self._made.submit(work, *arguments)


class _Budget:
    """So many bytes at a time; who asks for more than all gets all."""

    def __init__(self, total: int) -> None:
        self._total = self._left = total
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until there are `count` left, and hold them."""
        count = min(count, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= count)
            self._left -= count
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._changed.notify_all()
