"""Samples by ranged requests: how many are sent, what heals, and what is remembered of what does
not."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common import object_store, store_clients, store_copy
from data_pipeline.common.errors import ConfigError, DataError, StorageError
from data_pipeline.reading import remote
from data_pipeline.reading.cache import ShardCache
from data_pipeline.reading.open_shard import OpenShard
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.manifest import Manifest, load_manifest
from tests.support.fault_proxy import fault_proxy
from tests.support.http_server import http_server
from tests.support.http_shards import WebShards, served_elsewhere, web_settings, web_shards
from tests.support.small_shards import make_shards, samples

pytestmark = pytest.mark.http


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    object_store.forget_clients()
    monkeypatch.setattr(store_copy, "_whole_only", {})


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[WebShards]:
    with web_shards(tmp_path) as found:
        yield found


def _reasons(found: list[RawSample | SampleProblem]) -> list[str]:
    return [one.reason if isinstance(one, SampleProblem) else "" for one in found]


def test_neighbors_come_in_one_request(shards: WebShards) -> None:
    reader, expected = Reader(shards.store()), list(samples(21))
    refs = [(0, 4), (0, 2), (2, 0), (0, 3), (0, 5)]
    found = reader.read_many(refs)
    for (shard, i), one in zip(refs, found, strict=True):
        assert isinstance(one, RawSample)
        assert one.members["png"] == expected[7 * shard + i]["png"]
    assert shards.asked() == 2
    asked = sorted(count for _, path, count in shards.web.requests if path.endswith("0.tar"))
    rows = reader._store.open(0).rows
    assert asked == [f"bytes={rows[0][2]}-{rows[0][5] + rows[1][5] - 1}"]
    assert not list(shards.cache.glob("shards/*")), "whole shards were copied"


def test_far_apart_samples_come_in_requests_of_their_own(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "JOIN_GAP_BYTES", 100)
    assert _reasons(Reader(shards.store()).read_many([(0, 0), (0, 3), (0, 6)])) == ["", "", ""]
    assert shards.asked() == 3


def test_indices_are_kept_and_copies_are_used(shards: WebShards) -> None:
    assert _reasons(Reader(shards.store()).read_many([(0, 0), (1, 0)])) == ["", ""]
    store = shards.store()
    store.copy(1)
    before = shards.asked(".index"), shards.asked()
    assert Reader(store).read(1, 3).key == "00010"
    assert (shards.asked(".index"), shards.asked()) == before


def test_a_flipped_bit_heals(shards: WebShards) -> None:
    with fault_proxy(
        shards.web.port, share=0.5, faults=["flip"], only=lambda path: path.endswith(".tar")
    ) as proxy:
        manifest = dataclasses.replace(shards.manifest, base=proxy.endpoint)
        reader = Reader(ShardStore([manifest], web_settings(shards.cache)))
        found = [reader.read(shard, i) for shard in range(3) for i in range(3)]
        assert [one.members["png"] for one in found] == [
            list(samples(21))[7 * shard + i]["png"] for shard in range(3) for i in range(3)
        ]
        assert proxy.done["flip"] > 2


def test_what_is_damaged_in_the_store_is_damaged(shards: WebShards) -> None:
    path = shards.web.folder / "shard-000000.tar"
    rows, data = shards.store().open(0).rows, bytearray(path.read_bytes())
    data[rows[0][2] + 600] ^= 1
    path.write_bytes(data[: rows[0][5] + 100])
    found = Reader(shards.store()).read_many([(0, i) for i in range(7)])
    assert _reasons(found) == ["", "", "crc-mismatch", "", "", "truncated", "truncated"]
    assert isinstance(found[1], RawSample) and found[1].key == "00001"


def test_a_damaged_copy_gives_way_to_the_store(shards: WebShards) -> None:
    store = shards.store()
    store.copy(0)
    (copy,) = shards.cache.glob("shards/*.tar")
    place = store.open(0).rows[0][2] + 600
    with open(copy, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    found = Reader(store).read_many([(0, 1), (0, 2), (0, 3)])
    assert _reasons(found) == ["", "", ""]
    assert isinstance(found[1], RawSample) and found[1].members["png"] == list(samples(3))[2]["png"]
    assert not copy.exists(), "the damaged copy is still there for others"


def test_a_missing_shard_is_remembered_by_all(shards: WebShards) -> None:
    (shards.web.folder / "shard-000001.tar").unlink()
    found = Reader(shards.store()).read_many([(1, 0), (0, 0), (1, 6)])
    assert _reasons(found) == ["missing-shard", "", "missing-shard"]
    assert isinstance(found[0], SampleProblem) and "there is no such object" in found[0].detail
    before = len(shards.web.requests)
    other = Reader(shards.store())  # as another process would have it
    assert _reasons(other.read_many([(1, 3)])) == ["missing-shard"]
    assert len(shards.web.requests) == before


def test_a_trouble_is_forgotten_after_a_while(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shards.web.folder / "shard-000001.tar"
    path.rename(shards.web.folder / "away")
    reader = Reader(shards.store())
    assert _reasons(reader.read_many([(1, 0)])) == ["missing-shard"]
    (shards.web.folder / "away").rename(path)
    assert _reasons(reader.read_many([(1, 0)])) == ["missing-shard"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 301)
    assert _reasons(reader.read_many([(1, 0)])) == [""]
    assert not list(shards.cache.glob("bad/*"))


def test_a_store_that_does_not_answer_costs_one_wait(tmp_path: Path, shards: WebShards) -> None:
    with fault_proxy(
        shards.web.port, share=1.0, faults=["late"], only=lambda path: path.endswith(".tar")
    ) as proxy:
        manifest = dataclasses.replace(shards.manifest, base=proxy.endpoint)
        settings = web_settings(shards.cache, shard_seconds=1.2, request_seconds=0.4)
        found = Reader(ShardStore([manifest], settings)).read_many([(0, 0), (0, 3), (1, 0), (2, 6)])
        assert set(_reasons(found)) == {"unreachable"}
        asked = proxy.requests
        again = Reader(ShardStore([manifest], settings)).read_many([(2, 1), (0, 5)])
        assert set(_reasons(again)) == {"unreachable"}
        assert proxy.requests == asked, "another process asked again"


def test_a_trouble_can_be_forgotten_at_once(shards: WebShards) -> None:
    mine, other = Reader(shards.store()), shards.store()
    mine._store.note_trouble(0, StorageError("it is away", kind="unreachable"))
    mine._store.note_trouble(1, StorageError("you may not", kind="refused"))
    refs = [(0, 0), (1, 0), (2, 0)]
    assert _reasons(mine.read_many(refs)) == ["unreachable", "unreachable", ""]
    assert _reasons(Reader(shards.store()).read_many(refs)) == ["unreachable", "", ""]
    mine.forget_troubles()
    assert _reasons(mine.read_many(refs)) == [""] * 3
    assert not list(shards.cache.glob("bad/*")), "processes that begin now believe it"
    # What others say about a store that is away is not believed any more either; what is missing
    # is.
    other.note_trouble(2, StorageError("it is away", kind="unreachable"))
    other.note_trouble(1, StorageError("it is gone", kind="missing"))
    time.sleep(0.05)  # more than a tick of the clock of files
    mine.forget_troubles()
    assert _reasons(mine.read_many(refs)) == ["", "missing-shard", ""]
    time.sleep(0.05)
    other.note_trouble(0, StorageError("it is away again", kind="unreachable"))
    assert _reasons(mine.read_many(refs)) == ["unreachable", "missing-shard", ""]


def test_a_refusal_is_not_believed_of_others(shards: WebShards) -> None:
    shards.web.password = "me:hush"
    mine = Reader(shards.store())
    good = shards.manifest.url.replace("//", "//me:hush@")
    assert _reasons(mine.read_many([(0, 0)])) == ["unreachable"]
    asked = len(shards.web.requests)
    assert (
        _reasons(mine.read_many([(0, 1)])) == ["unreachable"] and len(shards.web.requests) == asked
    )
    right = dataclasses.replace(shards.manifest, url=good, base=good)
    assert _reasons(
        Reader(ShardStore([right], web_settings(shards.cache))).read_many([(0, 0)])
    ) == [""]
    shards.web.password = ""
    assert _reasons(Reader(shards.store()).read_many([(0, 0)])) == [""]


def test_a_trouble_of_one_place_is_not_one_of_another(tmp_path: Path, shards: WebShards) -> None:
    shutil.copytree(shards.web.folder, tmp_path / "mirror")
    (shards.web.folder / "shard-000000.tar").unlink()
    with http_server(tmp_path / "mirror") as web:
        store = ShardStore([shards.manifest, load_manifest(web.url())], web_settings(shards.cache))
        assert _reasons(Reader(store).read_many([(0, 0)])) == ["missing-shard"]
        assert _reasons(Reader(store).read_many([(3, 0)])) == [""]


def test_what_a_trouble_file_holds_is_not_trusted(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.store().note_trouble(0, StorageError("x", kind="missing"))
    (path,) = shards.cache.glob("bad/*")
    monkeypatch.setattr(Path, "unlink", _denied)  # somebody else's, in a folder with the sticky bit
    untils: list[Any] = ["soon", None, 1e400, float("nan"), [], time.time() - 1]
    for until in untils:
        path.write_text(json.dumps(["missing-shard", "x", until]))
        known = shards.store().trouble(0)
        assert known is None or known.until <= time.time() + 300, until
    assert _reasons(Reader(shards.store()).read_many([(0, 0)])) == [""]


def _denied(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


# Trouble of this machine.


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_cache_folder_that_cannot_be_written_costs_no_sample(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pwrite", fails)
    found = Reader(shards.store()).read_many([(shard, i) for shard in range(3) for i in range(7)])
    assert _reasons(found) == [""] * 21
    (record,) = caplog.records
    assert os.strerror(error) in record.getMessage() and "data.cache_dir" in record.getMessage()


def test_a_cache_folder_that_is_none_costs_no_sample(shards: WebShards) -> None:
    shards.cache.write_text("")
    assert _reasons(Reader(shards.store()).read_many([(0, 0), (2, 6)])) == ["", ""]


def test_an_index_that_cannot_be_read_or_replaced_costs_no_sample(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    Reader(shards.store()).read(0, 0)
    for path in (shards.cache / "index").iterdir():
        path.write_bytes(b"damaged")
    monkeypatch.setattr(Path, "unlink", _denied)
    assert _reasons(Reader(shards.store()).read_many([(0, 0)])) == [""]


@pytest.fixture
def files_limit() -> Iterator[Callable[[int], None]]:
    """Allows so many more open files than there are now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more: int) -> None:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more, before[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_may_open_as_many_files_as_it_may_allow_itself(shards: WebShards) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] - 1, before[1]))
        shards.store()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("copied", [False, True])
