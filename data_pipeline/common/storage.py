"""Files and objects by address: one small set of verbs for disks and object stores.

An address is a path, `file:/path`, `s3://bucket/name`, `gs://bucket/name`, `az://container/name` or
`http(s)://host/name`. Nothing here ever runs a shell (`pipe:` is no address), and what is written
appears complete or not at all. Paths go through `os`; the rest through `object_store.py`.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.common import object_store
from data_pipeline.common.errors import StorageError
from data_pipeline.common.object_store import redact

__all__ = [
    "exists",
    "fetch_to_file",
    "is_local",
    "join",
    "list_names",
    "list_tree",
    "local_path",
    "parent",
    "read_bytes",
    "redact",
    "replacing",
    "size",
    "upload_file",
    "write_bytes",
]

TIMEOUT_SECONDS = 60.0
"""Longest wait for one small request, where the caller names none."""


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine.

    Raises:
        StorageError: It is an address of a kind that is not known.
    """
    if url.startswith("file:"):
        return True
    scheme, separator, _ = url.partition("://")
    if not separator:
        # A path may hold a colon, but these two prefixes ask for programs to be run.
        if url.startswith(("pipe:", "-")):
            raise StorageError(f"{url!r} is not an address: commands are never run to read data")
        return True
    if scheme not in object_store.SCHEMES:
        known = ", ".join(f"{name}://" for name in object_store.SCHEMES)
        raise StorageError(f"{redact(url)}: no such kind of address; use a path, file:, {known}")
    return False


def local_path(url: str) -> Path:
    """The path behind a local address.

    Raises:
        StorageError: It is not local.
    """
    if not is_local(url):
        raise StorageError(f"{redact(url)} is not a path of this machine")
    if not url.startswith("file:"):
        return Path(url)
    rest = url.removeprefix("file:")
    if rest.startswith("//"):
        host, slash, path = rest.removeprefix("//").partition("/")
        if host not in ("", "localhost") or not slash:
            raise StorageError(
                f"{url} names the machine {host!r}; write file:/path or file:///path"
            )
        rest = "/" + path
    return Path(rest)


def join(base_url: str, name: str) -> str:
    """The address of `name` in the folder `base_url`."""
    return f"{base_url.rstrip('/')}/{name}" if base_url != "/" else f"/{name}"


def parent(url: str) -> str:
    """The address of the folder that holds `url`."""
    if is_local(url):
        return str(local_path(url).parent)
    # The signature of a presigned address is for that file alone.
    path = url.partition("?")[0] if url.startswith("http") else url
    return path.rstrip("/").rpartition("/")[0]


