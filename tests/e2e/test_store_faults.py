"""Reading all samples through a proxy that corrupts, delays and truncates responses.

There must be no crash and no long wait, and no sample may be lost or changed.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from data_pipeline.common import object_store, store_download
from data_pipeline.reading.fetch_ahead import FetchAhead
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import load_manifest
from tests.support.fault_proxy import FAULTS, FaultProxy, fault_proxy
from tests.support.http_server import http_server
from tests.support.results import read_many
from tests.support.s3_server import S3Server
from tests.support.small_shards import make_samples, make_shards

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

SAMPLES_PER_SHARD, WINDOW, BATCH_SIZE = 40, 3, 16
SETTINGS = DataConfig(
    fetch_ahead=WINDOW,
    request_seconds=1.0,
    shard_seconds=20.0,
    timeout_seconds=60.0,
    max_corrupt_ratio=1.0,
)
STORES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("s3", "http")]


class ReadReport(NamedTuple):
    """The result of reading all samples."""

    good: int
    corrupt: int
    max_seconds: float
    """The longest time that one batch took."""


class FaultyStore:
    """Serves folders from a store behind a fault proxy."""

    def __init__(self, kind: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self._kind, self._s3, self._monkeypatch = kind, s3_server, monkeypatch

    @contextlib.contextmanager
    def serve(
        self, folder: Path, *, fault_rate: float, seed: int
    ) -> Iterator[tuple[str, FaultProxy]]:
        """The address of the folder behind the proxy, and the proxy."""
        with contextlib.ExitStack() as stack:
            url = ""
            if self._kind == "s3":
                url = self._s3.upload(folder, f"faults-{folder.parent.name}")
                port = self._s3.port
            else:
                port = stack.enter_context(http_server(folder)).port
            proxy = stack.enter_context(fault_proxy(port, fault_rate=fault_rate, seed=seed))
            if self._kind == "s3":
                env = self._s3.env | {"AWS_ENDPOINT_URL": proxy.endpoint}
                for name, value in env.items():
                    self._monkeypatch.setenv(name, value)
            object_store.clear_clients()
            store_download._hosts_without_ranges.clear()
            yield url or proxy.endpoint, proxy


@pytest.fixture
def faulty_store(kind: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> FaultyStore:
    return FaultyStore(kind, s3_server, monkeypatch)


def windows_from(windows: list[list[int]], first: int) -> Iterator[list[int]]:
    return iter(windows[first:])


def read_all(url: str, cache: Path, count: int, *, cache_gib: float, epochs: int = 1) -> ReadReport:
    """Read every sample in random order, in batches, and compare it with the original."""
    settings = replace(SETTINGS, cache_dir=str(cache), cache_gib=cache_gib)
    store = ShardStore([load_manifest(url, timeout_seconds=20)], settings, max_open=6)
    expected = list(make_samples(count))
    reader, generator = Reader(store), random.Random(0)
    shards = list(range(len(store)))
    good = corrupt = 0
    max_seconds = 0.0
    for _ in range(epochs):
        generator.shuffle(shards)
        windows = [shards[i : i + WINDOW] for i in range(0, len(shards), WINDOW)]
        ahead = FetchAhead(store, partial(windows_from, windows))
        for index, window in enumerate(windows):
            ahead.start_batch(index)
            refs = [(shard, i) for shard in window for i in range(store.entry(shard).samples)]
            generator.shuffle(refs)
            for start in range(0, len(refs), BATCH_SIZE):
                batch = refs[start : start + BATCH_SIZE]
                started = time.monotonic()
                samples = read_many(reader, batch)
                max_seconds = max(max_seconds, time.monotonic() - started)
                for (shard, i), sample in zip(batch, samples, strict=True):
                    if isinstance(sample, RawSample):
                        assert_sample_equals(sample, expected[shard * SAMPLES_PER_SHARD + i])
                        good += 1
                    else:
                        corrupt += 1
        ahead.close()
    return ReadReport(good, corrupt, max_seconds)


def assert_sample_equals(sample: RawSample, expected: dict[str, object]) -> None:
    assert sample.key == expected["__key__"]
    assert sample.members["png"] == expected["png"]
    assert sample.members["txt"].decode() == expected["txt"]


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_no_sample_is_lost(
    faulty_store: FaultyStore, cache_gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_download, "PART_BYTES", 20_000)
    make_shards(tmp_path / "data", count=360, samples_per_shard=SAMPLES_PER_SHARD)
    with faulty_store.serve(tmp_path / "data", fault_rate=0.1, seed=3) as (url, proxy):
        report = read_all(url, tmp_path / "cache", 360, cache_gib=cache_gib)
    assert (report.good, report.corrupt) == (360, 0)
    assert report.max_seconds < 20
    assert sum(proxy.fault_counts.values()) >= 3, "there were too few faults"


@pytest.mark.long
@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("fault_rate", [0.001, 0.01, 0.1])
def test_all_faults(
    faulty_store: FaultyStore, fault_rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_download, "PART_BYTES", 20_000)
    count, epochs = 1200, 2
    make_shards(tmp_path / "data", count=count, samples_per_shard=SAMPLES_PER_SHARD)
    with faulty_store.serve(tmp_path / "data", fault_rate=fault_rate, seed=1) as (url, proxy):
        for cache_gib in (0.0, 1e-4, 1.0):  # a cache of no, few and all shards
            cache = tmp_path / str(cache_gib)
            report = read_all(url, cache, count, cache_gib=cache_gib, epochs=epochs)
            assert report.good + report.corrupt == epochs * count
            assert report.corrupt <= epochs * count * 0.01
            assert report.max_seconds < 60
    if fault_rate == 0.1:
        assert set(proxy.fault_counts) == set(FAULTS)


@pytest.mark.parametrize("kind", STORES)
def test_corrupt_shards_are_counted_exactly(faulty_store: FaultyStore, tmp_path: Path) -> None:
    """A missing shard, a truncated one and a flipped bit, behind a proxy with temporary faults."""
    data = tmp_path / "data"
    manifest = make_shards(data, count=240, samples_per_shard=SAMPLES_PER_SHARD)
    offsets_of_2, offsets_of_4 = (ShardStore([manifest]).open(shard).columns[0] for shard in (2, 4))
    (data / "shard-000001.tar").unlink()
    truncated = data / "shard-000002.tar"
    truncated.write_bytes(truncated.read_bytes()[: offsets_of_2[30] + 1])  # loses samples 30 to 39
    flipped = data / "shard-000004.tar"
    content = bytearray(flipped.read_bytes())
    content[offsets_of_4[7] + 5] ^= 4
    flipped.write_bytes(content)

    num_corrupt = SAMPLES_PER_SHARD + 10 + 1
    for cache_gib in (0.0, 1.0):
        with faulty_store.serve(data, fault_rate=0.02, seed=5) as (url, _):
            report = read_all(url, tmp_path / str(cache_gib), 240, cache_gib=cache_gib)
        assert (report.good, report.corrupt) == (240 - num_corrupt, num_corrupt)
        assert report.max_seconds < 20
