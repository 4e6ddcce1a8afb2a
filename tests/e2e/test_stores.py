"""One test body over four real stores: s3, gs, az and a web server. Each can be run alone (`-m
az`)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_pipeline.common import object_store, storage, store_copy
from data_pipeline.common.errors import StorageError
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.settings import DataConfig
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import Manifest, load_manifest
from tests.support import azure_server, gcs_server, http_server
from tests.support.s3_server import s3_server
from tests.support.small_shards import make_shards, samples
from tests.support.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

STORES = [
    pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("s3", "gs", "az", "http")
]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A running store of one kind."""

    kind: str
    env: dict[str, str]
    url: Callable[[str], str]
    wrong: dict[str, str]
    """The environment of somebody who may not read."""
    put: Callable[[str, bytes], None] | None = None
    """How objects are made where obstore's way is not known."""
    listable: bool = True
    wrong_url: Callable[[str], str] = field(default=lambda url: url)

    def write(self, name: str, data: bytes) -> None:
        if self.put is not None:
            self.put(name, data)
        else:
            storage.write_bytes(self.url(name), data)

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy all files of a folder; the address of the copy."""
        for path in sorted(folder.iterdir()):
            self.write(f"{prefix}/{path.name}", path.read_bytes())
        return self.url(prefix)


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        match request.param:
            case "s3":
                s3 = stack.enter_context(s3_server())
                yield Place(
                    kind="s3",
                    env=s3.env,
                    url=s3.url,
                    wrong={"AWS_SECRET_ACCESS_KEY": "not-the-key"},
                )
            case "gs":
                if reason := gcs_server.why_unavailable():
                    pytest.skip(reason)
                gs = stack.enter_context(gcs_server.gcs_server())
                wrong = {
                    "STORAGE_EMULATOR_HOST": "",
                    "GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/account.json",
                }
                yield Place(kind="gs", env=gs.env, url=gs.url, wrong=wrong, put=gs.put)
            case "az":
                if reason := azure_server.why_unavailable():
                    pytest.skip(reason)
                az = stack.enter_context(azure_server.azure_server())
                yield Place(
                    kind="az",
                    env=az.env,
                    url=az.url,
                    wrong={"AZURE_STORAGE_ACCOUNT_KEY": "bm90IHRoZSBrZXk="},
                )
            case _:
                folder = tmp_path_factory.mktemp("www")
                web = stack.enter_context(http_server.http_server(folder, password="me:hush"))
                netrc = tmp_path_factory.mktemp("home") / "netrc"
                netrc.write_text("machine 127.0.0.1 login me password hush\n")
                yield Place(
                    kind="http",
                    env={"NETRC": str(netrc)},
                    wrong={},
                    listable=False,
                    url=web.url,
                    wrong_url=lambda url: url.replace("://", "://me:not-the-key@"),
                )


@pytest.fixture
def place(running: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    """The store, with nothing but its own settings in the environment."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "STORAGE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in running.env.items():
        monkeypatch.setenv(name, value)
    object_store.forget_clients()
    monkeypatch.setattr(store_copy, "_whole_only", {})
    yield running
    object_store.forget_clients()


def _settings(cache: Path, **changes: object) -> DataConfig:
    given = {
        "cache_dir": str(cache),
        "shard_seconds": 20.0,
        "request_seconds": 5.0,
        "fetch_ahead": 2,
    }
    return DataConfig(**given | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("running", STORES, indirect=True)
def test_objects(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_copy, "PART_BYTES", 1 << 20)
    data, name = os.urandom((5 << 20) + 17), "objects/a b/100%.tar"
    url = place.url(name if place.kind != "http" else "objects/a%20b/100%25.tar")
    assert not storage.exists(url)
    place.write(name if place.kind != "http" else "objects/a%20b/100%25.tar", data)
    assert storage.exists(url) and storage.size(url) == len(data)
    assert storage.read_bytes(url) == data
    for start, end in [(0, 1), (5, 3 << 20), (len(data) - 1, len(data)), (0, len(data))]:
        assert object_store.read_range(url, start, end, timeout_seconds=20) == data[start:end]
    storage.fetch_to_file(url, tmp_path / "copy", expected_bytes=len(data))
    assert (tmp_path / "copy").read_bytes() == data
    place.write("objects/empty", b"")
    assert storage.read_bytes(place.url("objects/empty")) == b""
    with open(tmp_path / "empty", "w+b") as file:
        found = object_store.fetch(place.url("objects/empty"), file.fileno(), timeout_seconds=20)
    assert (found.size, found.sha256[:8]) == (0, "e3b0c442")
    if place.put is None:
        (tmp_path / "large").write_bytes(4 * data)  # goes up in parts
        storage.upload_file(tmp_path / "large", place.url("objects/copy"))
        assert storage.read_bytes(place.url("objects/copy")) == 4 * data
    if place.listable:
        assert storage.list_names(place.url("objects/a b")) == ["100%.tar"]
        assert {"a b/100%.tar", "empty"} <= set(storage.list_tree(place.url("objects")))
    else:
        with pytest.raises(StorageError, match="cannot be listed; name the files"):
            storage.list_names(place.url("objects"))


@pytest.mark.parametrize("running", STORES, indirect=True)
def test_what_cannot_be_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("there", b"x")
    with pytest.raises(
        StorageError, match=r"cannot read .*/none: there is no such object"
    ) as missing:
        storage.read_bytes(place.url("none"))
    assert missing.value.kind == "missing"
    with pytest.raises(
        StorageError, match=r"it is shorter than expected|has only 1 bytes"
    ) as beyond:
        object_store.read_range(place.url("there"), 10, 20, timeout_seconds=10)
    assert beyond.value.kind == "changed"
    for name, value in place.wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        StorageError, match=r"refused access \(status 40[13]\)|no credentials were found"
    ) as refused:
        storage.read_bytes(place.wrong_url(place.url("there")))
    assert refused.value.kind == "refused"
    assert "hush" not in str(refused.value) and "not-the-key" not in str(refused.value)


