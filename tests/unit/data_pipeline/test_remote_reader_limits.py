"""Reading remote samples on a machine with problems: unusable cache folders and too many open
files."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.common import object_store, store_download
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.reading.cache import ShardCache
from data_pipeline.reading.open_shard import OpenShard
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import SampleProblem, SampleRef
from data_pipeline.shards.manifest import load_manifest
from tests.support.http_shards import WebShards, http_server_process, web_settings, web_shards
from tests.support.results import problem_reasons, read_many, read_one
from tests.support.small_shards import make_shards

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


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_cache_folder_that_cannot_be_written(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pwrite", fails)
    refs = [(shard, i) for shard in range(3) for i in range(7)]
    assert problem_reasons(read_many(Reader(shards.store()), refs)) == [""] * 21
    (record,) = caplog.records
    assert os.strerror(error) in record.getMessage()
    assert "data.cache_dir" in record.getMessage()


def test_cache_folder_that_is_a_file(shards: WebShards) -> None:
    shards.cache.write_text("")
    results = read_many(Reader(shards.store()), [(0, 0), (2, 6)])
    assert problem_reasons(results) == ["", ""]


def test_corrupt_cached_index_that_cannot_be_removed(
    shards: WebShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_one(Reader(shards.store()), 0, 0)
    for path in (shards.cache / "index").iterdir():
        path.write_bytes(b"corrupt")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", denied)
    assert problem_reasons(read_many(Reader(shards.store()), [(0, 0)])) == [""]


@pytest.fixture
def limit_open_files() -> Iterator[Callable[[int], None]]:
    """Allows that many more open files than there are now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more: int) -> None:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_soft_limit_on_open_files_is_raised(shards: WebShards) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
        shards.store()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("is_cached", [False, True])
def test_too_many_open_files(
    tmp_path: Path, limit_open_files: Callable[[int], None], is_cached: bool
) -> None:
    make_shards(tmp_path / "data", count=7 * 40)
    with http_server_process(tmp_path / "data") as url:
        store = ShardStore([load_manifest(url)], web_settings(tmp_path / "cache"), max_open=1000)
        reader, shards = Reader(store), range(40)
        if is_cached:
            # Open the shards before they are cached, so that each copy is opened by a later read.
            read_many(reader, [(shard, 0) for shard in shards])
            for shard in shards:
                store.cache_shard(shard)

        limit_open_files(40)
        for start in range(0, 40, 10):
            refs = [(shard, i) for shard in shards[start : start + 10] for i in (1, 5)]
            assert problem_reasons(read_many(reader, refs)) == [""] * 20
            assert len(store._open) > 5, "more shards were closed than necessary"
        results = read_many(reader, [(shard, 2) for shard in shards])
        assert problem_reasons(results) == [""] * 40
        store.close()


def test_no_file_can_be_opened(tmp_path: Path, limit_open_files: Callable[[int], None]) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=7)]))
    limit_open_files(0)
    descriptors: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                descriptors.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(ConfigError, match="ulimit -n"):
            read_many(reader, [(0, 0)])
    finally:
        for fd in descriptors:
            os.close(fd)
    assert problem_reasons(read_many(reader, [(0, 0)])) == [""]


def test_copy_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server without ranges, which requires a copy."""

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with web_shards(tmp_path, ranges=False) as shards:
        monkeypatch.setattr(OpenShard, "read", fails)
        results = read_many(Reader(shards.store()), [(0, 0), (0, 1)])
        assert problem_reasons(results) == ["unreachable"] * 2


def test_copy_removed_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_shards(tmp_path, ranges=False) as shards:
        monkeypatch.setattr(ShardCache, "open", lambda *_: None)
        (problem,) = read_many(Reader(shards.store()), [(1, 0)])
        assert isinstance(problem, SampleProblem) and problem.reason == "unreachable"
        assert "removed" in problem.detail


def test_corrupt_index_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt_index(*_: object) -> OpenShard:
        raise DataError("x", slug="corrupt-index")

    with web_shards(tmp_path, ranges=False) as shards:
        reader = Reader(shards.store())
        store = reader._store
        shard = OpenShard(store.entry(1), "", store.load_index(1, 5.0), -1, is_copy=True)
        monkeypatch.setattr(ShardStore, "open", corrupt_index)
        ref = SampleRef(0, shard=1, sample=0)
        results = reader._remote._read_whole_shard([ref], shard, time.monotonic() + 5)
        ((_, result),) = results
        assert isinstance(result, SampleProblem) and result.reason == "corrupt-index"