def exists(url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> bool:
    """Whether there is a file or object at `url`; `timeout_seconds` is the longest wait for a
    store.

    Raises:
        StorageError: The store does not answer or refuses.
    """
    if is_local(url):
        return local_path(url).exists()
    return object_store.head(url, timeout_seconds, missing_ok=True) is not None


def size(url: str) -> int:
    """Bytes of a file or object.

    Raises:
        StorageError: It is missing or cannot be asked.
    """
    if is_local(url):
        with _explained("read", url):
            return local_path(url).stat().st_size
    found = object_store.head(url, TIMEOUT_SECONDS)
    assert found is not None
    return found.size


def read_bytes(
    url: str,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    request_seconds: float = object_store.REQUEST_SECONDS,
    sha256: str = "",
) -> bytes:
    """A whole small file or object.

    Args:
        url: What to read.
        timeout_seconds: Longest time for all tries together.
        request_seconds: Longest time for one request to a store.
        sha256: What it must be, if that is known. An object of a store is read again a few times
            until it is; a local file is not looked at.

    Raises:
        StorageError: It is missing, cannot be read in time, or is another.
    """
    if is_local(url):
        with _explained("read", url):
            return local_path(url).read_bytes()
    return object_store.read_all(
        url, timeout_seconds, sha256=sha256, request_seconds=request_seconds
    )


def write_bytes(url: str, data: bytes, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Put `data` at `url`, replacing what was there; a reader sees the old or the new, never a
    part.

    Raises:
        StorageError: The disk is full, or the store refuses.
    """
    if not is_local(url):
        object_store.write(url, data, timeout_seconds)
        return
    with replacing(local_path(url)) as fd, open(fd, "wb", closefd=False) as file:
        file.write(data)


def fetch_to_file(
    url: str,
    path: str | os.PathLike[str],
    *,
    expected_bytes: int | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    request_seconds: float = object_store.REQUEST_SECONDS,
) -> None:
    """Copy a file or object to a local file, which appears only when it is whole.

    Args:
        url: What to copy.
        path: Where to; its folder is made.
        expected_bytes: Its length if known; another length is an error.
        timeout_seconds: Longest time without progress, all tries together.
        request_seconds: Longest time for one request to a store.

    Raises:
        StorageError: Missing, refused, too slow, of another length, or changed while it was copied.
    """
    found = size(url) if is_local(url) else None
    with replacing(Path(path)) as fd:
        if found is not None:
            _check_length(url, found, expected_bytes)
            with open(local_path(url), "rb") as source, open(fd, "wb", closefd=False) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            _check_length(url, os.fstat(fd).st_size, found)
        else:
            object_store.fetch(
                url,
                fd,
                expected_bytes=expected_bytes,
                timeout_seconds=timeout_seconds,
                request_seconds=request_seconds,
            )


def upload_file(
    path: str | os.PathLike[str], url: str, *, timeout_seconds: float = TIMEOUT_SECONDS
) -> None:
    """Copy a local file to `url`, which appears only when it is whole; large ones go up in parts.

    Raises:
        StorageError: The file cannot be read, the disk is full, or the store refuses.
    """
    if is_local(url):
        fetch_to_file(os.fspath(path), local_path(url))
        return
    with _explained("read", os.fspath(path)):
        object_store.upload(Path(path), url, timeout_seconds)


def list_names(folder_url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> list[str]:
    """Names of the files directly in a folder, sorted; http(s) folders cannot be listed.

    `timeout_seconds` is the longest wait for a store.

    Raises:
        StorageError: The folder cannot be read.
    """
    if is_local(folder_url):
        with _explained("read", folder_url):
            return sorted(
                entry.name for entry in os.scandir(local_path(folder_url)) if entry.is_file()
            )
    return object_store.list_names(folder_url, timeout_seconds)


def list_tree(folder_url: str) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted; http(s) folders cannot be listed.

    Raises:
        StorageError: The folder cannot be read.
    """
    if not is_local(folder_url):
        return object_store.list_tree(folder_url, TIMEOUT_SECONDS)
    base = local_path(folder_url)
    with _explained("read", folder_url):
        os.scandir(base).close()
        found = [Path(folder, name) for folder, _, names in os.walk(base) for name in names]
    return sorted(path.relative_to(base).as_posix() for path in found)


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A file descriptor whose contents become `path` at the end, or vanish after an error.

    Raises:
        StorageError: The folder cannot be made, or the disk is full.
    """
    with _explained("write", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder: a rename is atomic only within one file system.
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with _explained("write", str(path)):
            yield fd
            os.fchmod(fd, 0o644)
            os.fsync(fd)
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _check_length(url: str, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise StorageError(f"{redact(url)} has {found} bytes, but {expected} were expected")


@contextmanager
def _explained(verb: str, url: str) -> Iterator[None]:
    """Turn an `OSError` into a message that names the address and what to do."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOENT: "check the path",
            errno.EACCES: "check its permissions",
            errno.ENOSPC: "the disk is full: free some space or choose another folder",
            errno.EDQUOT: "the quota is used up: free some space or choose another folder",
        }
        hint = hints.get(error.errno or 0, "")
        raise StorageError(
            f"cannot {verb} {url}: {error.strerror or error}" + (f"; {hint}" if hint else "")
        ) from error
