"""Downloads one object in parts, several at a time, into memory or a file.

Every response is checked: its length, and that the object did not change. `object_store.py` is the
public interface.

The loops below retry after `RetryState.record_failure`, which waits, or raises a `StorageError` if
the failure is final.
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
from data_pipeline.common.retries import MAX_CHANGED_ATTEMPTS, RetryState
from data_pipeline.common.store_clients import get_client, split_url
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
"""After timeouts, parts are halved down to this size."""
STREAM_SECONDS = 24 * 3600.0
"""Time limit for an object in one response, as long as data is received."""
NO_RANGES_SECONDS = 600.0
"""How long to remember that a web server does not support ranges."""

_hosts_without_ranges: dict[str, float] = {}
"""Host of each web server without range support -> `time.monotonic()` when to forget it."""


def download_range(
    url: str,
    part: tuple[int, int],
    expected: ObjectInfo,
    deadline: Deadline,
    sink: Callable[[int, memoryview], None],
) -> int:
    """Download the bytes from `part[0]` to `part[1]` (exclusive); returns the number of timeouts.

    Raises:
        StorageError: See `object_store.read_range`.
    """
    if not _supports_ranges(url):
        no_ranges = InvalidResponseError(
            ErrorKind.NO_RANGES, "the server does not support range requests"
        )
        raise to_storage_error("read", url, no_ranges)

    retries = RetryState("read", url, deadline)
    pending, info, timeouts = [part], expected, 0
    while pending:
        start, end = pending.pop()
        try:
            data, info = request_range(url, start, end, info, deadline)
            if len(data) < end - start:
                raise InvalidResponseError(ErrorKind.CHANGED, f"it has only {info.size} bytes")
        except (*CLIENT_ERRORS, InvalidResponseError) as error:
            try:
                retries.record_failure(error)
            except StorageError as final_error:
                if final_error.kind == ErrorKind.NO_RANGES:
                    _remember_no_ranges(url)
                raise

            if retries.last_timed_out:
                timeouts += 1
                pending += _halves(start, end)
            else:
                pending.append((start, end))
        else:
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
                _remember_no_ranges(url)
            elif (
                error.kind != ErrorKind.CHANGED
                or attempt == MAX_CHANGED_ATTEMPTS
                or deadline.remaining_seconds < 0
            ):
                raise
    raise AssertionError("unreachable")


def _supports_ranges(url: str) -> bool:
    if not url.startswith("http"):
        return True
    _, host, _, _ = split_url(url)
    return _hosts_without_ranges.get(host, 0.0) < time.monotonic()


def _remember_no_ranges(url: str) -> None:
    """Remember that a web server does not support ranges, for `NO_RANGES_SECONDS`."""
    _, host, _, _ = split_url(url)
    _hosts_without_ranges[host] = time.monotonic() + NO_RANGES_SECONDS


def _expected_info(expected_bytes: int | None) -> ObjectInfo:
    """The `ObjectInfo` to compare responses with: the size if it is known, and any ETag."""
    return ObjectInfo(-1 if expected_bytes is None else expected_bytes, "")


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
    retries = RetryState("read", url, deadline)
    expected = _expected_info(expected_bytes)
    part_bytes, is_empty = PART_BYTES, False
    while True:
        # No range if one request is enough: simple web servers do not support ranges.
        fits_in_one = is_empty or 0 <= expected.size <= part_bytes
        end = -1 if fits_in_one else part_bytes
        try:
            data, info = request_range(url, 0, end, expected, deadline)
        except (*CLIENT_ERRORS, InvalidResponseError) as error:
            retries.record_failure(error)
            if retries.last_timed_out:
                part_bytes = max(part_bytes // 2, SMALLEST_PART_BYTES)
            is_empty = retries.last_status == 416  # an empty object has no first byte
        else:
            return info, data


def _download_rest(
    url: str, start: int, info: ObjectInfo, deadline: Deadline, target: Target, digest: PartDigest
) -> None:
    """Download all bytes from `start` on, in parts, several at a time."""
    part_bytes, failed = PART_BYTES, threading.Event()
    part_deadline = Deadline(deadline.total_seconds, deadline.request_seconds, failed)

    def download_part(first: int, last: int) -> tuple[int, int, int]:
        timeouts = download_range(url, (first, last), info, part_deadline, target.sink)
        part_deadline.restart()
        return first, last, timeouts

    with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
        futures: set[Future[tuple[int, int, int]]] = set()
        try:
            while futures or start < info.size:
                while start < info.size and len(futures) < 2 * PARTS_IN_FLIGHT:
                    end = min(start + part_bytes, info.size)
                    futures.add(pool.submit(download_part, start, end))
                    start = end

                done, futures = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
                deadline.check_cancelled(url)
                for future in done:
                    first, last, timeouts = future.result()
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
    """Download the whole object in one streamed response, from a server without range support."""
    retries = RetryState("read", url, deadline)
    furthest = 0
    while True:
        position, info, digest = 0, _expected_info(None), hashlib.sha256()
        stream = _chunks(url, expected_bytes, deadline)
        while True:
            try:
                chunk = next(stream, None)
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
            # Responses that always break off at the same position are not progress.
            if position - furthest >= SMALLEST_PART_BYTES:
                furthest = position
                deadline.restart()


def _chunks(
    url: str, expected_bytes: int | None, deadline: Deadline
) -> Iterator[tuple[ObjectInfo, memoryview]]:
    """The chunks of one response, each with the object's metadata; the first chunk is empty."""
    deadline.check_cancelled(url)
    interval_seconds = deadline.next_request_seconds()
    store, name = get_client(url, STREAM_SECONDS, interval_seconds)
    response = obstore.get(store, name)
    info = validate_info(url, response.meta["size"], response.meta["e_tag"])
    check_unchanged(_expected_info(expected_bytes), info)

    # In every interval, at least `SMALLEST_PART_BYTES` must be received.
    position, interval_position = 0, 0
    interval_end = time.monotonic() + interval_seconds
    yield info, memoryview(b"")
    for chunk in response.stream(min_chunk_size=1):
        yield info, memoryview(chunk)
        deadline.check_cancelled(url)
        position += len(chunk)
        if time.monotonic() > interval_end:
            received = position - interval_position
            if received < SMALLEST_PART_BYTES:
                raise InvalidResponseError(
                    ErrorKind.TOO_SLOW,
                    f"only {received} bytes were received in {interval_seconds:g} s",
                )
            interval_position = position
            interval_end = time.monotonic() + interval_seconds
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