@pytest.fixture
def manifest(place: Place, tmp_path: Path) -> Manifest:
    """Three shards of seven samples, in the store."""
    make_shards(tmp_path / "data", count=21)
    return load_manifest(place.upload(tmp_path / "data", f"shards-{tmp_path.name}"))


@pytest.mark.parametrize("running", STORES, indirect=True)
def test_samples_come_by_ranges_and_then_from_copies(
    place: Place, manifest: Manifest, tmp_path: Path
) -> None:
    store = ShardStore([manifest], _settings(tmp_path / "cache"))
    reader, expected = Reader(store), list(samples(21))
    refs = [(2, 6), (0, 0), (1, 3), (0, 1), (2, 0)]
    for _ in range(2):
        for (shard, i), found in zip(refs, reader.read_many(refs), strict=True):
            want = expected[shard * 7 + i]
            assert isinstance(found, RawSample), found
            assert (found.key, found.members["png"]) == (want["__key__"], want["png"])
        if not list(tmp_path.glob("cache/shards/*.tar")):
            ahead = FetchAhead(store, lambda number: iter([[2, 0], [1]][number:]))
            until(lambda: len(list(tmp_path.glob("cache/shards/*.tar"))) == 3)
            ahead.close()
    assert all(shard is not None and shard.fd >= 0 for shard in map(store.at_hand, range(3)))
    for entry in manifest.shards:
        assert store.cache is not None
        assert store.cache.path(entry).read_bytes() == (tmp_path / "data" / entry.name).read_bytes()


@pytest.mark.parametrize("running", STORES, indirect=True)
def test_a_missing_shard_costs_its_samples_only(
    place: Place, manifest: Manifest, tmp_path: Path
) -> None:
    gone = dataclasses.replace(manifest.shards[1], name="gone.tar")
    changed = dataclasses.replace(manifest, shards=(manifest.shards[0], gone, manifest.shards[2]))
    reader = Reader(ShardStore([changed], _settings(tmp_path / "cache")))
    found = reader.read_many([(0, 0), (1, 0), (1, 5), (2, 0)])
    assert [one.reason if isinstance(one, SampleProblem) else "" for one in found] == [
        "",
        "missing-shard",
        "missing-shard",
        "",
    ]


@pytest.mark.parametrize("running", STORES, indirect=True)
def test_indexing_what_lies_in_a_store(place: Place, manifest: Manifest, tmp_path: Path) -> None:
    urls = [manifest.shard_url(shard) for shard in manifest.shards]
    found = index_shards(urls, str(tmp_path / "index"), workers=0)
    assert [(shard.samples, shard.sha256) for shard in found.shards] == [
        (shard.samples, shard.sha256) for shard in manifest.shards
    ]
    reader = Reader(ShardStore([load_manifest(tmp_path / "index")], _settings(tmp_path / "cache")))
    assert reader.read(1, 2).key == "00009"


@pytest.mark.http
def test_a_server_without_ranges_gives_whole_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_copy, "_whole_only", {})
    make_shards(tmp_path / "data", count=21)
    with http_server.http_server(tmp_path / "data", ranges=False) as web:
        reader = Reader(ShardStore([load_manifest(web.url())], _settings(tmp_path / "cache")))
        found = reader.read_many([(0, 0), (2, 6), (0, 3)])
        assert [one.key for one in found] == ["00000", "00020", "00003"]
        before = len(web.requests)
        assert [one.key for one in reader.read_many([(0, 5), (2, 1)])] == ["00005", "00015"]
        assert len(web.requests) == before, "samples of shards that are here were asked for again"


@pytest.mark.http
def test_presigned_addresses_and_their_secrecy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, secret = os.urandom(1000), "X-Amz-Signature=aGVsbG8%2F"
    (tmp_path / "a.tar").write_bytes(data)
    caplog.set_level(logging.DEBUG)
    with http_server.http_server(tmp_path, query=secret) as web:
        url = f"{web.url('a.tar')}?{secret}"
        assert storage.read_bytes(url) == data
        storage.fetch_to_file(url, tmp_path / "copy", expected_bytes=1000)
        assert (tmp_path / "copy").read_bytes() == data
        with pytest.raises(StorageError, match=r"/b\.tar: there is no such object") as error:
            storage.read_bytes(f"{web.url('b.tar')}?{secret}", timeout_seconds=2)
        with pytest.raises(StorageError, match="refused access"):
            storage.read_bytes(f"{url}x", timeout_seconds=2)
    assert not re.search("aGVsbG8", caplog.text + str(error.value))
