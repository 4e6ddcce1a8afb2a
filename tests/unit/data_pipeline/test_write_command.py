from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.preparing.visit import opened, tasks_of
from data_pipeline.samples import RawSample
from data_pipeline.shards.manifest import Manifest, load_manifest
from tests.support.data_commands import data
from tests.support.small_shards import caption, picture


def make_source(folder: Path, count: int = 23) -> Path:
    """A table of pictures; returns the CSV file."""
    (folder / "pics").mkdir(parents=True)
    lines = ["image,caption,score"]
    for number in range(count):
        (folder / "pics" / f"p.{number:02d}.png").write_bytes(picture(number))
        lines.append(f"pics/p.{number:02d}.png,{caption(number)},{number}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def contents(manifest: Manifest) -> list[RawSample]:
    found = []
    for task in tasks_of([manifest]):
        with opened(task) as shard:
            found += [raw for _, raw in shard.samples() if isinstance(raw, RawSample)]
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_goes_in_comes_out_in_balanced_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_source(tmp_path)
    assert (
        data(
            "write",
            "csv",
            table,
            "--out",
            tmp_path / "out",
            "--samples-per-shard",
            10,
            "--workers",
            0,
        )
        == 0
    )
    assert "3 shards, 23 samples" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert [entry.samples for entry in manifest.shards] == [7, 8, 8]
    for number, raw in enumerate(contents(manifest)):
        assert raw.key == f"pics/p_{number:02d}"
        assert raw.members == {
            "json": json.dumps({"score": number}).encode(),
            "png": picture(number),
            "txt": caption(number).encode(),
        }


def test_any_way_of_writing_gives_the_same_bytes(tmp_path: Path) -> None:
    table, options = make_source(tmp_path), ("--samples-per-shard", 5, "--prefix", "train")
    data("write", "csv", table, "--out", tmp_path / "one", *options, "--workers", 0)
    data("write", "csv", table, "--out", tmp_path / "two", *options, "--workers", 2)
    for part in (2, 0, 1):
        data(
            "write",
            "csv",
            table,
            "--out",
            tmp_path / "parts",
            *options,
            "--workers",
            0,
            "--part",
            f"{part}/3",
        )
        assert not (tmp_path / "parts" / "manifest.json").exists()
    data("write", "csv", table, "--out", tmp_path / "parts", *options, "--workers", 0)
    expected = bytes_of(tmp_path / "one")
    assert len(expected) == 2 * 5 + 1
    assert bytes_of(tmp_path / "two") == expected
    assert bytes_of(tmp_path / "parts") == expected


def test_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = make_source(tmp_path), tmp_path / "out"
    line = ("write", "csv", table, "--out", out, "--samples-per-shard", 8, "--workers", 0)
    data(*line)
    expected = bytes_of(out)
    (out / "manifest.json").unlink()
    (out / "shard-000001.tar").write_bytes(b"half")
    (out / "shard-000002.tar.index").unlink()
    capsys.readouterr()
    data(*line)
    assert "3 shards, 1 of them already there" in capsys.readouterr().out
    assert bytes_of(out) == expected

    # One caption changes: its shard is written again, the others are not.
    table.write_text(table.read_text().replace(caption(0), "another caption"))
    data(*line)
    assert "2 of them already there" in capsys.readouterr().out
    assert contents(load_manifest(out))[0].members["txt"] == b"another caption"


def test_what_becomes_no_sample_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = make_source(tmp_path), tmp_path / "out"
    (tmp_path / "pics" / "p.03.png").unlink()
    (tmp_path / "pics" / "p.04.png").write_bytes(b"<html>")
    (tmp_path / "pics" / "p.05.png").write_bytes(picture(5)[:200])
    (tmp_path / "pics" / "p.06.png").write_bytes(b"")
    table.write_text(table.read_text() + "pics/p.01.png,,5\n")
    line = ("write", "csv", table, "--out", out, "--samples-per-shard", 8, "--workers", 0)
    with pytest.raises(
        DataError, match=r"1 of the source's 24 pairs.*--max-left-out 0.01.*no-caption 1"
    ):
        data(*line)
    assert not (out / "manifest.json").exists()
    data(*line, "--max-left-out", 0.3)
    # Without decoding, half a picture still looks like one.
    assert load_manifest(out).about["left_out"] == {
        "missing-picture": 1,
        "no-caption": 1,
        "no-picture": 2,
    }
    data(*line, "--max-left-out", 0.3, "--decode")
    assert "bad-image" in capsys.readouterr().out
    left = [json.loads(line) for line in (out / "left-out.jsonl").read_text().splitlines()]
    assert sorted((row["reason"], row["origin"]) for row in left) == [
        ("bad-image", "pairs.csv line 7"),
        ("missing-picture", "pairs.csv line 5"),
        ("no-caption", "pairs.csv line 25"),
        ("no-picture", "pairs.csv line 6"),
        ("no-picture", "pairs.csv line 8"),
    ]
    keys = [raw.key for raw in contents(load_manifest(out))]
    assert keys == [f"pics/p_{number:02d}" for number in range(23) if number not in (3, 4, 5, 6)]

    # Mended, and nothing is left out any more.
    for number in (3, 4, 5, 6):
        (tmp_path / "pics" / f"p.{number:02d}.png").write_bytes(picture(number))
    shutil.rmtree(out / ".parts")
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    data(*line)
    assert len(contents(load_manifest(out))) == 23
    assert (out / "left-out.jsonl").read_text() == ""


def test_shards_of_an_earlier_write_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table, out = make_source(tmp_path), tmp_path / "out"
    line = ("write", "csv", table, "--out", out, "--workers", 0, "--samples-per-shard")
    data(*line, 5)
    assert "other shards" not in caplog.text
    data(*line, 10)
    assert "holds 2 other shards, such as shard-000003.tar" in caplog.text


def test_a_shard_of_which_nothing_is_left_is_passed_over(tmp_path: Path) -> None:
    table, out = make_source(tmp_path, 6), tmp_path / "out"
    for number in (2, 3):
        (tmp_path / "pics" / f"p.{number:02d}.png").unlink()
    line = (
        "write",
        "csv",
        table,
        "--out",
        out,
        "--samples-per-shard",
        2,
        "--workers",
        0,
        "--max-left-out",
    )
    data(*line, 0.5)
    assert [entry.name for entry in load_manifest(out).shards] == [
        "shard-000000.tar",
        "shard-000002.tar",
    ]
    shutil.rmtree(tmp_path / "pics")
    shutil.rmtree(out)
    with pytest.raises(DataError, match="no sample was left to write"):
        data(*line, 1)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    table = make_source(tmp_path, 2)
    for more, message in (
        (["--part", "2/2"], "give I/N with I from 0 to N - 1"),
        (["--samples-per-shard", "0"], "must be at least 1"),
        (["--max-left-out", "2"], r"must lie in 0\.\.1"),
        (["--delimiter", "ab"], "give one character"),
        (["--workers", "-1"], "must be 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            data("write", "csv", table, "--out", tmp_path / "out", *more)
    with pytest.raises(ConfigError, match="coco needs --images"):
        data("write", "coco", table, "--out", tmp_path / "out")


def test_another_dataset_is_not_written_over(tmp_path: Path) -> None:
    for name, count in (("first", 3), ("second", 4)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.png").write_bytes(picture(number))
            (folder / f"{number}.txt").write_text(f"caption {number}")
    out = tmp_path / "out"
    data("write", "folder", tmp_path / "first", "--out", out, "--workers", 0)
    data(
        "write", "folder", tmp_path / "first", "--out", out, "--workers", 0
    )  # the same again is welcome
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(
        DataError, match=r"holds a dataset that was made of something else \(1 shards, 3 samples\)"
    ):
        data("write", "folder", tmp_path / "second", "--out", out, "--workers", 0)
    assert (out / "manifest.json").read_bytes() == before
    data("write", "folder", tmp_path / "second", "--out", out, "--workers", 0, "--overwrite")
    assert load_manifest(out).total_samples == 4
