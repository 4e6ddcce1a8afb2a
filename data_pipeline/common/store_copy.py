"""Brings the bytes of one object: in checked parts, several at a time, into whatever takes them.

Shared by reading into memory and into a file; `object_store.py` is the door.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import obstore

from data_pipeline.common.errors import StorageError
from data_pipeline.common.retries import CHANGED_TRIES, Patience, Tries
from data_pipeline.common.store_answers import ObjectInfo, check_same, checked_info, one_answer
from data_pipeline.common.store_clients import client_of, split
from data_pipeline.common.store_errors import ASKING_ERRORS, Kind, WrongAnswerError, explained

PART_BYTES = 8 << 20
"""Size of one ranged request; 8 MiB with a few in flight fills a fast wire."""
PARTS_IN_FLIGHT = 4
SMALLEST_PART_BYTES = 256 << 10
"""A part that did not come in time is asked for in halves, down to this."""
STREAM_SECONDS = 24 * 3600.0
"""Longest time for a whole file in one answer, which must keep coming all the while."""
WHOLE_ONLY_SECONDS = 600.0
"""How long a web server is known to give only whole files."""
_HASH_BYTES = 1 << 20

_whole_only: dict[str, float] = {}
"""Web servers without ranges, and until when (on `time.monotonic()`) that is believed."""


class Fetched(NamedTuple):
    """What was copied."""

    size: int
    etag: str
    sha256: str
    """Empty where it was not taken."""


class Target(NamedTuple):
    """What takes an object's bytes."""

    sink: Callable[[int, memoryview], None]
    """Takes bytes for a position; called from several threads, for each byte at least once."""
    resize: Callable[[int], None]
    """Is told the object's length before each beginning."""
    read_back: Callable[[int, int], bytes] | None = None
    """Gives `count` bytes from a position that `sink` has taken; without it no SHA-256 is taken."""


def copy_range(
    url: str,
    part: tuple[int, int],
    expected: ObjectInfo,
    patience: Patience,
    sink: Callable[[int, memoryview], None],
) -> int:
    """Give `sink` the bytes from `part[0]` to `part[1]`; how often an answer took too long.

    Raises:
        StorageError: See `object_store.read_range`.
    """
    if not _gives_ranges(url):
        raise explained(
            "read", url, WrongAnswerError(Kind.NO_RANGES, "the server gives only whole files")
        )
    tries, pieces, known, slow = Tries("read", url, patience), [part], expected, 0
    while pieces:
        start, end = pieces.pop()
        try:
            data, known = one_answer(url, start, end, known, patience)
            if len(data) < end - start:
                raise WrongAnswerError(Kind.CHANGED, f"it has only {known.size} bytes")
        except StorageError:
            raise
        except (*ASKING_ERRORS, WrongAnswerError) as error:
            try:
                tries.failed(error)
            except StorageError as final:
                _note_ranges(url, final)
                raise
            slow += tries.too_slow
            pieces += _halves(start, end) if tries.too_slow else [(start, end)]
            continue
        sink(start, data)
    return slow


def copy_object(
    url: str, patience: Patience, target: Target, *, expected_bytes: int | None = None
) -> Fetched:
    """Give `target` a whole object.

    Raises:
        StorageError: See `object_store.fetch`.
    """
    for attempt in itertools.count(1):
        try:
            if not _gives_ranges(url):
                return _copy_stream(url, patience, target, expected_bytes)
            return _copy_in_parts(url, patience, target, expected_bytes)
        except StorageError as error:
            if error.kind == Kind.NO_RANGES and _gives_ranges(url):
                _note_ranges(url, error)
            elif error.kind != Kind.CHANGED or attempt == CHANGED_TRIES or patience.left < 0:
                raise
    raise AssertionError("unreachable")


def _gives_ranges(url: str) -> bool:
    return not url.startswith("http") or _whole_only.get(split(url)[1], 0.0) < time.monotonic()


def _note_ranges(url: str, error: StorageError) -> None:
    """Remember a web server that gives only whole files."""
    if error.kind == Kind.NO_RANGES:
        _whole_only[split(url)[1]] = time.monotonic() + WHOLE_ONLY_SECONDS


def _copy_in_parts(
    url: str, patience: Patience, target: Target, expected_bytes: int | None
) -> Fetched:
    info, data = _first_part(url, patience, expected_bytes)
    target.resize(info.size)
    target.sink(0, data)
    patience.moved()
    digest = _Digest(target.read_back)
    digest.add(0, len(data))
    if len(data) < info.size:
        _copy_rest(url, len(data), info, patience, target, digest)
    return Fetched(info.size, info.etag, digest.hexdigest())


