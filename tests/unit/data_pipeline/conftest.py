"""Fixtures: small shards and loaders over them, and object stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common import object_store, store_download
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.shards import index_job
from data_pipeline.shards.manifest import Manifest
from tests.support.http_server import http_server
from tests.support.loaders import NUM_SAMPLES, LoaderFactory
from tests.support.s3_server import S3Server
from tests.support.small_shards import make_shards, make_tokenizer, remove_indices


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: str) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("shards"), count=NUM_SAMPLES)


@pytest.fixture
def factory(manifest: Manifest, tokenizer: Tokenizer) -> LoaderFactory:
    return LoaderFactory(manifest, tokenizer)


@pytest.fixture
def new_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clears the cached clients of object stores and the list of servers without ranges."""
    object_store.clear_clients()
    monkeypatch.setattr(store_download, "_hosts_without_ranges", {})


@pytest.fixture
def s3(new_clients: None, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with its credentials in the environment."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def web(new_clients: None, tmp_path: Path) -> Iterator[str]:
    """Address of a web server without range support that serves `tmp_path/www`."""
    (tmp_path / "www").mkdir()
    with http_server(tmp_path / "www", ranges=False) as server:
        yield server.endpoint


@pytest.fixture
def written(tmp_path: Path) -> Manifest:
    """Three shards of 7 samples without manifest or indices."""
    manifest = make_shards(tmp_path / "data", count=21)
    remove_indices(tmp_path / "data")
    return manifest


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are read from start to end."""
    names: list[str] = []
    real_scan = index_job.scan

    def scan(chunks, total_bytes, where, **options):  # type: ignore[no-untyped-def]
        names.append(Path(where).name)
        return real_scan(chunks, total_bytes, where, **options)

    monkeypatch.setattr(index_job, "scan", scan)
    return names
