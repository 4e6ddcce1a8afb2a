"""The shard cache of a node: complete copies only, within the size limit."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common import object_store
from data_pipeline.common.errors import StorageError
from data_pipeline.reading import cache as cache_module
from data_pipeline.reading.cache import CopyResult, ShardCache
from data_pipeline.shards.manifest import ShardEntry
from tests.support.cached_shards import cached_shards, fetch_shard, make_cache
from tests.support.fault_proxy import fault_proxy
from tests.support.http_shards import WebShards, web_shards

pytestmark = pytest.mark.http


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[WebShards]:
    """Five shards."""
    object_store.clear_clients()
    with web_shards(tmp_path, count=35) as running:
        yield running


def set_age(cache: ShardCache, entry: ShardEntry, seconds: float) -> None:
    """Set the time since the last use of a copy."""
    last_use = time.time() - seconds
    os.utime(cache.path(entry), (last_use, last_use))


def test_shard_is_copied_once(shards: WebShards) -> None:
    cache = make_cache(shards, 10)
    assert cache.open(shards.manifest.shards[0]) is None
    assert fetch_shard(shards, cache, 0) is CopyResult.CACHED

    requests = shards.request_count()
    assert fetch_shard(shards, cache, 0) is CopyResult.CACHED
    assert shards.request_count() == requests

    fd = cache.open(shards.manifest.shards[0])
    assert fd is not None
    assert os.pread(fd, 1 << 20, 0) == (shards.web.folder / "shard-000000.tar").read_bytes()
    os.close(fd)


def test_least_recently_used_copies_are_removed(shards: WebShards) -> None:
    cache, entries = make_cache(shards, 3.2), shards.manifest.shards
    for shard, age in [(0, 100), (1, 300), (2, 200)]:
        assert fetch_shard(shards, cache, shard) is CopyResult.CACHED
        set_age(cache, entries[shard], age)
    assert fetch_shard(shards, cache, 3) is CopyResult.CACHED
    assert cached_shards(shards, cache) == [0, 2, 3]

    fd = cache.open(entries[2])  # now recently used, and locked
    assert fd is not None
    assert fetch_shard(shards, cache, 4) is CopyResult.CACHED
    assert cached_shards(shards, cache) == [2, 3, 4]
    os.close(fd)
    total = sum(path.stat().st_size for path in shards.cache.glob("shards/*"))
    assert total <= 3.2 * max(entry.bytes for entry in entries)


def test_open_and_kept_copies_are_not_removed(shards: WebShards) -> None:
    cache, entries = make_cache(shards, 2.2), shards.manifest.shards
    assert fetch_shard(shards, cache, 0) is fetch_shard(shards, cache, 1) is CopyResult.CACHED
    fd = cache.open(entries[0])
    assert fd is not None
    keep = {cache.path(entries[1])}
    assert fetch_shard(shards, cache, 2, keep=keep) is CopyResult.NO_SPACE
    assert cached_shards(shards, cache) == [0, 1]

    os.close(fd)
    assert fetch_shard(shards, cache, 2, keep=keep) is CopyResult.CACHED
    assert cached_shards(shards, cache) == [1, 2]


def test_removed_copy_is_readable_while_open(shards: WebShards) -> None:
    cache = make_cache(shards, 10)
    fetch_shard(shards, cache, 0)
    fd = cache.open(shards.manifest.shards[0])
    assert fd is not None
    cache.remove(shards.manifest.shards[0])
    assert os.pread(fd, 1 << 20, 0) == (shards.web.folder / "shard-000000.tar").read_bytes()
    os.close(fd)


def test_shard_that_another_process_copies(shards: WebShards) -> None:
    cache = make_cache(shards, 10)
    fetch_shard(shards, cache, 1)
    part = Path(f"{cache.path(shards.manifest.shards[0])}.part")
    with open(part, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert fetch_shard(shards, cache, 0) is CopyResult.BUSY
        assert part.exists()

    # Without the lock, it is the leftover of a killed process.
    assert fetch_shard(shards, cache, 0) is CopyResult.CACHED
    assert not part.exists()


def test_limit_on_concurrent_copies(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_CONCURRENT_COPIES", 2)
    cache = make_cache(shards, 10)
    fetch_shard(shards, cache, 1)
    slots = [open(shards.cache / "slots" / str(slot), "w") for slot in range(2)]  # noqa: SIM115
    for file in slots:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert fetch_shard(shards, cache, 0) is CopyResult.SLOTS_TAKEN
    slots[1].close()
    assert fetch_shard(shards, cache, 0) is CopyResult.CACHED
    slots[0].close()


def test_leftovers_are_removed(shards: WebShards) -> None:
    cache = make_cache(shards, 2.2)
    fetch_shard(shards, cache, 0)
    (shards.cache / "shards" / "abc-old.tar.part").write_bytes(bytes(100_000))
    assert fetch_shard(shards, cache, 1) is CopyResult.CACHED
    assert not list(shards.cache.glob("shards/*.part"))
    assert cached_shards(shards, cache) == [0, 1]


def test_truncated_copy_is_not_used(shards: WebShards) -> None:
    """After a power failure, a copy may have its final name but not all of its bytes."""
    cache = make_cache(shards, 10)
    fetch_shard(shards, cache, 0)
    os.truncate(cache.path(shards.manifest.shards[0]), 600)
    assert cache.open(shards.manifest.shards[0]) is None
    assert fetch_shard(shards, cache, 0) is CopyResult.CACHED
    assert cache.open(shards.manifest.shards[0]) is not None


def test_flipped_bit_is_copied_again(shards: WebShards, caplog: pytest.LogCaptureFixture) -> None:
    cache, entry = make_cache(shards, 10), shards.manifest.shards[0]
    with fault_proxy(shards.web.port, fault_rate=0.5, seed=0, faults=["bit-flip"]) as proxy:
        url = f"{proxy.endpoint}/{entry.name}"
        result = cache.fetch(entry, url, timeout_seconds=5, request_seconds=1)
        assert result is CopyResult.CACHED
        assert proxy.fault_counts["bit-flip"] == 2 and proxy.requests == 3
    assert cache.path(entry).read_bytes() == (shards.web.folder / entry.name).read_bytes()
    assert not caplog.records


@pytest.mark.parametrize("change", ["shorter", "longer", "other content"])
def test_shard_that_does_not_match_its_manifest(
    shards: WebShards, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is kept after three attempts, with a warning."""
    cache, entry = make_cache(shards, 10), shards.manifest.shards[0]
    path = shards.web.folder / entry.name
    data = path.read_bytes()
    changed = {
        "shorter": data[:-512],
        "longer": data + bytes(512),
        "other content": data[:-1] + b"\1",
    }[change]
    path.write_bytes(changed)

    requests = shards.request_count()
    caplog.set_level(logging.WARNING)
    assert fetch_shard(shards, cache, 0) is CopyResult.CACHED
    assert shards.request_count() == requests + 3
    fd = cache.open(entry)
    assert fd is not None and os.fstat(fd).st_size == len(changed)
    os.close(fd)
    assert f"{entry.name} has {len(changed)} bytes" in caplog.text
    assert f"expects {entry.bytes}" in caplog.text


