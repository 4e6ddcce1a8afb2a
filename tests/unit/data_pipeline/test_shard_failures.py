"""Records of unavailable shards: shared between processes, limited in time, and cleared."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common import object_store, store_download
from data_pipeline.common.errors import StorageError
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import SampleProblem
from data_pipeline.shards.manifest import load_manifest
from tests.support.fault_proxy import fault_proxy
from tests.support.http_server import http_server
from tests.support.http_shards import WebShards, web_settings, web_shards
from tests.support.results import problem_reasons, read_many

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


def test_missing_shard_is_recorded_for_all_processes(shards: WebShards) -> None:
    (shards.web.folder / "shard-000001.tar").unlink()
    results = read_many(Reader(shards.store()), [(1, 0), (0, 0), (1, 6)])
    assert problem_reasons(results) == ["missing-shard", "", "missing-shard"]
    assert isinstance(results[0], SampleProblem) and "shard-000001.tar" in results[0].detail

    num_requests = len(shards.web.requests)
    other = Reader(shards.store())  # as in another process
    assert problem_reasons(read_many(other, [(1, 3)])) == ["missing-shard"]
    assert len(shards.web.requests) == num_requests


def test_record_expires(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shards.web.folder / "shard-000001.tar"
    path.rename(shards.web.folder / "moved")
    reader = Reader(shards.store())
    assert problem_reasons(read_many(reader, [(1, 0)])) == ["missing-shard"]

    (shards.web.folder / "moved").rename(path)
    assert problem_reasons(read_many(reader, [(1, 0)])) == ["missing-shard"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 301)
    assert problem_reasons(read_many(reader, [(1, 0)])) == [""]
    assert not list(shards.cache.glob("failures/*"))


def test_unresponsive_store_costs_one_timeout(shards: WebShards) -> None:
    with fault_proxy(
        shards.web.port,
        fault_rate=1.0,
        faults=["delayed"],
        path_filter=lambda path: path.endswith(".tar"),
    ) as proxy:
        manifest = dataclasses.replace(shards.manifest, base=proxy.endpoint)
        settings = web_settings(shards.cache, shard_seconds=1.2, request_seconds=0.4)
        reader = Reader(ShardStore([manifest], settings))
        results = read_many(reader, [(0, 0), (0, 3), (1, 0), (2, 6)])
        assert set(problem_reasons(results)) == {"unreachable"}

        num_requests = proxy.requests
        other = Reader(ShardStore([manifest], settings))  # as in another process
        assert set(problem_reasons(read_many(other, [(2, 1), (0, 5)]))) == {"unreachable"}
        assert proxy.requests == num_requests


def test_clear_failures(shards: WebShards) -> None:
    reader, other = Reader(shards.store()), shards.store()
    reader._store.record_failure(0, StorageError("no response", kind="unreachable"))
    reader._store.record_failure(1, StorageError("access denied", kind="refused"))
    refs = [(0, 0), (1, 0), (2, 0)]
    assert problem_reasons(read_many(reader, refs)) == ["unreachable", "unreachable", ""]
    assert problem_reasons(read_many(Reader(shards.store()), refs)) == ["unreachable", "", ""]
    reader.clear_failures()
    assert problem_reasons(read_many(reader, refs)) == [""] * 3
    assert not list(shards.cache.glob("failures/*"))

    # Earlier records of other processes are ignored too, except of missing shards.
    other.record_failure(2, StorageError("no response", kind="unreachable"))
    other.record_failure(1, StorageError("no such object", kind="missing"))
    time.sleep(0.05)  # more than the resolution of file times
    reader.clear_failures()
    assert problem_reasons(read_many(reader, refs)) == ["", "missing-shard", ""]
    time.sleep(0.05)
    other.record_failure(0, StorageError("no response", kind="unreachable"))
    assert problem_reasons(read_many(reader, refs)) == ["unreachable", "missing-shard", ""]


def test_refused_requests_are_not_shared(shards: WebShards) -> None:
    """Another process may have valid credentials."""
    shards.web.password = "user:secret"
    reader = Reader(shards.store())
    assert problem_reasons(read_many(reader, [(0, 0)])) == ["unreachable"]
    num_requests = len(shards.web.requests)
    assert problem_reasons(read_many(reader, [(0, 1)])) == ["unreachable"]
    assert len(shards.web.requests) == num_requests

    url = shards.manifest.url.replace("//", "//user:secret@")
    manifest = dataclasses.replace(shards.manifest, url=url, base=url)
    with_password = Reader(ShardStore([manifest], web_settings(shards.cache)))
    assert problem_reasons(read_many(with_password, [(0, 0)])) == [""]
    shards.web.password = ""
    assert problem_reasons(read_many(Reader(shards.store()), [(0, 0)])) == [""]


def test_record_applies_to_one_location(tmp_path: Path, shards: WebShards) -> None:
    shutil.copytree(shards.web.folder, tmp_path / "mirror")
    (shards.web.folder / "shard-000000.tar").unlink()
    with http_server(tmp_path / "mirror") as mirror:
        manifests = [shards.manifest, load_manifest(mirror.url())]
        store = ShardStore(manifests, web_settings(shards.cache))
        assert problem_reasons(read_many(Reader(store), [(0, 0)])) == ["missing-shard"]
        assert problem_reasons(read_many(Reader(store), [(3, 0)])) == [""]


def test_invalid_record_files(shards: WebShards, monkeypatch: pytest.MonkeyPatch) -> None:
    """They expire like valid ones, even if the files cannot be removed."""
    shards.store().record_failure(0, StorageError("x", kind="missing"))
    (path,) = shards.cache.glob("failures/*")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", denied)
    expirations: list[Any] = ["soon", None, 1e400, float("nan"), [], time.time() - 1]
    for until in expirations:
        path.write_text(json.dumps(["missing-shard", "x", until]))
        failure = shards.store().failure(0)
        assert failure is None or failure.until <= time.time() + 300, until
    assert problem_reasons(read_many(Reader(shards.store()), [(0, 0)])) == [""]
