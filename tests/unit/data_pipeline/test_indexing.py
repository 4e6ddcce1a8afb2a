"""Indexing shards: which ones, where the results go, what is kept, and what is said about
damage."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards import index_one as one_shard
from data_pipeline.shards import indexing, patterns
from data_pipeline.shards.indexing import count_shards, index_shards
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest, load_index, load_manifest
from data_pipeline.shards.patterns import expand
from data_pipeline.shards.scan import index_shard
from tests.support.small_shards import make_shards


@pytest.fixture
def written(tmp_path: Path) -> Manifest:
    """Three shards of 7 samples without manifest or indices."""
    manifest = make_shards(tmp_path / "data", count=21)
    bare(tmp_path / "data")
    return manifest


def bare(folder: Path) -> None:
    for file in [*folder.rglob("*.json"), *folder.rglob("*.index")]:
        file.unlink()


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are read from end to end."""
    names: list[str] = []
    real = one_shard.scan

    def scan(pieces, total_bytes, where, **more):  # type: ignore[no-untyped-def]
        names.append(Path(where).name)
        return real(pieces, total_bytes, where, **more)

    monkeypatch.setattr(one_shard, "scan", scan)
    return names


# --- which shards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["folder", "wildcard", "braces", "list", "list file"])
def test_indexing_the_shards_of_others(tmp_path: Path, written: Manifest, how: str) -> None:
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


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "a/0.tar",
        "a/1.tar",
        "a/1.parquet",
        "b/c/2.tar",
        "b/2_stats.json",
        "x.tar/3.tar",
        "odd.bin",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a/0.tar\n@two.txt\n")
    (tmp_path / "two.txt").write_text("b/**/*.tar\na\n")
    assert expand(["a"]) == expand(["a/"]) == ["a/0.tar", "a/1.tar"]
    assert expand(["{b/c,a}"]) == ["b/c/2.tar", "a/0.tar", "a/1.tar"]
    assert expand(["b/**"]) == ["b/c/2.tar"]
    assert expand(["**/*.tar"]) == ["a/0.tar", "a/1.tar", "b/c/2.tar", "x.tar", "x.tar/3.tar"]
    assert expand(["x.tar"]) == ["x.tar/3.tar"] and expand(["odd.bin"]) == ["odd.bin"]
    assert expand(["a/1.tar", "a", "a/?.tar"]) == ["a/1.tar", "a/0.tar"]
    assert expand(["@one.txt"]) == ["a/0.tar", "b/c/2.tar", "a/1.tar"]
    assert expand(["s3://b/{0..2}.tar"]) == ["s3://b/0.tar", "s3://b/1.tar", "s3://b/2.tar"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/x-{0..3.tar", r"its braces do not close"),
        ("none*.tar", "no shards at"),
        ("b", r"FOLDER/\*\*"),
        ("missing", "No such file"),
        ("@loop.txt", "do they name each other"),
        ("@empty.txt", "lists no shards"),
        ("@binary.txt", "is not text"),
        ("@missing.txt", "No such file"),
        ("https://h/x.tar?sig=SECRET", "cannot stand"),
        ("s3://b*/x.tar", "cannot stand for a bucket"),
        ("pipe:cat x.tar", "commands are never run"),
    ],
)
def test_patterns_that_mean_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (tmp_path / "b").mkdir()
    for name, content in (
        ("loop", b"@loop.txt"),
        ("empty", b"# nothing\n"),
        ("binary", b"\xff\xfe"),
    ):
        (tmp_path / f"{name}.txt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        expand([text])
    assert "SECRET" not in str(error.value)


NAMES = [
    "a/0.tar",
    "a/1.tar",
    "a/10.tar",
    "a/b/0.tar",
    "a/b/c/0.tar",
    "a/[x].tar",
    "other.txt",
    "a-0.tar",
]


@pytest.mark.parametrize(
    "pattern",
    [
        "a/*.tar",
        "a/?.tar",
        "**/0.tar",
        "a/**",
        "a/**/*.tar",
        "*/[01].tar",
        "a/[!0-9]*",
        "*/b/*",
        "a/[[]x].tar",
        "**",
        "a*",
        "a/1*.tar",
        "*/*/0.tar",
    ],
)
def test_wildcards_in_a_store_mean_what_they_mean_on_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    for name in NAMES:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"")

    def list_tree(folder: str) -> list[str]:
        prefix = folder.removeprefix("s3://bucket/") + "/"
        return sorted(
            f"x/{name}".removeprefix(prefix) for name in NAMES if f"x/{name}".startswith(prefix)
        )

    monkeypatch.setattr(patterns.storage, "list_tree", list_tree)
    monkeypatch.chdir(tmp_path)

    def found(prefix: str) -> list[str]:
        try:
            return [url.removeprefix(prefix) for url in expand([f"{prefix}x/{pattern}"])]
        except DataError:
            return []

    local = [name for name in found("") if os.path.isfile(name)]
    assert local == found("s3://bucket/") and (local or pattern == "a*")