def test_failed_copy_leaves_no_file(shards: WebShards) -> None:
    cache, entry = make_cache(shards, 10), shards.manifest.shards[0]
    (shards.web.folder / entry.name).unlink()
    with pytest.raises(StorageError) as error:
        fetch_shard(shards, cache, 0)
    assert error.value.kind == "missing"
    assert list(shards.cache.glob("shards/*shard*")) == []
    assert cache.open(entry) is None


def test_full_disk(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(shards, 10)
    fetch_shard(shards, cache, 0)
    statvfs = os.statvfs

    def almost_full(path: object) -> os.statvfs_result:
        fields = list(statvfs(path))  # type: ignore[call-overload]
        fields[4] = 0  # f_bavail
        return os.statvfs_result(fields)

    def no_space(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", almost_full)
        assert fetch_shard(shards, cache, 1) is CopyResult.NO_SPACE
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        assert fetch_shard(shards, cache, 1) is CopyResult.NO_SPACE

    assert not list(shards.cache.glob("shards/*.part"))
    assert cached_shards(shards, cache) == [0]
    assert fetch_shard(shards, cache, 1) is CopyResult.CACHED


def test_cache_smaller_than_a_shard(shards: WebShards) -> None:
    assert fetch_shard(shards, ShardCache(shards.cache, 0), 0) is CopyResult.NO_SPACE
    assert fetch_shard(shards, make_cache(shards, 0.5), 0) is CopyResult.NO_SPACE
    assert shards.request_count() == 0


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    """No new copies, one warning, and existing copies are readable."""
    cache = make_cache(shards, 10)
    fetch_shard(shards, cache, 0)

    def no_locks(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert [fetch_shard(shards, cache, shard) for shard in (1, 2)] == [CopyResult.NO_SPACE] * 2
    (record,) = caplog.records
    assert os.strerror(error) in record.getMessage()
    fd = cache.open(shards.manifest.shards[0])
    assert fd is not None
    os.close(fd)


def test_long_non_ascii_name(shards: WebShards) -> None:
    """File systems limit names to 255 bytes, not characters."""
    entry = dataclasses.replace(shards.manifest.shards[0], name="\u56fe" * 80 + ".tar")
    url = shards.manifest.shard_url(shards.manifest.shards[0])
    result = make_cache(shards, 10).fetch(entry, url, timeout_seconds=5, request_seconds=1)
    assert result is CopyResult.CACHED


def test_disk_space_is_reserved(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a copy would fail midway when other processes fill the disk."""
    cache, entry = make_cache(shards, 10), shards.manifest.shards[0]
    fetch_shard(shards, cache, 1)
    fd = cache._reserve(entry, ())
    assert isinstance(fd, int)
    assert os.fstat(fd).st_size == entry.bytes
    assert os.fstat(fd).st_blocks * 512 >= entry.bytes
    os.close(fd)

    def fail_with(error: int) -> None:
        def fails(*_: object) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "posix_fallocate", fails)

    requests = shards.request_count()
    fail_with(errno.ENOSPC)
    assert fetch_shard(shards, cache, 0) is CopyResult.NO_SPACE
    assert shards.request_count() == requests
    assert not cache._part(entry).exists()

    fail_with(errno.EOPNOTSUPP)
    assert fetch_shard(shards, cache, 0) is CopyResult.CACHED
