"""Object stores through obstore: s3, gs, az and http(s), with the care that the library leaves to
us.

Large objects come in parts of `PART_BYTES`, a few at a time, so memory stays bounded whatever their
length. Every answer is checked for its length, and all parts of an object for one ETag: when it
changes in between, the copy begins again. What can heal is tried again until `timeout_seconds` are
over ; a part that does not come in time is asked for in halves, so that a slow line still gets
through. Errors say what kind they are (`StorageError.kind`) and never hold secrets.

    store_answers.py      one request, and what is checked about its answer
    store_copy.py         parts of an object, several at a time
    retries.py            when to try again
    store_clients.py      the clients, and why a forked child may not use them
    store_credentials.py  where keys come from
    store_errors.py       kinds of trouble, and how they are said
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from threading import Event

import obstore

from data_pipeline.common import store_copy
from data_pipeline.common.errors import StorageError
from data_pipeline.common.retries import Patience, Tries, ask
from data_pipeline.common.store_answers import ObjectInfo, checked_info
from data_pipeline.common.store_clients import SCHEMES, client_of, forget_clients
from data_pipeline.common.store_copy import PART_BYTES, Fetched
from data_pipeline.common.store_errors import Kind, WrongAnswerError, redact

__all__ = [
    "PART_BYTES",
    "SCHEMES",
    "Fetched",
    "ObjectInfo",
    "fetch",
    "forget_clients",
    "head",
    "list_names",
    "list_tree",
    "read_all",
    "read_range",
    "redact",
    "upload",
    "write",
]

REQUEST_SECONDS = 20.0
"""Longest wait for one request, where the caller names none."""
UPLOAD_PARTS = 4
"""Parts of an upload at a time."""
MOST_PARTS = 9000
"""Of an upload; stores allow 10,000."""
WHOLE_PUT_SECONDS = 600.0
"""Longest time for a file put on a web server, which takes it in one piece."""


def head(
    url: str,
    timeout_seconds: float,
    *,
    missing_ok: bool = False,
    request_seconds: float = REQUEST_SECONDS,
) -> ObjectInfo | None:
    """Length and ETag of an object; None for a missing one where that is allowed.

    Raises:
        StorageError: Missing, refused, or no answer within `timeout_seconds`.
    """

    def request(seconds: float) -> ObjectInfo:
        store, name = client_of(url, seconds)
        meta = obstore.head(store, name)
        return checked_info(url, meta["size"], meta["e_tag"])

    try:
        return ask("read", url, Patience(timeout_seconds, request_seconds), request)
    except StorageError as error:
        if missing_ok and error.kind == Kind.MISSING:
            return None
        raise


def read_all(
    url: str, timeout_seconds: float, *, sha256: str = "", request_seconds: float = REQUEST_SECONDS
) -> bytes:
    """A whole object that fits into memory.

    Where nothing says what it must be (no `sha256`, no ETag that is its MD5), it is read until two
    readings agree: a gateway's page with status 200, or a flipped bit, would look like the object.

    Raises:
        StorageError: Missing, refused, not readable within `timeout_seconds`, or never the right
        one.
    """
    patience = Patience(timeout_seconds, request_seconds)
    tries, seen = Tries("read", url, patience), Counter[str]()
    while True:
        data, etag = _read_once(url, patience)
        found = hashlib.sha256(data).hexdigest()
        seen[found] += 1
        if sha256 and found == sha256:
            return data
        if not sha256 and (
            seen[found] > 1
            or etag.strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
        ):
            return data
        if sha256 or seen.total() > 2:
            wrong = (
                f"it has SHA-256 {found}, but {sha256 or 'another the time before'} was expected"
            )
            tries.failed(WrongAnswerError(Kind.CHANGED, wrong))


def read_range(
    url: str,
    start: int,
    end: int,
    *,
    timeout_seconds: float,
    request_seconds: float = REQUEST_SECONDS,
    etag: str = "",
    size: int = -1,
    cancel: Event | None = None,
) -> bytes:
    """Bytes `start` to `end` (exclusive) of an object, in one request where that comes in time.

    Args:
        url: The object.
        start: First byte.
        end: After the last.
        timeout_seconds: Longest time for all tries together.
        request_seconds: Longest time for one request.
        etag: What it must have; another is an error of kind `changed`. Empty accepts any, but all
            pieces of this range have the same.
        size: Length of the object that is expected; -1 accepts any.
        cancel: Set by another thread to give up.

    Raises:
        StorageError: As for `head`, and kind `no-ranges` when a web server gives only whole files.
    """
    patience = Patience(timeout_seconds, request_seconds, cancel)
    buffer = bytearray(end - start)

    def sink(at: int, data: memoryview) -> None:
        buffer[at - start : at - start + len(data)] = data

    store_copy.copy_range(url, (start, end), ObjectInfo(size, etag), patience, sink)
    return bytes(buffer)


def fetch(
    url: str,
    fd: int,
    *,
    timeout_seconds: float,
    request_seconds: float = REQUEST_SECONDS,
    expected_bytes: int | None = None,
    cancel: Event | None = None,
) -> Fetched:
    """Copy an object into an open, empty file; memory stays bounded. Its SHA-256 is taken in
    passing.

    Args:
        url: The object.
        fd: Open for reading and writing.
        timeout_seconds: Longest time without progress, all tries together.
        request_seconds: Longest time for one request of `PART_BYTES`.
        expected_bytes: Its length if known; another one, seen three times, is an error of kind
            `changed`.
        cancel: Set by another thread to give up.

    Raises:
        StorageError: Missing, refused, too slow, or another each time.
        OSError: The file cannot be written.
    """
    patience = Patience(timeout_seconds, request_seconds, cancel)

    def sink(at: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(fd, data, at)
            data, at = data[written:], at + written

    def read_back(at: int, count: int) -> bytes:
        return os.pread(fd, count, at)

    target = store_copy.Target(sink, lambda size: os.ftruncate(fd, size), read_back)
    return store_copy.copy_object(url, patience, target, expected_bytes=expected_bytes)


def write(
    url: str, data: bytes, timeout_seconds: float, *, request_seconds: float = REQUEST_SECONDS
) -> None:
    """Put an object; stores make it visible only when it is whole. A large one goes up in parts.

    Raises:
        StorageError: Refused, or not done within `timeout_seconds`.
    """
    _put(url, data, len(data), Patience(timeout_seconds, request_seconds))


def upload(
    path: Path, url: str, timeout_seconds: float, *, request_seconds: float = REQUEST_SECONDS
) -> None:
    """Put a local file, in parts if it is large; memory stays bounded.

    Raises:
        StorageError: As for `write`.
        OSError: The file cannot be read.
    """
    _put(url, path, path.stat().st_size, Patience(timeout_seconds, request_seconds))


def list_names(folder_url: str, timeout_seconds: float) -> list[str]:
    """Names of the objects directly under a prefix, sorted."""

    def request(seconds: float) -> list[str]:
        store, prefix = client_of(_listable(folder_url), seconds)
        answer = obstore.list_with_delimiter(store, prefix or None)
        return sorted(str(found["path"]).rpartition("/")[2] for found in answer["objects"])

    return ask("list", folder_url, Patience(timeout_seconds), request)


def list_tree(folder_url: str, timeout_seconds: float) -> list[str]:
    """Names of all objects under a prefix, relative to it, sorted."""

    def request(seconds: float) -> list[str]:
        store, prefix = client_of(_listable(folder_url), seconds)
        pages = obstore.list(store, prefix or None)
        return sorted(str(found["path"]).removeprefix(prefix) for page in pages for found in page)

    return ask("list", folder_url, Patience(timeout_seconds), request)


def _listable(folder_url: str) -> str:
    if folder_url.startswith("http"):
        raise StorageError(f"{redact(folder_url)} cannot be listed; name the files")
    return folder_url.rstrip("/") + "/"


def _read_once(url: str, patience: Patience) -> tuple[bytes, str]:
    """An object and its ETag."""
    buffer = bytearray()

    def resize(size: int) -> None:
        buffer[:] = bytes(size)

    def sink(at: int, data: memoryview) -> None:
        buffer[at : at + len(data)] = data

    found = store_copy.copy_object(url, patience, store_copy.Target(sink, resize))
    return bytes(buffer), found.etag


def _put(url: str, content: bytes | Path, size: int, patience: Patience) -> None:
    part = max(PART_BYTES, -(-size // MOST_PARTS))
    in_parts = size > 2 * part and not url.startswith("http")

    def request(seconds: float) -> None:
        # A web server takes only whole files, which may be long.
        store, name = client_of(url, WHOLE_PUT_SECONDS if url.startswith("http") else seconds)
        obstore.put(
            store,
            name,
            content,
            use_multipart=in_parts,
            chunk_size=part,
            max_concurrency=UPLOAD_PARTS,
        )

    ask("write", url, patience, request)