def test_too_many_open_files_cost_no_sample(
    tmp_path: Path, files_limit: Callable[[int], None], copied: bool
) -> None:
    make_shards(tmp_path / "data", count=7 * 40)
    with served_elsewhere(tmp_path / "data") as url:
        store = ShardStore([load_manifest(url)], web_settings(tmp_path / "cache"), max_open=1000)
        reader, numbers = Reader(store), range(40)
        if copied:
            reader.read_many([(shard, 0) for shard in numbers])  # opened without a file ...
            for shard in numbers:
                store.copy(shard)
        files_limit(40)
        for start in range(0, 40, 10):  # ... which is opened now
            refs = [(shard, i) for shard in numbers[start : start + 10] for i in (1, 5)]
            assert _reasons(reader.read_many(refs)) == [""] * 20
            assert len(store._open) > 5, "more was closed than had to be"
        assert _reasons(reader.read_many([(shard, 2) for shard in numbers])) == [""] * 40
        store.close()


def test_no_open_file_at_all_is_an_error_of_the_machine(
    tmp_path: Path, files_limit: Callable[[int], None]
) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=7)]))
    files_limit(0)
    held: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(ConfigError, match="raise `ulimit -n`"):
            reader.read_many([(0, 0)])
    finally:
        for fd in held:
            os.close(fd)
    assert _reasons(reader.read_many([(0, 0)])) == [""]


