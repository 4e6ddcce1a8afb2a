"""Writing shards: deterministic contents, resumption, and atomic writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.shards import writer
from data_pipeline.shards.manifest import load_index, load_manifest
from data_pipeline.shards.writer import Sample, write_shard, write_shards
from tests.support.small_shards import make_samples, make_shards


@dataclass(frozen=True)
class FromFile:
    """A sample whose image is read when it is written."""

    path: str
    number: int
    bytes: int = 0

    def load(self) -> Mapping[str, object]:
        return {
            "__key__": f"{self.number:05d}",
            "jpg": Path(self.path).read_bytes(),
            "txt": f"number {self.number}",
        }


@pytest.fixture
def lazy(tmp_path: Path) -> list[FromFile]:
    (tmp_path / "images").mkdir()
    samples = []
    for number in range(20):
        path = tmp_path / "images" / f"{number}.jpg"
        path.write_bytes(os.urandom(100 * (number + 1)))
        samples.append(FromFile(str(path), number, path.stat().st_size))
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", count=5)
    make_shards(tmp_path / "b", count=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_number_of_processes_has_no_effect(tmp_path: Path, lazy: list[FromFile]) -> None:
    one = write_shards(lazy, tmp_path / "one", samples_per_shard=6)
    write_shards([sample.load() for sample in lazy], tmp_path / "plain", samples_per_shard=6)
    write_shards(iter(lazy), tmp_path / "two", samples_per_shard=6, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "plain") == contents(tmp_path / "two")
    assert [shard.samples for shard in one.shards] == [6, 6, 6, 2]
    index = load_index(one, one.shards[3])
    member = index.members(1)[0]
    start = int(index.offsets[1]) + member.start
    data = (tmp_path / "one" / one.shards[3].name).read_bytes()
    assert data[start : start + member.size] == Path(lazy[19].path).read_bytes()


@pytest.mark.parametrize("kind", ["lazy", "plain"])
def test_bytes_per_shard(tmp_path: Path, lazy: list[FromFile], kind: str) -> None:
    samples: list[Sample] = list(lazy)
    if kind == "plain":
        samples = [{"__key__": str(n), "jpg": bytes(s.bytes)} for n, s in enumerate(lazy)]
    manifest = write_shards(samples, tmp_path / "out", samples_per_shard=8, bytes_per_shard=4000)
    expected, free, count = [], 4000, 0
    for sample in lazy:
        if count and (count == 8 or sample.bytes > free):
            expected.append(count)
            free, count = 4000, 0
        free, count = free - sample.bytes, count + 1
    assert [shard.samples for shard in manifest.shards] == [*expected, count]
    assert write_shards(samples, tmp_path / "tiny", bytes_per_shard=1).shards[7].samples == 1


def test_resume_after_interruption(
    tmp_path: Path, lazy: list[FromFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = [*lazy[:13], FromFile(str(tmp_path / "missing.jpg"), 13), *lazy[14:]]
    with pytest.raises(StorageError, match=r"shard-000002.tar: .*FromFile.*No such file"):
        write_shards(first, out, samples_per_shard=5, resume=True)
    assert sorted(contents(out)) == [
        f"shard-00000{number}.tar{end}" for number in range(2) for end in ("", ".index")
    ]
    written: list[str] = []

    def record_write(samples: object, folder: str, name: str, **options: str) -> object:
        written.append(name)
        return write_shard(samples, folder, name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write_shard", record_write)
    manifest = write_shards(lazy, out, samples_per_shard=5, resume=True)
    assert written == ["shard-000002.tar", "shard-000003.tar"]
    assert load_manifest(out) == manifest
    assert (
        write_shards(lazy, out, samples_per_shard=5, resume=True) == manifest and len(written) == 2
    )
    (out / "shard-000001.tar").write_bytes(b"short")
    assert write_shards(lazy, out, samples_per_shard=5, resume=True) == manifest
    assert written[2:] == ["shard-000001.tar"]
    write_shards(
        lazy[1:], out, samples_per_shard=5, resume=True
    )  # other samples: all shards are written
    assert len(written) == 7


def test_parts_give_the_same_shards(tmp_path: Path, lazy: list[FromFile]) -> None:
    reference = write_shards(lazy, tmp_path / "whole", samples_per_shard=3, resume=True)
    for number in (2, 0, 1):
        part = write_shards(lazy, tmp_path / "parts", samples_per_shard=3, part=(number, 3))
        assert part.shards == reference.shards[number::3]
        assert not (tmp_path / "parts" / "manifest.json").exists()
    write_shards(lazy, tmp_path / "parts", samples_per_shard=3, resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("key", ["a.b", "", "x/", 7, "__meta__/7", ".hidden", "a\0b", None])
def test_invalid_keys(tmp_path: Path, key: object) -> None:
    with pytest.raises(DataError, match=r"sample key .* is invalid"):
        write_shards([{"__key__": key, "txt": "x"}], tmp_path)
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a", ["jpg"]), ("a", ["txt"])], "sample 'a'.* same key as a neighbor"),
        ([("a", ["jpg"]), ("b", []), ("c", ["txt"])], "sample 'b' has no files"),
        ([("a", [])], "sample 'a' has no files"),
        ([("a", ["jpg"]), ("b", ["jpg"]), ("a", ["jpg"])], "the key 'a' occurs twice"),
        ([("a", ["jpg", "JPG"])], "two files with the same extension"),
    ],
)
def test_samples_that_would_not_be_read_back(
    tmp_path: Path, files: list[tuple[str, list[str]]], message: str
) -> None:
    samples = [{"__key__": key, **dict.fromkeys(extensions, b"x")} for key, extensions in files]
    with pytest.raises(DataError, match=message):
        write_shards(samples, tmp_path)
    assert not list(tmp_path.glob("*"))


def test_long_and_non_ascii_names(tmp_path: Path) -> None:
    keys = ["é/ü☃", "x" * 90, "folder/" * 30 + "y", "ж" * 120]
    manifest = write_shards(
        [{"__key__": key, "seg.png": b"p", "txt": key} for key in keys], tmp_path
    )
    assert load_index(manifest, manifest.shards[0]).keys == keys


def test_failed_rewrite_leaves_no_manifest(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with pytest.raises(DataError, match=r"sample 'bad': its .png is a object"):
        write_shards([*make_samples(2), {"__key__": "bad", "png": object()}], tmp_path)
    with pytest.raises(DataError, match="no manifest"):
        load_manifest(tmp_path)


def test_failed_shard_leaves_no_files(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, object]]:
        yield from make_samples(2)
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        write_shard(broken(), str(tmp_path), "sub/x.tar")
    assert not list((tmp_path / "sub").iterdir())
    assert write_shard([], str(tmp_path), "sub/x.tar").samples == 0


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        write_shards([], tmp_path)


def test_warning_of_older_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_shards(tmp_path, count=21)
    assert "older shards" not in caplog.text
    make_shards(tmp_path, count=7)
    assert "2 older shards, from shard-000001.tar on" in caplog.text


def test_encoding_of_members(tmp_path: Path) -> None:
    sample = {
        "__key__": "a",
        "json": {"é": [1]},
        "txt": "ü",
        "bin": memoryview(b"m"),
        "x.json": "text",
        "_skip": 1,
    }
    manifest = write_shards([sample], tmp_path)
    data = (tmp_path / manifest.shards[0].name).read_bytes()
    contents = {
        m.extension: data[m.start : m.start + m.size]
        for m in load_index(manifest, manifest.shards[0]).members(0)
    }
    expected = {"json": '{"é": [1]}', "txt": "ü", "bin": "m", "x.json": '"text"'}
    assert contents == {name: text.encode() for name, text in expected.items()}
