"""Shards at hand: checked against the manifest, open, and with their index.

A local shard is read where it lies. A remote one is copied once into `cache_dir`, under a name that
holds its hash, by whichever process of the machine needs it first; the others wait for it. A shard
that is missing or is not the one of the manifest ends training: reading on would teach something
else than was asked for.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.shards.manifest import Manifest, ShardEntry, load_index
from data_pipeline.shards.shard_index import ShardIndex


@dataclass(frozen=True)
class OpenShard:
    """A checked shard, ready for `os.pread`."""

    name: str
    path: str
    fd: int
    index: ShardIndex


def check_present(manifests: Sequence[Manifest]) -> None:
    """Look at every local shard's length, so that a long run does not find a missing one after hours.

    Raises:
        DataError: Some are missing or have another length than their manifest says; names the first.
    """
    shards = [(manifest, entry) for manifest in manifests for entry in manifest.shards
              if storage.is_local(manifest.url)]
    problems = []
    for manifest, entry in shards:
        try:
            os.close(_open_checked(storage.local_path(manifest.shard_url(entry)), entry))
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f" ({len(problems)} of {len(shards)} shards are like this)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)


class ShardStore:
    """The shards of some manifests by number, opened on first use; the longest unused are closed."""

    def __init__(
        self,
        manifests: Sequence[Manifest],
        *,
        cache_dir: str = "",
        verify: bool = True,
        timeout_seconds: float = 300.0,
        max_open: int = 256,
    ) -> None:
        """Know the shards; nothing is opened yet.

        Args:
            manifests: Their shards, one after the other, are numbers 0, 1, ...
            cache_dir: Where copies of remote shards go.
            verify: Check a shard's SHA-256 when it is first opened.
            timeout_seconds: Longest wait for one request to a store.
            max_open: Shards held open.

        Raises:
            ConfigError: A manifest is remote and there is no `cache_dir`.
        """
        self._shards = [(manifest, entry) for manifest in manifests for entry in manifest.shards]
        self._cache_dir, self._verify, self._timeout = cache_dir, verify, timeout_seconds
        self._max_open = max_open
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._checked: set[int] = set()
        for manifest in manifests:
            if not cache_dir and not storage.is_local(manifest.url):
                raise ConfigError(
                    f"data.cache_dir is empty, but {storage.redact(manifest.url)} is remote; name a local "
                    f"folder for copies of its shards"
                )

    def __len__(self) -> int:
        return len(self._shards)

    def open(self, number: int) -> OpenShard:
        """One shard, checked and open.

        Raises:
            DataError: It is missing, has another length or another hash than the manifest says.
        """
        shard = self._open.get(number)
        if shard is None:
            shard = self._open_new(number)
            self._open[number] = shard
            if len(self._open) > self._max_open:
                _, oldest = self._open.popitem(last=False)
                os.close(oldest.fd)
        else:
            self._open.move_to_end(number)
        return shard

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1].fd)

    def _open_new(self, number: int) -> OpenShard:
        manifest, entry = self._shards[number]
        index = load_index(manifest, entry, with_members=False, timeout_seconds=self._timeout)
        local = storage.is_local(manifest.url)
        path = storage.local_path(manifest.shard_url(entry)) if local else self._cached(manifest, entry)
        fd = _open_checked(path, entry)
        try:
            if self._verify and number not in self._checked:
                self._check_hash(fd, path, entry)
            self._checked.add(number)
        except BaseException:
            os.close(fd)
            raise
        return OpenShard(entry.name, str(path), fd, index)

    def _cached(self, manifest: Manifest, entry: ShardEntry) -> Path:
        """The local copy of a remote shard, made if it is not there."""
        path = Path(self._cache_dir) / f"{entry.sha256[:16]}-{Path(entry.name).name}"
        with _locked(path):
            if not path.exists() or path.stat().st_size != entry.bytes:
                url = manifest.shard_url(entry)
                try:
                    storage.fetch_to_file(
                        url, path, expected_bytes=entry.bytes, timeout_seconds=self._timeout
                    )
                except DataError as error:
                    raise DataError(f"shard {entry.name}: {error}; {_REMEDY}") from error
        return path

    def _check_hash(self, fd: int, path: Path, entry: ShardEntry) -> None:
        """Compare the whole file with the manifest, once a machine where there is a cache folder."""
        found = os.fstat(fd)
        stamp = f"{path} {found.st_size} {found.st_mtime_ns}"
        marker = Path(self._cache_dir) / "verified" / entry.sha256 if self._cache_dir else None
        if marker and marker.exists() and marker.read_text() == stamp:
            return
        with open(fd, "rb", closefd=False) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != entry.sha256:
            if marker and path.parent == Path(self._cache_dir):
                path.unlink(missing_ok=True)  # our own copy: let the next start fetch it again
            raise DataError(
                f"shard {path} has SHA-256 {sha256}, but its manifest expects {entry.sha256}: it was "
                f"changed or damaged; {_REMEDY}"
            )
        if marker:
            storage.write_bytes(str(marker), stamp.encode())


_REMEDY = "copy it again, or make the manifest again with `vlmoe data index` if the change was meant"


def _open_checked(path: Path, entry: ShardEntry) -> int:
    """A file descriptor of a shard that has the manifest's length."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(
            f"shard {path} is missing, but its manifest expects {entry.samples} samples in "
            f"{entry.bytes} bytes there; {_REMEDY}"
        ) from None
    except OSError as error:
        hint = "lower data.shuffle_window or raise `ulimit -n`" if error.errno == errno.EMFILE else _REMEDY
        raise DataError(f"cannot open shard {path}: {error.strerror}; {hint}") from error
    found = os.fstat(fd).st_size
    if found != entry.bytes:
        os.close(fd)
        kind = "was cut off" if found < entry.bytes else "is longer than it should be"
        raise DataError(
            f"shard {path} has {found} bytes, but its manifest expects {entry.bytes}: it {kind}; {_REMEDY}"
        )
    return fd


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes of this machine from making `path` at the same time."""
    storage.local_path(str(path)).parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # let go by the kernel if its holder dies
        yield
    finally:
        os.close(fd)
