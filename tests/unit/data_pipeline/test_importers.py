from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.coco import Coco
from data_pipeline.preparing.importers.flickr import Flickr
from data_pipeline.preparing.importers.folder import Folder
from data_pipeline.preparing.importers.image_url import resolve_image_url
from data_pipeline.preparing.importers.records import (
    Importer,
    Record,
    SkippedRow,
    UniqueKeys,
    safe_key,
)
from data_pipeline.preparing.importers.table import Table, parse_value
from tests.support.small_shards import make_png


def split_rows(source: Importer) -> tuple[list[Record], list[SkippedRow]]:
    rows = list(source())
    assert rows == list(source()), "an importer must return the same stream for every call"
    records = [row for row in rows if isinstance(row, Record)]
    return records, [row for row in rows if isinstance(row, SkippedRow)]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a/b", "a/b"),
        ("img.007", "img_007"),
        ("../../etc/passwd", "etc/passwd"),
        ("/abs//x", "abs/x"),
        ("a b\n\x00c", "a_b__c"),
        ("x" * 82, "x" * 82),
    ],
)
def test_safe_key(key: str, expected: str) -> None:
    assert safe_key(key) == expected


def test_keys_stay_distinct_and_valid() -> None:
    names = ["日本", "中国", "", "...", "y" * 300, "y" * 301, "/".join("z" * 50)]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 90 and "." not in key and not key.startswith("/") for key in keys)


def test_unique_keys() -> None:
    keys = UniqueKeys()
    unique = [keys.make(name) for name in ("a.b", "a_b", "a_b-2", "a_b")]
    assert unique == ["a_b", "a_b-2", "a_b-2-2", "a_b-3"]


def test_resolve_image_url() -> None:
    assert resolve_image_url("a/b.jpg", "images") == "images/a/b.jpg"
    assert resolve_image_url("/data/x.jpg", "images") == "/data/x.jpg"
    assert resolve_image_url("s3://b/x.jpg", "images") == "s3://b/x.jpg"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("../x.jpg", "invalid-path"),
        ("a/../../x", "invalid-path"),
        ("pipe:id", "invalid-path"),
        ("", "invalid-path"),
        ("https://a/b.jpg", "web-address"),
        ("ftp://a/b", "invalid-path"),
    ],
)
def test_invalid_image_names(name: str, slug: str) -> None:
    with pytest.raises(DataError) as error:
        resolve_image_url(name, "images")
    assert error.value.slug == slug


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [
                ["FilePath", "Caption", "score", "zip", "note"],
                ["x/1.jpg", "one, with a comma\nand a line", "0.5", "007", ""],
                ["x/2.jpg", "  ", "1", "8", "n"],
                ["x/3.jpg", "three"],
                ["../4.jpg", "four", "1", "8", "n"],
            ]
        )
    return path


def test_csv_with_default_columns(csv_file: Path) -> None:
    records, skipped = split_rows(Table(files=(str(csv_file),)))
    assert records == [
        Record(
            "x/1",
            f"{csv_file.parent}/x/1.jpg",
            ("one, with a comma\nand a line",),
            {"score": 0.5, "zip": "007", "note": None},
            "t.csv line 2",
            inputs=2,
        )
    ]
    assert [row.reason for row in skipped] == ["no-caption", "malformed-row", "invalid-path"]
    assert skipped[1].origin == "t.csv line 5"


def test_csv_with_given_columns(csv_file: Path) -> None:
    table = Table(
        files=(str(csv_file),),
        image_folder="s3://b/p",
        caption_columns=("note", "Caption"),
        key_column="zip",
    )
    records, _ = split_rows(table)
    row = records[1]
    assert len(records) == 2
    assert (row.key, row.image, row.captions) == ("8", "s3://b/p/x/2.jpg", ("n",))
    with pytest.raises(DataError, match=r"'text'.*FilePath, Caption"):
        split_rows(Table(files=(str(csv_file),), caption_columns=("text",)))


