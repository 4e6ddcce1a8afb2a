"""The index of a shard: its contents, and equal bytes for equal indices."""

from __future__ import annotations

import hashlib
import mmap
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.shards.index_file import COLUMNS
from data_pipeline.shards.scan import index_shard
from data_pipeline.shards.shard_index import Member, SampleRow, ShardIndex, index_name
from tests.support.small_shards import make_shards


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shard")
    return folder / make_shards(folder, count=9, samples_per_shard=9).shards[0].name


@pytest.fixture(scope="module")
def index(shard: Path) -> ShardIndex:
    return index_shard(shard)


def test_index_matches_tarfile(shard: Path, index: ShardIndex) -> None:
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        infos = tar.getmembers()
    assert len(index) == 9 and index.keys == [f"{number:05d}" for number in range(9)]
    assert (index.shard_bytes, index.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for i in range(len(index)):
        png, txt = infos[2 * i], infos[2 * i + 1]
        offset, extent = int(index.offsets[i]), int(index.extents[i])
        assert offset == png.offset
        assert offset + extent == txt.offset_data + -(-txt.size // 512) * 512
        assert index.crc32[i] == zlib.crc32(data[offset : offset + extent])
        assert index.members(i) == (
            ("png", 512, png.size),
            ("txt", txt.offset_data - offset, txt.size),
        )
        for member, info in zip(index.members(i), (png, txt), strict=True):
            start = offset + member.start
            expected = data[info.offset_data : info.offset_data + info.size]
            assert data[start : start + member.size] == expected
        assert index.key(i) == png.name.removesuffix(".png")


def test_dtypes(index: ShardIndex) -> None:
    assert (index.offsets.dtype, index.extents.dtype, index.crc32.dtype) == (
        np.int64,
        np.int64,
        np.uint32,
    )
    member = index.members(2)[1]
    assert all(type(number) is int for number in (member.start, member.size))
    for column in (index.offsets, index.crc32):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_index_out_of_range(index: ShardIndex) -> None:
    assert index.key(-1) == index.key(8)
    for i in (9, -10):
        with pytest.raises(IndexError):
            index.key(i)
        with pytest.raises(IndexError):
            index.members(i)


def test_safetensors_library_reads_it(index: ShardIndex) -> None:
    loaded = load_safetensors(index.to_bytes())
    assert set(loaded) == set(COLUMNS)
    for name, column in loaded.items():
        assert np.array_equal(column, index.columns[name])


def test_open_memory_maps(shard: Path, index: ShardIndex) -> None:
    path = Path(index_name(str(shard)))
    mapped = ShardIndex.open(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    base = mapped.offsets.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    assert mapped.to_bytes() == index.to_bytes()


def test_equal_indices_are_equal_bytes(shard: Path, index: ShardIndex) -> None:
    data = index.to_bytes()
    assert data == index_shard(shard).to_bytes() == ShardIndex.from_bytes(data, "x").to_bytes()


def test_empty_shard() -> None:
    empty = ShardIndex.build([], shard_bytes=1024, sha256="0" * 64)
    loaded = ShardIndex.from_bytes(empty.to_bytes(), "x")
    assert (len(loaded), loaded.keys, loaded.shard_bytes) == (0, [], 1024)
    assert set(load_safetensors(empty.to_bytes())) == set(COLUMNS)


def test_optional_metadata_and_unusual_names() -> None:
    rows = [
        SampleRow("é/ü☃", 0, 2048, 7, (Member("jpg", 512, 3), Member('a"\\b', 1536, 0))),
        SampleRow(r"b\xff", 4096, 512, 2**32 - 1, ()),
    ]
    index = ShardIndex.build(
        rows,
        shard_bytes=9000,
        sha256="a" * 64,
        etag='"x-3"',
        corruption="lost",
        source_hash="f" * 64,
    )
    loaded = ShardIndex.from_bytes(index.to_bytes(), "x")
    assert loaded.keys == ["é/ü☃", r"b\xff"]
    assert [loaded.members(i) for i in range(2)] == [row.members for row in rows]
    assert loaded.crc32.tolist() == [7, 2**32 - 1]
    assert (loaded.etag, loaded.corruption, loaded.source_hash) == ('"x-3"', "lost", "f" * 64)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SampleRow("a", 0, 600, 0, ()), "outside of the shard"),
        (SampleRow("a", -1, 5, 0, ()), "outside of the shard"),
        (SampleRow("a", 0, 0, 0, ()), "outside of the shard"),
        (SampleRow("a", 0, 99, 0, (Member("x", 90, 10),)), "outside of its sample"),
    ],
)
def test_invalid_rows(row: SampleRow, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ShardIndex.build([row], shard_bytes=512, sha256="0" * 64)


def test_missing_index_and_wrong_hash(tmp_path: Path, index: ShardIndex) -> None:
    with pytest.raises(StorageError, match="No such file"):
        ShardIndex.open(tmp_path / "x.index")
    (tmp_path / "x.index").write_bytes(index.to_bytes())
    with pytest.raises(DataError, match=r"s3://b/x.index .*SHA-256 .*0000"):
        ShardIndex.open(tmp_path / "x.index", "s3://b/x.index", sha256="0" * 64)
