"""The thread that copies upcoming shards: what it copies, what it keeps, and how it ends."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.common import object_store
from data_pipeline.loading.batch_reader import BatchReader
from data_pipeline.order.order import Order, OrderSource
from data_pipeline.reading import fetch_ahead
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import SampleRef
from tests.support.fault_proxy import fault_proxy
from tests.support.http_shards import WebShards, web_settings, web_shards
from tests.support.results import read_one
from tests.support.small_shards import make_shards
from tests.support.waiting import wait_until

pytestmark = pytest.mark.http


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebShards]:
    """Ten shards."""
    object_store.clear_clients()
    monkeypatch.setattr(fetch_ahead, "MAX_WAIT_SECONDS", 0.1)
    with web_shards(tmp_path, count=70) as running:
        yield running


def cached_shards(store: ShardStore) -> set[int]:
    assert store.cache is not None
    return {shard for shard in range(len(store)) if store.cache.has(store.entry(shard))}


def windows_per_batch(*windows: list[int]) -> Callable[[int], Iterator[list[int]]]:
    """An order in which each batch needs one window."""
    return lambda batch: iter(windows[batch:])


def check_cached(store: ShardStore, thread: FetchAhead, expected: set[int]) -> None:
    """Wait until these shards are cached; later rounds of the thread must cache no others."""
    wait_until(lambda: cached_shards(store) >= expected)
    rounds = thread.rounds
    wait_until(lambda: thread.rounds > rounds + 2)
    assert cached_shards(store) == expected


def test_current_window_and_shards_after_it(shards: WebShards) -> None:
    store = shards.store(fetch_ahead=2)
    thread = FetchAhead(store, windows_per_batch([3, 1, 2], [0, 5, 4], [6, 7]))
    check_cached(store, thread, {3, 1, 2, 0, 5})
    thread.start_batch(1)  # the second window is current, so all of it is copied
    check_cached(store, thread, {0, 1, 2, 3, 4, 5, 6, 7})
    thread.close()


def test_endless_order_of_few_shards(shards: WebShards) -> None:
    store = shards.store(fetch_ahead=50)
    thread = FetchAhead(store, lambda batch: islice(itertools.cycle([[0], [1]]), batch, None))
    reader = Reader(store)
    for batch in range(6):
        thread.start_batch(batch)
        assert read_one(reader, batch % 2, 3).key == f"{batch % 2 * 7 + 3:05d}"
    check_cached(store, thread, {0, 1})
    thread.close()


@pytest.mark.parametrize("num_windows", [4, 9, 16])
def test_plan_in_every_epoch(num_windows: int) -> None:
    """It has every needed shard, also if the same shards are repeated after few windows."""
    num_shards = num_windows * 4
    order = Order([OrderSource(name="a", sizes=[10] * num_shards)], 0, 4)

    def windows_from(batch: int) -> Iterator[list[int]]:
        return order.shards_from(8 * batch)

    class StoreWithoutCache:
        cache, settings = None, SimpleNamespace(fetch_ahead=4)

        def __len__(self) -> int:
            return num_shards

    thread = FetchAhead(StoreWithoutCache(), windows_from)  # type: ignore[arg-type]
    for batch in range(4 * num_windows * 40 // 8):
        thread.start_batch(batch)
        needed = {ref.shard for ref in order.samples(8 * batch, 8)}
        planned = thread.plan()
        assert needed <= set(planned), f"batch {batch}"
        assert len(planned) == 8


def test_current_window_is_not_evicted(shards: WebShards) -> None:
    cache_gib = 3.5 * max(entry.bytes for entry in shards.manifest.shards) / 2**30
    store = shards.store(fetch_ahead=4, cache_gib=cache_gib)
    thread = FetchAhead(store, windows_per_batch([0, 1, 2], [3, 4], [5, 6]))
    check_cached(store, thread, {0, 1, 2})

    requests = shards.request_count()
    reader = Reader(store)
    assert read_one(reader, 6, 0).key == "00042"  # by a ranged request
    thread.start_batch(2)
    wait_until(lambda: {5, 6} <= cached_shards(store))
    assert shards.request_count() == requests + 3, "expected one ranged request and two copies"
    assert len(cached_shards(store)) == 3
    thread.close()


def test_missing_files_do_not_end_the_thread(shards: WebShards) -> None:
    (shards.web.folder / "shard-000001.tar").unlink()
    (shards.web.folder / "shard-000002.tar.index").unlink()
    store = shards.store()
    thread = FetchAhead(store, windows_per_batch([0, 1, 2, 3]))
    check_cached(store, thread, {0, 3})
    assert shards.store().failure(1) is not None, "the failure is not shared"
    thread.close()


def test_close_during_a_copy(shards: WebShards) -> None:
    with fault_proxy(shards.web.port, fault_rate=1.0, faults=["503"]) as proxy:
        manifest = dataclasses.replace(shards.manifest, base=proxy.endpoint)
        store = ShardStore([manifest], web_settings(shards.cache, shard_seconds=50.0))
        thread = FetchAhead(store, windows_per_batch([0]))
        wait_until(lambda: proxy.requests > 2)
        start = time.monotonic()
        thread.close()
        assert time.monotonic() - start < 2
    assert not has_fetch_ahead_thread()
    assert not list(shards.cache.glob("shards/*.part"))


def test_no_thread_without_remote_shards_or_cache(shards: WebShards, tmp_path: Path) -> None:
    before = threading.active_count()
    local = ShardStore([make_shards(tmp_path / "local", count=7)])
    FetchAhead(local, windows_per_batch([0])).close()
    without_cache = web_settings(shards.cache, cache_dir="", cache_gib=0)
    FetchAhead(ShardStore([shards.manifest], without_cache), windows_per_batch([0])).close()
    assert threading.active_count() == before
    assert shards.request_count() == 0


def open_batch_reader(shards: WebShards, windows: Iterator[list[int]]) -> BatchReader:
    """Reads batches with one shard in use and two shards ahead."""
    settings = web_settings(shards.cache, fetch_ahead=2)
    shards_from = windows_per_batch(*windows)
    return BatchReader([shards.manifest], settings, shards_from, max_open=4)


def test_batch_reader_reports_its_position(shards: WebShards) -> None:
    reader, store = open_batch_reader(shards, ([shard] for shard in range(10))), shards.store()
    reader.read(0, [SampleRef(0, shard=0, sample=0)])
    wait_until(lambda: cached_shards(store) == {0, 1, 2})
    reader.read(5, [SampleRef(0, shard=5, sample=0)])
    wait_until(lambda: cached_shards(store) == {0, 1, 2, 5, 6, 7})
    reader.close()


def test_batch_reader_closes_the_thread_and_all_files(shards: WebShards) -> None:
    reader, store = open_batch_reader(shards, iter([[0]])), shards.store()
    refs = [SampleRef(0, shard=0, sample=0)]
    reader.read(0, refs)
    wait_until(lambda: cached_shards(store) == {0})
    reader.read(0, refs)  # from the copy
    assert has_fetch_ahead_thread() and open_copies(shards)
    reader.close()
    assert not has_fetch_ahead_thread() and not open_copies(shards)


def has_fetch_ahead_thread() -> bool:
    return "fetch-ahead" in {thread.name for thread in threading.enumerate()}


def open_copies(shards: WebShards) -> list[Path]:
    """The files of the cache that this process has open."""
    links = [Path(f"/proc/self/fd/{fd}").resolve() for fd in os.listdir("/proc/self/fd")]
    return [path for path in links if path.is_relative_to(shards.cache / "shards")]


def copy_and_read(url: str, cache: Path, keys) -> None:  # type: ignore[no-untyped-def]
    from data_pipeline.shards.manifest import load_manifest

    store = ShardStore([load_manifest(url)], web_settings(cache, fetch_ahead=10))
    FetchAhead(store, windows_per_batch(list(range(10))))
    wait_until(lambda: len(cached_shards(store)) == 10)
    keys.put(read_one(Reader(store), 9, 6).key)


def test_processes_share_the_copies(shards: WebShards) -> None:
    """Three processes copy each shard once, and exit although their threads still run."""
    context = multiprocessing.get_context("forkserver")
    keys = context.Queue()
    processes = [
        context.Process(target=copy_and_read, args=(shards.manifest.url, shards.cache, keys))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert {keys.get(timeout=60) for _ in processes} == {"00069"}
    for process in processes:
        process.join(timeout=20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert shards.request_count() == 10