# --- where the results go -------------------------------------------------------------------------


def test_indexing_sub_folders(tmp_path: Path) -> None:
    make_shards(tmp_path / "data" / "one")
    make_shards(tmp_path / "data" / "two")
    manifest = index_shards([f"{tmp_path}/data/one", f"{tmp_path}/data/two"], f"{tmp_path}/data")
    assert manifest.shards[0].name == "one/shard-000000.tar"
    assert manifest.base == manifest.url == f"{tmp_path}/data"
    assert load_index(manifest, manifest.shards[-1]).keys
    with pytest.raises(DataError, match="no shards at"):
        index_shards(f"{tmp_path}/data")


@pytest.mark.parametrize("names", [["data"], ["data/shard-000000.tar", "more/x.tar"]])
def test_results_elsewhere(tmp_path: Path, written: Manifest, names: list[str]) -> None:
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


def test_shards_may_be_named_from_here_and_from_the_root(
    tmp_path: Path, written: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "data")
    found = index_shards(
        [f"{tmp_path}/data/shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    )
    assert found.shards == written.shards
    found = index_shards("shard-000001.tar", "../out")
    assert load_manifest(tmp_path / "out").base == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("shards", "out", "message"),
    [
        (["s3://a/x.tar", "s3://b/x.tar"], "", "lie in different places"),
        (["s3://a/x.tar", "/x.tar"], "", "different"),
        (["https://h/x.tar"], "", "nothing can be written to https://h"),
        (["/x.tar"], "s3://b/m", "files of this machine"),
    ],
)
def test_places_that_do_not_go_together(shards: list[str], out: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        index_shards(shards, out)


def test_what_an_older_manifest_says_is_kept(tmp_path: Path) -> None:
    folder = str(tmp_path)
    make_shards(tmp_path)
    index_shards(folder, about={"license": "CC0"})
    assert index_shards(folder).about == {"license": "CC0"}
    assert index_shards(folder, about={}).about == {}
    (tmp_path / MANIFEST_NAME).write_text("[1]")
    assert index_shards(folder).about == {}


# --- several processes, parts, and going on -------------------------------------------------------


def test_processes_give_what_one_gives(
    tmp_path: Path, written: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_SMALL_BYTES", 0)
    assert index_shards(str(tmp_path / "data"), workers=2) == written


def test_parts_come_together(tmp_path: Path, written: Manifest, scans: list[str]) -> None:
    folder = str(tmp_path / "data")
    for number in (1, 0):
        part = index_shards(folder, part=(number, 2))
        assert part.shards == written.shards[number::2]
        assert not (tmp_path / "data" / MANIFEST_NAME).exists()
    assert index_shards(folder, part=(7, 8)).shards == ()
    assert len(scans) == 3
    assert index_shards(folder) == written and len(scans) == 3


def test_only_new_and_changed_shards_are_read_again(
    tmp_path: Path, written: Manifest, scans: list[str]
) -> None:
    folder, shard = tmp_path / "data", tmp_path / "data" / "shard-000001.tar"
    index_shards(str(folder))
    index_shards(str(folder))
    assert len(scans) == 3
    whole, index = shard.read_bytes(), Path(f"{shard}.index")

    def again() -> list[str]:
        scans.clear()
        assert index_shards(str(folder)).shards[1].samples in (6, 7)
        return scans

    times = index.stat().st_atime_ns, index.stat().st_mtime_ns
    shard.write_bytes(whole)  # the same bytes, written later
    os.utime(index, ns=times)
    os.utime(shard, ns=(times[0], times[1] + 1))
    assert again() == ["shard-000001.tar"]

    os.utime(shard, ns=(0, 0))  # other bytes of the same length and age
    make_shards(tmp_path / "other", count=7, first=900)
    other = (tmp_path / "other" / "shard-000000.tar").read_bytes()
    assert len(other) == len(whole)
    shard.write_bytes(other)
    os.utime(shard, ns=(0, 0))
    assert again() == ["shard-000001.tar"]

    index.write_bytes(index.read_bytes()[:-1])
    assert again() == ["shard-000001.tar"]
    index.unlink()
    assert again() == ["shard-000001.tar"]
    assert again() == []


def test_an_index_that_other_code_wrote_keeps_its_hash(tmp_path: Path, written: Manifest) -> None:
    index = index_shard(tmp_path / "data" / "shard-000000.tar").to_bytes()
    size = int.from_bytes(index[:8], "little")
    spaced = (size + 8).to_bytes(8, "little") + index[8 : 8 + size] + b" " * 8 + index[8 + size :]
    (tmp_path / "data" / "shard-000000.tar.index").write_bytes(spaced)
    manifest = index_shards(str(tmp_path / "data"))
    assert load_index(manifest, manifest.shards[0]).key(0) == "00000"
    assert manifest.shards[0].index_sha256 != written.shards[0].index_sha256


# --- damage ---------------------------------------------------------------------------------------


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def test_every_damaged_shard_is_named_and_the_others_are_done(
    tmp_path: Path, written: Manifest, scans: list[str]
) -> None:
    folder = tmp_path / "data"
    cut(folder / "shard-000000.tar", 3000)
    (folder / "shard-000002.tar").write_bytes(b"<html>not found</html>".ljust(1024, b"x"))
    with pytest.raises(DataError) as error:
        index_shards(str(folder))
    message = str(error.value)
    assert message.startswith("2 of 3 shards cannot be indexed:\n")
    assert "shard-000000.tar: the member at byte" in message
    assert "shard-000002.tar: at byte 0 there is no tar header" in message
    assert "--salvage" in message
    assert not (folder / MANIFEST_NAME).exists() and (folder / "shard-000001.tar.index").exists()
    scans.clear()
    manifest = index_shards(str(folder), salvage=True)
    assert scans == ["shard-000000.tar", "shard-000002.tar"]
    assert [shard.samples for shard in manifest.shards] == [1, 7, 0]
    assert [bool(shard.damage) for shard in manifest.shards] == [True, False, True]
    assert load_manifest(folder) == manifest
    assert load_index(manifest, manifest.shards[0]).keys == ["00000"]
    with pytest.raises(DataError, match="2 of 3"):  # what was salvaged is not taken for whole
        index_shards(str(folder))


def test_a_single_damaged_or_missing_shard(tmp_path: Path, written: Manifest) -> None:
    cut(tmp_path / "data" / "shard-000000.tar", 3000)
    with pytest.raises(DataError, match=r"shard-000000.tar.*cut off"):
        index_shards(str(tmp_path / "data" / "shard-000000.tar"))
    with pytest.raises(DataError, match=r"cannot read .*nothing.tar: No such file"):
        index_shards(str(tmp_path / "data" / "nothing.tar"))


def test_it_stops_early_where_nothing_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"20 of 500 shards cannot be indexed \(480 were not tried\)"
    ):
        index_shards(f"{tmp_path}/{{000..499}}.tar")


def tar_of(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return path


@pytest.mark.parametrize(
    ("names", "message", "saved"),
    [
        (["a.jpg", "b.jpg", "a.txt", "b.txt", "c.jpg", "c.txt"], "the key 'a' comes twice", ["c"]),
        (["a.txt", "a.txt", "b.txt"], "sample 'a' has two files with the same extension", ["b"]),
        (["README", "LICENSE"], "holds 2 files but no samples", []),
    ],
)
def test_shards_that_are_no_webdataset_shards(
    tmp_path: Path, names: list[str], message: str, saved: list[str]
) -> None:
    path = tar_of(tmp_path / "x.tar", names)
    with pytest.raises(DataError, match=message):
        index_shard(path)
    assert index_shard(path, salvage=True).keys == saved


# --- shards without a manifest --------------------------------------------------------------------


def test_counting_shards_at_the_start_of_a_run(
    tmp_path: Path, written: Manifest, scans: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shards, run = str(tmp_path / "data"), str(tmp_path / "run")
    cut(tmp_path / "data" / "shard-000002.tar", 9000)
    for rank in range(2):
        count_shards(shards, run, part=(rank, 2))
    assert (
        len(caplog.messages) == 2
        and "has no manifest" in caplog.messages[0]
        and "lost:" in caplog.messages[1]
    )
    assert "damage done before today looks like data" in caplog.text
    manifest = count_shards(shards, run)
    assert len(scans) == 3 and caplog.text.count("has no manifest") == 1
    assert [shard.samples for shard in manifest.shards] == [7, 7, 4]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        shard.name for shard in written.shards
    ]
    loaded = load_manifest(run)
    assert loaded == manifest and loaded.base == shards
    assert loaded.shards[:2] == written.shards[:2]

    make_shards(tmp_path / "new", count=7)  # a run that goes on keeps to its data
    shutil.move(tmp_path / "new" / "shard-000000.tar", tmp_path / "data" / "shard-000003.tar")
    assert count_shards(shards, run) == manifest and len(scans) == 3
    assert len(count_shards([f"{shards}/*.tar"], run).shards) == 4
