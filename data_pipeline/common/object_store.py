"""Object stores through obstore: s3, gs, az and http(s), with the care that the library leaves to us.

Clients are made on first use, one per bucket, process and time-out. Their threads do not survive
`fork`: a forked child that used one would wait for ever, so it is told so instead. Every answer is
checked for its length, and all parts of an object for one ETag. Messages never hold secrets.

Credentials come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_REGION, AWS_ENDPOINT_URL (http allowed), GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY, and instance roles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, S3Store, from_url

from data_pipeline.common.errors import StorageError

SCHEMES = ("s3", "gs", "az", "http", "https")
PART_BYTES = 8 << 20
"""Size of one ranged request; 8 MiB with a few in flight fills a fast wire."""
PARTS_IN_FLIGHT = 4
MAX_RETRIES = 5

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_ASKED_FOR_CREDENTIALS = ("169.254.169.254", "/latest/api/token", "metadata.google", "/metadata/identity", "redential")

Result = TypeVar("Result")
_ERRORS = (BaseError, OSError, ValueError)
"""What obstore raises."""


class ObjectInfo(NamedTuple):
    """What a store says about an object."""

    size: int
    etag: str


_clients: dict[tuple[str, str, float], ObjectStore] = {}
_clients_pid: int | None = None


def head(url: str, timeout_seconds: float, *, missing_ok: bool = False) -> ObjectInfo | None:
    """Length and ETag of an object; None for a missing one where that is allowed."""
    store, name = _open(url, timeout_seconds)
    try:
        meta = obstore.head(store, name)
    except FileNotFoundError as error:
        if missing_ok:
            return None
        raise StorageError(_explain("read", url, error)) from None
    except _ERRORS as error:
        raise StorageError(_explain("read", url, error)) from None
    return ObjectInfo(meta["size"], meta["e_tag"] or "")


def read_all(url: str, timeout_seconds: float) -> bytes:
    """A whole small object in one request."""
    store, name = _open(url, timeout_seconds)

    def get() -> bytes:
        answer = obstore.get(store, name)
        data = bytes(answer.bytes())
        if len(data) != answer.meta["size"]:
            raise StorageError(f"{redact(url)} came with {len(data)} of {answer.meta['size']} bytes")
        return data

    return _ask("read", url, get)


def write_all(url: str, data: bytes, timeout_seconds: float) -> None:
    """Put an object; stores make it visible only when it is whole."""
    store, name = _open(url, timeout_seconds)
    _ask("write", url, lambda: obstore.put(store, name, data))


def fetch(url: str, fd: int, expected_bytes: int | None, timeout_seconds: float) -> None:
    """Copy an object into an open file, in parts of `PART_BYTES`.

    Raises:
        StorageError: Missing, refused, too slow, not `expected_bytes` long, or changed in between.
    """
    found = head(url, timeout_seconds)
    assert found is not None
    if expected_bytes is not None and found.size != expected_bytes:
        raise StorageError(f"{redact(url)} has {found.size} bytes, but {expected_bytes} were expected")
    store, name = _open(url, timeout_seconds)

    def copy_part(start: int) -> None:
        end = min(start + PART_BYTES, found.size)
        data = memoryview(_ask("read", url, lambda: _part(store, name, url, start, end, found)))
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], start + written)

    os.truncate(fd, found.size)
    starts = range(0, found.size, PART_BYTES)
    if len(starts) <= 1:
        for start in starts:
            copy_part(start)
        return
    with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
        jobs = [pool.submit(copy_part, start) for start in starts]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def list_names(folder_url: str, timeout_seconds: float) -> list[str]:
    """Names of the objects directly under a prefix, sorted."""
    store, prefix = _open(folder_url.rstrip("/") + "/", timeout_seconds)
    if folder_url.startswith("http"):
        raise StorageError(f"{redact(folder_url)} cannot be listed; name the files")
    answer = _ask("list", folder_url, lambda: obstore.list_with_delimiter(store, prefix or None))
    return sorted(str(found["path"]).rpartition("/")[2] for found in answer["objects"])


def redact(url: str) -> str:
    """An address as it may be shown: without user, password and query (presigned URLs carry keys)."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    rest = rest.partition("?")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _part(store: ObjectStore, name: str, url: str, start: int, end: int, whole: ObjectInfo) -> bytes:
    """One checked range of an object."""
    # A plain request where one is enough: small web servers know no ranges.
    options: Any = None if (start, end) == (0, whole.size) else {"range": (start, end)}
    answer = obstore.get(store, name, options=options)
    etag, data = answer.meta["e_tag"] or "", bytes(answer.bytes())
    if (etag, answer.meta["size"]) != (whole.etag, whole.size):
        raise StorageError(f"{redact(url)} changed while it was read; start again")
    if len(data) != end - start:
        raise StorageError(f"{redact(url)} came with {len(data)} of {end - start} bytes at {start}")
    return data


