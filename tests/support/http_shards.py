"""Small shards behind an HTTP server, for tests of remote reading."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_pipeline.reading.store import ShardStore
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest, load_manifest
from tests.support.http_server import HttpServer, http_server
from tests.support.small_shards import make_shards


@dataclass(kw_only=True)
class WebShards:
    """Shards of seven samples each behind an HTTP server, and a cache folder."""

    web: HttpServer
    manifest: Manifest
    """Manifest with URLs of the server."""
    cache: Path

    def store(self, **changes: Any) -> ShardStore:
        """A new store with short timeouts."""
        return ShardStore([self.manifest], web_settings(self.cache, **changes))

    def request_count(self, suffix: str = ".tar") -> int:
        """Number of requests for files with this suffix."""
        return sum(path.endswith(suffix) for _, path, _ in self.web.requests)


def web_settings(cache: Path, **changes: Any) -> DataConfig:
    """Settings with short timeouts."""
    defaults: dict[str, Any] = {
        "cache_dir": str(cache),
        "shard_seconds": 6.0,
        "request_seconds": 1.0,
        "fetch_ahead": 2,
        "timeout_seconds": 60.0,
    }
    return DataConfig(**defaults | changes)


@contextmanager
def web_shards(folder: Path, count: int = 21, *, ranges: bool = True) -> Iterator[WebShards]:
    """Write `count` valid samples as shards and serve them over HTTP."""
    make_shards(folder / "data", count=count)
    with http_server(folder / "data", ranges=ranges) as web:
        yield WebShards(web=web, manifest=load_manifest(web.url()), cache=folder / "cache")


@contextmanager
def http_server_process(folder: Path) -> Iterator[str]:
    """URL of a folder behind an HTTP server in another process, which has its own limit of open
    files."""
    context = multiprocessing.get_context("spawn")
    connection, child_connection = context.Pipe()
    process = context.Process(target=_serve, args=(folder, child_connection))
    process.start()
    try:
        yield connection.recv()
    finally:
        connection.send(None)
        process.join()


def _serve(folder: Path, connection: Connection) -> None:
    with http_server(folder) as web:
        connection.send(web.url())
        connection.recv()
