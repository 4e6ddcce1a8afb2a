"""The index of a shard: what it says, that equal ones are equal bytes, and that no damaged one is
believed."""

from __future__ import annotations

import hashlib
import json
import mmap
import random
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.shards.index_file import COLUMNS, decode, encode
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


def equal(first: ShardIndex, second: ShardIndex) -> bool:
    return first.to_bytes() == second.to_bytes()


def test_it_agrees_with_tarfile(shard: Path, index: ShardIndex) -> None:
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
            assert (
                data[start : start + member.size]
                == data[info.offset_data : info.offset_data + info.size]
            )
        assert index.key(i) == png.name.removesuffix(".png")


def test_its_types_are_those_that_are_promised(index: ShardIndex) -> None:
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


def test_a_number_beyond_the_end_is_an_error(index: ShardIndex) -> None:
    assert index.key(-1) == index.key(8)
    for i in (9, -10):
        with pytest.raises(IndexError):
            index.key(i)
        with pytest.raises(IndexError):
            index.members(i)


def test_the_safetensors_library_reads_it(index: ShardIndex) -> None:
    found = load_safetensors(index.to_bytes())
    assert set(found) == set(COLUMNS)
    for name, column in found.items():
        assert np.array_equal(column, index.columns[name])


def test_it_is_mapped_not_read(shard: Path, index: ShardIndex) -> None:
    path = Path(index_name(str(shard)))
    opened = ShardIndex.open(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    base = opened.offsets.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    assert equal(opened, index)


def test_equal_indices_are_equal_bytes(shard: Path, index: ShardIndex) -> None:
    data = index.to_bytes()
    assert data == index_shard(shard).to_bytes() == ShardIndex.from_bytes(data, "x").to_bytes()


def test_an_empty_shard_has_an_index() -> None:
    empty = ShardIndex.build([], shard_bytes=1024, sha256="0" * 64)
    found = ShardIndex.from_bytes(empty.to_bytes(), "x")
    assert (len(found), found.keys, found.shard_bytes) == (0, [], 1024)
    assert set(load_safetensors(empty.to_bytes())) == set(COLUMNS)


def test_notes_and_odd_names_survive() -> None:
    rows = [
        SampleRow("é/ü☃", 0, 2048, 7, (Member("jpg", 512, 3), Member('a"\\b', 1536, 0))),
        SampleRow(r"b\xff", 4096, 512, 2**32 - 1, ()),
    ]
    made = ShardIndex.build(
        rows, shard_bytes=9000, sha256="a" * 64, etag='"x-3"', damage="lost", made_from="f" * 64
    )
    found = ShardIndex.from_bytes(made.to_bytes(), "x")
    assert found.keys == ["é/ü☃", r"b\xff"]
    assert [found.members(i) for i in range(2)] == [row.members for row in rows]
    assert found.crc32.tolist() == [7, 2**32 - 1]
    assert (found.etag, found.damage, found.made_from) == ('"x-3"', "lost", "f" * 64)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SampleRow("a", 0, 600, 0, ()), "outside of the shard"),
        (SampleRow("a", -1, 5, 0, ()), "outside of the shard"),
        (SampleRow("a", 0, 0, 0, ()), "outside of the shard"),
        (SampleRow("a", 0, 99, 0, (Member("x", 90, 10),)), "outside of its sample"),
    ],
)
def test_rows_that_cannot_be_are_refused(row: SampleRow, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ShardIndex.build([row], shard_bytes=512, sha256="0" * 64)


Change = Callable[[dict[str, np.ndarray], dict[str, str]], None]


def put(name: str, at: int, value: int) -> Change:
    def change(columns: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        columns[name][at] = value

    return change


def note(name: str, value: str) -> Change:
    def change(columns: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        metadata[name] = value

    return change


BIG = 2**63 - 1
CHANGES: list[Change] = [
    put("offsets", 0, -512),
    put("offsets", 8, BIG),
    put("offsets", 3, 0),
    put("extents", 8, BIG),
    put("extents", 1, 0),
    put("extents", 2, -1),
    put("key_ends", 8, BIG),
    put("key_ends", 3, 0),
    put("key_ends", 0, -BIG),
    put("member_ends", 8, 19),
    put("member_ends", 4, BIG),
    put("member_ends", 4, -BIG),
    put("member_start", 5, BIG),
    put("member_start", 5, -1),
    put("member_size", 5, BIG),
    put("member_size", 5, -1),
    put("member_extension", 0, 2),
    note("samples", "8"),
    note("samples", "-9"),
    note("samples", "x"),
    note("samples", "9" * 5000),
    note("shard_bytes", "100"),
    note("shard_bytes", "-1"),
    note("shard_bytes", str(2**62)),
    note("version", "1"),
    note("extensions", "{}"),
    note("extensions", "[1, 2]"),
    note("extensions", "["),
    note("extensions", "[" * 99999),
    note("sha256", "../x"),
    note("sha256", "A" * 64),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_what_cannot_be_true_is_not_believed(index: ShardIndex, number: int) -> None:
    columns, metadata = decode(index.to_bytes())
    changed = {name: column.copy() for name, column in columns.items()}
    CHANGES[number](changed, metadata)
    with pytest.raises(DataError, match=r"x.index is not a shard index.*vlmoe data index") as error:
        ShardIndex.from_bytes(encode(changed, metadata), "x.index")
    assert error.value.slug == "bad-index"


def test_columns_that_wrap_around_are_not_believed(index: ShardIndex) -> None:
    columns, metadata = decode(index.to_bytes())
    changed = {name: column.copy() for name, column in columns.items()}
    changed["member_ends"][3:5] = (
        2**62 + 9,
        -(2**62) - 9,
    )  # the difference wraps to a positive number
    changed["member_ends"][5:8] = 10, 12, 14
    with pytest.raises(DataError, match="member_ends does not divide"):
        ShardIndex.from_bytes(encode(changed, metadata), "x.index")


def with_header(data: bytes, change: Callable[[Any], object]) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    other = change(header)
    header = header if other is None else other
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: [],
        lambda header: 7,
        lambda header: {"__metadata__": 3},
        lambda header: header.__delitem__("offsets"),
        lambda header: header.update(more=header["offsets"]),
        lambda header: header["offsets"].__delitem__("shape"),
        lambda header: header["offsets"].update(dtype="F64"),
        lambda header: header["offsets"].update(shape=[3, 3]),
        lambda header: header["offsets"].update(shape=[-9]),
        lambda header: header["offsets"].update(shape=[True]),
        lambda header: header["offsets"].update(data_offsets=[0.0, 72.0]),
        lambda header: header["crc32"].update(dtype=[]),
        lambda header: header["offsets"].update(data_offsets=header["extents"]["data_offsets"]),
        lambda header: header["offsets"].update(data_offsets=[0, 1 << 70]),
        lambda header: header.update(offsets=[]),
        lambda header: header["__metadata__"].__delitem__("sha256"),
        lambda header: header["__metadata__"].update(etag=7),
    ],
)
def test_a_header_that_is_not_ours(index: ShardIndex, change: Callable[[Any], object]) -> None:
    data = index.to_bytes()
    assert len(ShardIndex.from_bytes(with_header(data, lambda header: None), "x")) == 9
    with pytest.raises(DataError, match="not a shard index"):
        ShardIndex.from_bytes(with_header(data, change), "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        bytes(8),
        bytes(4096),
        b"\xff" * 4096,
        (5).to_bytes(8, "little") + b"{}",
        b"<html>" * 99,
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_other_files_are_no_index(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.index").write_bytes(data)
    with pytest.raises(DataError, match=r"x.index is not a shard index"):
        ShardIndex.open(tmp_path / "x.index")


def test_an_index_of_an_older_version_says_so() -> None:
    with pytest.raises(DataError, match=r"older version; make it again with `vlmoe data index`"):
        ShardIndex.from_bytes(b'{"version":1,"keys":["0"]}', "x.index")


def test_a_missing_index_and_one_of_another_hash(tmp_path: Path, index: ShardIndex) -> None:
    with pytest.raises(StorageError, match="No such file"):
        ShardIndex.open(tmp_path / "x.index")
    (tmp_path / "x.index").write_bytes(index.to_bytes())
    with pytest.raises(DataError, match=r"s3://b/x.index has SHA-256 .* expects 0000"):
        ShardIndex.open(tmp_path / "x.index", "s3://b/x.index", sha256="0" * 64)


def fuzz(index: ShardIndex, rounds: int, seed: int) -> int:
    """Damage an index in many ways; how many were believed. What is believed must be safe to
    use."""
    draw, whole, believed = random.Random(seed), index.to_bytes(), 0
    for _ in range(rounds):
        data = bytearray(whole)
        match draw.randrange(4):
            case 0:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 1:
                del data[draw.randrange(len(data)) :]
            case 2:
                start = draw.randrange(len(data))
                data[start : start + 8] = draw.choice([bytes(8), b"\xff" * 8, draw.randbytes(8)])
            case 3:
                start = draw.randrange(len(data))
                data[start:start] = draw.randbytes(draw.randrange(1, 64))
        try:
            found = ShardIndex.from_bytes(bytes(data), "x")
        except DataError:
            continue
        believed += 1
        assert len(found.keys) == len(found)
        for i in range(len(found)):
            offset, extent = int(found.offsets[i]), int(found.extents[i])
            assert 0 <= offset < offset + extent <= found.shard_bytes
            for extension, start, size in found.members(i):
                assert isinstance(extension, str) and 0 <= start <= start + size <= extent
            assert isinstance(found.key(i), str)
    return believed


def test_no_damage_leads_out_of_the_shard(index: ShardIndex) -> None:
    assert (
        0 < fuzz(index, 1500, seed=1) < 1500
    )  # a changed checksum or key is believed: the manifest's hash is not


@pytest.mark.long
def test_no_damage_leads_out_of_the_shard_for_long(index: ShardIndex) -> None:
    assert 0 < fuzz(index, 60_000, seed=2) < 60_000
