"""Reading everything through a store whose answers go wrong: no crash, no long wait, and nothing
lost or changed.

The proxy in front of the store spoils a share of all answers, in every way it knows.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.common import object_store, store_copy
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import load_manifest
from tests.support.fault_proxy import FAULTS, FaultProxy, fault_proxy
from tests.support.http_server import http_server
from tests.support.s3_server import S3Server
from tests.support.small_shards import make_shards, samples

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

_PER_SHARD = 40
STORES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("s3", "http")]


@contextlib.contextmanager
def _spoiled(
    kind: str,
    folder: Path,
    share: float,
    seed: int,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[str, FaultProxy]]:
    """Address of the shards of `folder` behind a proxy, and the proxy."""
    with contextlib.ExitStack() as stack:
        if kind == "s3":
            url, port = s3_server.upload(folder, f"faults-{folder.parent.name}"), s3_server.port
        else:
            web = stack.enter_context(http_server(folder))
            url, port = "", web.port
        proxy = stack.enter_context(fault_proxy(port, share=share, seed=seed))
        if kind == "s3":
            for name, value in (s3_server.env | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
                monkeypatch.setenv(name, value)
        object_store.forget_clients()
        store_copy._whole_only.clear()
        yield url or proxy.endpoint, proxy


def _from(windows: list[list[int]], number: int) -> Iterator[list[int]]:
    return iter(windows[number:])


def _read_all(
    url: str, cache: Path, count: int, *, cache_gib: float, rounds: int = 1
) -> tuple[int, int, float]:
    """Read every sample in random order, in batches; how many came, how many were bad, and the
    longest wait."""
    settings = DataConfig(
        cache_dir=str(cache),
        cache_gib=cache_gib,
        fetch_ahead=3,
        request_seconds=1.0,
        shard_seconds=20.0,
        timeout_seconds=60.0,
        max_corrupt_ratio=1.0,
    )
    store = ShardStore([load_manifest(url, timeout_seconds=20)], settings, max_open=6)
    expected, order = list(samples(count)), random.Random(0)
    reader, shards, longest, came, bad = Reader(store), list(range(len(store))), 0.0, 0, 0
    for _ in range(rounds):
        order.shuffle(shards)
        windows = [shards[start : start + 3] for start in range(0, len(shards), 3)]
        ahead = FetchAhead(store, partial(_from, windows))
        for start in range(0, len(shards), 3):
            ahead.reached(start // 3)
            refs = [
                (shard, i)
                for shard in shards[start : start + 3]
                for i in range(store.entry(shard).samples)
            ]
            order.shuffle(refs)
            while refs:
                batch, refs = refs[:16], refs[16:]
                began = time.monotonic()
                found = reader.read_many(batch)
                longest = max(longest, time.monotonic() - began)
                for (shard, i), one in zip(batch, found, strict=True):
                    if not isinstance(one, RawSample):
                        bad += 1
                        continue
                    want = expected[shard * _PER_SHARD + i]
                    assert (one.key, one.members["png"], one.members["txt"].decode()) == (
                        want["__key__"],
                        want["png"],
                        want["txt"],
                    )
                    came += 1
        ahead.close()
    return came, bad, longest


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_everything_comes_through_a_bad_line(
    kind: str,
    cache_gib: float,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_copy, "PART_BYTES", 20_000)
    make_shards(tmp_path / "data", count=360, samples_per_shard=_PER_SHARD)
    with _spoiled(kind, tmp_path / "data", 0.1, 3, s3_server, monkeypatch) as (url, proxy):
        came, bad, longest = _read_all(url, tmp_path / "cache", 360, cache_gib=cache_gib)
    assert came + bad == 360 and bad == 0
    assert longest < 20
    assert sum(proxy.done.values()) >= 3, "the proxy spoiled nothing"


@pytest.mark.long
@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_faults_of_all_kinds(
    kind: str, share: float, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_copy, "PART_BYTES", 20_000)
    count = 1200
    make_shards(tmp_path / "data", count=count, samples_per_shard=_PER_SHARD)
    with _spoiled(kind, tmp_path / "data", share, 1, s3_server, monkeypatch) as (url, proxy):
        for cache_gib in (0.0, 1e-4, 1.0):  # no copies, copies of few shards, copies of all
            came, bad, longest = _read_all(
                url, tmp_path / str(cache_gib), count, cache_gib=cache_gib, rounds=2
            )
            assert came + bad == 2 * count and bad <= 2 * count * 0.01
            assert longest < 60
    if share == 0.1:
        assert set(proxy.done) == set(FAULTS), "a fault was never made"


@pytest.mark.parametrize("kind", STORES)
def test_what_is_bad_for_good_is_counted_exactly(
    kind: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard is missing, one is cut off and one has a flipped bit: behind a bad line that is
    still what is told."""
    manifest = make_shards(tmp_path / "data", count=240, samples_per_shard=_PER_SHARD)
    rows = ShardStore([manifest]).open(2).rows
    (tmp_path / "data" / "shard-000001.tar").unlink()
    path = tmp_path / "data" / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[: rows[0][30] + 1])  # samples 30 to 39 are gone
    path = tmp_path / "data" / "shard-000004.tar"
    data = bytearray(path.read_bytes())
    data[ShardStore([manifest]).open(4).rows[0][7] + 5] ^= 4
    path.write_bytes(data)
    for cache_gib in (0.0, 1.0):
        with _spoiled(kind, tmp_path / "data", 0.02, 5, s3_server, monkeypatch) as (url, _):
            came, bad, longest = _read_all(url, tmp_path / str(cache_gib), 240, cache_gib=cache_gib)
        assert (came, bad) == (240 - _PER_SHARD - 10 - 1, _PER_SHARD + 10 + 1)
        assert longest < 20
