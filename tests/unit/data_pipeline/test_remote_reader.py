"""Reading samples by ranged requests: how many are sent, and what is tried again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common import object_store, store_clients, store_download
from data_pipeline.reading import remote
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.manifest import load_manifest
from tests.support.corruption import corrupt_caption
from tests.support.fault_proxy import fault_proxy
from tests.support.http_shards import WebShards, web_settings, web_shards
from tests.support.results import problem_reasons, read_many, read_one
from tests.support.small_shards import make_samples

pytestmark = pytest.mark.http


@pytest.fixture(autouse=True)
def new_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    object_store.clear_clients()
    monkeypatch.setattr(store_download, "_hosts_without_ranges", {})


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[WebShards]:
    """Three shards."""
    with web_shards(tmp_path) as running:
        yield running


def test_adjacent_samples_in_one_request(shards: WebShards) -> None:
    reader, expected = Reader(shards.store()), list(make_samples(21))
    refs = [(0, 4), (0, 2), (2, 0), (0, 3), (0, 5)]
    for (shard, i), result in zip(refs, read_many(reader, refs), strict=True):
        assert isinstance(result, RawSample)
        assert result.members["png"] == expected[7 * shard + i]["png"]

    assert shards.request_count() == 2
    ranges = [value for _, path, value in shards.web.requests if path.endswith("0.tar")]
    offsets, extents = reader._store.open(0).columns[:2]
    assert ranges == [f"bytes={offsets[2]}-{offsets[5] + extents[5] - 1}"]
    assert not list(shards.cache.glob("shards/*")), "whole shards were copied"


def test_distant_samples_in_separate_requests(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MAX_GAP_BYTES", 100)
    results = read_many(Reader(shards.store()), [(0, 0), (0, 3), (0, 6)])
    assert problem_reasons(results) == ["", "", ""]
    assert shards.request_count() == 3


def test_cached_indices_and_copies_are_used(shards: WebShards) -> None:
    results = read_many(Reader(shards.store()), [(0, 0), (1, 0)])
    assert problem_reasons(results) == ["", ""]
    store = shards.store()
    store.cache_shard(1)
    before = shards.request_count(".index"), shards.request_count()
    assert read_one(Reader(store), 1, 3).key == "00010"
    assert (shards.request_count(".index"), shards.request_count()) == before


def test_flipped_bit_in_a_response(shards: WebShards) -> None:
    """The sample is requested again."""
    with fault_proxy(
        shards.web.port,
        fault_rate=0.5,
        faults=["bit-flip"],
        path_filter=lambda path: path.endswith(".tar"),
    ) as proxy:
        manifest = dataclasses.replace(shards.manifest, base=proxy.endpoint)
        reader = Reader(ShardStore([manifest], web_settings(shards.cache)))
        expected = list(make_samples(21))
        for shard in range(3):
            for i in range(3):
                sample = read_one(reader, shard, i)
                assert sample.members["png"] == expected[7 * shard + i]["png"]
        assert proxy.fault_counts["bit-flip"] > 2


def test_flipped_bit_in_an_index(shards: WebShards) -> None:
    # Of this seed's first fifteen responses two are faulty, so no index is wrong three times.
    with fault_proxy(shards.web.port, fault_rate=0.25, seed=9, faults=["bit-flip"]) as proxy:
        manifest = load_manifest(proxy.endpoint)
        reader = Reader(ShardStore([manifest], web_settings(shards.cache)))
        results = read_many(reader, [(0, 1), (1, 1), (2, 1)])
        assert problem_reasons(results) == ["", "", ""]
        assert proxy.fault_counts["bit-flip"] == 2


def test_corrupt_shard_in_the_store(shards: WebShards) -> None:
    path = shards.web.folder / "shard-000000.tar"
    offsets, data = shards.store().open(0).columns[0], bytearray(path.read_bytes())
    data[offsets[2] + 600] ^= 1
    path.write_bytes(data[: offsets[5] + 100])
    results = read_many(Reader(shards.store()), [(0, i) for i in range(7)])
    assert problem_reasons(results) == ["", "", "crc-mismatch", "", "", "truncated", "truncated"]
    assert isinstance(results[1], RawSample) and results[1].key == "00001"


def test_corrupt_copy_is_replaced(shards: WebShards) -> None:
    """Its samples are read from the store, and the copy is removed."""
    store = shards.store()
    store.cache_shard(0)
    (copy,) = shards.cache.glob("shards/*.tar")
    offset = store.open(0).columns[0][2] + 600
    with open(copy, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))

    results = read_many(Reader(store), [(0, 1), (0, 2), (0, 3)])
    assert problem_reasons(results) == ["", "", ""]
    assert isinstance(results[1], RawSample)
    assert results[1].members["png"] == list(make_samples(3))[2]["png"]
    assert not copy.exists()


def test_index_that_does_not_match_its_manifest(shards: WebShards) -> None:
    entry = dataclasses.replace(shards.manifest.shards[1], index_sha256="0" * 64)
    changed = dataclasses.replace(shards.manifest, shards=(shards.manifest.shards[0], entry))
    reader = Reader(ShardStore([changed], web_settings(shards.cache)))
    assert problem_reasons(read_many(reader, [(0, 1), (1, 1)])) == ["", "corrupt-index"]


def record_clients(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of all clients that are created from now on."""
    created: list[tuple[Any, ...]] = []
    make_client = store_clients._client

    def record(*arguments: Any) -> Any:
        created.append(arguments)
        return make_client(*arguments)

    monkeypatch.setattr(store_clients, "_client", record)
    return created


