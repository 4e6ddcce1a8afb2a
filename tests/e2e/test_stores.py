"""Reading and writing object stores: most tests run with servers of each kind, s3, gs, az and http.

`-m az` runs only those with servers of that kind.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common import object_store, storage, store_download
from data_pipeline.common.errors import StorageError
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.settings import DataConfig
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import Manifest, load_manifest
from tests.support.http_server import http_server
from tests.support.object_stores import (
    INVALID_SECRET,
    PASSWORD,
    RunningStore,
    running_store,
)
from tests.support.results import read_many, read_one
from tests.support.small_shards import make_samples, make_shards
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

KINDS = [
    pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("s3", "gs", "az", "http")
]
on_all_stores = pytest.mark.parametrize("module_store", KINDS, indirect=True)


@pytest.fixture(scope="module")
def module_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningStore]:
    """One server for all tests of this module."""
    with running_store(request.param, tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture
def store(
    module_store: RunningStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[RunningStore]:
    """The store, with only its own settings in the environment."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "STORAGE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in module_store.env.items():
        monkeypatch.setenv(name, value)

    object_store.clear_clients()
    monkeypatch.setattr(store_download, "_hosts_without_ranges", {})
    yield module_store
    object_store.clear_clients()


@pytest.fixture
def manifest(store: RunningStore, tmp_path: Path) -> Manifest:
    """Three shards of seven samples, in the store."""
    make_shards(tmp_path / "data", count=21)
    return load_manifest(store.upload(tmp_path / "data", f"shards-{tmp_path.name}"))


def make_settings(cache: Path) -> DataConfig:
    return DataConfig(cache_dir=str(cache), shard_seconds=20.0, request_seconds=5.0, fetch_ahead=2)


def sample_keys(samples: list[RawSample | SampleProblem]) -> list[str]:
    return [sample.key for sample in samples]


@on_all_stores
def test_read_objects(store: RunningStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_download, "PART_BYTES", 1 << 20)
    data = os.urandom((5 << 20) + 17)
    name = "objects/a%20b/100%25.tar" if store.kind == "http" else "objects/a b/100%.tar"
    url = store.url(name)
    assert not storage.exists(url)

    store.write(name, data)
    assert storage.exists(url) and storage.size(url) == len(data)
    assert storage.read_bytes(url) == data
    for start, end in [(0, 1), (5, 3 << 20), (len(data) - 1, len(data)), (0, len(data))]:
        assert object_store.read_range(url, start, end, timeout_seconds=20) == data[start:end]
    storage.fetch_to_file(url, tmp_path / "copy", expected_bytes=len(data))
    assert (tmp_path / "copy").read_bytes() == data

    store.write("objects/empty", b"")
    empty = store.url("objects/empty")
    assert storage.read_bytes(empty) == b""
    with open(tmp_path / "empty", "w+b") as file:
        fetched = object_store.fetch(empty, file.fileno(), timeout_seconds=20)
    assert (fetched.size, fetched.sha256[:8]) == (0, "e3b0c442")


