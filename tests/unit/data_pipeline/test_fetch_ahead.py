"""The thread that copies what comes next: how far it goes, what it leaves alone, and how it
ends."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.common import object_store
from data_pipeline.order.order import Order, OrderSource
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


def _from(*windows: list[int]) -> Callable[[int], Iterator[list[int]]]:
    """An order in which each batch needs one window."""
    return lambda number: iter(windows[number:])


def _stays(store: ShardStore, ahead: FetchAhead, expected: set[int]) -> None:
    """It comes to this, and looking again changes nothing."""
    until(lambda: _here(store) >= expected)
    looks = ahead.looks
    until(lambda: ahead.looks > looks + 2)
    assert _here(store) == expected


def test_the_window_and_a_few_beyond(shards: WebShards) -> None:
    store = shards.store(fetch_ahead=2)
    ahead = FetchAhead(store, _from([3, 1, 2], [0, 5, 4], [6, 7]))
    _stays(store, ahead, {3, 1, 2, 0, 5})
    ahead.reached(1)  # the second window has begun, and is copied whole
    _stays(store, ahead, {0, 1, 2, 3, 4, 5, 6, 7})
    ahead.close()


def test_an_endless_order_of_few_shards(shards: WebShards) -> None:
    store = shards.store(fetch_ahead=50)
    ahead = FetchAhead(store, lambda number: islice(itertools.cycle([[0], [1]]), number, None))
    reader = Reader(store)
    for number in range(6):
        ahead.reached(number)
        assert reader.read(number % 2, 3).key == f"{number % 2 * 7 + 3:05d}"
    _stays(store, ahead, {0, 1})
    ahead.close()


@pytest.mark.parametrize("count", [4, 9, 16])
def test_the_place_is_known_in_every_epoch(count: int) -> None:
    """Also with few windows, where the same shards come again and again."""
    order = Order([OrderSource(name="a", sizes=[10] * count * 4)], 0, 4)

    def windows_from(number: int) -> Iterator[list[int]]:
        return order.shards_from(8 * number)

    class NoStore:
        cache, settings = None, SimpleNamespace(fetch_ahead=4)

        def __len__(self) -> int:
            return count * 4

    ahead = FetchAhead(NoStore(), windows_from)  # type: ignore[arg-type]
    for number in range(4 * count * 40 // 8):
        ahead.reached(number)
        needed = {ref.shard for ref in order.samples(8 * number, 8)}
        wanted = ahead.plan()
        assert needed <= set(wanted), f"batch {number}"
        assert len(wanted) == 8


def test_nothing_of_the_window_is_removed_for_what_comes_later(shards: WebShards) -> None:
    room = 3.5 * max(entry.bytes for entry in shards.manifest.shards) / 2**30
    store = shards.store(fetch_ahead=4, cache_gib=room)
    ahead = FetchAhead(store, _from([0, 1, 2], [3, 4], [5, 6]))
    _stays(store, ahead, {0, 1, 2})
    copied = shards.asked()
    reader = Reader(store)
    assert reader.read(6, 0).key == "00042", "what does not fit comes by ranges"
    ahead.reached(2)
    until(lambda: {5, 6} <= _here(store))
    assert shards.asked() == copied + 3, "one range and two copies"
    assert len(_here(store)) == 3
    ahead.close()


def test_troubles_do_not_end_it(shards: WebShards) -> None:
    (shards.web.folder / "shard-000001.tar").unlink()
    (shards.web.folder / "shard-000002.tar.index").unlink()
    store = shards.store()
    ahead = FetchAhead(store, _from([0, 1, 2, 3]))
    _stays(store, ahead, {0, 3})
    assert shards.store().trouble(1) is not None, "others do not know"
    ahead.close()


def test_it_ends_soon_even_in_the_middle_of_a_copy(shards: WebShards) -> None:
    with fault_proxy(shards.web.port, share=1.0, faults=["503"]) as proxy:
        manifest = dataclasses.replace(shards.manifest, base=proxy.endpoint)
        store = ShardStore([manifest], web_settings(shards.cache, shard_seconds=50.0))
        ahead = FetchAhead(store, _from([0]))
        until(lambda: proxy.requests > 2)
        start = time.monotonic()
        ahead.close()
        assert time.monotonic() - start < 2
    assert "fetch-ahead" not in {thread.name for thread in threading.enumerate()}
    assert not list(shards.cache.glob("shards/*.part"))


def test_there_is_no_thread_where_there_is_nothing_to_copy(
    shards: WebShards, tmp_path: Path
) -> None:
    before = threading.active_count()
    FetchAhead(ShardStore([make_shards(tmp_path / "local", count=7)]), _from([0])).close()
    without = web_settings(shards.cache, cache_dir="", cache_gib=0)
    FetchAhead(ShardStore([shards.manifest], without), _from([0])).close()
    assert threading.active_count() == before and shards.asked() == 0


def _worker(url: str, cache: Path, done) -> None:  # type: ignore[no-untyped-def]
    from data_pipeline.shards.manifest import load_manifest

    store = ShardStore([load_manifest(url)], web_settings(cache, fetch_ahead=10))
    FetchAhead(store, _from(list(range(10))))
    until(lambda: len(_here(store)) == 10)
    done.put(Reader(store).read(9, 6).key)


def test_processes_share_the_work(shards: WebShards) -> None:
    """Three workers from a fork server copy each shard once, and end though their threads still
    run."""
    context = multiprocessing.get_context("forkserver")
    done = context.Queue()
    workers = [
        context.Process(target=_worker, args=(shards.manifest.url, shards.cache, done))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    assert {done.get(timeout=60) for _ in workers} == {"00069"}
    for worker in workers:
        worker.join(timeout=20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert shards.asked() == 10
