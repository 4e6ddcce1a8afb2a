"""Corrupt and untrusted index files are rejected, or safe to use."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.index_file import decode, encode
from data_pipeline.shards.scan import index_shard
from data_pipeline.shards.shard_index import ShardIndex
from tests.support.small_shards import make_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("shard")
    return index_shard(folder / make_shards(folder, count=9, samples_per_shard=9).shards[0].name)


Change = Callable[[dict[str, np.ndarray], dict[str, str]], None]


def set_value(name: str, at: int, value: int) -> Change:
    def change(columns: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        columns[name][at] = value

    return change


def set_metadata(name: str, value: str) -> Change:
    def change(columns: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        metadata[name] = value

    return change


BIG = 2**63 - 1
CHANGES: list[Change] = [
    set_value("offsets", 0, -512),
    set_value("offsets", 8, BIG),
    set_value("offsets", 3, 0),
    set_value("extents", 8, BIG),
    set_value("extents", 1, 0),
    set_value("extents", 2, -1),
    set_value("key_ends", 8, BIG),
    set_value("key_ends", 3, 0),
    set_value("key_ends", 0, -BIG),
    set_value("member_ends", 8, 19),
    set_value("member_ends", 4, BIG),
    set_value("member_ends", 4, -BIG),
    set_value("member_start", 5, BIG),
    set_value("member_start", 5, -1),
    set_value("member_size", 5, BIG),
    set_value("member_size", 5, -1),
    set_value("member_extension", 0, 2),
    set_metadata("samples", "8"),
    set_metadata("samples", "-9"),
    set_metadata("samples", "x"),
    set_metadata("samples", "9" * 5000),
    set_metadata("shard_bytes", "100"),
    set_metadata("shard_bytes", "-1"),
    set_metadata("shard_bytes", str(2**62)),
    set_metadata("version", "2"),
    set_metadata("extensions", "{}"),
    set_metadata("extensions", "[1, 2]"),
    set_metadata("extensions", "["),
    set_metadata("extensions", "[" * 99999),
    set_metadata("sha256", "../x"),
    set_metadata("sha256", "A" * 64),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_inconsistent_values_are_rejected(index: ShardIndex, number: int) -> None:
    columns, metadata = decode(index.to_bytes())
    changed = {name: column.copy() for name, column in columns.items()}
    CHANGES[number](changed, metadata)
    with pytest.raises(DataError, match=r"x.index is not a valid.*vlmoe data index") as error:
        ShardIndex.from_bytes(encode(changed, metadata), "x.index")
    assert error.value.slug == "corrupt-index"


def test_overflowing_columns_are_rejected(index: ShardIndex) -> None:
    columns, metadata = decode(index.to_bytes())
    changed = {name: column.copy() for name, column in columns.items()}
    # The difference overflows to a positive number.
    changed["member_ends"][3:5] = 2**62 + 9, -(2**62) - 9
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
def test_invalid_headers(index: ShardIndex, change: Callable[[Any], object]) -> None:
    data = index.to_bytes()
    assert len(ShardIndex.from_bytes(with_header(data, lambda header: None), "x")) == 9
    with pytest.raises(DataError, match=r"^x is not a valid shard index"):
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
def test_other_files_are_rejected(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.index").write_bytes(data)
    with pytest.raises(DataError, match=r"x.index is not a valid shard index"):
        ShardIndex.open(tmp_path / "x.index")


def test_index_of_an_older_version() -> None:
    with pytest.raises(DataError, match=r"x.index .*older version.*`vlmoe data index`"):
        ShardIndex.from_bytes(b'{"version":1,"keys":["0"]}', "x.index")


def fuzz(index: ShardIndex, rounds: int, seed: int) -> int:
    """Corrupt an index at random; returns how often it was accepted, after checking it then."""
    rng, data, accepted = random.Random(seed), index.to_bytes(), 0
    for _ in range(rounds):
        try:
            loaded = ShardIndex.from_bytes(corrupt_randomly(data, rng), "x")
        except DataError:
            continue
        accepted += 1
        assert len(loaded.keys) == len(loaded)
        for i in range(len(loaded)):
            offset, extent = int(loaded.offsets[i]), int(loaded.extents[i])
            assert 0 <= offset < offset + extent <= loaded.shard_bytes
            for extension, start, size in loaded.members(i):
                assert isinstance(extension, str) and 0 <= start <= start + size <= extent
            assert isinstance(loaded.key(i), str)
    return accepted


def corrupt_randomly(data: bytes, rng: random.Random) -> bytes:
    corrupt = bytearray(data)
    match rng.randrange(4):
        case 0:
            corrupt[rng.randrange(len(corrupt))] ^= 1 << rng.randrange(8)
        case 1:
            del corrupt[rng.randrange(len(corrupt)) :]
        case 2:
            start = rng.randrange(len(corrupt))
            corrupt[start : start + 8] = rng.choice([bytes(8), b"\xff" * 8, rng.randbytes(8)])
        case 3:
            start = rng.randrange(len(corrupt))
            corrupt[start:start] = rng.randbytes(rng.randrange(1, 64))
    return bytes(corrupt)


def test_fuzzed_index_stays_within_the_shard(index: ShardIndex) -> None:
    # A changed checksum or key is accepted here; the hash in the manifest detects it.
    assert 0 < fuzz(index, 1500, seed=1) < 1500


@pytest.mark.long
def test_fuzzed_index_stays_within_the_shard_long(index: ShardIndex) -> None:
    assert 0 < fuzz(index, 60_000, seed=2) < 60_000
