"""The shards of a run by number: the index of each, and its file where there is one on this
machine.

A local shard is read where it lies; a remote one from its copy in the cache, and from the store as
long as there is no copy. Nothing that is wrong with a shard ends a run: it is a `DataError` with a
slug by which the samples concerned are counted.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from threading import Event
from typing import TypeVar
from weakref import WeakSet

from data_pipeline.common import storage
from data_pipeline.common.errors import ConfigError, DataError, StorageError
from data_pipeline.common.open_files import is_out_of_files, raise_limit
from data_pipeline.reading.cache import Made, ShardCache, touch
from data_pipeline.reading.open_shard import OpenShard
from data_pipeline.reading.troubles import Trouble, Troubles, reason_of
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest, ShardEntry, load_index
from data_pipeline.shards.shard_index import ShardIndex

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

INDEX_TRIES = 3
"""How often an index of a store is fetched that is not the one of the manifest."""
_WAIT_SECONDS = 0.05
_REMEDY = (
    "copy it again, or make the manifest again with `vlmoe data index` if the change was meant"
)


def check_present(manifests: Sequence[Manifest], max_corrupt_ratio: float = 0.01) -> None:
    """Look for every local shard, so that a long run does not find after hours that many are
    missing.

    Shards of stores are not asked for. Shards of another length than their manifest says are only
    told.

    Args:
        manifests: All that a run reads.
        max_corrupt_ratio: Share of the samples that may be in missing shards.

    Raises:
        DataError: More of them are missing; names the first.
    """
    shards = [
        (manifest, entry)
        for manifest in manifests
        for entry in manifest.shards
        if storage.is_local(manifest.base)
    ]
    missing: list[tuple[str, int]] = []
    for manifest, entry in shards:
        path = storage.local_path(manifest.shard_url(entry))
        try:
            found = path.stat().st_size
        except OSError as error:
            what = (
                "is missing"
                if isinstance(error, FileNotFoundError)
                else f"cannot be read ({error.strerror})"
            )
            missing.append(
                (
                    f"shard {path} {what}, but its manifest expects {entry.samples} samples in "
                    f"{entry.bytes} bytes there",
                    entry.samples,
                )
            )
            continue
        if found != entry.bytes:
            logger.warning(
                "shard %s has %d bytes, but its manifest expects %d; samples that are damaged or cut off "
                "are left out",
                path,
                found,
                entry.bytes,
            )
    lost, total = (
        sum(samples for _, samples in missing),
        sum(manifest.total_samples for manifest in manifests),
    )
    if not missing:
        return
    counted = f"{len(missing)} of {len(shards)} shards are missing, with {lost} of {total} samples"
    if lost > max_corrupt_ratio * total:
        raise DataError(
            f"{missing[0][0]}; {_REMEDY} ({counted}, more than data.max_corrupt_ratio {max_corrupt_ratio:g})"
        )
    logger.warning("%s; %s: their samples are left out", missing[0][0], counted)


class ShardStore:
    """The shards of some manifests by number, opened on first use; the longest unused are closed.

    One thread reads; others may call `load_index` and `copy`.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        settings: DataConfig | None = None,
        *,
        max_open: int = 256,
    ) -> None:
        """Know the shards; nothing is opened yet.

        Args:
            manifests: Their shards, one after the other, are numbers 0, 1, ...
            settings: The cache, and how long to wait for a store.
            max_open: Shards held open, with up to two descriptors each; fewer where there are not
                so many.

        Raises:
            ConfigError: A manifest is remote, copies are wanted, and there is no `cache_dir`.
        """
        self.settings = settings or DataConfig()
        self._shards = [(manifest, entry) for manifest in manifests for entry in manifest.shards]
        self._max_open = max(1, max_open)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._held: WeakSet[OpenShard] = WeakSet()
        """All that were opened and that somebody still has."""
        self.short_of_files = False
        """Set by other threads that could open no file: the one that reads closes some."""
        raise_limit()
        for manifest in manifests:
            if (
                not self.settings.cache_dir
                and self.settings.cache_gib
                and not storage.is_local(manifest.base)
            ):
                raise ConfigError(
                    f"data.cache_dir is empty, but {storage.redact(manifest.base)} is remote; name a local folder for "
                    f"copies of its shards, or set data.cache_gib=0 to keep none"
                )
        self.cache = (
            ShardCache(self.settings.cache_dir, self.settings.cache_gib)
            if self.settings.cache_dir
            else None
        )
        self._troubles = Troubles(
            Path(self.settings.cache_dir, "bad") if self.settings.cache_dir else None
        )

    def __len__(self) -> int:
        return len(self._shards)

    def name(self, number: int) -> str:
        """How the manifest calls a shard."""
        return self._shards[number][1].name

    def entry(self, number: int) -> ShardEntry:
        """The manifest's row for a shard."""
        return self._shards[number][1]

    def is_remote(self, number: int) -> bool:
        """Whether a shard or its index lies in a store."""
        manifest = self._shards[number][0]
        return not (storage.is_local(manifest.base) and storage.is_local(manifest.url))

    def trouble(self, number: int) -> Trouble | None:
        """What is known against a shard now."""
        return self._troubles.of(*self._shards[number])

    def note_trouble(self, number: int, error: StorageError, reason: str = "") -> None:
        """Remember why a shard could not be had; `reason` is the word for it if not
        `reason_of(error)`."""
        self._troubles.add(*self._shards[number], error, reason)

    def forget_troubles(self) -> None:
        """Ask the stores again that did not answer or refused, instead of believing for a while
        that they still do."""
        self._troubles.forget()

    def at_hand(self, number: int) -> OpenShard | None:
        """A shard that needs no store to be opened; None for others.

        Raises:
            DataError: It is missing or its index is bad, with a slug.
        """
        if self.short_of_files:
            self.short_of_files = False
            self.free_files()
        shard = self._open.get(number)
        if shard is not None:
            self._open.move_to_end(number)
            if shard.fd < 0:
                shard.fd = self.with_files(lambda: self._open_file(number))
            elif shard.is_copy:
                touch(shard.fd)
            return shard
        return None if self.is_remote(number) else self.open(number)

    def open(self, number: int, index: ShardIndex | None = None) -> OpenShard:
        """A shard with its index; the one given, or else the one that is fetched now.

        Raises:
            DataError: The shard or its index cannot be had, with a slug.
        """
        shard = self.at_hand(number) if number in self._open else None
        if shard is None:
            shard = self.with_files(lambda: self._open_new(number, index))
            self._open[number] = shard
            self._held.add(shard)
            self._close_oldest(self._max_open)
        return shard

    def with_files(self, work: Callable[[], Answer]) -> Answer:
        """Do what opens files; as long as there are too many, close some and do it again.

        Raises:
            ConfigError: There are too many though none is held here.
        """
        while True:
            try:
                return work()
            except (OSError, DataError) as error:
                if not is_out_of_files(error):
                    raise
                if not self.free_files():
                    raise ConfigError(
                        "this process may not open enough files to read a single shard; raise `ulimit -n`, or look "
                        "for what else holds files open"
                    ) from error

    def free_files(self) -> bool:
        """Close the shards unused longest and hold half as many from now on; whether anything was
        closed."""
        few = len(self._open) // 2
        self._max_open = max(1, few)
        idle = [
            shard for shard in self._held if shard not in self._open.values()
        ]  # in use by who reads
        idle += [self._open.popitem(last=False)[1] for _ in range(len(self._open) - few)]
        for shard in idle:
            shard.into_memory()
            self._held.discard(shard)
        return bool(idle)

    def forget(self, number: int) -> None:
        """Close a shard, so that it is opened anew."""
        if (shard := self._open.pop(number, None)) is not None:
            shard.close()

    def drop_copy(self, number: int) -> None:
        """Remove the copy of a shard, of which the store has a better one."""
        logger.warning("the copy of shard %s is damaged; it will be made again", self.name(number))
        if self.cache is not None:
            self.cache.drop(self.entry(number))
        self.forget(number)

    def close(self) -> None:
        """Close every file."""
        self._close_oldest(0)

    def load_index(self, number: int, timeout_seconds: float) -> ShardIndex:
        """The index of a shard; one from a store is tried again while it is not the manifest's.

        Any thread may call it.

        Raises:
            DataError: It cannot be had, with a slug; or there are too many open files
            (`is_out_of_files`).
        """
        manifest, entry = self._shards[number]
        for attempt in range(INDEX_TRIES):
            try:
                return load_index(
                    manifest,
                    entry,
                    cache_dir=self.settings.cache_dir,
                    timeout_seconds=max(0.1, timeout_seconds),
                    request_seconds=self.settings.request_seconds,
                )
            except StorageError as error:
                if is_out_of_files(error):
                    raise
                if error.slug or not error.kind:
                    raise DataError(str(error), slug=error.slug or "bad-index") from error.__cause__
                slug = (
                    "bad-index"
                    if reason_of(error) in ("missing-shard", "truncated")
                    else reason_of(error)
                )
                raise StorageError(str(error), slug=slug, kind=error.kind) from None
            except DataError as error:
                if storage.is_local(manifest.url) or attempt == INDEX_TRIES - 1:
                    raise DataError(str(error), slug=error.slug or "bad-index") from error
        raise AssertionError("the last try returns or raises")

    def copy(
        self,
        number: int,
        *,
        keep: Collection[int] = (),
        timeout_seconds: float = 0.0,
        cancel: Event | None = None,
    ) -> Made:
        """Copy a remote shard into the cache.

        Args:
            number: The shard.
            keep: Shards whose copies stay.
            timeout_seconds: Longest time without progress; `data.shard_seconds` if 0.
            cancel: Set by another thread to give up.

        Raises:
            StorageError: It cannot be had.
            OSError: There are too many open files.
        """
        manifest, entry = self._shards[number]
        if storage.is_local(manifest.base):
            return Made.HERE
        if self.cache is None:
            return Made.FULL
        return self.cache.make(
            entry,
            manifest.shard_url(entry),
            keep={self.cache.path(self._shards[other][1]) for other in keep},
            timeout_seconds=timeout_seconds or self.settings.shard_seconds,
            request_seconds=self.settings.request_seconds,
            cancel=cancel,
        )

    def copy_now(self, number: int, end: float, keep: Collection[int]) -> None:
        """Copy a shard that can only be had whole, closing others to make room if need be.

        Args:
            number: The shard.
            end: When to give up, on `time.monotonic()`.
            keep: Shards that stay open.

        Raises:
            StorageError: It cannot be had, or there is no room.
        """
        while (left := end - time.monotonic()) > 0:
            made = self.with_files(lambda left=left: self.copy(number, timeout_seconds=left))  # type: ignore[misc]
            if made is Made.HERE:
                return
            if made is Made.FULL:
                held = [
                    other for other, shard in self._open.items() if shard.is_copy and shard.fd >= 0
                ]
                if not (others := [other for other in held if other not in keep]):
                    break
                self.forget(others[0])
            else:
                time.sleep(_WAIT_SECONDS)
        raise StorageError(
            f"shard {self.name(number)} comes from a server that gives only whole files, and there is no room for "
            f"a copy; raise data.cache_gib, or use a server that knows ranges",
            slug="unreachable",
        )

    def _open_new(self, number: int, index: ShardIndex | None) -> OpenShard:
        manifest, entry = self._shards[number]
        url, remote = manifest.shard_url(entry), not storage.is_local(manifest.base)
        if not remote:
            fd = _open_local(storage.local_path(url), entry)
        try:
            if index is None:
                index = self.load_index(number, self.settings.shard_seconds)
            if remote:
                fd = self._open_file(number)
        except BaseException:
            if not remote:
                os.close(fd)
            raise
        return OpenShard(entry, url, index, fd, is_copy=remote)

    def _open_file(self, number: int) -> int:
        """A descriptor of a shard's copy; -1 without one."""
        fd = self.cache.open(self.entry(number)) if self.cache is not None else None
        return -1 if fd is None else fd

    def _close_oldest(self, keep: int) -> None:
        while len(self._open) > keep:
            self._open.popitem(last=False)[1].close()


def _open_local(path: Path, entry: ShardEntry) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing; {_REMEDY}", slug="missing-shard") from None
    except OSError as error:
        raise DataError(
            f"cannot open shard {path}: {error.strerror}", slug="unreachable"
        ) from error
