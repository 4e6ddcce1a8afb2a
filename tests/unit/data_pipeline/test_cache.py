"""The cache of a node: whole copies only, within the limit, for any number of processes that come
and go."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common import object_store
from data_pipeline.common.errors import StorageError
from data_pipeline.reading import cache as cache_module
from data_pipeline.reading.cache import Made, ShardCache
from data_pipeline.shards.manifest import ShardEntry
from tests.support.fault_proxy import fault_proxy
from tests.support.http_shards import WebShards, web_shards

pytestmark = pytest.mark.http


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[WebShards]:
    object_store.forget_clients()
    with web_shards(tmp_path, count=35) as found:
        yield found


def _make(shards: WebShards, cache: ShardCache, number: int, **more: object) -> Made:
    entry = shards.manifest.shards[number]
    given: dict[str, object] = {"timeout_seconds": 5.0, "request_seconds": 1.0}
    return cache.make(entry, shards.manifest.shard_url(entry), **given | more)  # type: ignore[arg-type]


def _cache(shards: WebShards, room_for: float) -> ShardCache:
    """A cache with room for so many shards."""
    return ShardCache(
        shards.cache, room_for * max(entry.bytes for entry in shards.manifest.shards) / 2**30
    )


def _here(shards: WebShards, cache: ShardCache) -> list[int]:
    return [number for number, entry in enumerate(shards.manifest.shards) if cache.has(entry)]


def _use(cache: ShardCache, entry: ShardEntry, age_seconds: float) -> None:
    """As if the copy had been used so long ago."""
    then = time.time() - age_seconds
    os.utime(cache.path(entry), (then, then))


def test_a_shard_is_copied_once_and_whole(shards: WebShards) -> None:
    cache = _cache(shards, 10)
    assert cache.open(shards.manifest.shards[0]) is None
    assert _make(shards, cache, 0) is Made.HERE
    asked = shards.asked()
    assert _make(shards, cache, 0) is Made.HERE and shards.asked() == asked
    fd = cache.open(shards.manifest.shards[0])
    assert fd is not None
    assert os.pread(fd, 1 << 20, 0) == (shards.web.folder / "shard-000000.tar").read_bytes()
    os.close(fd)


def test_the_longest_unused_go_first(shards: WebShards) -> None:
    cache, entries = _cache(shards, 3.2), shards.manifest.shards
    for number, age in [(0, 100), (1, 300), (2, 200)]:
        assert _make(shards, cache, number) is Made.HERE
        _use(cache, entries[number], age)
    assert _make(shards, cache, 3) is Made.HERE
    assert _here(shards, cache) == [0, 2, 3]
    fd = cache.open(entries[2])  # used now: no longer the oldest, and held
    assert fd is not None
    assert _make(shards, cache, 4) is Made.HERE
    assert _here(shards, cache) == [2, 3, 4]
    os.close(fd)
    total = sum(path.stat().st_size for path in shards.cache.glob("shards/*"))
    assert total <= 3.2 * max(entry.bytes for entry in entries)


def test_what_is_open_or_wanted_stays(shards: WebShards) -> None:
    cache, entries = _cache(shards, 2.2), shards.manifest.shards
    assert _make(shards, cache, 0) is _make(shards, cache, 1) is Made.HERE
    fd = cache.open(entries[0])
    assert fd is not None
    assert _make(shards, cache, 2, keep={cache.path(entries[1])}) is Made.FULL
    assert _here(shards, cache) == [0, 1]
    os.close(fd)
    assert _make(shards, cache, 2, keep={cache.path(entries[1])}) is Made.HERE
    assert _here(shards, cache) == [1, 2]


def test_a_removed_copy_is_whole_for_who_has_it_open(shards: WebShards) -> None:
    cache = _cache(shards, 10)
    _make(shards, cache, 0)
    fd = cache.open(shards.manifest.shards[0])
    assert fd is not None
    cache.drop(shards.manifest.shards[0])
    assert os.pread(fd, 1 << 20, 0) == (shards.web.folder / "shard-000000.tar").read_bytes()
    os.close(fd)


def test_a_shard_that_another_process_copies_is_left_to_it(shards: WebShards) -> None:
    cache = _cache(shards, 10)
    _make(shards, cache, 1)
    part = Path(f"{cache.path(shards.manifest.shards[0])}.part")
    with open(part, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert _make(shards, cache, 0) is Made.BUSY
        assert part.exists()
    assert _make(shards, cache, 0) is Made.HERE  # its holder is gone
    assert not part.exists()


def test_few_copies_at_a_time(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "COPIES_AT_ONCE", 2)
    cache = _cache(shards, 10)
    _make(shards, cache, 1)
    held = [open(shards.cache / "slots" / str(number), "w") for number in range(2)]  # noqa: SIM115
    for file in held:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert _make(shards, cache, 0) is Made.CROWDED
    held[1].close()
    assert _make(shards, cache, 0) is Made.HERE
    held[0].close()


def test_leftovers_are_removed(shards: WebShards) -> None:
    cache = _cache(shards, 2.2)
    _make(shards, cache, 0)
    (shards.cache / "shards" / "abc-old.tar.part").write_bytes(bytes(100_000))
    assert _make(shards, cache, 1) is Made.HERE
    assert not list(shards.cache.glob("shards/*.part"))
    assert _here(shards, cache) == [0, 1]


def test_a_half_copy_is_not_taken_for_whole(shards: WebShards) -> None:
    """As a power failure may leave it: the right name, but not all of the bytes."""
    cache = _cache(shards, 10)
    _make(shards, cache, 0)
    os.truncate(cache.path(shards.manifest.shards[0]), 600)
    assert cache.open(shards.manifest.shards[0]) is None
    assert _make(shards, cache, 0) is Made.HERE
    assert cache.open(shards.manifest.shards[0]) is not None


def test_flipped_bits_are_copied_again(shards: WebShards, caplog: pytest.LogCaptureFixture) -> None:
    cache, entry = _cache(shards, 10), shards.manifest.shards[0]
    with fault_proxy(shards.web.port, share=0.5, seed=0, faults=["flip"]) as proxy:
        made = cache.make(
            entry, f"{proxy.endpoint}/{entry.name}", timeout_seconds=5, request_seconds=1
        )
        assert made is Made.HERE and proxy.done["flip"] == 2 and proxy.requests == 3
    assert cache.path(entry).read_bytes() == (shards.web.folder / entry.name).read_bytes()
    assert not caplog.records


@pytest.mark.parametrize("change", [-512, 512, 0])
def test_another_shard_than_the_manifests_is_kept_after_three_tries(
    shards: WebShards, change: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache, entry = _cache(shards, 10), shards.manifest.shards[0]
    path, asked = shards.web.folder / entry.name, shards.asked()
    data = path.read_bytes()
    path.write_bytes(
        data[:change] if change < 0 else data + bytes(change) if change else data[:-1] + b"\1"
    )
    caplog.set_level(logging.WARNING)
    assert _make(shards, cache, 0) is Made.HERE
    assert shards.asked() == asked + 3
    fd = cache.open(entry)
    assert fd is not None and os.fstat(fd).st_size == entry.bytes + change
    os.close(fd)
    assert (
        "but its manifest expects" in caplog.text
        and "samples are checked one by one" in caplog.text
    )


def test_a_failed_copy_leaves_nothing(shards: WebShards) -> None:
    cache, entry = _cache(shards, 10), shards.manifest.shards[0]
    (shards.web.folder / entry.name).unlink()
    with pytest.raises(StorageError) as error:
        _make(shards, cache, 0)
    assert error.value.kind == "missing"
    assert list(shards.cache.glob("shards/*shard*")) == [] and cache.open(entry) is None


def test_a_full_disk_is_as_a_full_cache(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _cache(shards, 10)
    _make(shards, cache, 0)
    real = os.statvfs

    def almost_full(path: object) -> os.statvfs_result:
        fields = list(real(path))  # type: ignore[call-overload]
        fields[4] = 0  # f_bavail
        return os.statvfs_result(fields)

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", almost_full)
        assert _make(shards, cache, 1) is Made.FULL

    def no_space(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        assert _make(shards, cache, 1) is Made.FULL
    assert not list(shards.cache.glob("shards/*.part")) and _here(shards, cache) == [0]
    assert _make(shards, cache, 1) is Made.HERE


def test_nothing_fits_into_no_room(shards: WebShards) -> None:
    assert _make(shards, ShardCache(shards.cache, 0), 0) is Made.FULL
    assert _make(shards, _cache(shards, 0.5), 0) is Made.FULL
    assert shards.asked() == 0


_COPIER = """
import sys
from data_pipeline.common.errors import StorageError
from data_pipeline.reading.cache import ShardCache
from data_pipeline.shards.manifest import load_manifest
manifest = load_manifest(sys.argv[1])
cache = ShardCache(sys.argv[2], float(sys.argv[3]))
print("ready", flush=True)
while True:
    for entry in manifest.shards:
        cache.drop(entry)
        cache.make(entry, manifest.shard_url(entry), timeout_seconds=5, request_seconds=1)
