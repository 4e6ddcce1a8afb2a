"""Files and objects by address: the same functions for local disks and object stores.

An address is a path, `file:/path`, `s3://bucket/name`, `gs://bucket/name`, `az://container/name` or
`http(s)://host/name`. No commands are ever run (`pipe:` addresses are rejected), and writes are
atomic. Paths use `os`; everything else uses `object_store.py`.
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
    "atomic_write",
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
    "size",
    "upload_file",
    "write_bytes",
]

TIMEOUT_SECONDS = 60.0
"""Default time limit of an operation on a store."""


def is_local(url: str) -> bool:
    """Whether `url` is a local path.

    Raises:
        StorageError: The scheme of the address is not supported.
    """
    if url.startswith("file:"):
        return True
    scheme, separator, _ = url.partition("://")
    if not separator:
        # A path may contain a colon, but WebDataset runs a command for `pipe:` and reads standard
        # input for `-`.
        if url.startswith(("pipe:", "-")):
            raise StorageError(f"{url!r} is not an address: commands are never run to read data")
        return True
    if scheme not in object_store.SCHEMES:
        supported = ", ".join(f"{name}://" for name in object_store.SCHEMES)
        raise StorageError(f"{redact(url)}: unsupported URL scheme; use a path, file:, {supported}")
    return False


def local_path(url: str) -> Path:
    """The path of a local address.

    Raises:
        StorageError: The address is not local.
    """
    if not is_local(url):
        raise StorageError(f"{redact(url)} is not a local path")
    if not url.startswith("file:"):
        return Path(url)
    rest = url.removeprefix("file:")
    if rest.startswith("//"):
        host, slash, path = rest.removeprefix("//").partition("/")
        if host not in ("", "localhost") or not slash:
            raise StorageError(
                f"{url} contains the host {host!r}; write file:/path or file:///path"
            )
        rest = "/" + path
    return Path(rest)


def join(base_url: str, name: str) -> str:
    """The address of `name` in the folder `base_url`."""
    return f"{base_url.rstrip('/')}/{name}" if base_url != "/" else f"/{name}"


def parent(url: str) -> str:
    """The address of the folder that contains `url`."""
    if is_local(url):
        return str(local_path(url).parent)
    # The signature of a presigned address is valid only for that file.
    path = url.partition("?")[0] if url.startswith("http") else url
    return path.rstrip("/").rpartition("/")[0]


def exists(url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> bool:
    """Whether a file or object exists; `timeout_seconds` applies to stores.

    Raises:
        StorageError: The store does not answer or refuses access.
    """
    if is_local(url):
        return local_path(url).exists()
    return object_store.head(url, timeout_seconds, missing_ok=True) is not None


def size(url: str) -> int:
    """Size of a file or object in bytes.

    Raises:
        StorageError: It is missing or cannot be accessed.
    """
    if is_local(url):
        with _os_errors("read", url):
            return local_path(url).stat().st_size
    info = object_store.head(url, TIMEOUT_SECONDS)
    assert info is not None
    return info.size


def read_bytes(
    url: str,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    request_seconds: float = object_store.REQUEST_SECONDS,
    sha256: str = "",
) -> bytes:
    """Read a whole small file or object.

    Args:
        url: What to read.
        timeout_seconds: Limit for all attempts together.
        request_seconds: Timeout of one request to a store.
        sha256: Expected SHA-256, if known. An object of a store is read again a few times until it
            matches; a local file is not checked.

    Raises:
        StorageError: It is missing, cannot be read in time, or has another SHA-256.
    """
    if is_local(url):
        with _os_errors("read", url):
            return local_path(url).read_bytes()
    return object_store.read_all(
        url, timeout_seconds, sha256=sha256, request_seconds=request_seconds
    )


def write_bytes(url: str, data: bytes, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Write `data` to `url` atomically, replacing an existing file or object.

    Raises:
        StorageError: The disk is full, or the store refuses access.
    """
    if not is_local(url):
        object_store.write(url, data, timeout_seconds)
        return
    with atomic_write(local_path(url)) as fd, open(fd, "wb", closefd=False) as file:
        file.write(data)


def fetch_to_file(
    url: str,
    path: str | os.PathLike[str],
    *,
    expected_bytes: int | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    request_seconds: float = object_store.REQUEST_SECONDS,
) -> None:
    """Copy a file or object to a local file, atomically.

    Args:
        url: What to copy.
        path: Destination; its folder is created.
        expected_bytes: Its size if known; another size is an error.
        timeout_seconds: Maximum time without progress, all attempts together.
        request_seconds: Timeout of one request to a store.

    Raises:
        StorageError: The source is missing, refused or too slow, has another size, or changed
            while it was copied.
    """
    local_bytes = size(url) if is_local(url) else None
    with atomic_write(Path(path)) as fd:
        if local_bytes is not None:
            _check_size(url, local_bytes, expected_bytes)
            with open(local_path(url), "rb") as source, open(fd, "wb", closefd=False) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            _check_size(url, os.fstat(fd).st_size, local_bytes)
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
    """Copy a local file to `url`, atomically; large files are uploaded in parts.

    Raises:
        StorageError: The file cannot be read, the disk is full, or the store refuses access.
    """
    if is_local(url):
        fetch_to_file(os.fspath(path), local_path(url))
        return
    with _os_errors("read", os.fspath(path)):
        object_store.upload(Path(path), url, timeout_seconds)


def list_names(folder_url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> list[str]:
    """Names of the files directly in a folder, sorted; http(s) folders cannot be listed.

    `timeout_seconds` applies to stores.

    Raises:
        StorageError: The folder cannot be read.
    """
    if is_local(folder_url):
        with _os_errors("read", folder_url):
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
    with _os_errors("read", folder_url):
        os.scandir(base).close()  # raises if the folder cannot be read; os.walk does not
        paths = [Path(folder, name) for folder, _, names in os.walk(base) for name in names]
    return sorted(path.relative_to(base).as_posix() for path in paths)


@contextmanager
def atomic_write(path: Path) -> Iterator[int]:
    """A file descriptor of a temporary file that replaces `path` on exit; deleted after an error.

    Raises:
        StorageError: The folder cannot be created, or the disk is full.
    """
    with _os_errors("write", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename is atomic only within one file system.
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with _os_errors("write", str(path)):
            yield fd
            os.fchmod(fd, 0o644)
            os.fsync(fd)
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _check_size(url: str, actual: int, expected: int | None) -> None:
    if expected is not None and actual != expected:
        raise StorageError(f"{redact(url)} has {actual} bytes, but {expected} were expected")


@contextmanager
def _os_errors(verb: str, url: str) -> Iterator[None]:
    """Convert an `OSError` to a `StorageError` with the address and what to do."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOENT: "check the path",
            errno.EACCES: "check its permissions",
            errno.ENOSPC: "the disk is full: free some space or choose another folder",
            errno.EDQUOT: "the quota is used up: free some space or choose another folder",
        }
        hint = f"; {hints[error.errno]}" if error.errno in hints else ""
        raise StorageError(f"cannot {verb} {url}: {error.strerror or error}{hint}") from error
