"""Downloads one object in checked parts, several at a time, into memory or a file.

Used by `object_store.py`, which is the public interface.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import obstore

from data_pipeline.common.deadline import Deadline
from data_pipeline.common.download_target import FetchResult, PartDigest, Target
from data_pipeline.common.errors import StorageError
from data_pipeline.common.retries import CHANGED_TRIES, RetryState
from data_pipeline.common.store_clients import get_client, split
from data_pipeline.common.store_errors import (
    CLIENT_ERRORS,
    ErrorKind,
    InvalidResponseError,
    to_storage_error,
)
from data_pipeline.common.store_requests import (
    ObjectInfo,
    check_unchanged,
    request_range,
    validate_info,
)

PART_BYTES = 8 << 20
"""Size of one range request; a few of 8 MiB in flight saturate a fast network."""
PARTS_IN_FLIGHT = 4
SMALLEST_PART_BYTES = 256 << 10
"""After a timeout a part is split in halves, down to this size."""
STREAM_SECONDS = 24 * 3600.0
"""Timeout for a whole file in one response, as long as data keeps coming."""
NO_RANGES_SECONDS = 600.0
"""How long to remember that a web server does not support ranges."""

_hosts_without_ranges: dict[str, float] = {}
"""Web servers without range support, and until when (`time.monotonic()`) to assume so."""


def download_range(
    url: str,
    part: tuple[int, int],
    expected: ObjectInfo,
    deadline: Deadline,
    sink: Callable[[int, memoryview], None],
) -> int:
    """Write the bytes from `part[0]` to `part[1]` to `sink`; returns the number of timeouts.

    Raises:
        StorageError: See `object_store.read_range`.
    """
    if not _supports_ranges(url):
        no_ranges = InvalidResponseError(
            ErrorKind.NO_RANGES, "the server does not support range requests"
        )
        raise to_storage_error("read", url, no_ranges)

    retries, ranges, info, timeouts = RetryState("read", url, deadline), [part], expected, 0
    while ranges:
        start, end = ranges.pop()
        try:
            data, info = request_range(url, start, end, info, deadline)
            if len(data) < end - start:
                raise InvalidResponseError(ErrorKind.CHANGED, f"it has only {info.size} bytes")
        except StorageError:
            raise
        except (*CLIENT_ERRORS, InvalidResponseError) as error:
            try:
                retries.record_failure(error)
            except StorageError as final:
                _note_ranges(url, final)
                raise
            timeouts += retries.too_slow
            ranges += _halves(start, end) if retries.too_slow else [(start, end)]
            continue
        sink(start, data)
    return timeouts


def download_object(
    url: str, deadline: Deadline, target: Target, *, expected_bytes: int | None = None
) -> FetchResult:
    """Write a whole object to `target`.

    Raises:
        StorageError: See `object_store.fetch`.
    """
    for attempt in itertools.count(1):
        try:
            if not _supports_ranges(url):
                return _download_stream(url, deadline, target, expected_bytes)
            return _download_in_parts(url, deadline, target, expected_bytes)
        except StorageError as error:
            if error.kind == ErrorKind.NO_RANGES and _supports_ranges(url):
                _note_ranges(url, error)
            elif (
                error.kind != ErrorKind.CHANGED
                or attempt == CHANGED_TRIES
                or deadline.remaining_seconds < 0
            ):
                raise
    raise AssertionError("unreachable")


def _supports_ranges(url: str) -> bool:
    if not url.startswith("http"):
        return True
    return _hosts_without_ranges.get(split(url)[1], 0.0) < time.monotonic()


def _note_ranges(url: str, error: StorageError) -> None:
    """Remember a web server that does not support ranges."""
    if error.kind == ErrorKind.NO_RANGES:
        _hosts_without_ranges[split(url)[1]] = time.monotonic() + NO_RANGES_SECONDS


def _download_in_parts(
    url: str, deadline: Deadline, target: Target, expected_bytes: int | None
) -> FetchResult:
    info, data = _first_part(url, deadline, expected_bytes)
    target.resize(info.size)
    target.sink(0, data)
    deadline.restart()

    digest = PartDigest(target.read_back)
    digest.add(0, len(data))
    if len(data) < info.size:
        _download_rest(url, len(data), info, deadline, target, digest)
    return FetchResult(info.size, info.etag, digest.hexdigest())


def _first_part(
    url: str, deadline: Deadline, expected_bytes: int | None
) -> tuple[ObjectInfo, memoryview]:
    """The object's metadata and its first bytes, in one request instead of HEAD and GET."""
    retries, count, empty = RetryState("read", url, deadline), PART_BYTES, False
    expected = ObjectInfo(-1 if expected_bytes is None else expected_bytes, "")
    while True:
        # No range where one request is enough: simple web servers do not support them.
        whole = empty or 0 <= expected.size <= count
        try:
            data, info = request_range(url, 0, -1 if whole else count, expected, deadline)
        except StorageError:
            raise
        except (*CLIENT_ERRORS, InvalidResponseError) as error:
            retries.record_failure(error)
            if retries.too_slow:
                count = max(count // 2, SMALLEST_PART_BYTES)
            empty = retries.status == 416  # an empty object has no first byte
        else:
            return info, data


def _download_rest(
    url: str, start: int, info: ObjectInfo, deadline: Deadline, target: Target, digest: PartDigest
) -> None:
    """All bytes from `start`, in parts, several at a time."""
    part_bytes, failed = PART_BYTES, threading.Event()
    part_deadline = Deadline(deadline.total_seconds, deadline.request_seconds, failed)

    def download_part(first: int, last: int) -> tuple[int, int, int]:
        timeouts = download_range(url, (first, last), info, part_deadline, target.sink)
        part_deadline.restart()
        return first, last, timeouts

    with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
        jobs: set[Future[tuple[int, int, int]]] = set()
        try:
            while jobs or start < info.size:
                while start < info.size and len(jobs) < 2 * PARTS_IN_FLIGHT:
                    end = min(start + part_bytes, info.size)
                    jobs.add(pool.submit(download_part, start, end))
                    start = end

                done, jobs = wait(jobs, timeout=0.2, return_when=FIRST_COMPLETED)
                deadline.check_cancelled(url)
                for job in done:
                    first, last, timeouts = job.result()
                    digest.add(first, last)
                    if timeouts > 1:  # a slow connection, not one slow response
                        part_bytes = max(part_bytes // 2, SMALLEST_PART_BYTES)
        except BaseException:
            failed.set()  # stops the other parts
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    deadline.restart()


def _download_stream(
    url: str, deadline: Deadline, target: Target, expected_bytes: int | None
) -> FetchResult:
    """From a server without ranges: the whole file as one streamed response."""
    retries, furthest = RetryState("read", url, deadline), 0
    while True:
        position, info, digest = 0, ObjectInfo(-1, ""), hashlib.sha256()
        stream = _chunks(url, expected_bytes, deadline)
        while True:
            try:
                chunk = next(stream, None)
            except StorageError:
                raise
            except (*CLIENT_ERRORS, InvalidResponseError) as error:
                retries.record_failure(error)
                break
            if chunk is None:
                return FetchResult(info.size, info.etag, digest.hexdigest())

            info, data = chunk
            if not position:
                target.resize(info.size)
            target.sink(position, data)
            digest.update(data)
            position += len(data)
            # A response that always breaks at the same position is no progress.
            if position - furthest >= SMALLEST_PART_BYTES:
                furthest = position
                deadline.restart()


def _chunks(
    url: str, expected_bytes: int | None, deadline: Deadline
) -> Iterator[tuple[ObjectInfo, memoryview]]:
    """Checked chunks of one response, at least one."""
    deadline.check_cancelled(url)
    seconds = deadline.next_request_seconds()
    store, name = get_client(url, STREAM_SECONDS, seconds)
    response = obstore.get(store, name)
    info = validate_info(url, response.meta["size"], response.meta["e_tag"])
    check_unchanged(ObjectInfo(-1 if expected_bytes is None else expected_bytes, ""), info)

    position, interval_start = 0, 0
    interval_end = time.monotonic() + seconds
    yield info, memoryview(b"")
    for chunk in response.stream(min_chunk_size=1):
        yield info, memoryview(chunk)
        deadline.check_cancelled(url)
        position += len(chunk)
        if time.monotonic() > interval_end:
            received = position - interval_start
            if received < SMALLEST_PART_BYTES:
                raise InvalidResponseError(
                    ErrorKind.TOO_SLOW, f"only {received} bytes were received in {seconds:g} s"
                )
            interval_end, interval_start = time.monotonic() + seconds, position
    if position != info.size:
        raise InvalidResponseError(
            ErrorKind.UNREACHABLE, f"the response ended after {position} of {info.size} bytes"
        )


def _halves(start: int, end: int) -> list[tuple[int, int]]:
    """Two halves of a range; the first one last, because ranges are popped from the end."""
    if end - start <= SMALLEST_PART_BYTES:
        return [(start, end)]
    middle = (start + end) // 2
    return [(middle, end), (start, middle)]
