"""Patterns that name shards: folders, braces, wildcards and list files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards import patterns
from data_pipeline.shards.patterns import expand_patterns, find_shards


def test_expand_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert expand_patterns(["a"]) == expand_patterns(["a/"]) == ["a/0.tar", "a/1.tar"]
    assert expand_patterns(["{b/c,a}"]) == ["b/c/2.tar", "a/0.tar", "a/1.tar"]
    assert expand_patterns(["b/**"]) == ["b/c/2.tar"]
    assert expand_patterns(["**/*.tar"]) == [
        "a/0.tar",
        "a/1.tar",
        "b/c/2.tar",
        "x.tar",
        "x.tar/3.tar",
    ]
    assert expand_patterns(["x.tar"]) == ["x.tar/3.tar"] and expand_patterns(["odd.bin"]) == [
        "odd.bin"
    ]
    assert expand_patterns(["a/1.tar", "a", "a/?.tar"]) == ["a/1.tar", "a/0.tar"]
    assert expand_patterns(["@one.txt"]) == ["a/0.tar", "b/c/2.tar", "a/1.tar"]
    assert expand_patterns(["s3://b/{0..2}.tar"]) == [
        "s3://b/0.tar",
        "s3://b/1.tar",
        "s3://b/2.tar",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/x-{0..3.tar", "unbalanced braces"),
        ("none*.tar", "no shards at"),
        ("b", r"FOLDER/\*\*"),
        ("missing", "No such file"),
        ("@loop.txt", "@loop.txt: list files are nested"),
        ("@empty.txt", "lists no shards"),
        ("@binary.txt", "@binary.txt is not a list file"),
        ("@missing.txt", "No such file"),
        ("https://h/x.tar?sig=SECRET", "query must not be in a manifest"),
        ("s3://b*/x.tar", "the bucket cannot be a wildcard"),
        ("pipe:cat x.tar", "commands are never run"),
    ],
)
def test_invalid_patterns(
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
        expand_patterns([text])
    assert "SECRET" not in str(error.value)


def test_archives_of_other_kinds_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["0.tar", "1.tar.gz", "2.TAR", "3.tgz", "4.zip", "5.TAR.ZST", "._0.tar", "6.tar.index"]
    for name in [f"in/{name}" for name in names] + ["gz/a.tar.gz", "gz/b.gz"]:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    for pattern in ("in", "in/*", "in/**"):
        caplog.clear()
        assert expand_patterns([pattern]) == ["in/0.tar", "in/2.TAR"]
        assert caplog.messages[0].startswith(
            f"{pattern} has 4 compressed archives (.gz 1, .tgz 1, .zip 1, .zst 1), such as "
        )
        assert "decompress it with `gunzip`" in caplog.text and "1.tar.gz" in caplog.text
    caplog.clear()
    assert expand_patterns(["in/*.tar"]) == ["in/0.tar"] and not caplog.messages
    for pattern in ("gz", "gz/*.gz", "gz/**"):
        with pytest.raises(DataError, match=r"has 1 compressed archive .*a\.tar\.gz.*`gunzip`"):
            expand_patterns([pattern])
    for url in ("gz/a.tar.gz", "s3://b/a.tar.gz", "s3://b/A.TAR"):  # refused by content
        assert expand_patterns([url]) == [url]


def test_other_files_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("0.tar", "._0.tar", "a.txt", "b.zip", "c", "0.tar.index", "manifest.json"):
        Path("in", name).parent.mkdir(exist_ok=True)
        Path("in", name).touch()
    Path("in/x/y").mkdir(parents=True)
    counts = {"hidden file": 1, ".txt file": 1, ".zip file": 1, "other file": 1}
    assert find_shards(["in"]) == (["in/0.tar"], counts)
    assert find_shards(["in", "in/", "in/*"]) == (["in/0.tar"], counts)
    del counts["hidden file"]  # which wildcards do not match
    assert find_shards(["in/**"]) == (["in/0.tar"], counts)
    assert find_shards(["in/0.tar"]) == find_shards(["in/*.tar"]) == (["in/0.tar"], {})
    Path("in/0.tar").unlink()
    Path("in/b.zip").unlink()
    with pytest.raises(DataError, match=r"no shards at in \(ignored: .*hidden file 1"):
        find_shards(["in"])


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
def test_wildcards_in_a_store_match_as_on_disk(
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

    def expand(prefix: str) -> list[str]:
        try:
            return [url.removeprefix(prefix) for url in expand_patterns([f"{prefix}x/{pattern}"])]
        except DataError:
            return []

    local = [name for name in expand("") if os.path.isfile(name)]
    assert local == expand("s3://bucket/") and (local or pattern == "a*")
