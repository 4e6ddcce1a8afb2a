"""Reading samples of local shards: contents are unchanged, and every corrupt byte is detected."""

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
from tests.support.results import problem_reasons, read_many, read_one
from tests.support.small_shards import make_samples, make_shards


def test_samples_in_any_order(tmp_path: Path) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=20)]))
    expected, ids = list(make_samples(20)), [19, 0, 7, 6, 13, 0]
    results = read_many(reader, [(i // 7, i % 7) for i in ids])
    for i, raw in zip(ids, results, strict=True):
        assert isinstance(raw, RawSample)
        assert (raw.shard, raw.key) == (f"shard-{i // 7:06d}.tar", f"{i:05d}")
        text = str(expected[i]["txt"]).encode()
        assert raw.members == {"png": expected[i]["png"], "txt": text}
        assert list(raw.members) == ["png", "txt"]
        assert read_one(reader, i // 7, i % 7) == raw
    assert read_many(reader, []) == []


def test_names_of_members(tmp_path: Path) -> None:
    write_shards([{"__key__": "a.b/c/ü", "seg.PNG": b"s", "txt": "t", "json": {"x": 1}}], tmp_path)
    raw = read_one(Reader(ShardStore([load_manifest(tmp_path)])), 0, 0)
    assert raw.key == "a.b/c/ü"
    assert raw.members == {"json": b'{"x": 1}', "seg.png": b"s", "txt": b"t"}


def test_flipped_bit_affects_one_sample_only(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=3)
    path = tmp_path / "shard-000000.tar"
    index = ShardStore([manifest]).open(0).index
    intact, first = path.read_bytes(), int(index.offsets[1])
    end = first + int(index.extents[1])
    for offset in [first, first + 200, first + 512, first + 600, end - 600, end - 1]:
        data = bytearray(intact)
        data[offset] ^= 0x10
        path.write_bytes(data)
        reader = Reader(ShardStore([manifest]))
        before, problem, after = read_many(reader, [(0, 0), (0, 1), (0, 2)])
        assert isinstance(problem, SampleProblem)
        assert (problem.shard, problem.key) == ("shard-000000.tar", "00001")
        assert problem.reason == "crc-mismatch"
        assert f"at byte {first}" in problem.detail
        assert f"{int(index.crc32[1]):08x}" in problem.detail
        assert isinstance(before, RawSample) and isinstance(after, RawSample)
        assert (before.key, after.key) == ("00000", "00002")
        with pytest.raises(DataError) as error:
            read_one(reader, 0, 1)
        assert error.value.slug == "crc-mismatch"


def test_shard_truncated_while_it_is_open(tmp_path: Path) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=3)]))
    read_one(reader, 0, 0)
    os.truncate(tmp_path / "shard-000000.tar", 5000)
    results = read_many(reader, [(0, 0), (0, 2)])
    assert problem_reasons(results) == ["", "truncated"]
    assert isinstance(results[1], SampleProblem) and " bytes at byte " in results[1].detail


def test_oversize_sample(tmp_path: Path) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=3)]), max_sample_bytes=1000)
    with pytest.raises(DataError, match=r"\d+ bytes, more than 1000") as error:
        read_one(reader, 0, 0)
    assert error.value.slug == "oversize"


def test_missing_shards_and_corrupt_indices(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=28)
    (tmp_path / manifest.shards[1].name).unlink()
    (tmp_path / manifest.shards[2].index).write_bytes(b"not an index")
    (tmp_path / manifest.shards[3].index).unlink()
    reader = Reader(ShardStore([manifest]))
    results = read_many(reader, [(0, 3), (1, 2), (2, 0), (0, 4), (3, 5)])
    assert problem_reasons(results) == ["", "missing-shard", "corrupt-index", "", "corrupt-index"]

    missing = results[1]
    assert isinstance(missing, SampleProblem)
    assert (missing.shard, missing.key) == ("shard-000001.tar", "#2")
    assert "shard-000001.tar is missing" in missing.detail


def test_restored_shard_is_read_again(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=7)
    path = tmp_path / "shard-000000.tar"
    path.rename(tmp_path / "moved")
    reader = Reader(ShardStore([manifest]))
    assert isinstance(read_many(reader, [(0, 0)])[0], SampleProblem)
    (tmp_path / "moved").rename(path)
    assert read_one(reader, 0, 0).key == "00000"


def test_input_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(ShardStore([make_shards(tmp_path, count=7)]))

    def fails(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fails)
        (problem,) = read_many(reader, [(0, 1)])
    assert isinstance(problem, SampleProblem)
    assert problem.reason == "unreachable" and "Input/output error" in problem.detail
    assert read_one(reader, 0, 1).key == "00001"


@pytest.mark.parametrize("method", ["read", "pread"])
def test_short_reads_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Network file systems may return fewer bytes than requested."""
    shard = ShardStore([make_shards(tmp_path, count=3)]).open(0)
    offset, count = shard.columns[0][1], shard.columns[1][1]
    pread, sizes = os.pread, list[int]()

    def short_read(fd: int, size: int, position: int) -> bytes:
        sizes.append(size)
        return pread(fd, min(size, 700), position)

    monkeypatch.setattr(os, "pread", short_read)
    data = shard.read(1) if method == "read" else shard.pread(count, offset)
    assert data == (tmp_path / "shard-000000.tar").read_bytes()[offset : offset + count]
    assert sizes == [2048, 1348, 648]


def test_low_limit_on_open_files(tmp_path: Path) -> None:
    """A process that may open fewer files than there are shards in the window."""
    manifest = make_shards(tmp_path, count=80, samples_per_shard=2)
    reader = Reader(ShardStore([manifest]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 30, hard))
    try:
        results = read_many(reader, [(shard, 1) for shard in range(40)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    keys = [result.key for result in results if isinstance(result, RawSample)]
    assert keys == [f"{2 * shard + 1:05d}" for shard in range(40)]


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Reading 100 MB with at most three open shards."""
    pixels = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes()
    write_shards(
        ({"__key__": str(i), "bin": pixels} for i in range(400)),
        tmp_path,
        samples_per_shard=50,
    )
    reader = Reader(ShardStore([load_manifest(tmp_path)], max_open=3))
    generator = random.Random(0)
    refs = [(shard, i) for shard in range(8) for i in range(50)]

    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def read_everything() -> None:
        generator.shuffle(refs)
        for start in range(0, len(refs), 20):
            results = read_many(reader, refs[start : start + 20])
            assert all(isinstance(result, RawSample) for result in results)

    read_everything()
    before = resident_bytes()
    for _ in range(5):
        read_everything()
    assert resident_bytes() - before < 8 << 20
