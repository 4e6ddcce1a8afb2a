"""Opening shards: what is checked, what is said, and how copies of remote ones are kept."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.reading.store import ShardStore
from data_pipeline.shards.manifest import Manifest, load_manifest
from tests.support.s3_server import S3Server
from tests.support.small_shards import make_shards


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_shards(tmp_path / "data", count=21)


def test_shards_of_several_manifests_are_numbered_on(manifest: Manifest, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", count=7, first=500)
    store = ShardStore([manifest, other])
    assert len(store) == 4
    assert store.open(2).index.keys[0] == "00014"
    assert store.open(3).index.keys[0] == "00500"


def test_few_files_stay_open(manifest: Manifest) -> None:
    store, before = ShardStore([manifest], max_open=2), len(os.listdir("/proc/self/fd"))
    for number in [0, 1, 2, 0, 1, 2, 2]:
        assert store.open(number).name == f"shard-{number:06d}.tar"
        assert os.fstat(store.open(number).fd).st_size == manifest.shards[number].bytes
    assert len(os.listdir("/proc/self/fd")) == before + 2
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_missing_shard(manifest: Manifest) -> None:
    Path(manifest.shard_url(manifest.shards[1])).unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar is missing, .* expects 7 samples in \d+ bytes.*copy"):
        ShardStore([manifest]).open(1)


@pytest.mark.parametrize(("change", "message"), [(-1024, "was cut off"), (512, "is longer than it should be")])
def test_a_shard_of_another_length(manifest: Manifest, change: int, message: str) -> None:
    shard = manifest.shards[0]
    os.truncate(manifest.shard_url(shard), shard.bytes + change)
    expected = rf"has {shard.bytes + change} bytes, but its manifest expects {shard.bytes}: it {message}"
    with pytest.raises(DataError, match=expected) as error:
        ShardStore([manifest]).open(0)
    assert not error.value.slug  # ends training, unlike a bad sample


def test_a_shard_with_another_hash(manifest: Manifest) -> None:
    path = Path(manifest.shard_url(manifest.shards[0]))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the padding after the end mark: no sample is touched
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"SHA-256 \w+, but its manifest expects {manifest.shards[0].sha256}"):
        ShardStore([manifest]).open(0)
    assert ShardStore([manifest], verify=False).open(0).index.keys


def test_a_hash_is_checked_once_a_machine(manifest: Manifest, tmp_path: Path) -> None:
    cache, path = tmp_path / "cache", Path(manifest.shard_url(manifest.shards[0]))
    ShardStore([manifest], cache_dir=str(cache)).open(0)
    (marker,) = (cache / "verified").iterdir()
    assert marker.name == manifest.shards[0].sha256
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ShardStore([manifest], cache_dir=str(cache)).open(0).index.keys  # same length and time: trusted
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(DataError, match="SHA-256"):
        ShardStore([manifest], cache_dir=str(cache)).open(0)


def test_remote_shards_need_a_cache(manifest: Manifest) -> None:
    remote = dataclasses.replace(manifest, url="s3://bucket/data")
    with pytest.raises(ConfigError, match="cache_dir is empty, but s3://bucket/data is remote"):
        ShardStore([remote])


@pytest.mark.s3
def test_remote_shards_are_copied_once(
    s3_server: S3Server, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    remote = load_manifest(s3_server.upload(Path(manifest.url), "shards-test"))
    cache = tmp_path / "cache"
    opened = ShardStore([remote], cache_dir=str(cache)).open(1)
    assert Path(opened.path).parent == cache
    assert Path(opened.path).read_bytes() == Path(manifest.shard_url(manifest.shards[1])).read_bytes()
    before = Path(opened.path).stat().st_mtime_ns
    assert ShardStore([remote], cache_dir=str(cache)).open(1).index.keys == opened.index.keys
    assert Path(opened.path).stat().st_mtime_ns == before
    os.truncate(opened.path, 100)  # a damaged copy is fetched again
    assert ShardStore([remote], cache_dir=str(cache)).open(1).index.keys == opened.index.keys


@pytest.mark.s3
def test_a_remote_shard_that_is_not_the_manifests(
    s3_server: S3Server, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    path = Path(manifest.shard_url(manifest.shards[0]))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\1")
    remote = load_manifest(s3_server.upload(Path(manifest.url), "shards-bad"))
    with pytest.raises(DataError, match="SHA-256"):
        ShardStore([remote], cache_dir=str(tmp_path / "cache")).open(0)
    path.write_bytes(data[:-512])
    s3_server.upload(Path(manifest.url), "shards-bad")
    with pytest.raises(DataError, match=rf"has {len(data) - 512} bytes, but {len(data)} were expected"):
        ShardStore([remote], cache_dir=str(tmp_path / "cache")).open(0)
