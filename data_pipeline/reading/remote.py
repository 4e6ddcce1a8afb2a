"""Reads samples from remote stores: concurrent ranged requests with one deadline for all of them.

Adjacent samples are read in one request. A sample with a wrong checksum is requested again. An
unavailable shard is recorded (`shard_failures.py`), so neither the rest of the batch nor other
processes wait for it again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed

from data_pipeline.common import object_store
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.open_files import is_too_many_open_files
from data_pipeline.common.store_errors import ErrorKind
from data_pipeline.reading.open_shard import OpenShard
from data_pipeline.reading.request_pool import ByteBudget, RequestPool
from data_pipeline.reading.shard_failures import failure_reason
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem, SampleRef
from data_pipeline.shards.shard_index import ShardIndex

MAX_CONCURRENT_REQUESTS = 16
"""Per process; small requests are bound by latency."""
MAX_BYTES_IN_FLIGHT = 256 << 20
"""Per process; a larger sample is requested alone."""
MAX_GAP_BYTES, MAX_RANGE_BYTES = 64 << 10, 4 << 20
"""Samples at most this far apart are read in one request of at most this size."""
MAX_CHECKSUM_ATTEMPTS = 3


_Result = RawSample | SampleProblem | DataError
"""DataError: the shard is unavailable."""


class RemoteReader:
    """Reads remote shards of a `ShardStore`; not thread-safe."""

    def __init__(self, store: ShardStore) -> None:
        self._store = store
        self._pool = RequestPool(MAX_CONCURRENT_REQUESTS)
        self._budget = ByteBudget(MAX_BYTES_IN_FLIGHT)

    def open(
        self, shards: Mapping[int, OpenShard | None], deadline: float
    ) -> Iterator[tuple[int, OpenShard | DataError]]:
        """Load the indices of shards.

        Args:
            shards: Shard index -> open shard, which is returned as it is, or None.
            deadline: On `time.monotonic()`.

        Yields:
            Shard index and open shard, or the error if it is unavailable. Process each result
            before the next one: opening a shard may close the files of others.
        """
        loading: dict[Future[ShardIndex], int] = {}
        for shard_index, shard in shards.items():
            if failure := self._known_failure(shard_index):
                yield shard_index, failure
            elif shard is not None:
                yield shard_index, shard
            else:
                future = self._pool.submit(self._load_index, shard_index, deadline)
                loading[future] = shard_index

        for future in as_completed(loading):
            shard_index = loading[future]
            opened: OpenShard | DataError
            try:
                index = self._index_result(future, shard_index, deadline)
                opened = self._store.open(shard_index, index)
            except DataError as error:
                opened = error
            yield shard_index, opened

    def read(
        self, refs: Sequence[SampleRef], shards: Mapping[int, OpenShard], deadline: float
    ) -> Iterator[tuple[SampleRef, RawSample | SampleProblem]]:
        """Read samples, in any order.

        Args:
            refs: Samples within the size limit.
            shards: The open shards of these samples, by shard index.
            deadline: On `time.monotonic()`.
        """
        without_ranges: dict[int, list[SampleRef]] = {}
        jobs = {
            self._pool.submit(self._read_run, run, shards[run[0].shard], deadline): run
            for run in _contiguous(refs, shards)
        }
        for job in as_completed(jobs):
            shard = shards[jobs[job][0].shard]
            for ref, result in self._run_result(job, jobs[job], shard, deadline):
                if not isinstance(result, DataError):
                    yield ref, result
                elif isinstance(result, StorageError) and result.kind == ErrorKind.NO_RANGES:
                    without_ranges.setdefault(ref.shard, []).append(ref)
                else:
                    yield ref, _problem(shard, ref, result)

        for shard_index, shard_refs in without_ranges.items():
            yield from self._read_whole_shard(shard_refs, shards[shard_index], deadline)

    def _index_result(
        self, future: Future[ShardIndex], shard_index: int, deadline: float
    ) -> ShardIndex:
        """The result of `_load_index`; loads it here if there were too many open files, because
        only this thread may close some."""
        try:
            return future.result()
        except DataError as error:
            if not is_too_many_open_files(error):
                raise
        return self._store.retry_out_of_files(lambda: self._load_index(shard_index, deadline))

    def _run_result(
        self,
        job: Future[list[tuple[SampleRef, _Result]]],
        run: list[SampleRef],
        shard: OpenShard,
        deadline: float,
    ) -> list[tuple[SampleRef, _Result]]:
        """The result of `_read_run`, as in `_index_result`."""
        try:
            return job.result()
        except DataError as error:
            if not is_too_many_open_files(error):
                raise
        return self._store.retry_out_of_files(lambda: self._read_run(run, shard, deadline))

    def _load_index(self, shard_index: int, deadline: float) -> ShardIndex:
        start = time.monotonic()
        try:
            return self._store.load_index(shard_index, deadline - start)
        except StorageError as error:
            if not is_too_many_open_files(error):
                self._record_failure(shard_index, error, start)
            raise

    def _read_run(
        self, run: list[SampleRef], shard: OpenShard, deadline: float
    ) -> list[tuple[SampleRef, _Result]]:
        """Read nearby samples of one shard in one request, or one by one if it is truncated."""
        start = time.monotonic()
        shard_index = run[0].shard
        if failure := self._known_failure(shard_index):
            return [(ref, failure) for ref in run]

        offsets, extents = shard.columns[:2]
        first, end = offsets[run[0].sample], offsets[run[-1].sample] + extents[run[-1].sample]
        try:
            with self._budget.reserve(end - first):
                data = self._read_range(shard, first, end, deadline)
        except StorageError as error:
            if is_too_many_open_files(error):
                raise
            if len(run) > 1 and error.kind == ErrorKind.CHANGED:
                # The shard is truncated somewhere in this range.
                return [pair for ref in run for pair in self._read_run([ref], shard, deadline)]
            self._record_failure(shard_index, error, start)
            failure = StorageError(str(error), slug=failure_reason(error), kind=error.kind)
            return [(ref, failure) for ref in run]

        results: list[tuple[SampleRef, _Result]] = []
        for ref in run:
            begin = offsets[ref.sample] - first
            sample_data = data[begin : begin + extents[ref.sample]]
            results.append((ref, self._verify(shard, ref.sample, sample_data, deadline)))
        return results

    def _verify(
        self, shard: OpenShard, i: int, data: bytes, deadline: float
    ) -> RawSample | SampleProblem:
        """The sample, requested again while its checksum is wrong."""
        offset, count = shard.columns[0][i], shard.columns[1][i]
        result = shard.verify(i, data)
        for _ in range(MAX_CHECKSUM_ATTEMPTS - 1):
            if isinstance(result, RawSample):
                break
            try:
                with self._budget.reserve(count):
                    data = self._read_range(shard, offset, offset + count, deadline)
            except StorageError as error:
                if is_too_many_open_files(error):
                    raise
                break
            result = shard.verify(i, data)
        return result

    def _read_whole_shard(
        self, refs: Sequence[SampleRef], shard: OpenShard, deadline: float
    ) -> Iterator[tuple[SampleRef, RawSample | SampleProblem]]:
        """Read from a server without range support, through a cached copy of the shard."""
        start, shard_index = time.monotonic(), refs[0].shard
        try:
            self._store.cache_shard_now(shard_index, deadline, keep={shard_index})
            copy = self._store.open(shard_index)
        except DataError as error:
            if isinstance(error, StorageError):
                self._record_failure(shard_index, error, start)
            yield from ((ref, _problem(shard, ref, error)) for ref in refs)
            return

        for ref in refs:
            yield ref, _read_copy(copy, ref.sample)

    def _read_range(self, shard: OpenShard, first: int, end: int, deadline: float) -> bytes:
        return object_store.read_range(
            shard.url,
            first,
            end,
            timeout_seconds=max(0.0, deadline - time.monotonic()),
            request_seconds=self._store.settings.request_seconds,
        )

    def _known_failure(self, shard_index: int) -> DataError | None:
        """The recorded failure of a shard, unless there is a cached copy of it."""
        entry, cache = self._store.entry(shard_index), self._store.cache
        failure = self._store.failure(shard_index)
        if failure is None or (cache is not None and cache.has(entry)):
            return None
        return StorageError(failure.detail, slug=failure.reason)

    def _record_failure(self, shard_index: int, error: StorageError, start: float) -> None:
        """Record a failure, unless the request merely ran out of the batch's time."""
        waited = time.monotonic() - start
        is_final = error.kind in (ErrorKind.MISSING, ErrorKind.REFUSED)
        if is_final or waited > self._store.settings.shard_seconds / 2:
            self._store.record_failure(shard_index, error, error.slug or failure_reason(error))


