"""Opening shards: which are at hand, what is looked at before training, and what is said."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.reading.store import ShardStore, check_present
from data_pipeline.settings import DataConfig
from data_pipeline.shards.manifest import Manifest
from tests.support.small_shards import make_shards


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_shards(tmp_path / "data", count=21)


def test_shards_of_several_manifests_are_numbered_on(manifest: Manifest, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", count=7, first=500)
    store = ShardStore([manifest, other])
    assert len(store) == 4
    assert store.open(2).index.key(0) == "00014"
    assert store.open(3).index.key(0) == "00500"
    assert store.name(3) == "shard-000000.tar" and not store.is_remote(3)


def test_few_files_stay_open(manifest: Manifest) -> None:
    store, before = ShardStore([manifest], max_open=2), len(os.listdir("/proc/self/fd"))
    for number in [0, 1, 2, 0, 1, 2, 2]:
        assert store.open(number).name == f"shard-{number:06d}.tar"
        assert os.fstat(store.open(number).fd).st_size == manifest.shards[number].bytes
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # the file and its mapped index
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_missing_shard(manifest: Manifest) -> None:
    Path(manifest.shard_url(manifest.shards[1])).unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar is missing; copy it again") as error:
        ShardStore([manifest]).open(1)
    assert error.value.slug == "missing-shard"


def test_a_look_before_training(
    manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    check_present([manifest])
    assert not caplog.records
    os.truncate(manifest.shard_url(manifest.shards[0]), 512)
    check_present([manifest])
    assert "shard-000000.tar has 512 bytes, but its manifest expects" in caplog.text
    Path(manifest.shard_url(manifest.shards[1])).unlink()
    first = r"shard-000001.tar is missing, but its manifest expects 7 samples in \d+ bytes there; copy it again"
    counted = (
        r"1 of 3 shards are missing, with 7 of 21 samples, more than data.max_corrupt_ratio 0.3"
    )
    with pytest.raises(DataError, match=f"{first}.*{counted}"):
        check_present([manifest], 0.3)
    check_present([manifest], 0.4)
    assert (
        "1 of 3 shards are missing, with 7 of 21 samples: their samples are left out" in caplog.text
    )
    check_present(
        [manifest, make_shards(tmp_path / "more", count=42)], 0.2
    )  # of all data, not of one source
    check_present([dataclasses.replace(manifest, url="s3://bucket/x", base="s3://bucket/x")], 0.0)


def test_remote_shards_need_a_place_for_copies(manifest: Manifest, tmp_path: Path) -> None:
    remote = dataclasses.replace(manifest, url="s3://bucket/data", base="s3://bucket/data")
    with pytest.raises(
        ConfigError, match=r"cache_dir is empty, but s3://bucket/data is remote.*data.cache_gib=0"
    ):
        ShardStore([remote])
    assert ShardStore([remote], DataConfig(cache_gib=0)).is_remote(0)
    assert ShardStore([remote], DataConfig(cache_dir=str(tmp_path / "cache"))).at_hand(0) is None