def test_tsv_without_header(tmp_path: Path) -> None:
    file = tmp_path / "cc.tsv"
    file.write_text('a "quoted" word\timg/1.jpg\n\nb\timg/2.jpg\nc\timg/2.jpg\n')
    with pytest.raises(DataError, match=r"image column.*--image-column"):
        split_rows(Table(files=(str(file),)))

    header = ("caption", "image")
    records, _ = split_rows(Table(files=(str(file),), header=header))
    assert [(row.key, row.captions) for row in records] == [
        ("img/1", ('a "quoted" word',)),
        ("img/2", ("b",)),
        ("img/2", ("c",)),
    ]
    grouped, _ = split_rows(Table(files=(str(file),), header=header, group=True))
    assert [row.captions for row in grouped] == [('a "quoted" word',), ("b", "c")]

    file.write_bytes(b"image\tcaption\n1.jpg\t\xff\n")
    with pytest.raises(DataError, match="UTF-8"):
        split_rows(Table(files=(str(file),)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.28", 0.28),
        ("-3", -3),
        ("1e5", 1e5),
        ("007", "007"),
        ("1_000", "1_000"),
        ("nan", "nan"),
        ("", None),
        ("9" * 30, "9" * 30),
        ("True", True),
        ("1e999", "1e999"),
        (" 5", " 5"),
    ],
)
def test_parse_value(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for name in ("b/2.JPG", "b/1.png", "a_cat/3.jpeg", "x.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(make_png(1))
    return tmp_path


def test_folder_with_text_files(image_folder: Path) -> None:
    (image_folder / "b/2.txt").write_text("\ufefftwo\n")
    (image_folder / "b/2.json").write_text('{"score": 1}')
    (image_folder / "x.txt").write_text(" ")
    (image_folder / "x.json").write_text("[")
    records, skipped = split_rows(Folder(folders=(str(image_folder),)))
    image = f"{image_folder}/b/2.JPG"
    expected = Record("b/2", image, ("two",), {"score": 1}, "b/2.JPG", inputs=3)
    assert records == [expected]
    assert [(row.origin, row.reason) for row in skipped] == [
        ("x.webp", "invalid-json"),
        ("a_cat/3.jpeg", "no-caption"),
        ("b/1.png", "no-caption"),
    ]


def test_folder_names_as_captions(image_folder: Path) -> None:
    source = Folder(folders=(str(image_folder),), caption_from="folder", template="a photo of a {}")
    records, _ = split_rows(source)
    assert [row.captions for row in records][1:] == [
        ("a photo of a a cat",),
        ("a photo of a b",),
        ("a photo of a b",),
    ]
    (image_folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"no image in .*empty"):
        split_rows(Folder(folders=(f"{image_folder}/empty",)))


def test_coco(tmp_path: Path) -> None:
    images = [(9, "9.jpg"), (4, "4.jpg"), (5, "../5.jpg")]
    content = {
        "images": [{"id": image_id, "file_name": name} for image_id, name in images],
        "annotations": [
            {"id": 30, "image_id": 9, "caption": "third\n"},
            {"id": 2, "image_id": 9, "caption": " first "},
            {"id": 1, "image_id": 5, "caption": "x"},
            {"id": 4, "image_id": 77, "caption": "of no image"},
        ],
    }
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(content))
    source = Coco(files=(str(file),), image_folder="images")
    records, skipped = split_rows(source)
    assert records == [
        Record(
            "9",
            "images/9.jpg",
            ("first", "third"),
            {"image_id": 9},
            "captions.json image 9",
            inputs=3,
        )
    ]
    assert [row.reason for row in skipped] == ["no-caption", "invalid-path", "no-image"]
    assert sum(row.inputs for row in (*records, *skipped)) == len(images) + 4

    for malformed in ("[]", "{", '{"images": [{"id": "x"}]}'):
        file.write_text(malformed)
        with pytest.raises(DataError, match=r"captions.json is not a COCO"):
            split_rows(source)


@pytest.mark.parametrize(
    "text",
    [
        "1.jpg#0\tA child .\n1.jpg#1\tB | c, d .\n2.jpg#0\tE\n",
        "image_name| comment_number| comment\n"
        "1.jpg| 0| A child .\n1.jpg| 1   B | c, d .\n2.jpg| 0| E\n",
        'image,caption\n1.jpg,A child .\n1.jpg,"B | c, d ."\n2.jpg,E\n',
    ],
)
def test_flickr_list_formats(tmp_path: Path, text: str) -> None:
    file = tmp_path / "list"
    file.write_text(text + "broken line\n")
    records, skipped = split_rows(Flickr(files=(str(file),), image_folder="p"))
    assert [(row.key, row.image, row.captions) for row in records] == [
        ("1", "p/1.jpg", ("A child .", "B | c, d .")),
        ("2", "p/2.jpg", ("E",)),
    ]
    assert [row.reason for row in skipped] == ["malformed-row"]