def _open(url: str, timeout_seconds: float) -> tuple[ObjectStore, str]:
    """The client for an address, and the object's name in it."""
    global _clients_pid
    if _clients_pid is not None and _clients_pid != os.getpid():
        raise StorageError(
            f"process {os.getpid()} was forked from {_clients_pid}, which had already used an object "
            f"store; its client would wait for ever here: start workers with 'forkserver' or 'spawn'"
        )
    scheme, _, rest = url.partition("://")
    if "?" in rest:
        raise StorageError(f"{redact(url)}?...: addresses with a query (presigned) are not supported")
    host, _, name = rest.partition("/")
    base = f"{scheme}://{host}"
    endpoint = _s3_endpoint() if scheme == "s3" else ""
    known = (base, endpoint, timeout_seconds)
    if known not in _clients:
        _clients_pid = os.getpid()
        try:
            _clients[known] = _client(scheme, host, endpoint, timeout_seconds)
        except _ERRORS as error:
            raise StorageError(_explain("open", base, error)) from None
    return _clients[known], name


def _s3_endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _client(scheme: str, host: str, endpoint: str, timeout_seconds: float) -> ObjectStore:
    """A new client with explicit time-outs and retries."""
    wait = timedelta(seconds=timeout_seconds)
    plain = scheme == "http" or endpoint.startswith("http://")
    client: Any = {
        "connect_timeout": min(timedelta(seconds=10), wait),
        "read_timeout": min(timedelta(seconds=60), wait),
        "timeout": wait,
    } | ({"allow_http": True} if plain else {})
    retry: Any = {"max_retries": MAX_RETRIES, "retry_timeout": wait}
    if scheme == "s3":
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        more: Any = {"endpoint": endpoint} if endpoint else {}
        return S3Store(host, region=region, client_options=client, retry_config=retry, **more)
    return from_url(f"{scheme}://{host}", client_options=client, retry_config=retry)


def _ask(verb: str, url: str, request: Callable[[], Result]) -> Result:
    try:
        return request()
    except StorageError:
        raise
    except _ERRORS as error:
        # `from None`: the library's own text may quote signed requests, so it must not be printed.
        raise StorageError(_explain(verb, url, error)) from None


def _explain(verb: str, url: str, error: Exception) -> str:
    """What went wrong in one line, without quoting the library's text beyond known-harmless words."""
    text, kind = str(error), type(error).__name__
    status = re.search(r"\b(?:status[^0-9]{1,12}|Server returned non-2xx status code: )([45]\d\d)\b", text)
    if isinstance(error, FileNotFoundError):
        reason = "there is no such object; check the address"
    elif kind in ("PermissionDeniedError", "UnauthenticatedError"):
        reason = "the store refused access; check the credentials and the bucket's rules"
    elif any(part in text for part in _ASKED_FOR_CREDENTIALS):
        # Without keys the library asks the cloud's own service for some, which other machines do not have.
        names = _CREDENTIALS.get(url.partition("://")[0], "them")
        reason = f"no credentials were found; set {names} in the environment"
    elif "Connection refused" in text or "dns error" in text or "tcp connect" in text:
        reason = "the store cannot be reached; check the network and the endpoint (AWS_ENDPOINT_URL for s3)"
    elif "timed out" in text.lower() or "timedout" in text.lower():
        reason = "the store did not answer in time; raise data.timeout_seconds or look at the network"
    elif kind == "NotSupportedError":
        reason = "the server gives no ranges of a file; serve it with one that does"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    elif "must be specified" in text.lower():
        reason = f"an account is needed; set {_CREDENTIALS.get(url.partition('://')[0], 'it')} in the environment"
    else:
        reason = f"the store answered with {kind}" + (f" (status {status[1]})" if status else "")
    return f"cannot {verb} {redact(url)}: {reason}"