def _problem(shard: OpenShard, ref: SampleRef, error: DataError) -> SampleProblem:
    return shard.problem(ref.sample, error.slug or "unreachable", str(error))


def _read_copy(shard: OpenShard, i: int) -> RawSample | SampleProblem:
    if shard.fd < 0:
        detail = f"the copy of shard {shard.name} was removed before it was read"
        return shard.problem(i, "unreachable", detail)

    try:
        data = shard.read(i)
    except OSError as error:
        detail = (
            f"cannot read the copy of shard {shard.name}: {error.strerror}; check the disk of "
            f"data.cache_dir"
        )
        return shard.problem(i, "unreachable", detail)
    return shard.verify(i, data)


def _contiguous(
    refs: Sequence[SampleRef], shards: Mapping[int, OpenShard]
) -> Iterator[list[SampleRef]]:
    """Groups (runs) of nearby samples of one shard, each read in one request."""
    run: list[SampleRef] = []
    run_start = run_end = 0
    for ref in sorted(refs, key=lambda ref: (ref.shard, ref.sample)):
        offsets, extents = shards[ref.shard].columns[:2]
        offset, count = offsets[ref.sample], extents[ref.sample]

        is_near = run and ref.shard == run[0].shard and offset - run_end <= MAX_GAP_BYTES
        if is_near and offset + count - run_start <= MAX_RANGE_BYTES:
            run.append(ref)
        else:
            if run:
                yield run
            run, run_start = [ref], offset
        run_end = offset + count
    if run:
        yield run