@on_all_stores
def test_upload_in_parts(
    store: RunningStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not store.can_upload:
        pytest.skip("the data pipeline cannot write to this server")
    monkeypatch.setattr(store_download, "PART_BYTES", 1 << 20)
    data = 4 * os.urandom((5 << 20) + 17)
    (tmp_path / "large").write_bytes(data)
    storage.upload_file(tmp_path / "large", store.url("uploads/large"))
    assert storage.read_bytes(store.url("uploads/large")) == data


@on_all_stores
def test_list_objects(store: RunningStore) -> None:
    if not store.can_list:
        with pytest.raises(StorageError, match="cannot be listed"):
            storage.list_names(store.url("listed"))
        return
    store.write("listed/a b/100%.tar", b"x")
    store.write("listed/empty", b"")
    assert storage.list_names(store.url("listed/a b")) == ["100%.tar"]
    assert {"a b/100%.tar", "empty"} <= set(storage.list_tree(store.url("listed")))


@on_all_stores
def test_read_errors(store: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("one-byte", b"x")
    url = store.url("one-byte")
    with pytest.raises(
        StorageError, match=r"cannot read .*/none: there is no such object"
    ) as error:
        storage.read_bytes(store.url("none"))
    assert error.value.kind == "missing"

    with pytest.raises(StorageError, match=r"shorter than expected|only 1 bytes") as error:
        object_store.read_range(url, 10, 20, timeout_seconds=10)
    assert error.value.kind == "changed"

    for name, value in store.invalid_credentials.items():
        monkeypatch.setenv(name, value)
    refused = r"refused access \(status 40[13]\)|no credentials were found"
    with pytest.raises(StorageError, match=refused) as error:
        storage.read_bytes(store.invalid_url(url))
    assert error.value.kind == "refused"
    assert PASSWORD not in str(error.value) and INVALID_SECRET not in str(error.value)


@on_all_stores
def test_samples_by_range_and_from_the_cache(
    store: RunningStore, manifest: Manifest, tmp_path: Path
) -> None:
    shards = ShardStore([manifest], make_settings(tmp_path / "cache"))
    reader, expected = Reader(shards), list(make_samples(21))
    refs = [(2, 6), (0, 0), (1, 3), (0, 1), (2, 0)]  # (shard, sample)

    def assert_samples_equal() -> None:
        for (shard, i), sample in zip(refs, read_many(reader, refs), strict=True):
            original = expected[shard * 7 + i]
            assert isinstance(sample, RawSample), sample
            assert (sample.key, sample.members["png"]) == (original["__key__"], original["png"])

    assert_samples_equal()
    assert not list(tmp_path.glob("cache/shards/*.tar"))

    windows = [[2, 0], [1]]
    fetch_ahead = FetchAhead(shards, lambda first_batch: iter(windows[first_batch:]))
    wait_until(lambda: len(list(tmp_path.glob("cache/shards/*.tar"))) == 3)
    fetch_ahead.close()
    assert_samples_equal()

    assert all(shard is not None and shard.fd >= 0 for shard in map(shards.try_open, range(3)))
    assert shards.cache is not None
    for entry in manifest.shards:
        copy = shards.cache.path(entry)
        assert copy.read_bytes() == (tmp_path / "data" / entry.name).read_bytes()


@on_all_stores
def test_missing_shard(store: RunningStore, manifest: Manifest, tmp_path: Path) -> None:
    first, second, third = manifest.shards
    missing = dataclasses.replace(second, name="missing.tar")
    manifest = dataclasses.replace(manifest, shards=(first, missing, third))
    reader = Reader(ShardStore([manifest], make_settings(tmp_path / "cache")))
    samples = read_many(reader, [(0, 0), (1, 0), (1, 5), (2, 0)])
    reasons = [sample.reason if isinstance(sample, SampleProblem) else "" for sample in samples]
    assert reasons == ["", "missing-shard", "missing-shard", ""]


@on_all_stores
def test_index_shards(store: RunningStore, manifest: Manifest, tmp_path: Path) -> None:
    urls = [manifest.shard_url(shard) for shard in manifest.shards]
    indexed = index_shards(urls, str(tmp_path / "index"), workers=0)
    assert [(shard.samples, shard.sha256) for shard in indexed.shards] == [
        (shard.samples, shard.sha256) for shard in manifest.shards
    ]
    shards = ShardStore([load_manifest(tmp_path / "index")], make_settings(tmp_path / "cache"))
    assert read_one(Reader(shards), 1, 2).key == "00009"


@pytest.mark.http
def test_server_without_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole shards are downloaded, once."""
    monkeypatch.setattr(store_download, "_hosts_without_ranges", {})
    make_shards(tmp_path / "data", count=21)
    with http_server(tmp_path / "data", ranges=False) as server:
        settings = make_settings(tmp_path / "cache")
        reader = Reader(ShardStore([load_manifest(server.url())], settings))
        samples = read_many(reader, [(0, 0), (2, 6), (0, 3)])
        assert sample_keys(samples) == ["00000", "00020", "00003"]

        num_requests = len(server.requests)
        assert sample_keys(read_many(reader, [(0, 5), (2, 1)])) == ["00005", "00015"]
        assert len(server.requests) == num_requests, "a cached shard was requested again"


@pytest.mark.http
def test_presigned_urls_stay_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, query = os.urandom(1000), "X-Amz-Signature=aGVsbG8%2F"
    (tmp_path / "a.tar").write_bytes(data)
    caplog.set_level(logging.DEBUG)
    with http_server(tmp_path, query=query) as server:
        url = f"{server.url('a.tar')}?{query}"
        assert storage.read_bytes(url) == data
        storage.fetch_to_file(url, tmp_path / "copy", expected_bytes=1000)
        assert (tmp_path / "copy").read_bytes() == data

        with pytest.raises(StorageError, match=r"/b\.tar: there is no such object") as error:
            storage.read_bytes(f"{server.url('b.tar')}?{query}", timeout_seconds=2)
        with pytest.raises(StorageError, match="refused access"):
            storage.read_bytes(f"{url}x", timeout_seconds=2)
    assert "aGVsbG8" not in caplog.text + str(error.value)
