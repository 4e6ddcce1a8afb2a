"""Object stores (s3, gs, az) and http(s) through obstore, with retries and checks.

Large objects are read in parts of `PART_BYTES`, a few at a time, so memory stays bounded. Every
response is checked for its length, and all parts of an object for the same ETag: if the object
changes during a download, the download starts again. Temporary failures are retried until
`timeout_seconds` are over; after a timeout, a part is requested in halves, so that slow connections
still make progress. Errors have a kind (`StorageError.kind`) and never contain secrets.

    deadline.py           time limits of an operation
    retries.py            which failures are retried, and when
    store_requests.py     one request, and the checks of its response
    store_download.py     the parts of an object, several at a time
    download_target.py    where a download is written, and its hash
    store_clients.py      the clients, which do not survive a fork
    store_credentials.py  where credentials are read from
    store_providers.py    credentials from the libraries of the clouds
    store_errors.py       kinds of errors and their messages
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from threading import Event

import obstore

from data_pipeline.common import store_download
from data_pipeline.common.deadline import Deadline
from data_pipeline.common.download_target import FetchResult, Target
from data_pipeline.common.errors import StorageError
from data_pipeline.common.retries import RetryState, call_with_retries
from data_pipeline.common.store_clients import SCHEMES, clear_clients, get_client
from data_pipeline.common.store_download import PART_BYTES
from data_pipeline.common.store_errors import ErrorKind, InvalidResponseError, redact
from data_pipeline.common.store_requests import ObjectInfo, validate_info

__all__ = [
    "PART_BYTES",
    "SCHEMES",
    "FetchResult",
    "ObjectInfo",
    "clear_clients",
    "fetch",
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
"""Default timeout of one request."""
UPLOAD_PARTS = 4
"""Number of parts of an upload that are sent at the same time."""
MAX_PARTS = 9000
"""Maximum number of parts of an upload; stores allow 10,000."""
HTTP_PUT_SECONDS = 600.0
"""Timeout for a PUT to a web server, which takes a file in one request."""


def head(
    url: str,
    timeout_seconds: float,
    *,
    missing_ok: bool = False,
    request_seconds: float = REQUEST_SECONDS,
) -> ObjectInfo | None:
    """Size and ETag of an object; None for a missing one if `missing_ok`.

    Raises:
        StorageError: It is missing, access is refused, or `timeout_seconds` are over.
    """

    def request(seconds: float) -> ObjectInfo:
        store, name = get_client(url, seconds)
        meta = obstore.head(store, name)
        return validate_info(url, meta["size"], meta["e_tag"])

    try:
        return call_with_retries("read", url, Deadline(timeout_seconds, request_seconds), request)
    except StorageError as error:
        if missing_ok and error.kind == ErrorKind.MISSING:
            return None
        raise


def read_all(
    url: str, timeout_seconds: float, *, sha256: str = "", request_seconds: float = REQUEST_SECONDS
) -> bytes:
    """Read a whole object into memory.

    If the contents cannot be verified (no `sha256`, and the ETag is not their MD5), the object is
    read until two reads agree: otherwise an error page with status 200 or a flipped bit would be
    accepted.

    Raises:
        StorageError: It is missing, access is refused, `timeout_seconds` are over, or no read gave
            the right contents.
    """
    deadline = Deadline(timeout_seconds, request_seconds)
    retries, counts = RetryState("read", url, deadline), Counter[str]()
    while True:
        data, etag = _read_once(url, deadline)
        digest = hashlib.sha256(data).hexdigest()
        counts[digest] += 1
        if sha256 and digest == sha256:
            return data
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if not sha256 and (counts[digest] > 1 or etag.strip('"') == md5):
            return data
        if sha256 or counts.total() > 2:
            expected = f"{sha256} was expected" if sha256 else "earlier reads differed"
            problem = f"it has SHA-256 {digest}, but {expected}"
            retries.record_failure(InvalidResponseError(ErrorKind.CHANGED, problem))


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
    """Bytes `start` to `end` (exclusive) of an object, in one request unless that times out.

    Args:
        url: The object.
        start: First byte.
        end: End, exclusive.
        timeout_seconds: Limit for all attempts together.
        request_seconds: Timeout of one request.
        etag: Expected ETag; another one is an error of kind `changed`. Empty accepts any, but all
            requests for this range must see the same.
        size: Expected size of the object; -1 accepts any.
        cancel: Set by another thread to stop.

    Raises:
        StorageError: As for `head`, and kind `no-ranges` if a web server does not support ranges.
    """
    deadline = Deadline(timeout_seconds, request_seconds, cancel)
    buffer = bytearray(end - start)

    def sink(offset: int, data: memoryview) -> None:
        buffer[offset - start : offset - start + len(data)] = data

    store_download.download_range(url, (start, end), ObjectInfo(size, etag), deadline, sink)
    return bytes(buffer)


def fetch(
    url: str,
    fd: int,
    *,
    timeout_seconds: float,
    request_seconds: float = REQUEST_SECONDS,
    expected_bytes: int | None = None,
    cancel: Event | None = None,
) -> FetchResult:
    """Download an object into an open, empty file with bounded memory, and compute its SHA-256.

    Args:
        url: The object.
        fd: Open for reading and writing.
        timeout_seconds: Maximum time without progress, all attempts together.
        request_seconds: Timeout of one request of `PART_BYTES`.
        expected_bytes: Its size if known; three responses with another size are an error of kind
            `changed`.
        cancel: Set by another thread to stop.

    Raises:
        StorageError: It is missing, access is refused, it is too slow, or it keeps changing.
        OSError: The file cannot be written.
    """
    deadline = Deadline(timeout_seconds, request_seconds, cancel)

    def sink(offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written

    def read_back(offset: int, count: int) -> bytes:
        return os.pread(fd, count, offset)

    target = Target(sink, lambda size: os.ftruncate(fd, size), read_back)
    return store_download.download_object(url, deadline, target, expected_bytes=expected_bytes)


def write(
    url: str, data: bytes, timeout_seconds: float, *, request_seconds: float = REQUEST_SECONDS
) -> None:
    """Write an object, in parts if it is large; it becomes visible only when it is complete.

    Raises:
        StorageError: Access is refused, or `timeout_seconds` are over.
    """
    _put(url, data, len(data), Deadline(timeout_seconds, request_seconds))


def upload(
    path: Path, url: str, timeout_seconds: float, *, request_seconds: float = REQUEST_SECONDS
) -> None:
    """Upload a local file, in parts if it is large, with bounded memory.

    Raises:
        StorageError: As for `write`.
        OSError: The file cannot be read.
    """
    _put(url, path, path.stat().st_size, Deadline(timeout_seconds, request_seconds))


def list_names(folder_url: str, timeout_seconds: float) -> list[str]:
    """Names of the objects directly under a prefix, sorted."""

    def request(seconds: float) -> list[str]:
        store, prefix = get_client(_listable(folder_url), seconds)
        listing = obstore.list_with_delimiter(store, prefix or None)
        return sorted(str(meta["path"]).rpartition("/")[2] for meta in listing["objects"])

    return call_with_retries("list", folder_url, Deadline(timeout_seconds), request)


def list_tree(folder_url: str, timeout_seconds: float) -> list[str]:
    """Names of all objects under a prefix, relative to it, sorted."""

    def request(seconds: float) -> list[str]:
        store, prefix = get_client(_listable(folder_url), seconds)
        pages = obstore.list(store, prefix or None)
        return sorted(str(meta["path"]).removeprefix(prefix) for page in pages for meta in page)

    return call_with_retries("list", folder_url, Deadline(timeout_seconds), request)


def _listable(folder_url: str) -> str:
    """The address with a final slash; an error for http(s), which cannot list."""
    if folder_url.startswith("http"):
        raise StorageError(f"{redact(folder_url)} cannot be listed; name the files")
    return folder_url.rstrip("/") + "/"


def _read_once(url: str, deadline: Deadline) -> tuple[bytes, str]:
    """The contents of an object and its ETag."""
    buffer = bytearray()

    def resize(size: int) -> None:
        buffer[:] = bytes(size)

    def sink(offset: int, data: memoryview) -> None:
        buffer[offset : offset + len(data)] = data

    result = store_download.download_object(url, deadline, Target(sink, resize))
    return bytes(buffer), result.etag


def _put(url: str, content: bytes | Path, size: int, deadline: Deadline) -> None:
    is_http = url.startswith("http")
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))

    def request(seconds: float) -> None:
        store, name = get_client(url, HTTP_PUT_SECONDS if is_http else seconds)
        obstore.put(
            store,
            name,
            content,
            use_multipart=size > 2 * part_bytes and not is_http,
            chunk_size=part_bytes,
            max_concurrency=UPLOAD_PARTS,
        )

    call_with_retries("write", url, deadline, request)
