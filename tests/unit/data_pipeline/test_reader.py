"""Reading samples of shards on this machine: what was written comes back, and every damaged byte is
noticed."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.reading.reader import Reader
from data_pipeline.reading.store import ShardStore
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.writer import write_shards
from tests.support.small_shards import make_shards, samples


def test_samples_come_back_in_any_order(tmp_path: Path) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=20)]))
    expected, numbers = list(samples(20)), [19, 0, 7, 6, 13, 0]
    found = reader.read_many([(number // 7, number % 7) for number in numbers])
    for number, raw in zip(numbers, found, strict=True):
        assert isinstance(raw, RawSample)
        assert (raw.shard, raw.key) == (f"shard-{number // 7:06d}.tar", f"{number:05d}")
        assert raw.members == {
            "png": expected[number]["png"],
            "txt": str(expected[number]["txt"]).encode(),
        }
        assert list(raw.members) == ["png", "txt"]
        assert reader.name(number // 7, number % 7) == (raw.shard, raw.key)
        assert reader.read(number // 7, number % 7) == raw
    assert reader.read_many([]) == []


def test_names_of_members(tmp_path: Path) -> None:
    write_shards([{"__key__": "a.b/c/ü", "seg.PNG": b"s", "txt": "t", "json": {"x": 1}}], tmp_path)
    raw = Reader(ShardStore([load_manifest(tmp_path)])).read(0, 0)
    assert raw.key == "a.b/c/ü"
    assert raw.members == {"json": b'{"x": 1}', "seg.png": b"s", "txt": b"t"}


def test_a_flipped_bit_is_noticed_in_that_sample_only(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=3)
    path = tmp_path / "shard-000000.tar"
    index = ShardStore([manifest]).open(0).index
    good, first, last = (
        path.read_bytes(),
        int(index.offsets[1]),
        int(index.offsets[1] + index.extents[1]),
    )
    for place in [first, first + 200, first + 512, first + 600, last - 600, last - 1]:
        data = bytearray(good)
        data[place] ^= 0x10
        path.write_bytes(data)
        reader = Reader(ShardStore([manifest]))
        before, bad, after = reader.read_many([(0, 0), (0, 1), (0, 2)])
        assert isinstance(bad, SampleProblem)
        assert (bad.shard, bad.key, bad.reason) == ("shard-000000.tar", "00001", "crc-mismatch")
        assert (
            bad.detail.startswith("CRC-32 ")
            and f"at byte {first}, but the index expects" in bad.detail
        )
        assert isinstance(before, RawSample) and isinstance(after, RawSample)
        assert (before.key, after.key) == ("00000", "00002")
        with pytest.raises(DataError) as error:
            reader.read(0, 1)
        assert error.value.slug == "crc-mismatch"


def test_a_shard_cut_while_it_is_open(tmp_path: Path) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=3)]))
    reader.read(0, 0)
    os.truncate(tmp_path / "shard-000000.tar", 5000)
    found = reader.read_many([(0, 0), (0, 2)])
    assert [getattr(one, "reason", "") for one in found] == ["", "truncated"]
    assert " bytes at byte " in found[1].detail


def test_a_huge_sample_is_not_read(tmp_path: Path) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=3)]), max_sample_bytes=1000)
    with pytest.raises(DataError, match=r"has \d+ bytes, more than 1000") as error:
        reader.read(0, 0)
    assert error.value.slug == "oversize"


def test_troubles_of_whole_shards_are_those_of_their_samples(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=28)
    (tmp_path / manifest.shards[1].name).unlink()
    (tmp_path / manifest.shards[2].index).write_bytes(b"rubbish")
    (tmp_path / manifest.shards[3].index).unlink()
    reader = Reader(ShardStore([manifest]))
    found = reader.read_many([(0, 3), (1, 2), (2, 0), (0, 4), (3, 5)])
    assert [getattr(one, "reason", "") for one in found] == [
        "",
        "missing-shard",
        "bad-index",
        "",
        "bad-index",
    ]
    assert (found[1].shard, found[1].key) == ("shard-000001.tar", "#2")
    assert "shard-000001.tar is missing; copy it again" in found[1].detail
    assert reader.name(1, 2) == ("shard-000001.tar", "#2")


def test_a_shard_that_comes_back_is_read_again(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=7)
    path = tmp_path / "shard-000000.tar"
    path.rename(tmp_path / "away")
    reader = Reader(ShardStore([manifest]))
    assert isinstance(reader.read_many([(0, 0)])[0], SampleProblem)
    (tmp_path / "away").rename(path)
    assert reader.read(0, 0).key == "00000"


def test_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=7)]))

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken)
        (bad,) = reader.read_many([(0, 1)])
    assert isinstance(bad, SampleProblem)
    assert bad.reason == "unreachable" and "Input/output error" in bad.detail
    assert reader.read(0, 1).key == "00001"


def test_few_open_files_are_enough(tmp_path: Path) -> None:
    """A process that may open fewer files than the window has shards goes on with those."""
    manifest = make_shards(tmp_path, count=80, samples_per_shard=2)
    reader = Reader(ShardStore([manifest]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
    try:
        found = reader.read_many([(shard, 1) for shard in range(40)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [getattr(one, "key", "") for one in found] == [
        f"{2 * shard + 1:05d}" for shard in range(40)
    ]


def test_memory_does_not_grow_with_what_is_read(tmp_path: Path) -> None:
    """Reading 100 MB through a small set of open shards leaves the process as large as it was."""
    pixels = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes()
    write_shards(
        ({"__key__": str(number), "bin": pixels} for number in range(400)),
        tmp_path,
        samples_per_shard=50,
    )
    reader, order = Reader(ShardStore([load_manifest(tmp_path)], max_open=3)), random.Random(0)
    refs = [(shard, i) for shard in range(8) for i in range(50)]

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def one_pass() -> None:
        order.shuffle(refs)
        for start in range(0, len(refs), 20):
            assert all(
                isinstance(one, RawSample) for one in reader.read_many(refs[start : start + 20])
            )

    one_pass()
    before = resident()
    for _ in range(5):
        one_pass()
    assert resident() - before < 8 << 20
