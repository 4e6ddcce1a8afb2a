"""The second count of `vlmoe data check`: files that the index or the manifest lacks are found."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.preparing.check import check
from data_pipeline.preparing.second_count import count_members
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.scan import index_shard
from data_pipeline.shards.shard_index import ShardIndex
from tests.support.corruption import flip_bit, sample_offset, shard_path
from tests.support.data_commands import run_data_command
from tests.support.small_shards import make_png, make_shards

ODD_MEMBERS = ("./.DS_Store", "__MACOSX__/x.jpg", "README", "a.", "._0.jpg", "d/.e/f")


def write_tar(
    path: Path, format: int, samples: int = 3, odd: tuple[str, ...] = ODD_MEMBERS
) -> None:
    with tarfile.open(path, "w", format=format) as archive:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        label = tarfile.TarInfo("volume")
        label.type = b"V"
        archive.addfile(label)
        names = [f"d/{i}.{end}" for i in range(samples) for end in ("PNG", "en.txt", "json")]
        names += [f"{'x' * 120}/日本.jpg", f"{'x' * 120}/日本.txt"]
        for name in [*odd[:3], *names, *odd[3:]]:
            content = make_png(1) if name.lower().endswith(("png", "jpg")) else b'{"a": 1}'
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_of_a_tar_is_in_one_count(format: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, format)
    with path.open("rb") as file:
        count = count_members(file, index_shard(path))
    assert count.in_samples == 11 and not count.problems
    assert count.ignored == {
        "folder": 1,
        "volume label": 1,
        "hidden file": 2,
        "reserved name": 1,
        "no extension": 3,
    }
    with tarfile.open(path) as archive:
        assert count.in_samples + count.ignored.total() == len(archive.getmembers())


def test_both_counts_have_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    names = [f"{base}.jpg" for base in ("a", "__a", "__/a", "____/b", "__a__", "_a__/b")]
    names += ["__meta__/x", "__meta__/x.", "__meta__/.x", "__meta__/x.jpg", "a__/x", "./__b__/x"]
    names += ["", "x.", ".", "d/.", "...", ".a.jpg", "README", "__README__"]
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            archive.addfile(tarfile.TarInfo(f"{name}" or f"n{number}"))
        for kind in (b"5", b"D", b"V"):
            for name in ("f", "f.jpg", "__f__/x.jpg", ".f"):
                member = tarfile.TarInfo(name)
                member.type = kind
                archive.addfile(member)
    index = index_shard(path)
    with path.open("rb") as file:
        count = count_members(file, index)
    assert not count.problems
    assert count.ignored == index.ignored and count.in_samples == len(index)


def test_an_index_of_another_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", tarfile.PAX_FORMAT)
    write_tar(tmp_path / "b.tar", tarfile.PAX_FORMAT, samples=4)
    indices = [index_shard(tmp_path / name) for name in ("a.tar", "b.tar")]
    with (tmp_path / "b.tar").open("rb") as file:
        reasons = [reason for reason, _ in count_members(file, indices[0]).problems]
        file.seek(0)
        assert not count_members(file, indices[1]).problems
    assert reasons == ["not-in-index", "not-in-shard"]


def without_sample(index: ShardIndex, manifest: Manifest) -> bytes:
    """The index without its last sample, as a defect of the code that makes it would leave it."""
    from data_pipeline.shards.shard_index import SampleRow

    rows = [
        SampleRow(
            index.key(i),
            int(index.offsets[i]),
            int(index.extents[i]),
            int(index.crc32[i]),
            index.members(i),
        )
        for i in range(len(index) - 1)
    ]
    return ShardIndex.build(
        rows, shard_bytes=index.shard_bytes, sha256=manifest.shards[0].sha256
    ).to_bytes()


def test_a_sample_that_the_index_lost_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_shards(tmp_path, count=5, samples_per_shard=5)
    path = shard_path(manifest, 0)
    whole = index_shard(path)
    lost = ShardIndex.from_bytes(without_sample(whole, manifest), "index")
    monkeypatch.setattr("data_pipeline.preparing.shard_access.load_index", lambda *_: lost)

    report = check([manifest])
    (finding,) = report.findings
    assert finding.reason == "not-in-index" and "00004.png" in finding.detail
    assert not check([manifest], count=False).findings
    assert run_data_command("check", tmp_path, "--workers", 0) == 1
    assert "not-in-index" in capsys.readouterr().out


def test_counts_are_printed_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shards"
    manifest = make_shards(folder, count=12, samples_per_shard=4)
    report_path = tmp_path / "report.json"
    command = ("check", folder, "--workers", 0, "--json", report_path)
    assert run_data_command(*command) == 0
    files = 0
    for shard in range(3):
        with tarfile.open(shard_path(manifest, shard)) as archive:
            files += len(archive.getmembers())
    assert f"counted again: {files} files in samples, 0 ignored\n" in capsys.readouterr().out
    assert json.loads(report_path.read_text())["files_in_samples"] == files

    flip_bit(shard_path(manifest, 1), 700)
    (folder / "new.tar").write_bytes(b"")
    (folder / "below").mkdir()
    (folder / "below" / "a.tar").write_bytes(b"")
    make_shards(folder / "dataset", count=2)
    (folder / "skipped.jsonl").write_text("")
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden").write_text("x")
    assert run_data_command(*command) == 1
    output = capsys.readouterr().out
    assert f"counted again: {files * 2 // 3} files in samples" in output
    assert "not counted: 1 corrupt or salvaged shard" in output
    assert "new.tar: not-in-manifest: " in output
    assert f"below {folder}, there are 1 shard 'below/a.tar'; " in output
    assert f"`vlmoe data index '{folder}/**'` includes them" in output
    report = json.loads(report_path.read_text())
    reasons = [row["reason"] for row in report["findings"] if row["shard"] < 0]
    assert reasons == ["not-in-manifest"]
    assert report["folders"][0]["shards_not_in_manifest"] == ["new.tar"]
    assert f"{folder} has 1 other file (.txt 1)" in output

    assert run_data_command(*command, "--no-count") == 1
    assert "counted again" not in capsys.readouterr().out


def test_salvaged_shards_are_not_counted(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=4, samples_per_shard=4)
    flip_bit(shard_path(manifest, 0), sample_offset(manifest, 0, 1) + 3)  # in a header
    assert run_data_command("index", tmp_path, "--salvage") == 0
    manifest = load_manifest(tmp_path)
    report = check([manifest])
    assert not report.findings and (report.not_counted, report.files.in_samples) == (1, 0)
    # The same shard with a manifest that calls it whole; tarfile ends at the corrupt header.
    entry = replace(manifest.shards[0], corruption="")
    report = check([replace(manifest, shards=(entry,))])
    assert [finding.reason for finding in report.findings] == ["not-in-shard"]
