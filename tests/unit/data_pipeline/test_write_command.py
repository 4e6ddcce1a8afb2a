from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.preparing import shard_access
from data_pipeline.preparing.importers.load_samples import _make_sample
from data_pipeline.preparing.importers.records import Record
from data_pipeline.preparing.tasks import shard_tasks
from data_pipeline.samples import RawSample
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import Manifest, load_manifest
from tests.support.data_commands import run_data_command
from tests.support.small_shards import make_caption, make_png


def make_source(folder: Path, count: int = 23) -> Path:
    """Write images and a table of them; returns the CSV file."""
    (folder / "images").mkdir(parents=True)
    lines = ["image,caption,score"]
    for number in range(count):
        image_path(folder, number).write_bytes(make_png(number))
        lines.append(f"images/p.{number:02d}.png,{make_caption(number)},{number}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def image_path(folder: Path, number: int) -> Path:
    return folder / "images" / f"p.{number:02d}.png"


def write_csv(table: Path, out: Path, *options: str | float | Path) -> int:
    words = [str(option) for option in options]
    return run_data_command("write", "csv", table, "--out", out, "--workers", 0, *words)


def read_samples(manifest: Manifest) -> list[RawSample]:
    return [
        raw
        for task in shard_tasks([manifest])
        for _, raw in shard_access.read_samples(task)
        if isinstance(raw, RawSample)
    ]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_samples_match_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = make_source(tmp_path)
    assert write_csv(table, tmp_path / "out", "--samples-per-shard", 10) == 0
    assert "3 shards, 23 samples" in capsys.readouterr().out

    manifest = load_manifest(tmp_path / "out")
    assert [entry.samples for entry in manifest.shards] == [7, 8, 8]
    for number, raw in enumerate(read_samples(manifest)):
        assert raw.key == f"images/p_{number:02d}"
        assert raw.members == {
            "json": json.dumps({"score": number}).encode(),
            "png": make_png(number),
            "txt": make_caption(number).encode(),
        }


def test_bytes_do_not_depend_on_workers_and_parts(tmp_path: Path) -> None:
    table, options = make_source(tmp_path), ("--samples-per-shard", 5, "--prefix", "train")
    write_csv(table, tmp_path / "one", *options)
    run_data_command("write", "csv", table, "--out", tmp_path / "two", *options, "--workers", 2)
    for part in (2, 0, 1):
        write_csv(table, tmp_path / "parts", *options, "--part", f"{part}/3")
        assert not (tmp_path / "parts" / "manifest.json").exists()
    write_csv(table, tmp_path / "parts", *options)

    expected = read_files(tmp_path / "one")
    assert len(expected) == 2 * 5 + 1
    assert read_files(tmp_path / "two") == expected
    assert read_files(tmp_path / "parts") == expected


def test_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = make_source(tmp_path), tmp_path / "out"
    options = ("--samples-per-shard", 8)
    write_csv(table, out, *options)
    expected = read_files(out)
    (out / "manifest.json").unlink()
    (out / "shard-000001.tar").write_bytes(b"half")
    (out / "shard-000002.tar.index").unlink()
    capsys.readouterr()
    write_csv(table, out, *options)
    assert "3 shards, 1 of them already written" in capsys.readouterr().out
    assert read_files(out) == expected

    # One caption changes: only its shard is written again.
    table.write_text(table.read_text().replace(make_caption(0), "another caption"))
    write_csv(table, out, *options)
    assert "2 of them already written" in capsys.readouterr().out
    assert read_samples(load_manifest(out))[0].members["txt"] == b"another caption"


def make_invalid_source(folder: Path) -> Path:
    """A source whose images 3 to 6 are invalid, and whose last row has no caption."""
    table = make_source(folder)
    image_path(folder, 3).unlink()
    image_path(folder, 4).write_bytes(b"<html>")
    image_path(folder, 5).write_bytes(make_png(5)[:200])
    image_path(folder, 6).write_bytes(b"")
    table.write_text(table.read_text() + "images/p.01.png,,5\n")
    return table


def test_max_skipped_ratio(tmp_path: Path) -> None:
    table, out = make_invalid_source(tmp_path), tmp_path / "out"
    message = r"1 of 24 pairs.*--max-skipped-ratio 0.01.*no-caption 1"
    with pytest.raises(DataError, match=message):
        write_csv(table, out, "--samples-per-shard", 8)
    assert not (out / "manifest.json").exists()

    # The rejected row is listed although nothing was written.
    assert [row["origin"] for row in read_skipped(out / "skipped.jsonl")] == ["pairs.csv line 25"]

    # Without --decode, a truncated image is not detected.
    write_csv(table, out, "--samples-per-shard", 8, "--max-skipped-ratio", 0.3)
    assert load_manifest(out).metadata["skipped"] == {
        "missing-image": 1,
        "no-caption": 1,
        "not-an-image": 2,
    }


def read_skipped(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_skipped_rows_are_listed_before_the_error(tmp_path: Path) -> None:
    table, out = make_invalid_source(tmp_path), tmp_path / "out"
    options = ("--samples-per-shard", 5, "--max-skipped-ratio", 0.1)
    with pytest.raises(DataError, match=rf"--max-skipped-ratio 0.1 .* until now: {out}/skipped"):
        write_csv(table, out, *options)
    listed = [row["origin"] for row in read_skipped(out / "skipped.jsonl")]
    assert listed == [f"pairs.csv line {line}" for line in (25, 5, 6, 8)]

    # Parts do not replace each other's lists.
    with pytest.raises(DataError, match=r"\.parts/skipped-1-of-2\.jsonl"):
        write_csv(table, out, "--samples-per-shard", 5, "--part", "1/2", "--max-skipped-ratio", 0)
    assert len(read_skipped(out / "skipped.jsonl")) == 4
    assert len(read_skipped(out / ".parts" / "skipped-1-of-2.jsonl")) == 2


def test_a_failing_write_keeps_the_list_of_a_finished_dataset(tmp_path: Path) -> None:
    table, out = make_invalid_source(tmp_path), tmp_path / "out"
    write_csv(table, out, "--max-skipped-ratio", 0.3)
    before = (out / "skipped.jsonl").read_bytes()
    table.write_text(table.read_text() + "images/p.02.png,,5\n")
    with pytest.raises(DataError, match=rf"until now: {out}/\.parts/skipped\.jsonl"):
        write_csv(table, out)
    assert (out / "skipped.jsonl").read_bytes() == before
    assert len(read_skipped(out / ".parts" / "skipped.jsonl")) == 2


def test_counts_of_inputs_are_kept_for_the_same_shards_only(tmp_path: Path) -> None:
    table, out = make_invalid_source(tmp_path), tmp_path / "out"
    write_csv(table, out, "--samples-per-shard", 8, "--max-skipped-ratio", 0.3)
    metadata = dict(load_manifest(out).metadata)
    assert {"inputs", "skipped", "source_fingerprint"} <= set(metadata)
    index_shards(str(out))
    assert load_manifest(out).metadata == metadata
    (out / "shard-000001.tar").unlink()
    index_shards(str(out))
    del metadata["inputs"], metadata["skipped"]
    assert load_manifest(out).metadata == metadata


def test_list_of_a_source_without_samples(tmp_path: Path) -> None:
    (tmp_path / "no-captions.csv").write_text("image,caption\na.png,\nb.png,\n")
    (tmp_path / "no-images.csv").write_text("image,caption\na.png,x\nb.png,x\n")
    for name, ratio in (("no-captions", 0), ("no-images", 1)):
        out = tmp_path / name
        with pytest.raises(DataError, match=rf"until now: {out}/skipped.jsonl"):
            write_csv(tmp_path / f"{name}.csv", out, "--max-skipped-ratio", ratio)
        assert len(read_skipped(out / "skipped.jsonl")) == 2

    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"no-caption 2.*list cannot be written: cannot write"):
        write_csv(tmp_path / "no-captions.csv", tmp_path / "file" / "out")


def test_skipped_rows_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = make_invalid_source(tmp_path), tmp_path / "out"
    options = ("--samples-per-shard", 8, "--max-skipped-ratio", 0.3, "--decode")
    write_csv(table, out, *options)
    assert "corrupt-image" in capsys.readouterr().out
    rows = read_skipped(out / "skipped.jsonl")
    assert sorted((row["reason"], row["origin"]) for row in rows) == [
        ("corrupt-image", "pairs.csv line 7"),
        ("missing-image", "pairs.csv line 5"),
        ("no-caption", "pairs.csv line 25"),
        ("not-an-image", "pairs.csv line 6"),
        ("not-an-image", "pairs.csv line 8"),
    ]
    valid = [number for number in range(23) if number not in (3, 4, 5, 6)]
    keys = [raw.key for raw in read_samples(load_manifest(out))]
    assert keys == [f"images/p_{number:02d}" for number in valid]

    # After the images and the table are fixed, nothing is skipped.
    for number in (3, 4, 5, 6):
        image_path(tmp_path, number).write_bytes(make_png(number))
    shutil.rmtree(out / ".parts")
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    write_csv(table, out, "--samples-per-shard", 8)
    assert len(read_samples(load_manifest(out))) == 23
    assert (out / "skipped.jsonl").read_text() == ""


def test_shards_of_an_earlier_write_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table, out = make_source(tmp_path), tmp_path / "out"
    write_csv(table, out, "--samples-per-shard", 5)
    assert "not in its manifest" not in caplog.text
    write_csv(table, out, "--samples-per-shard", 10)
    assert "2 shards not in its manifest, such as shard-000003.tar" in caplog.text


def test_empty_shards_are_omitted(tmp_path: Path) -> None:
    table, out = make_source(tmp_path, 6), tmp_path / "out"
    for number in (2, 3):
        image_path(tmp_path, number).unlink()
    write_csv(table, out, "--samples-per-shard", 2, "--max-skipped-ratio", 0.5)
    names = [entry.name for entry in load_manifest(out).shards]
    assert names == ["shard-000000.tar", "shard-000002.tar"]

    shutil.rmtree(tmp_path / "images")
    shutil.rmtree(out)
    with pytest.raises(DataError, match=r"no sample to write.*missing-image 6"):
        write_csv(table, out, "--samples-per-shard", 2, "--max-skipped-ratio", 1)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--part", "2/2", "--part 2/2"),
        ("--samples-per-shard", "0", "--samples-per-shard 0: .*at least 1"),
        ("--max-skipped-ratio", "2", r"--max-skipped-ratio 2.0: .*0\.\.1"),
        ("--delimiter", "ab", "--delimiter 'ab': .*one character"),
        ("--workers", "-1", "--workers -1: .*0 or more"),
    ],
)
def test_invalid_options(tmp_path: Path, option: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_csv(make_source(tmp_path, 2), tmp_path / "out", option, value)


def test_coco_needs_an_image_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="coco needs --images"):
        run_data_command("write", "coco", tmp_path / "x.json", "--out", tmp_path / "out")