def _first_part(
    url: str, patience: Patience, expected_bytes: int | None
) -> tuple[ObjectInfo, memoryview]:
    """What the object is, and its first bytes: one request less than asking for its head before."""
    tries, count, empty = Tries("read", url, patience), PART_BYTES, False
    expected = ObjectInfo(-1 if expected_bytes is None else expected_bytes, "")
    while True:
        # A plain request where one is enough: small web servers know no ranges.
        plain = empty or 0 <= expected.size <= count
        try:
            data, info = one_answer(url, 0, -1 if plain else count, expected, patience)
        except StorageError:
            raise
        except (*ASKING_ERRORS, WrongAnswerError) as error:
            tries.failed(error)
            if tries.too_slow:
                count = max(count // 2, SMALLEST_PART_BYTES)
            empty = tries.status == 416  # there is no first byte
        else:
            return info, data


def _copy_rest(
    url: str, start: int, info: ObjectInfo, patience: Patience, target: Target, digest: _Digest
) -> None:
    """All bytes from `start`, in parts, a few at a time."""
    part_bytes, gone_wrong = PART_BYTES, threading.Event()
    inner = Patience(patience.total_seconds, patience.request_seconds, gone_wrong)

    def copy_part(first: int, last: int) -> tuple[int, int, int]:
        slow = copy_range(url, (first, last), info, inner, target.sink)
        inner.moved()
        return first, last, slow

    with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
        jobs: set[Future[tuple[int, int, int]]] = set()
        try:
            while jobs or start < info.size:
                while start < info.size and len(jobs) < 2 * PARTS_IN_FLIGHT:
                    end = min(start + part_bytes, info.size)
                    jobs.add(pool.submit(copy_part, start, end))
                    start = end
                done, jobs = wait(jobs, timeout=0.2, return_when=FIRST_COMPLETED)
                patience.check_wanted(url)
                for job in done:
                    first, last, slow = job.result()
                    digest.add(first, last)
                    if slow > 1:  # the line, not one unlucky answer
                        part_bytes = max(part_bytes // 2, SMALLEST_PART_BYTES)
        except BaseException:
            gone_wrong.set()  # or the pool would go on with parts that nobody wants any more
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    patience.moved()


def _copy_stream(
    url: str, patience: Patience, target: Target, expected_bytes: int | None
) -> Fetched:
    """From a server that gives only whole files: in one answer, as it comes."""
    tries, furthest = Tries("read", url, patience), 0
    while True:
        position, info, digest = 0, ObjectInfo(-1, ""), hashlib.sha256()
        stream = _chunks(url, expected_bytes, patience)
        while True:
            try:
                found = next(stream, None)
            except StorageError:
                raise
            except (*ASKING_ERRORS, WrongAnswerError) as error:
                tries.failed(error)
                break
            if found is None:
                return Fetched(info.size, info.etag, digest.hexdigest())
            if not position:
                target.resize(found[0].size)
            info, data = found
            target.sink(position, data)
            digest.update(data)
            position += len(data)
            if (
                position - furthest >= SMALLEST_PART_BYTES
            ):  # an answer that always breaks is no progress
                furthest = position
                patience.moved()


def _chunks(
    url: str, expected_bytes: int | None, patience: Patience
) -> Iterator[tuple[ObjectInfo, memoryview]]:
    """Checked pieces of one answer, at least one."""
    patience.check_wanted(url)
    seconds = patience.next_request_seconds()
    store, name = client_of(url, STREAM_SECONDS, seconds)
    answer = obstore.get(store, name)
    info = checked_info(url, answer.meta["size"], answer.meta["e_tag"])
    check_same(ObjectInfo(-1 if expected_bytes is None else expected_bytes, ""), info)
    position, mark, at_mark = 0, time.monotonic() + seconds, 0
    yield info, memoryview(b"")
    for chunk in answer.stream(min_chunk_size=1):
        yield info, memoryview(chunk)
        patience.check_wanted(url)
        position += len(chunk)
        if time.monotonic() > mark:
            if position - at_mark < SMALLEST_PART_BYTES:
                raise WrongAnswerError(
                    Kind.TOO_SLOW, f"only {position - at_mark} bytes came in {seconds:g} s"
                )
            mark, at_mark = time.monotonic() + seconds, position
    if position != info.size:
        raise WrongAnswerError(Kind.UNREACHABLE, f"it came with {position} of {info.size} bytes")


def _halves(start: int, end: int) -> list[tuple[int, int]]:
    """The first one last: it is taken next."""
    if end - start <= SMALLEST_PART_BYTES:
        return [(start, end)]
    middle = (start + end) // 2
    return [(middle, end), (start, middle)]


class _Digest:
    """SHA-256 of parts that come in any order: what is whole from the start on is read back and
    hashed."""

    def __init__(self, read_back: Callable[[int, int], bytes] | None) -> None:
        self._read_back, self._hash = read_back, hashlib.sha256()
        self._position, self._ends = 0, dict[int, int]()

    def add(self, start: int, end: int) -> None:
        """These bytes have been taken."""
        self._ends[start] = end
        while self._read_back is not None and (until := self._ends.pop(self._position, 0)):
            while self._position < until:
                data = self._read_back(self._position, min(_HASH_BYTES, until - self._position))
                self._hash.update(data)
                self._position += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest() if self._read_back is not None else ""
