"""The thread that copies what comes next: how far it goes, what it leaves alone, and how it ends."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common import object_store
from data_pipeline.reading import fetch_ahead
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from tests.support.fault_proxy import fault_proxy
from tests.support.http_shards import WebShards, web_settings, web_shards
from tests.support.small_shards import make_shards
from tests.support.waiting import until

pytestmark = pytest.mark.http


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebShards]:
    """Ten shards."""
    object_store.forget_clients()
    monkeypatch.setattr(fetch_ahead, "LONGEST_WAIT_SECONDS", 0.1)
    with web_shards(tmp_path, count=70) as found:
        yield found


def _here(store: ShardStore) -> set[int]:
    assert store.cache is not None
    return {number for number in range(len(store)) if store.cache.has(store.entry(number))}


def _stays(store: ShardStore, expected: set[int]) -> None:
    """It comes to this and stays so."""
    until(lambda: _here(store) >= expected)
    time.sleep(0.5)
    assert _here(store) == expected


def test_the_window_and_a_few_beyond(shards: WebShards) -> None:
    store = shards.store(fetch_ahead=2)
    ahead = FetchAhead(store, iter([[3, 1, 2], [0, 5, 4], [6, 7]]))
    _stays(store, {3, 1, 2, 0, 5})
    reader = Reader(store)
    reader.read(1, 0)
    _stays(store, {3, 1, 2, 0, 5})
    reader.read(4, 0)  # the second window has begun, and is copied whole
    _stays(store, {0, 1, 2, 3, 4, 5, 6, 7})
    ahead.close()


def test_an_endless_order_of_few_shards(shards: WebShards) -> None:
    store = shards.store(fetch_ahead=50)
    ahead = FetchAhead(store, itertools.cycle([[0], [1]]))
    reader = Reader(store)
    for number in range(6):
        assert reader.read(number % 2, 3).key == f"{number % 2 * 7 + 3:05d}"
    _stays(store, {0, 1})
    ahead.close()


def test_nothing_of_the_window_is_removed_for_what_comes_later(shards: WebShards) -> None:
    room = 3.5 * max(entry.bytes for entry in shards.manifest.shards) / 2**30
    store = shards.store(fetch_ahead=4, cache_gib=room)
    ahead = FetchAhead(store, iter([[0, 1, 2], [3, 4], [5, 6]]))
    _stays(store, {0, 1, 2})
    copied = shards.asked()
    reader = Reader(store)
    assert reader.read(6, 0).key == "00042", "what does not fit comes by ranges"
    until(lambda: {5, 6} <= _here(store))  # its window is read now
    assert shards.asked() == copied + 3, "one range and two copies"
    assert len(_here(store)) == 3
    ahead.close()


def test_troubles_do_not_end_it(shards: WebShards) -> None:
    (shards.web.folder / "shard-000001.tar").unlink()
    (shards.web.folder / "shard-000002.tar.index").unlink()
    store = shards.store()
    ahead = FetchAhead(store, iter([[0, 1, 2, 3]]))
    _stays(store, {0, 3})
    assert (shards.cache / "bad" / store.entry(1).sha256).exists()
    ahead.close()


def test_it_ends_soon_even_in_the_middle_of_a_copy(shards: WebShards) -> None:
    with fault_proxy(shards.web.port, share=1.0, faults=["503"]) as proxy:
        manifest = dataclasses.replace(shards.manifest, base=proxy.endpoint)
        store = ShardStore([manifest], web_settings(shards.cache, shard_seconds=50.0))
        ahead = FetchAhead(store, iter([[0]]))
        until(lambda: proxy.requests > 2)
        start = time.monotonic()
        ahead.close()
        assert time.monotonic() - start < 2
    assert "fetch-ahead" not in {thread.name for thread in threading.enumerate()}
    assert not list(shards.cache.glob("shards/*.part"))


def test_there_is_no_thread_where_there_is_nothing_to_copy(shards: WebShards, tmp_path: Path) -> None:
    before = threading.active_count()
    FetchAhead(ShardStore([make_shards(tmp_path / "local", count=7)]), iter([[0]])).close()
    without = web_settings(shards.cache, cache_dir="", cache_gib=0)
    FetchAhead(ShardStore([shards.manifest], without), iter([[0]])).close()
    assert threading.active_count() == before and shards.asked() == 0


def _worker(url: str, cache: Path, done) -> None:  # type: ignore[no-untyped-def]
    from data_pipeline.shards.manifest import load_manifest

    store = ShardStore([load_manifest(url)], web_settings(cache, fetch_ahead=10))
    FetchAhead(store, iter([list(range(10))]))
    until(lambda: len(_here(store)) == 10)
    done.put(Reader(store).read(9, 6).key)


def test_processes_share_the_work(shards: WebShards) -> None:
    """Three workers from a fork server copy each shard once, and end though their threads still run."""
    context = multiprocessing.get_context("forkserver")
    done = context.Queue()
    workers = [context.Process(target=_worker, args=(shards.manifest.url, shards.cache, done)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert {done.get(timeout=60) for _ in workers} == {"00069"}
    for worker in workers:
        worker.join(timeout=20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert shards.asked() == 10
