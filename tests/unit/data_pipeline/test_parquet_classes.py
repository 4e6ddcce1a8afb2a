"""Parquet files of Hugging Face datasets: classes, several caption columns, images by path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.load_samples import load_samples
from data_pipeline.preparing.importers.parquet import Parquet
from data_pipeline.preparing.importers.records import Record, SkippedRow
from data_pipeline.preparing.write import WritePlan, write_dataset
from tests.support.data_commands import run_data_command
from tests.support.small_shards import make_png

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CLASSES = {"names": ["tabby_cat", "hot-dog", "tree"], "_type": "ClassLabel"}
OLD_CLASSES = {"num_classes": 3, "names": CLASSES["names"], "id": None, "_type": "ClassLabel"}


def write_hugging_face(
    path: Path, columns: dict[str, list[Any]], features: dict[str, Any], count: int = 3
) -> Path:
    """A file as `datasets` writes it, with the images `make_png(0)`, `make_png(1)` ..."""
    images = [{"bytes": make_png(row), "path": f"{row}.png"} for row in range(count)]
    features = {"image": {"_type": "Image"}} | features
    table = pyarrow.table({"image": images} | columns)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)
    return path


def load(source: Parquet) -> list[Any]:
    """Samples without the image, and reason and detail of skipped rows."""
    records = [row for row in source() if isinstance(row, Record)]
    return [
        (row.reason, row.detail)
        if isinstance(row, SkippedRow)
        else {name: row[name] for name in ("txt", "json") if name in row}
        for row in load_samples(records, source, decode=True)
    ]


@pytest.mark.parametrize("feature", [CLASSES, OLD_CLASSES])
def test_class_names_are_captions(tmp_path: Path, feature: dict[str, Any]) -> None:
    path = write_hugging_face(tmp_path / "a.parquet", {"label": [2, 0, 1]}, {"label": feature})
    assert load(Parquet(files=(str(path),), template="a photo of a {}")) == [
        {"txt": "a photo of a tree", "json": {"label": 2, "label_name": "tree"}},
        {"txt": "a photo of a tabby cat", "json": {"label": 0, "label_name": "tabby_cat"}},
        {"txt": "a photo of a hot dog", "json": {"label": 1, "label_name": "hot-dog"}},
    ]


def test_rows_without_a_class(tmp_path: Path) -> None:
    labels = {"label": [-1, 3, None, 1]}
    path = write_hugging_face(tmp_path / "a.parquet", labels, {"label": CLASSES}, count=4)
    *skipped, sample = load(Parquet(files=(str(path),)))
    assert sample["txt"] == "hot dog"
    for (reason, detail), value in zip(skipped, ("-1", "3", "null"), strict=True):
        assert reason == "no-caption"
        assert f"the class in column 'label' is {value}, expected 0 to 2" in detail


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": CLASSES, "_type": "Sequence", "length": -1},
        {"feature": CLASSES, "_type": "List"},
        [CLASSES],
    ],
)
def test_lists_of_classes(tmp_path: Path, feature: Any) -> None:
    columns = {"objects": [[0, 2], [], [-1, 1]]}
    path = write_hugging_face(tmp_path / "a.parquet", columns, {"objects": feature})
    first, second, third = load(Parquet(files=(str(path),), template="a {}"))
    assert first["json"] == {
        "objects": [0, 2],
        "objects_name": ["tabby_cat", "tree"],
        "captions": ["a tabby cat", "a tree"],
    }
    assert second[0] == "no-caption"
    assert third["json"] == {"objects": [-1, 1], "objects_name": [None, "hot-dog"]}


def test_several_caption_columns(tmp_path: Path) -> None:
    columns = {"short": ["a", "b", " "], "long": [["aa", "aaa"], [], [None]], "label": [0, 1, 9]}
    path = write_hugging_face(tmp_path / "a.parquet", columns, {"label": CLASSES})
    names = ("long", "label", "short")
    first, second, third = load(Parquet(files=(str(path),), caption_columns=names))
    assert first["txt"] == "aa"
    assert first["json"] == {
        "label": 0,
        "label_name": "tabby_cat",
        "captions": ["aa", "aaa", "tabby cat", "a"],
    }
    assert second["json"]["captions"] == ["hot dog", "b"]
    assert third[0] == "no-caption"


def test_a_caption_column_has_priority(tmp_path: Path) -> None:
    columns = {"label": [0, 1, 2], "text": ["x", "y", "z"]}
    path = write_hugging_face(tmp_path / "a.parquet", columns, {"label": CLASSES})
    assert load(Parquet(files=(str(path),)))[1] == {"txt": "y", "json": {"label": 1}}
    chosen = load(Parquet(files=(str(path),), caption_columns=("label",)))[1]
    assert chosen == {"txt": "hot dog", "json": {"label": 1, "text": "y", "label_name": "hot-dog"}}


def test_ambiguous_and_unnamed_classes(tmp_path: Path) -> None:
    columns = {"coarse": [0, 1, 2], "fine": [2, 1, 0]}
    path = write_hugging_face(tmp_path / "a.parquet", columns, {"coarse": CLASSES, "fine": CLASSES})
    with pytest.raises(DataError, match=r"several columns of classes: coarse, fine; .*--caption-"):
        load(Parquet(files=(str(path),)))
    write_hugging_face(path, columns, {})
    with pytest.raises(DataError, match=r"no caption column .* no column of classes with names"):
        load(Parquet(files=(str(path),)))
    with pytest.raises(DataError, match=r"'fine' has type int64, .*the file has no class names"):
        load(Parquet(files=(str(path),), caption_columns=("fine",)))


def test_image_column_by_its_description(tmp_path: Path) -> None:
    columns = {"photo": [{"bytes": make_png(1), "path": None}] * 3, "text": ["x", "y", "z"]}
    path = write_hugging_face(tmp_path / "a.parquet", columns, {"photo": {"_type": "Image"}})
    table = parquet.read_table(path).drop_columns(["image"])
    parquet.write_table(table, path)
    assert [row["txt"] for row in load(Parquet(files=(str(path),)))] == ["x", "y", "z"]


def test_paths_instead_of_images(tmp_path: Path) -> None:
    images = [{"bytes": make_png(0), "path": "0.png"}, {"bytes": None, "path": "x/1.png"}, None]
    path = write_hugging_face(
        tmp_path / "a.parquet", {"image": images, "text": ["x", "y", "z"]}, {}
    )
    first, second, third = load(Parquet(files=(str(path),)))
    assert first == {"txt": "x"}
    assert second[0] == "no-image"
    assert "only the path 'x/1.png'" in second[1]
    assert "embed" in second[1]
    assert third[0] == "not-an-image"

    for only_paths in ([{"path": "x.png"}] * 3, [{"bytes": None, "path": "x.png"}] * 3, ["x"] * 3):
        write_hugging_face(path, {"image": only_paths, "text": ["x", "y", "z"]}, {})
        with pytest.raises(DataError, match=r"'image' has only the paths of images .*embed"):
            load(Parquet(files=(str(path),)))


def test_command_counts_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"label": [0, -1, 2, 1]}
    path = write_hugging_face(tmp_path / "a.parquet", labels, {"label": CLASSES}, count=4)
    run_data_command(
        "write", "parquet", path, "--out", tmp_path / "out", "--template", "one {}",
        "--caption-column", "label", "--max-skipped-ratio", 0.3, "--workers", 0,
    )  # fmt: skip
    assert "4 rows: 3 in samples, 1 skipped, 0 ignored" in capsys.readouterr().out
    assert b"one tabby cat" in (tmp_path / "out" / "shard-000000.tar").read_bytes()


def test_rows_are_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"label": [0, 1, 2]}
    path = write_hugging_face(tmp_path / "a.parquet", labels, {"label": CLASSES})
    iter_batches = parquet.ParquetFile.iter_batches

    def without_last_rows(self: Any, **options: Any) -> Any:
        return (batch.slice(0, 1) for batch in iter_batches(self, **options))

    source = Parquet(files=(str(path),))
    records = list(source())
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", without_last_rows)
    with pytest.raises(DataError, match="has 3 rows by its metadata, but 2 were read"):
        list(source())
    with pytest.raises(DataError, match="2 of the rows up to row 2 are missing"):
        list(load_samples(records, source, decode=False))


def test_corrupt_pages_are_an_error(tmp_path: Path) -> None:
    labels = {"label": [row % 3 for row in range(50)]}
    path = write_hugging_face(tmp_path / "a.parquet", labels, {"label": CLASSES}, count=50)
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    path.write_bytes(data)
    plan = WritePlan(source=Parquet(files=(str(path),)), out=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"a.parquet is corrupt"):
        write_dataset(plan)


def test_a_template_needs_classes(tmp_path: Path) -> None:
    columns = {"label": [0, 1, 2], "text": ["x", "y", "z"]}
    path = write_hugging_face(tmp_path / "a.parquet", columns, {"label": CLASSES})
    with pytest.raises(DataError, match=r"'a \{\}' is for .*captions are text \(column 'text'\)"):
        list(Parquet(files=(str(path),), template="a {}")())
    both = Parquet(files=(str(path),), template="a {}", caption_columns=("text", "label"))
    assert load(both)[0]["json"]["captions"] == ["x", "a tabby cat"]
