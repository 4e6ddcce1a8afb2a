"""`vlmoe data index` and `vlmoe data check` on archives of every layout: counts, or the error."""

from __future__ import annotations

import gzip
import io
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from tests.support.data_commands import run_data_command
from tests.support.small_shards import make_png

Files = list[tuple[str, bytes]]
PNG = make_png(1)
THREE = ("1 shard, 3 samples", "6 in samples, 0 ignored")
"""Counts of three pairs."""


def tar(files: Files, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive in which a name may occur several times."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as writer:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            writer.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pairs(count: int, prefix: str = "", image: str = "jpg", text: str = "txt") -> Files:
    return [
        file
        for i in range(count)
        for file in ((f"{prefix}{i}.{image}", PNG), (f"{prefix}{i}.{text}", b"a cat"))
    ]


def with_files_of_macos(files: Files) -> Files:
    extra = [(name.replace("./", "./._"), b"\0\5\26\7") for name, _ in files]
    both = [file for pair in zip(extra, files, strict=True) for file in pair]
    return [*both, ("./.DS_Store", b"x"), ("__MACOSX/._1.jpg", b"x")]


def apart(first: str, second: str, count: int = 5) -> Files:
    """All images, then all texts."""
    images = [(f"{first}{i}.jpg", PNG) for i in range(count)]
    return images + [(f"{second}{i}.txt", b"a cat") for i in range(count)]


def read_counts(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, *keys: str
) -> tuple[str, str, dict[str, int]]:
    """Shards and samples, files, and the unusable samples by reason; both commands count alike."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert run_data_command("index", folder) == 0
    files = next(line[7:] for line in caplog.messages if line.startswith("files: "))
    samples = capsys.readouterr().out.partition("manifest.json: ")[2].strip()
    status = run_data_command("check", folder, "--decode", "--workers", 0, *keys)
    output = capsys.readouterr().out
    findings = re.findall(r"^([a-z-]+) +(\d+) +0$", output, re.MULTILINE)
    assert f"counted again: {files.replace(' in', ' files in', 1)}\n" in output
    assert status == bool(findings)
    return samples, files, {reason: int(count) for reason, count in findings}


LAYOUTS: dict[str, tuple[list[Files], str, str, dict[str, int]]] = {
    # Name: shards, samples, files, number of unusable samples by reason.
    "two-folders": (
        [apart("images/", "captions/")],
        "1 shard, 10 samples",
        "10 in samples, 0 ignored",
        {"no-caption": 5, "no-image": 5},
    ),
    "across": (
        [[*pairs(5), ("last.jpg", PNG)], [("last.txt", b"a cat"), *pairs(3, "b")]],
        "2 shards, 10 samples",
        "18 in samples, 0 ignored",
        {"no-caption": 1, "no-image": 1},
    ),
    "macos": (
        [with_files_of_macos(pairs(4, "./"))],
        "1 shard, 4 samples",
        "8 in samples, 10 ignored (hidden file 10)",
        {},
    ),
    "capitals": (
        [[*pairs(3, image="JPG", text="TXT"), ("q.JpEg", PNG), ("q.txt", b"x")]],
        "1 shard, 4 samples",
        "8 in samples, 0 ignored",
        {},
    ),
    "caption-first": (
        [[(f"{i}.{end}", data) for i in range(3) for end, data in
          (("txt", b"a"), ("json", b'{"a": 1}'), ("webp", PNG))]],
        "1 shard, 3 samples",
        "9 in samples, 0 ignored",
        {},
    ),
    "keys-differ-in-case": (
        [[*pairs(1, "a"), *pairs(1, "A")]],
        "1 shard, 2 samples",
        "4 in samples, 0 ignored",
        {},
    ),
    "dots-in-names": (
        [[*pairs(2, "IMG.2023."), *pairs(1, "holiday v1.")]],
        "1 shard, 2 samples",
        "6 in samples, 0 ignored",
        {"several-samples": 1, "no-image": 1},
    ),
    "no-files": ([pairs(1), []], "2 shards, 1 sample", "2 in samples, 0 ignored", {}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_is_in_one_count(
    layout: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shards, samples, files, findings = LAYOUTS[layout]
    for i, members in enumerate(shards):
        (tmp_path / f"{i}.tar").write_bytes(tar(members))
    counts = read_counts(tmp_path, capsys, caplog)
    assert counts == (samples, files, findings)
    num_members = sum(map(len, shards))
    assert sum(map(int, re.findall(r"^\d+|\d+(?= ignored)", files))) == num_members


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["d" * 120, "日本 x" * 30, "é" * 3])
def test_long_names_and_unicode(
    format: int,
    folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "a.tar").write_bytes(tar(pairs(3, f"{folder}/"), format))
    assert read_counts(tmp_path, capsys, caplog) == (*THREE, {})


@pytest.mark.parametrize(
    ("ends", "options", "without", "hint"),
    [
        (("jpg", "caption"), ("--caption-key", "caption"), "no-caption", "use caption, add"),
        (("jpg", "json"), ("--caption-key", "json:caption"), "no-caption", "use json:FIELD, add"),
        (
            ("input.jpg", "outputs.txt"),
            ("--caption-key", "outputs.txt", "--image-key", "input.jpg"),
            "no-image",
            "use input.jpg, add",
        ),
    ],
)
@pytest.mark.parametrize(
    "text", [b'{"caption": ["a", "b", null, 3]}', b'\xef\xbb\xbf{"caption": "a"}']
)
def test_captions_and_images_under_other_keys(
    ends: tuple[str, str],
    options: tuple[str, ...],
    without: str,
    hint: str,
    text: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar(
            [(name, PNG if i % 2 == 0 else text) for i, (name, _) in enumerate(pairs(3, "", *ends))]
        )
    )
    assert read_counts(tmp_path, capsys, caplog) == (*THREE, {without: 3})
    run_data_command("check", tmp_path, "--decode", "--workers", 0)
    assert capsys.readouterr().out.count(hint) == 3
    assert read_counts(tmp_path, capsys, caplog, *options) == (*THREE, {})


PLAIN = tar(pairs(3))
END = PLAIN.rindex(b"a cat") + 512
"""Where the end-of-archive marker of `PLAIN` begins."""


def refused_archives() -> Iterator[tuple[str, bytes, str]]:
    yield "a.tar", tar(apart("", "")), "the key '0' occurs twice: .* sorted by name"
    yield "a.tar", tar([*pairs(3), *pairs(1)]), "the key '0' occurs twice"
    same = [("0.jpg", PNG), ("0.jpg", PNG), ("0.txt", b"a")]
    yield "a.tar", tar(same), "two files with the same extension, the second is '0.jpg'"
    yield "a.tar", PLAIN + PLAIN, "data after the end-of-archive marker.*two archives were joined"
    yield "a.tar", PLAIN + b"x" * 100, "data after the end-of-archive marker"
    yield "a.tar", b"", "ends after 0 bytes without an end-of-archive marker: it was truncated"
    yield "a.tar", PLAIN[:END], "ends after .* bytes without an end-of-archive marker"
    yield "a.tar", PLAIN[: END - 1], "the archive was truncated; copy or write it again"
    yield "a.tar", bytes(10240), "there is no sample in its 1 shard"
    yield "a.tar", tar([("__MACOSX/._1.jpg", b"x")]), "no samples .hidden file 1."
    yield "a.tar", gzip.compress(PLAIN), r"a\.tar is a \.gz archive, not a plain \.tar.*`gunzip`"
    yield "a.tar.gz", gzip.compress(PLAIN), r"1 compressed archive \(\.gz 1\).*`gunzip`"
    yield "a.tgz", gzip.compress(PLAIN), r"1 compressed archive \(\.tgz 1\).*`gunzip`"
    yield "a.zip", b"PK\3\4" + bytes(50), r"1 compressed archive \(\.zip 1\).*write its files as a"
    yield "a.txt", b"x", r"no shards at .* \(ignored: \.txt file 1\)"


@pytest.mark.parametrize(("name", "data", "message"), list(refused_archives()))
def test_refused_archives(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        run_data_command("index", tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_an_archive_may_end_with_one_block_of_zeros(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.tar").write_bytes(PLAIN[: END + 512])
    assert read_counts(tmp_path, capsys, caplog) == (*THREE, {})


def test_compressed_archives_beside_shards_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("0.tar", "1.tar.gz", "2.TAR", "3.tgz"):
        compress = name.endswith("gz")
        (tmp_path / name).write_bytes(gzip.compress(PLAIN) if compress else PLAIN)
    counts = read_counts(tmp_path, capsys, caplog)
    assert counts == ("2 shards, 6 samples", "12 in samples, 0 ignored", {})
    assert "has 2 compressed archives (.gz 1, .tgz 1)" in caplog.text
    assert "beside 2 shards: 2 files ignored (.gz file 1, .tgz file 1)" in caplog.text