def test_a_server_without_ranges_whose_copy_is_removed_or_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with web_shards(tmp_path, ranges=False) as shards:
        with monkeypatch.context() as patch:
            patch.setattr(OpenShard, "read", broken)
            assert (
                _reasons(Reader(shards.store()).read_many([(0, 0), (0, 1)])) == ["unreachable"] * 2
            )
        reader = Reader(shards.store())
        monkeypatch.setattr(ShardCache, "open", lambda *_: None)
        (found,) = reader.read_many([(1, 0)])
        assert isinstance(found, SampleProblem) and found.reason == "unreachable"
        assert "was removed before it was read" in found.detail
        monkeypatch.setattr(ShardStore, "open", _bad_index)
        opened = OpenShard(
            reader._store.entry(1), "", reader._store.load_index(1, 5.0), -1, is_copy=True
        )
        ((_, result),) = reader._remote._read_whole(
            1, [remote.Wanted(0, opened, 1, 0)], time.monotonic() + 5
        )
        assert isinstance(result, DataError) and result.slug == "bad-index"


def _bad_index(*_: object) -> OpenShard:
    raise DataError("x", slug="bad-index")


def test_indices_are_asked_for_with_the_time_of_a_request(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    real = store_clients._client

    def noted(*arguments: Any) -> Any:
        times.append(arguments[-1][0])
        return real(*arguments)

    monkeypatch.setattr(store_clients, "_client", noted)
    for cache_dir in (str(shards.cache), ""):
        object_store.forget_clients()
        store = shards.store(
            cache_dir=cache_dir, cache_gib=0, shard_seconds=50.0, request_seconds=0.75
        )
        store.load_index(0, 50.0)
    assert times == [0.75, 0.75]


def test_few_clients_for_many_requests(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where less than three requests' time is left, which is a little less with each."""
    made: list[object] = []
    real = store_clients._client

    def noted(*given: Any) -> Any:
        made.append(given)
        return real(*given)

    monkeypatch.setattr(store_clients, "_client", noted)
    reader = Reader(shards.store(shard_seconds=5.0, request_seconds=2.0, cache_gib=0))
    for i in range(7):
        reader.read_many([(shard, i) for shard in range(3)])
    assert shards.asked() == 21
    assert len(made) <= 2


@pytest.mark.parametrize("cache_gib", [0, 1])
def test_without_a_cache_samples_come_by_ranges(shards: WebShards, cache_gib: int) -> None:
    settings = web_settings(
        shards.cache, cache_gib=cache_gib, cache_dir=str(shards.cache) if cache_gib else ""
    )
    assert Reader(ShardStore([shards.manifest], settings)).read(2, 1).key == "00015"


def test_a_server_without_ranges_and_no_room(tmp_path: Path) -> None:
    with web_shards(tmp_path, ranges=False) as shards:
        found = Reader(shards.store(cache_gib=1e-6)).read_many([(0, 0)])
        assert _reasons(found) == ["unreachable"]
        assert isinstance(found[0], SampleProblem) and "raise data.cache_gib" in found[0].detail
        # Room for one shard is enough, one after the other.
        size = max(entry.bytes for entry in shards.manifest.shards)
        reader = Reader(shards.store(cache_gib=1.5 * size / 2**30))
        assert [reader.read(shard, 1).key for shard in (0, 1, 2, 0)] == [
            "00001",
            "00008",
            "00015",
            "00001",
        ]


def test_an_index_that_is_not_the_manifests(shards: WebShards) -> None:
    entry = dataclasses.replace(shards.manifest.shards[1], index_sha256="0" * 64)
    changed = dataclasses.replace(shards.manifest, shards=(shards.manifest.shards[0], entry))
    found = Reader(ShardStore([changed], web_settings(shards.cache))).read_many([(0, 1), (1, 1)])
    assert _reasons(found) == ["", "bad-index"]


def test_an_index_with_a_flipped_bit_heals(shards: WebShards) -> None:
    # Of this seed's first fifteen answers two are spoiled, so no index is wrong three times.
    with fault_proxy(shards.web.port, share=0.25, seed=9, faults=["flip"]) as proxy:
        manifest: Manifest = load_manifest(proxy.endpoint)
        reader = Reader(ShardStore([manifest], web_settings(shards.cache)))
        assert _reasons(reader.read_many([(0, 1), (1, 1), (2, 1)])) == ["", "", ""]
        assert proxy.done["flip"] == 2
