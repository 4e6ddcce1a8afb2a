"""Indexing shards: manifest location, processes and parts, reuse of indices, corrupt shards."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards import index_job, indexing
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest, load_index, load_manifest
from data_pipeline.shards.run_indexing import index_for_run
from data_pipeline.shards.scan import index_shard
from data_pipeline.shards.shard_index import ShardIndex
from tests.support.corruption import truncate
from tests.support.small_shards import make_shards
from tests.support.tar_archives import tar_of


@pytest.mark.parametrize("how", ["folder", "wildcard", "braces", "list", "list file"])
def test_shards_given_in_different_ways(tmp_path: Path, written: Manifest, how: str) -> None:
    base = tmp_path / "data"
    (tmp_path / "list.txt").write_text(
        f"# some\n{base}/shard-000000.tar\n\n  {base}/shard-00000[12].tar # rest\n"
    )
    given = {
        "folder": str(base),
        "wildcard": f"{base}/shard-*.tar",
        "braces": f"{base}/shard-{{000000..000002}}.tar",
        "list": [f"{base}/shard-00000{number}.tar" for number in range(3)],
        "list file": f"@{tmp_path}/list.txt",
    }[how]
    assert index_shards(given) == written == load_manifest(base)
    for shard in written.shards:
        assert load_index(written, shard).to_bytes() == index_shard(base / shard.name).to_bytes()


def test_sub_folders(tmp_path: Path) -> None:
    make_shards(tmp_path / "data" / "one")
    make_shards(tmp_path / "data" / "two")
    manifest = index_shards([f"{tmp_path}/data/one", f"{tmp_path}/data/two"], f"{tmp_path}/data")
    assert manifest.shards[0].name == "one/shard-000000.tar"
    assert manifest.base == manifest.url == f"{tmp_path}/data"
    assert load_index(manifest, manifest.shards[-1]).keys
    with pytest.raises(DataError, match="no shards at"):
        index_shards(f"{tmp_path}/data")


@pytest.mark.parametrize("names", [["data"], ["data/shard-000000.tar", "more/x.tar"]])
def test_manifest_in_another_folder(tmp_path: Path, written: Manifest, names: list[str]) -> None:
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "data" / "shard-000001.tar", tmp_path / "more" / "x.tar")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    index_shards([f"{tmp_path}/{name}" for name in names], str(out))
    assert [
        path for path in sorted(tmp_path.rglob("*")) if out not in (path, *path.parents)
    ] == before
    manifest = load_manifest(out)
    assert manifest.base == str(tmp_path / names[0] if len(names) == 1 else tmp_path)
    assert load_index(manifest, manifest.shards[1]).key(0) == "00007"
    for shard in manifest.shards:
        assert Path(manifest.shard_url(shard)).stat().st_size == shard.bytes


def test_relative_and_absolute_paths(
    tmp_path: Path, written: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "data")
    manifest = index_shards(
        [f"{tmp_path}/data/shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    )
    assert manifest.shards == written.shards
    index_shards("shard-000001.tar", "../out")
    assert load_manifest(tmp_path / "out").base == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("shards", "out", "message"),
    [
        (["s3://a/x.tar", "s3://b/x.tar"], "", "different buckets .*s3://a/x.tar, s3://b/x.tar"),
        (["s3://a/x.tar", "/x.tar"], "", "different buckets"),
        (["https://h/x.tar"], "", "cannot write to https://h.*--out"),
        (["/x.tar"], "s3://b/m", "local files.*s3://b/m"),
    ],
)
def test_shards_without_a_common_folder(shards: list[str], out: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        index_shards(shards, out)


def test_metadata_of_an_existing_manifest_is_kept(tmp_path: Path) -> None:
    folder = str(tmp_path)
    make_shards(tmp_path)
    index_shards(folder, metadata={"license": "CC0"})
    assert index_shards(folder).metadata == {"license": "CC0"}
    assert index_shards(folder, metadata={}).metadata == {}
    (tmp_path / MANIFEST_NAME).write_text("[1]")
    assert index_shards(folder).metadata == {}


def test_several_processes_give_the_same_manifest(
    tmp_path: Path, written: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_SMALL_BYTES", 0)
    assert index_shards(str(tmp_path / "data"), workers=2) == written


def test_parts_give_the_same_manifest(tmp_path: Path, written: Manifest, scans: list[str]) -> None:
    folder = str(tmp_path / "data")
    for number in (1, 0):
        part = index_shards(folder, part=(number, 2))
        assert part.shards == written.shards[number::2]
        assert not (tmp_path / "data" / MANIFEST_NAME).exists()
    assert index_shards(folder, part=(7, 8)).shards == ()
    assert len(scans) == 3
    assert index_shards(folder) == written and len(scans) == 3


def test_only_changed_shards_are_read_again(
    tmp_path: Path, written: Manifest, scans: list[str]
) -> None:
    folder, shard = tmp_path / "data", tmp_path / "data" / "shard-000001.tar"
    index_shards(str(folder))
    index_shards(str(folder))
    assert len(scans) == 3
    original, index = shard.read_bytes(), Path(f"{shard}.index")

    def index_again() -> list[str]:
        scans.clear()
        assert index_shards(str(folder)).shards[1].samples in (6, 7)
        return scans

    times = index.stat().st_atime_ns, index.stat().st_mtime_ns
    shard.write_bytes(original)  # the same bytes, written later
    os.utime(index, ns=times)
    os.utime(shard, ns=(times[0], times[1] + 1))
    assert index_again() == ["shard-000001.tar"]

    os.utime(shard, ns=(0, 0))  # other bytes of the same size and time
    make_shards(tmp_path / "other", count=7, first=900)
    other = (tmp_path / "other" / "shard-000000.tar").read_bytes()
    assert len(other) == len(original)
    shard.write_bytes(other)
    os.utime(shard, ns=(0, 0))
    assert index_again() == ["shard-000001.tar"]

    index.write_bytes(index.read_bytes()[:-1])
    assert index_again() == ["shard-000001.tar"]
    index.unlink()
    assert index_again() == ["shard-000001.tar"]
    assert index_again() == []


def test_old_index_of_a_sparse_archive_is_not_reused(tmp_path: Path, scans: list[str]) -> None:
    tar_of(tmp_path / "a.tar", ["GNUSparseFile.12/a.jpg", "b.jpg"])
    index_shards(str(tmp_path))
    index_shards(str(tmp_path))
    assert scans == ["a.tar", "a.tar"]


def test_index_with_other_bytes_keeps_its_hash(tmp_path: Path, written: Manifest) -> None:
    index = index_shard(tmp_path / "data" / "shard-000000.tar").to_bytes()
    size = int.from_bytes(index[:8], "little")
    spaced = (size + 8).to_bytes(8, "little") + index[8 : 8 + size] + b" " * 8 + index[8 + size :]
    (tmp_path / "data" / "shard-000000.tar.index").write_bytes(spaced)
    manifest = index_shards(str(tmp_path / "data"))
    assert load_index(manifest, manifest.shards[0]).key(0) == "00000"
    assert manifest.shards[0].index_sha256 != written.shards[0].index_sha256


def test_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tar_of(tmp_path / "a.TAR", ["a.jpg", "a.txt", "._a.jpg", "README"])
    tar_of(tmp_path / "b.tar", ["b.jpg", "b.txt", ".DS_Store"])
    tar_of(tmp_path / "c.tar", [])
    manifest = index_shards(str(tmp_path))
    assert [shard.name for shard in manifest.shards] == ["a.TAR", "b.tar", "c.tar"]
    assert "files: 4 in samples, 3 ignored (hidden file 2, no extension 1)" in caplog.messages
    assert f"without files: 1 shard; the first: {tmp_path}/c.tar" in caplog.messages

    tar_of(tmp_path / "b.tar", ["b.jpg", "b.txt", "x/.DS_Store"])
    os.utime(tmp_path / "b.tar", (2e9, 2e9))
    index_shards(str(tmp_path))
    assert caplog.messages[-1] == "files: 4 in samples, 3 ignored (hidden file 2, no extension 1)"


def test_counts_are_the_same_when_indices_are_reused(
    tmp_path: Path, scans: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tar_of(tmp_path / "a.tar", ["a.jpg", "a.txt", "README", "._a.jpg", "d/"])
    tar_of(tmp_path / "b.tar", ["b.jpg", "b.txt"])
    for name in ("._a.tar", ".hidden", "0.tar.gz", "stats.json", "README", "old.tar.index"):
        (tmp_path / name).touch()
    (tmp_path / "broken.tar").symlink_to("missing")
    (tmp_path / "folder").mkdir()
    counts = []
    for _ in range(2):
        caplog.clear()
        index_shards(str(tmp_path))
        counts.append([m for m in caplog.messages if m.startswith(("files:", "beside"))])
    assert scans == ["a.tar", "b.tar"]
    assert counts[0] == counts[1]
    assert counts[0] == [
        "files: 4 in samples, 3 ignored (folder 1, hidden file 1, no extension 1)",
        "beside 2 shards: 7 files ignored (hidden file 2, link to a missing file 1, .gz file 1, "
        "other file 1, .index file 1, .json file 1)",
    ]


def test_counts_are_only_stored_if_there_are_any(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", ["a.jpg", "a.txt", "._a.jpg"])
    tar_of(tmp_path / "b.tar", ["b.jpg", "b.txt"])
    with_counts, without = (index_shard(tmp_path / name) for name in ("a.tar", "b.tar"))
    assert b"ignored" in with_counts.to_bytes() and b"ignored" not in without.to_bytes()
    read = ShardIndex.from_bytes(with_counts.to_bytes(), "a")
    assert read.ignored == with_counts.ignored == {"hidden file": 1}
    with pytest.raises(DataError, match="numbers of ignored members"):
        ShardIndex.build([], shard_bytes=0, sha256="0" * 64, ignored={"folder": -1})


def test_indices_of_versions_that_did_not_count_ignored_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tar_of(tmp_path / "a.tar", ["a.jpg", "._a.txt", "a.txt"])
    index = replace(index_shard(tmp_path / "a.tar"), ignored={})
    (tmp_path / "a.tar.index").write_bytes(index.to_bytes())
    index_shards(str(tmp_path))
    assert caplog.messages[0] == "reused the existing index of 1 of 1 shards"
    assert caplog.messages[-1] == "files: 2 in samples, 1 ignored (hidden file 1)"

    monkeypatch.setattr(index_job, "_ignored_when_indexed", lambda *_: None)  # as in a store
    index_shards(str(tmp_path))
    assert caplog.messages[-1].endswith("0 ignored; ignored files not counted in 1 reused index")


def test_index_for_run(
    tmp_path: Path, written: Manifest, scans: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shards, run = str(tmp_path / "data"), str(tmp_path / "run")
    truncate(tmp_path / "data" / "shard-000002.tar", 9000)
    for rank in range(2):
        index_for_run(shards, run, part=(rank, 2))
    assert (
        len(caplog.messages) == 2
        and "has no manifest" in caplog.messages[0]
        and "lost:" in caplog.messages[1]
    )
    assert "vlmoe data index" in caplog.text
    manifest = index_for_run(shards, run)
    assert len(scans) == 3 and caplog.text.count("has no manifest") == 1
    assert [shard.samples for shard in manifest.shards] == [7, 7, 4]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        shard.name for shard in written.shards
    ]
    loaded = load_manifest(run)
    assert loaded == manifest and loaded.base == shards
    assert loaded.shards[:2] == written.shards[:2]

    make_shards(tmp_path / "new", count=7)  # a resumed run keeps its data
    shutil.move(tmp_path / "new" / "shard-000000.tar", tmp_path / "data" / "shard-000003.tar")
    assert index_for_run(shards, run) == manifest and len(scans) == 3
    assert len(index_for_run([f"{shards}/*.tar"], run).shards) == 4
