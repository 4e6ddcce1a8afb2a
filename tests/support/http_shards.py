"""Small shards behind a web server, for tests of reading from stores that need no real one."""

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
    """Shards of seven samples each behind a web server, and a folder for copies."""

    web: HttpServer
    manifest: Manifest
    """Its addresses are the server's."""
    cache: Path

    def store(self, **changes: Any) -> ShardStore:
        """A new store with short waits."""
        return ShardStore([self.manifest], web_settings(self.cache, **changes))

    def asked(self, ending: str = ".tar") -> int:
        """Requests for files whose names end so."""
        return sum(path.endswith(ending) for _, path, _ in self.web.requests)


def web_settings(cache: Path, **changes: Any) -> DataConfig:
    """Settings with short waits."""
    given: dict[str, Any] = {
        "cache_dir": str(cache),
        "shard_seconds": 6.0,
        "request_seconds": 1.0,
        "fetch_ahead": 2,
        "timeout_seconds": 60.0,
    }
    return DataConfig(**given | changes)


@contextmanager
def web_shards(folder: Path, count: int = 21, *, ranges: bool = True) -> Iterator[WebShards]:
    """`count` good samples behind a server, until the end of the block."""
    make_shards(folder / "data", count=count)
    with http_server(folder / "data", ranges=ranges) as web:
        yield WebShards(web=web, manifest=load_manifest(web.url()), cache=folder / "cache")


@contextmanager
def served_elsewhere(folder: Path) -> Iterator[str]:
    """The address of a folder behind a server in a process of its own, with open files of its
    own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(folder, there))
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


def _serve(folder: Path, pipe: Connection) -> None:
    with http_server(folder) as web:
        pipe.send(web.url())
        pipe.recv()
