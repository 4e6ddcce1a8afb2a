"""Opens the shards of a run: the index of each, and its file if it is on this machine.

Local shards are read in place; remote shards from their copy in the cache, or from the store while
there is no copy. A problem with a shard never ends a run: it raises a `DataError` with a slug, by
which the affected samples are counted.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from threading import Event
from typing import TypeVar
from weakref import WeakSet

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError, DataError, StorageError
from data_pipeline.common.open_files import is_too_many_open_files, raise_open_file_limit
from data_pipeline.reading.cache import CopyResult, ShardCache
from data_pipeline.reading.file_locks import touch
from data_pipeline.reading.index_loading import load_index_with_retries
from data_pipeline.reading.local_shards import open_local_shard
from data_pipeline.reading.open_shard import OpenShard
from data_pipeline.reading.shard_failures import ShardFailure, ShardFailures
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest, ShardEntry
from data_pipeline.shards.shard_index import ShardIndex

logger = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_SECONDS = 0.05


def check_cache_dir(manifests: Iterable[Manifest], settings: DataConfig) -> None:
    """Raise a ConfigError if shards are remote and there is no folder for copies of them."""
    remote = [manifest.base for manifest in manifests if not storage.is_local(manifest.base)]
    if remote and settings.cache_gib and not settings.cache_dir:
        raise ConfigError(
            f"data.cache_dir is empty, but {storage.redact(remote[0])} is remote; set it to a "
            f"local folder for copies of its shards, or set data.cache_gib=0 to disable caching"
        )


class ShardStore:
    """The shards of some manifests, opened on first use; least recently used ones are closed.

    One thread reads; other threads may call `load_index` and `cache_shard`.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        settings: DataConfig | None = None,
        *,
        max_open: int = 256,
    ) -> None:
        """Set the shards; none is opened yet.

        Args:
            manifests: Their shards, concatenated, are numbered 0, 1, ...
            settings: The cache, and timeouts of stores.
            max_open: Maximum number of open shards, with up to two descriptors each; reduced if the
                process may not open as many files.
        """
        self.settings = settings or DataConfig()
        self._shards = [(manifest, entry) for manifest in manifests for entry in manifest.shards]
        self._max_open = max(1, max_open)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._referenced: WeakSet[OpenShard] = WeakSet()
        """All opened shards that are still referenced, by this store or by a reader."""
        self.out_of_files = False
        """Set by other threads that could not open a file; the reading thread then closes some."""

        raise_open_file_limit()
        check_cache_dir(manifests, self.settings)
        cache_dir = self.settings.cache_dir
        self.cache = ShardCache(cache_dir, self.settings.cache_gib) if cache_dir else None
        self._failures = ShardFailures(Path(cache_dir, "failures") if cache_dir else None)

    def __len__(self) -> int:
        return len(self._shards)

    def name(self, shard: int) -> str:
        """Name of a shard in its manifest."""
        return self.entry(shard).name

    def entry(self, shard: int) -> ShardEntry:
        """Manifest entry of a shard."""
        return self._shards[shard][1]

    def is_remote(self, shard: int) -> bool:
        """Whether a shard or its index is in a remote store."""
        manifest = self._shards[shard][0]
        return not (storage.is_local(manifest.base) and storage.is_local(manifest.url))

    def failure(self, shard: int) -> ShardFailure | None:
        """The current record of a shard's failure."""
        return self._failures.get(*self._shards[shard])

    def record_failure(self, shard: int, error: StorageError, reason: str = "") -> None:
        """Record that a shard is unavailable; `reason` defaults to `failure_reason(error)`."""
        self._failures.record(*self._shards[shard], error, reason)

    def clear_failures(self) -> None:
        """Discard records of stores that did not respond or refused access: try them again."""
        self._failures.clear()

    def try_open(self, shard: int) -> OpenShard | None:
        """A shard that can be opened without requests to a store; None for others.

        Raises:
            DataError: It is missing or its index is corrupt; has a slug.
        """
        if self.out_of_files:
            self.out_of_files = False
            self.close_idle_files()

        opened = self._open.get(shard)
        if opened is None:
            return None if self.is_remote(shard) else self.open(shard)

        self._open.move_to_end(shard)
        if opened.fd < 0:
            opened.fd = self.retry_out_of_files(lambda: self._open_copy(shard))
        elif opened.is_copy:
            touch(opened.fd)
        return opened

    def open(self, shard: int, index: ShardIndex | None = None) -> OpenShard:
        """A shard with its index, which is loaded if it is not given.

        Raises:
            DataError: The shard or its index is unavailable; has a slug.
        """
        opened = self.try_open(shard) if shard in self._open else None
        if opened is None:
            opened = self.retry_out_of_files(lambda: self._open_new(shard, index))
            self._open[shard] = opened
            self._referenced.add(opened)
            self._close_least_recently_used(self._max_open)
        return opened

    def retry_out_of_files(self, function: Callable[[], T]) -> T:
        """Call a function that opens files; while there are too many open files, close some and
        call it again.

        Raises:
            ConfigError: There are too many open files, but none can be closed here.
        """
        while True:
            try:
                return function()
            except (OSError, DataError) as error:
                if not is_too_many_open_files(error):
                    raise
                if not self.close_idle_files():
                    raise ConfigError(
                        "the limit on open files is too low to read a single shard; raise "
                        "`ulimit -n`, or check what else in this process holds files open"
                    ) from error

    def close_idle_files(self) -> bool:
        """Close the least recently used half of the open shards, and keep at most as many open from
        now on; returns whether any file was closed."""
        keep = len(self._open) // 2
        self._max_open = max(1, keep)
        # Shards that a reader still references, although they are not in `_open` any more.
        to_close = [shard for shard in self._referenced if shard not in self._open.values()]
        to_close += [self._open.popitem(last=False)[1] for _ in range(len(self._open) - keep)]
        for shard in to_close:
            shard.detach_file()
            self._referenced.discard(shard)
        return bool(to_close)

    def close_shard(self, shard: int) -> None:
        """Close a shard, so that it is opened again."""
        if (opened := self._open.pop(shard, None)) is not None:
            opened.close()

    def remove_corrupt_copy(self, shard: int) -> None:
        """Remove the corrupt copy of a shard that is intact in the store."""
        logger.warning("the copy of shard %s is corrupt; it will be copied again", self.name(shard))
        if self.cache is not None:
            self.cache.remove(self.entry(shard))
        self.close_shard(shard)

    def close(self) -> None:
        """Close every file."""
        self._close_least_recently_used(0)

    def load_index(self, shard: int, timeout_seconds: float) -> ShardIndex:
        """The index of a shard. Thread-safe.

        Raises:
            DataError: It is unavailable (has a slug), or there are too many open files
                (`is_too_many_open_files`).
        """
        return load_index_with_retries(*self._shards[shard], self.settings, timeout_seconds)

    def cache_shard(
        self,
        shard: int,
        *,
        keep: Collection[int] = (),
        timeout_seconds: float = 0.0,
        cancel: Event | None = None,
    ) -> CopyResult:
        """Copy a remote shard into the cache. Thread-safe.

        Args:
            shard: The shard.
            keep: Shards whose copies must not be removed.
            timeout_seconds: Maximum time without progress; `data.shard_seconds` if 0.
            cancel: Set by another thread to abort.

        Raises:
            StorageError: The shard is unavailable.
            OSError: There are too many open files.
        """
        manifest, entry = self._shards[shard]
        if storage.is_local(manifest.base):
            return CopyResult.CACHED
        if self.cache is None:
            return CopyResult.NO_SPACE
        return self.cache.fetch(
            entry,
            manifest.shard_url(entry),
            keep={self.cache.path(self.entry(other)) for other in keep},
            timeout_seconds=timeout_seconds or self.settings.shard_seconds,
            request_seconds=self.settings.request_seconds,
            cancel=cancel,
        )

    def cache_shard_now(self, shard: int, deadline: float, keep: Collection[int]) -> None:
        """Copy a shard that can only be downloaded as a whole, closing others to free space.

        Args:
            shard: The shard.
            deadline: On `time.monotonic()`.
            keep: Shards that stay open.

        Raises:
            StorageError: The shard is unavailable, or there is no space.
        """
        while (remaining := deadline - time.monotonic()) > 0:
            result = self.retry_out_of_files(
                functools.partial(self.cache_shard, shard, timeout_seconds=remaining)
            )
            if result is CopyResult.CACHED:
                return
            if result is CopyResult.NO_SPACE:
                closable = [
                    other
                    for other, opened in self._open.items()
                    if opened.is_copy and opened.fd >= 0 and other not in keep
                ]
                if not closable:
                    break
                self.close_shard(closable[0])
            else:
                time.sleep(_POLL_SECONDS)

        raise StorageError(
            f"the server of shard {self.name(shard)} does not support ranged requests, and there "
            f"is no space for a copy of the shard; raise data.cache_gib, or use a server with "
            f"range support",
            slug="unreachable",
        )

    def _open_new(self, shard: int, index: ShardIndex | None) -> OpenShard:
        manifest, entry = self._shards[shard]
        url, is_remote = manifest.shard_url(entry), not storage.is_local(manifest.base)
        if not is_remote:
            fd = open_local_shard(storage.local_path(url))
        try:
            if index is None:
                index = self.load_index(shard, self.settings.shard_seconds)
            if is_remote:
                fd = self._open_copy(shard)
        except BaseException:
            if not is_remote:
                os.close(fd)
            raise
        return OpenShard(entry, url, index, fd, is_copy=is_remote)

    def _open_copy(self, shard: int) -> int:
        """Descriptor of a shard's copy; -1 if there is none."""
        fd = self.cache.open(self.entry(shard)) if self.cache is not None else None
        return -1 if fd is None else fd

    def _close_least_recently_used(self, keep: int) -> None:
        while len(self._open) > keep:
            self._open.popitem(last=False)[1].close()
