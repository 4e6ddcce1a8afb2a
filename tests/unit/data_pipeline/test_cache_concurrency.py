"""The shard cache with several processes: killed writers, eviction while reading, and races."""

from __future__ import annotations

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
from data_pipeline.reading.cache import CopyResult
from tests.support.cached_shards import fetch_shard, make_cache, max_shard_bytes
from tests.support.fault_proxy import fault_proxy
from tests.support.http_shards import WebShards, web_shards

pytestmark = pytest.mark.http


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[WebShards]:
    """Five shards."""
    object_store.clear_clients()
    with web_shards(tmp_path, count=35) as running:
        yield running


_WRITER = """
import sys
from data_pipeline.reading.cache import ShardCache
from data_pipeline.shards.manifest import load_manifest

manifest = load_manifest(sys.argv[1])
cache = ShardCache(sys.argv[2], float(sys.argv[3]))
print("ready", flush=True)
while True:
    for entry in manifest.shards:
        cache.remove(entry)
        cache.fetch(entry, manifest.shard_url(entry), timeout_seconds=5, request_seconds=1)
"""


def check_killed_writers(shards: WebShards, url: str, num_writers: int) -> None:
    """Kill writers at random times; copies must be complete, and leftovers must not accumulate."""
    cache, generator = make_cache(shards, 3.5), random.Random(0)
    limit = 3.5 * max_shard_bytes(shards)
    command = [sys.executable, "-c", _WRITER, url, str(shards.cache), str(limit / 2**30)]
    for _ in range(num_writers):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()

        for entry in shards.manifest.shards:
            if (fd := cache.open(entry)) is not None:
                assert os.pread(fd, 1 << 20, 0) == (shards.web.folder / entry.name).read_bytes()
                os.close(fd)
        assert len(list(shards.cache.glob("shards/*.part"))) <= 1

    for shard in range(len(shards.manifest.shards)):
        assert fetch_shard(shards, cache, shard) is CopyResult.CACHED
    assert not list(shards.cache.glob("shards/*.part"))
    assert sum(path.stat().st_size for path in shards.cache.glob("shards/*")) <= limit


def test_killed_writers(shards: WebShards) -> None:
    check_killed_writers(shards, shards.manifest.url, num_writers=3)


@pytest.mark.long
def test_many_killed_writers(shards: WebShards) -> None:
    with fault_proxy(
        shards.web.port, fault_rate=0.3, faults=["delayed"], delay_seconds=0.03
    ) as proxy:
        check_killed_writers(shards, proxy.endpoint, num_writers=30)


_READER = """
import random, sys
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import load_manifest
from tests.support.results import read_many
from tests.support.small_shards import make_png

url, cache_dir, cache_gib, seed, num_batches = sys.argv[1:]
settings = DataConfig(
    cache_dir=cache_dir,
    cache_gib=float(cache_gib),
    shard_seconds=20,
    request_seconds=5,
    fetch_ahead=2,
)
store = ShardStore([load_manifest(url)], settings, max_open=2)
reader, generator = Reader(store), random.Random(int(seed))
shards = list(range(5))
generator.shuffle(shards)
fetch_ahead = FetchAhead(
    store, lambda first: iter([[shards[index % 5]] for index in range(first, 10000)])
)

num_from_cache = 0
for batch in range(int(num_batches)):
    window = batch // 4
    fetch_ahead.start_batch(window)
    refs = [(shards[index % 5], generator.randrange(7)) for index in (window, window + 1)]
    for (shard, i), sample in zip(refs, read_many(reader, refs)):
        assert isinstance(sample, RawSample), sample
        assert sample.key == f"{7 * shard + i:05d}"
        assert sample.members["png"] == make_png(7 * shard + i)
        num_from_cache += store.open(shard).fd >= 0
fetch_ahead.close()
print("read", num_from_cache)
"""


def test_processes_that_evict_each_others_copies(shards: WebShards) -> None:
    """Four processes with space for two of five shards read every sample correctly."""
    cache_gib = 2.2 * max_shard_bytes(shards) / 2**30
    command = [sys.executable, "-c", _READER, shards.manifest.url, str(shards.cache)]
    processes = [
        subprocess.Popen(
            [*command, str(cache_gib), str(seed), "60"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert all(out.startswith("read ") and not error for out, error in outputs), outputs
    assert sum(int(out.split()[1]) for out, _ in outputs) > 0, "no copy was used"
    assert len(list(shards.cache.glob("shards/*.tar"))) <= 2
    assert shards.request_count() > 20, "no copy was removed and copied again"


def always_acquired(calls: list[int]) -> Callable[[], AbstractContextManager[bool]]:
    @contextmanager
    def slot() -> Iterator[bool]:
        calls.append(1)
        yield True

    return slot


def test_copy_finished_between_open_and_lock(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes its copy after this one opened the `.part` file: the opened file is
    the copy itself, and must not be truncated."""
    cache, entry = make_cache(shards, 10), shards.manifest.shards[0]
    content = (shards.web.folder / entry.name).read_bytes()
    try_lock = cache_module.try_lock

    def finish_first(fd: int, operation: int) -> bool:
        os.pwrite(fd, content, 0)
        os.rename(cache._part(entry), cache.path(entry))
        monkeypatch.setattr(cache_module, "try_lock", try_lock)
        return try_lock(fd, operation)

    (shards.cache / "shards").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(cache_module, "try_lock", finish_first)
    calls: list[int] = []
    monkeypatch.setattr(cache, "_slot", always_acquired(calls))
    assert fetch_shard(shards, cache, 0) is CopyResult.CACHED
    assert cache.path(entry).read_bytes() == content
    assert shards.request_count() == 0
    assert calls == [1], "`finish_first` was not called for the `.part` file"


def test_part_file_removed_between_open_and_lock(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer removes the `.part` file after this process opened it: other processes would not
    see a copy in the opened file."""
    cache, entry = make_cache(shards, 10), shards.manifest.shards[0]
    fetch_shard(shards, cache, 1)
    part, try_lock, pending = cache._part(entry), cache_module.try_lock, [1]

    def remove_first(fd: int, operation: int) -> bool:
        if pending and part.exists() and os.path.samestat(os.fstat(fd), part.stat()):
            pending.clear()
            part.unlink()
        return try_lock(fd, operation)

    monkeypatch.setattr(cache_module, "try_lock", remove_first)
    requests = shards.request_count()
    assert fetch_shard(shards, cache, 0) is CopyResult.BUSY and not pending
    assert shards.request_count() == requests
    assert fetch_shard(shards, cache, 0) is CopyResult.CACHED
    assert cache.path(entry).read_bytes() == (shards.web.folder / entry.name).read_bytes()


@pytest.mark.parametrize("fails", [False, True])
def test_part_file_replaced_during_a_copy(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The new `.part` file belongs to another process, and is neither renamed nor removed."""
    cache, entry = make_cache(shards, 10), shards.manifest.shards[0]
    part, fetch = cache._part(entry), object_store.fetch

    def replace_part(*args: Any, **options: Any) -> object_store.FetchResult:
        result = fetch(*args, **options)
        part.unlink()
        part.write_bytes(b"of another process")
        if fails:
            raise StorageError("the store does not respond", kind="unreachable")
        return result

    monkeypatch.setattr(object_store, "fetch", replace_part)
    if fails:
        with pytest.raises(StorageError):
            fetch_shard(shards, cache, 0)
    else:
        assert fetch_shard(shards, cache, 0) is CopyResult.BUSY
    assert not cache.has(entry)
    assert part.read_bytes() == b"of another process"