def test_another_dataset_is_not_overwritten(tmp_path: Path) -> None:
    for name, count in (("first", 3), ("second", 4)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.png").write_bytes(make_png(number))
            (folder / f"{number}.txt").write_text(f"caption {number}")
    out = tmp_path / "out"

    def write(name: str, *options: str) -> None:
        command = ("write", "folder", tmp_path / name, "--out", out, "--workers", 0)
        run_data_command(*command, *options)

    write("first")
    write("first")  # the same source may be written again
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"another source \(1 shard\).*--overwrite"):
        write("second")
    assert (out / "manifest.json").read_bytes() == before
    write("second", "--overwrite")
    assert load_manifest(out).total_samples == 4


@pytest.mark.parametrize("kind", ["folder", "csv", "coco", "flickr"])
def test_a_template_without_names_is_an_error(tmp_path: Path, kind: str) -> None:
    options = (kind, tmp_path, "--out", tmp_path / "out", "--template", "a {}")
    with pytest.raises(ConfigError, match=r"--template 'a \{\}' has no effect here"):
        run_data_command("write", *options)


def test_a_column_named_captions_is_kept_beside_several_captions() -> None:
    record = Record("k", "", ("one", "two"), {"captions": "third", "n": 1}, "row 1")
    sample = _make_sample(record, lambda: make_png(1), decode=False)
    assert isinstance(sample, dict)
    fields = {"captions": ["one", "two"], "source_captions": "third", "n": 1}
    assert sample["json"] == fields
