"""Reading single samples: what was written comes back, and every damaged byte is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.writer import write_shards
from tests.support.small_shards import make_shards, samples


def test_samples_come_back_in_any_order(tmp_path: Path) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=20)]))
    expected = list(samples(20))
    for number in [19, 0, 7, 6, 13, 0]:
        raw = reader.read(number // 7, number % 7)
        assert (raw.shard, raw.key) == (f"shard-{number // 7:06d}.tar", f"{number:05d}")
        assert raw.members == {"png": expected[number]["png"], "txt": str(expected[number]["txt"]).encode()}
        assert reader.name(number // 7, number % 7) == (raw.shard, raw.key)


def test_names_of_members(tmp_path: Path) -> None:
    write_shards([{"__key__": "a.b/c/ü", "seg.PNG": b"s", "txt": "t", "json": {"x": 1}}], tmp_path)
    raw = Reader(ShardStore([load_manifest(tmp_path)])).read(0, 0)
    assert raw.key == "a.b/c/ü"
    assert raw.members == {"json": b'{"x": 1}', "seg.png": b"s", "txt": b"t"}


def test_a_flipped_bit_is_noticed_in_that_sample_only(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=3)
    path = tmp_path / "shard-000000.tar"
    index = ShardStore([manifest]).open(0).index
    good, first, last = path.read_bytes(), int(index.offsets[1]), int(index.offsets[1] + index.extents[1])
    for place in [first, first + 200, first + 512, first + 600, last - 600, last - 1]:
        data = bytearray(good)
        data[place] ^= 0x10
        path.write_bytes(data)
        reader = Reader(ShardStore([manifest], verify=False))
        with pytest.raises(DataError, match=r"CRC-32 \w{8} at byte \d+, but the index expects \w{8}") as error:
            reader.read(0, 1)
        assert error.value.slug == "crc-mismatch"
        assert reader.read(0, 0).key == "00000"
        assert reader.read(0, 2).key == "00002"


def test_a_shard_cut_while_it_is_open(tmp_path: Path) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=3)]))
    reader.read(0, 0)
    os.truncate(tmp_path / "shard-000000.tar", 2000)
    with pytest.raises(DataError) as error:
        reader.read(0, 2)
    assert error.value.slug == "truncated"


def test_a_huge_sample_is_not_read(tmp_path: Path) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=3)]), max_sample_bytes=1000)
    with pytest.raises(DataError, match=r"has \d+ bytes, more than 1000") as error:
        reader.read(0, 0)
    assert error.value.slug == "oversize"