def test_timeout_of_index_requests(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    created = record_clients(monkeypatch)
    for cache_dir in (str(shards.cache), ""):
        object_store.clear_clients()
        store = shards.store(
            cache_dir=cache_dir, cache_gib=0, shard_seconds=50.0, request_seconds=0.75
        )
        store.load_index(0, 50.0)
    assert [arguments[-1][0] for arguments in created] == [0.75, 0.75]


def test_clients_are_reused(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the remaining time, which limits the request timeout, is different each time."""
    created = record_clients(monkeypatch)
    reader = Reader(shards.store(shard_seconds=5.0, request_seconds=2.0, cache_gib=0))
    for i in range(7):
        read_many(reader, [(shard, i) for shard in range(3)])
    assert shards.request_count() == 21
    assert len(created) <= 2


@pytest.mark.parametrize("cache_gib", [0, 1])
def test_ranged_requests_without_a_copy(shards: WebShards, cache_gib: int) -> None:
    settings = web_settings(
        shards.cache, cache_gib=cache_gib, cache_dir=str(shards.cache) if cache_gib else ""
    )
    assert read_one(Reader(ShardStore([shards.manifest], settings)), 2, 1).key == "00015"


def test_server_without_ranges(tmp_path: Path) -> None:
    """Whole shards are copied, if there is space for one."""
    with web_shards(tmp_path, ranges=False) as shards:
        (result,) = read_many(Reader(shards.store(cache_gib=1e-6)), [(0, 0)])
        assert isinstance(result, SampleProblem) and result.reason == "unreachable"
        assert "data.cache_gib" in result.detail

        max_bytes = max(entry.bytes for entry in shards.manifest.shards)
        reader = Reader(shards.store(cache_gib=1.5 * max_bytes / 2**30))
        keys = [read_one(reader, shard, 1).key for shard in (0, 1, 2, 0)]
        assert keys == ["00001", "00008", "00015", "00001"]


def test_corrupt_shard_on_a_server_without_ranges(tmp_path: Path) -> None:
    with web_shards(tmp_path, ranges=False) as shards:
        corrupt_caption(shards.web.folder / "shard-000000.tar", 2)
        results = read_many(Reader(shards.store()), [(0, 1), (0, 2), (0, 3)])
        assert problem_reasons(results) == ["", "crc-mismatch", ""]


def test_oversize_sample(shards: WebShards) -> None:
    """Its size is known from the index, so it is not requested."""
    reader = Reader(shards.store(), max_sample_bytes=1000)
    assert problem_reasons(read_many(reader, [(0, 0), (1, 6)])) == ["oversize", "oversize"]
    assert shards.request_count() == 0