"""


def _killed_at_random(shards: WebShards, url: str, times: int) -> None:
    cache, chance = _cache(shards, 3.5), random.Random(0)
    limit = 3.5 * max(entry.bytes for entry in shards.manifest.shards)
    command = [sys.executable, "-c", _COPIER, url, str(shards.cache), str(limit / 2**30)]
    for _ in range(times):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for entry in shards.manifest.shards:
            if (fd := cache.open(entry)) is not None:
                assert os.pread(fd, 1 << 20, 0) == (shards.web.folder / entry.name).read_bytes()
                os.close(fd)
        assert len(list(shards.cache.glob("shards/*.part"))) <= 1, "leftovers grow"
    for number in range(len(shards.manifest.shards)):
        assert _make(shards, cache, number) is Made.HERE
    assert not list(shards.cache.glob("shards/*.part"))
    assert sum(path.stat().st_size for path in shards.cache.glob("shards/*")) <= limit


def test_killed_while_copying(shards: WebShards) -> None:
    _killed_at_random(shards, shards.manifest.url, times=3)


@pytest.mark.long
def test_killed_while_copying_many_times(shards: WebShards) -> None:
    with fault_proxy(shards.web.port, share=0.3, faults=["late"], late_seconds=0.03) as proxy:
        _killed_at_random(shards, proxy.endpoint, times=30)


_READER = """
import random, sys
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.samples import RawSample
from data_pipeline.settings import DataConfig
from data_pipeline.reading.store import ShardStore
from data_pipeline.shards.manifest import load_manifest
from tests.support.small_shards import picture
url, cache, room, seed, batches = sys.argv[1:]
settings = DataConfig(cache_dir=cache, cache_gib=float(room), shard_seconds=20, request_seconds=5, fetch_ahead=2)
store = ShardStore([load_manifest(url)], settings, max_open=2)
reader, order = Reader(store), random.Random(int(seed))
shards = list(range(5))
order.shuffle(shards)
ahead = FetchAhead(store, lambda first: iter([[shards[number % 5]] for number in range(first, 10000)]))
here = 0
for number in range(int(batches)):
    ahead.reached(number // 4)
    refs = [(shards[number // 4 % 5], order.randrange(7)), (shards[(number // 4 + 1) % 5], order.randrange(7))]
    for (shard, i), one in zip(refs, reader.read_many(refs)):
        assert isinstance(one, RawSample), one
        assert one.key == f"{7 * shard + i:05d}" and one.members["png"] == picture(7 * shard + i)
        here += store.open(shard).fd >= 0
ahead.close()
print("read", here)
"""


def test_processes_that_take_each_others_room_read_every_sample_right(shards: WebShards) -> None:
    """Four processes with room for two of five shards: copies come and go all the time."""
    room = 2.2 * max(entry.bytes for entry in shards.manifest.shards) / 2**30
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _READER,
                shards.manifest.url,
                str(shards.cache),
                str(room),
                str(seed),
                "60",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    said = [process.communicate(timeout=100) for process in processes]
    assert all(out.startswith("read ") and not error for out, error in said), said
    assert sum(int(out.split()[1]) for out, _ in said) > 0, "no copy was ever used"
    assert len(list(shards.cache.glob("shards/*.tar"))) <= 2
    assert shards.asked() > 20, "nothing was removed and copied again"


def test_a_copy_that_another_process_ends_meanwhile_is_left_alone(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the unfinished file and locking it, whoever made it may end: then it is the
    copy itself."""
    cache, entry = _cache(shards, 10), shards.manifest.shards[0]
    whole = (shards.web.folder / entry.name).read_bytes()
    lock = cache_module._try_lock

    def ends_first(fd: int, kind: int) -> bool:
        os.pwrite(fd, whole, 0)
        os.rename(cache._part(entry), cache.path(entry))
        monkeypatch.setattr(cache_module, "_try_lock", lock)
        return lock(fd, kind)

    (shards.cache / "shards").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(cache_module, "_try_lock", ends_first)
    calls: list[int] = []
    monkeypatch.setattr(cache, "_slot", _always_free(calls))
    assert _make(shards, cache, 0) is Made.HERE
    assert cache.path(entry).read_bytes() == whole and shards.asked() == 0
    assert calls == [1], "the file was not locked where this test expects it"


def _always_free(calls: list[int]) -> Callable[[], AbstractContextManager[bool]]:
    @contextmanager
    def slot() -> Iterator[bool]:
        calls.append(1)
        yield True

    return slot


def test_a_file_that_was_given_up_while_it_was_waited_for_is_not_filled(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who made it removed it between our opening and our locking it: others would not see ours."""
    cache, entry = _cache(shards, 10), shards.manifest.shards[0]
    _make(shards, cache, 1)
    part, real, others = cache._part(entry), cache_module._try_lock, [1]

    def given_up(fd: int, kind: int) -> bool:
        if others and part.exists() and os.path.samestat(os.fstat(fd), part.stat()):
            others.clear()
            part.unlink()
        return real(fd, kind)

    monkeypatch.setattr(cache_module, "_try_lock", given_up)
    asked = shards.asked()
    assert _make(shards, cache, 0) is Made.BUSY and not others
    assert shards.asked() == asked, "it was copied for nothing"
    assert _make(shards, cache, 0) is Made.HERE
    assert cache.path(entry).read_bytes() == (shards.web.folder / entry.name).read_bytes()


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_that_was_taken_away_gets_no_name(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    cache, entry = _cache(shards, 10), shards.manifest.shards[0]
    part, real = cache._part(entry), object_store.fetch

    def taken_away(*given: Any, **more: Any) -> object_store.Fetched:
        found = real(*given, **more)
        part.unlink()
        part.write_bytes(b"another's")
        if fails:
            raise StorageError("the store is away", kind="unreachable")
        return found

    monkeypatch.setattr(object_store, "fetch", taken_away)
    if fails:
        with pytest.raises(StorageError):
            _make(shards, cache, 0)
    else:
        assert _make(shards, cache, 0) is Made.BUSY
    assert not cache.has(entry) and part.read_bytes() == b"another's"


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of_once_and_keeps_no_copies(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    cache = _cache(shards, 10)
    _make(shards, cache, 0)

    def no_locks(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert [_make(shards, cache, number) for number in (1, 2)] == [Made.FULL] * 2
    assert [os.strerror(error) in record.getMessage() for record in caplog.records] == [True]
    fd = cache.open(shards.manifest.shards[0])
    assert fd is not None, "what was copied before can be read"
    os.close(fd)


def test_a_long_name_of_other_letters_is_a_name_of_a_file(shards: WebShards) -> None:
    entry = dataclasses.replace(shards.manifest.shards[0], name="\u56fe" * 80 + ".tar")
    url = shards.manifest.shard_url(shards.manifest.shards[0])
    assert _cache(shards, 10).make(entry, url, timeout_seconds=5, request_seconds=1) is Made.HERE


def test_room_is_reserved_on_the_disk(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a disk that others fill meanwhile would fail in the middle of a copy."""
    cache, entry = _cache(shards, 10), shards.manifest.shards[0]
    _make(shards, cache, 1)
    fd = cache._reserve(entry, ())
    assert isinstance(fd, int)
    assert os.fstat(fd).st_size == entry.bytes and os.fstat(fd).st_blocks * 512 >= entry.bytes
    os.close(fd)

    def fails_with(error: int) -> None:
        def fails(*_: object) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "posix_fallocate", fails)

    asked = shards.asked()
    fails_with(errno.ENOSPC)
    assert _make(shards, cache, 0) is Made.FULL
    assert shards.asked() == asked and not cache._part(entry).exists()
    fails_with(errno.EOPNOTSUPP)
    assert _make(shards, cache, 0) is Made.HERE
