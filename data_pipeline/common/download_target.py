"""Where a download is written, and the SHA-256 of parts that complete in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

_HASH_BYTES = 1 << 20


class FetchResult(NamedTuple):
    """What was downloaded."""

    size: int
    etag: str
    sha256: str
    """Empty if it was not computed."""


class Target(NamedTuple):
    """Where the bytes of an object are written."""

    sink: Callable[[int, memoryview], None]
    """Writes bytes at an offset; called from several threads, at least once for each byte."""
    resize: Callable[[int], None]
    """Called with the object's size before each attempt."""
    read_back: Callable[[int, int], bytes] | None = None
    """Reads `(offset, count)` bytes that `sink` has written; None computes no SHA-256."""


class PartDigest:
    """SHA-256 of parts that complete in any order: contiguous parts are read back and hashed."""

    def __init__(self, read_back: Callable[[int, int], bytes] | None) -> None:
        self._read_back, self._hash = read_back, hashlib.sha256()
        self._position, self._ends = 0, dict[int, int]()

    def add(self, start: int, end: int) -> None:
        """Mark the bytes from `start` to `end` as written."""
        self._ends[start] = end
        while self._read_back is not None and (until := self._ends.pop(self._position, 0)):
            while self._position < until:
                data = self._read_back(self._position, min(_HASH_BYTES, until - self._position))
                self._hash.update(data)
                self._position += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest() if self._read_back is not None else ""
