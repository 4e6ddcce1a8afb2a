"""Opening shards: open files, the check before training, and errors."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.reading.local_shards import check_local_shards
from data_pipeline.reading.store import ShardStore
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest
from tests.support.small_shards import make_shards


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_shards(tmp_path / "data", count=21)


def test_shard_numbers_continue_across_manifests(manifest: Manifest, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", count=7, first=500)
    store = ShardStore([manifest, other])
    assert len(store) == 4
    assert store.open(2).index.key(0) == "00014"
    assert store.open(3).index.key(0) == "00500"
    assert store.name(3) == "shard-000000.tar" and not store.is_remote(3)


def test_number_of_open_files_is_limited(manifest: Manifest) -> None:
    store, before = ShardStore([manifest], max_open=2), len(os.listdir("/proc/self/fd"))
    for number in [0, 1, 2, 0, 1, 2, 2]:
        assert store.open(number).name == f"shard-{number:06d}.tar"
        assert os.fstat(store.open(number).fd).st_size == manifest.shards[number].bytes
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # the file and its mapped index
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_missing_shard(manifest: Manifest) -> None:
    Path(manifest.shard_url(manifest.shards[1])).unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar is missing") as error:
        ShardStore([manifest]).open(1)
    assert error.value.slug == "missing-shard"


def test_check_local_shards(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    check_local_shards([manifest])
    assert not caplog.records
    os.truncate(manifest.shard_url(manifest.shards[0]), 512)
    check_local_shards([manifest])
    size = manifest.shards[0].bytes
    assert re.search(rf"shard-000000\.tar has 512 bytes, .*\b{size}\b", caplog.text)

    Path(manifest.shard_url(manifest.shards[1])).unlink()
    counts = "1 of 3 shards are missing, with 7 of 21 samples"
    with pytest.raises(DataError, match=rf"shard-000001\.tar .*{counts}") as error:
        check_local_shards([manifest], 0.3)
    assert "data.max_corrupt_ratio 0.3" in str(error.value)
    check_local_shards([manifest], 0.4)
    assert counts in caplog.text
    # The limit applies to all data together, not to each source.
    check_local_shards([manifest, make_shards(tmp_path / "more", count=42)], 0.2)
    check_local_shards(
        [dataclasses.replace(manifest, url="s3://bucket/x", base="s3://bucket/x")], 0.0
    )


def test_remote_shards_need_a_cache_dir(manifest: Manifest, tmp_path: Path) -> None:
    remote = dataclasses.replace(manifest, url="s3://bucket/data", base="s3://bucket/data")
    with pytest.raises(ConfigError, match=r"data.cache_dir .*s3://bucket/data .*data.cache_gib=0"):
        ShardStore([remote])
    assert ShardStore([remote], DataConfig(cache_gib=0)).is_remote(0)
    assert ShardStore([remote], DataConfig(cache_dir=str(tmp_path / "cache"))).try_open(0) is None
