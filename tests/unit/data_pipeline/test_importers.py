from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers.coco import Coco
from data_pipeline.preparing.importers.fill import samples_of
from data_pipeline.preparing.importers.flickr import Flickr
from data_pipeline.preparing.importers.folder import Folder
from data_pipeline.preparing.importers.parquet import Parquet
from data_pipeline.preparing.importers.pictures_at import picture_address
from data_pipeline.preparing.importers.records import Importer, Keys, LeftOut, Record, safe_key
from data_pipeline.preparing.importers.table import Table, value_of
from tests.support.small_shards import picture


def rows(source: Importer) -> tuple[list[Record], list[LeftOut]]:
    found = list(source())
    assert found == list(source()), "an importer must give the same stream again"
    return [row for row in found if isinstance(row, Record)], [
        row for row in found if isinstance(row, LeftOut)
    ]


@pytest.mark.parametrize(
    ("wanted", "key"),
    [
        ("a/b", "a/b"),
        ("img.007", "img_007"),
        ("../../etc/passwd", "etc/passwd"),
        ("/abs//x", "abs/x"),
        ("a b\n\x00c", "a_b__c"),
        ("x" * 82, "x" * 82),
    ],
)
def test_keys_are_what_webdataset_can_hold(wanted: str, key: str) -> None:
    assert safe_key(wanted) == key


def test_keys_that_lose_what_told_them_apart_stay_apart() -> None:
    names = ["日本", "中国", "", "...", "y" * 300, "y" * 301, "/".join("z" * 50)]
    keys = [safe_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 90 and "." not in key and not key.startswith("/") for key in keys)
    made = Keys()
    assert [made.make(name) for name in ("a.b", "a_b", "a_b-2", "a_b")] == [
        "a_b",
        "a_b-2",
        "a_b-2-2",
        "a_b-3",
    ]


def test_pictures_stay_below_their_folder() -> None:
    assert picture_address("a/b.jpg", "pics") == "pics/a/b.jpg"
    assert picture_address("/data/x.jpg", "pics") == "/data/x.jpg"
    assert picture_address("s3://b/x.jpg", "pics") == "s3://b/x.jpg"
    for name, slug in (
        ("../x.jpg", "bad-path"),
        ("a/../../x", "bad-path"),
        ("pipe:id", "bad-path"),
        ("", "bad-path"),
        ("https://a/b.jpg", "web-address"),
        ("ftp://a/b", "bad-path"),
    ):
        with pytest.raises(DataError) as error:
            picture_address(name, "pics")
        assert error.value.slug == slug


def test_csv_columns_by_name_and_by_guess(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [
                ["FilePath", "Caption", "score", "zip", "note"],
                ["x/1.jpg", "one, with a comma\nand a line", "0.5", "007", ""],
                ["x/2.jpg", "  ", "1", "8", "n"],
                ["x/3.jpg", "three"],
                ["../4.jpg", "four", "1", "8", "n"],
            ]
        )
    good, bad = rows(Table(files=(str(table),)))
    assert good == [
        Record(
            "x/1",
            f"{tmp_path}/x/1.jpg",
            ("one, with a comma\nand a line",),
            {"score": 0.5, "zip": "007", "note": None},
            "t.csv line 3",
        )
    ]
    assert [row.reason for row in bad] == ["no-caption", "bad-row", "bad-path"]
    assert bad[1].origin == "t.csv line 5"
    chosen, _ = rows(
        Table(
            files=(str(table),),
            pictures="s3://b/p",
            caption_columns=("note", "Caption"),
            key_column="zip",
        )
    )
    assert [(row.key, row.picture, row.captions) for row in chosen][1:] == [
        ("8", "s3://b/p/x/2.jpg", ("n",))
    ]
    with pytest.raises(DataError, match="no column 'text'; its columns are FilePath, Caption"):
        rows(Table(files=(str(table),), caption_columns=("text",)))


def test_tsv_without_a_header(tmp_path: Path) -> None:
    table = tmp_path / "cc.tsv"
    table.write_text('a "quoted" word\timg/1.jpg\n\nb\timg/2.jpg\nc\timg/2.jpg\n')
    with pytest.raises(DataError, match=r"no column is called like a picture.*--image-column"):
        rows(Table(files=(str(table),)))
    named = Table(files=(str(table),), header=("caption", "image"))
    good, _ = rows(named)
    assert [(row.key, row.captions) for row in good] == [
        ("img/1", ('a "quoted" word',)),
        ("img/2", ("b",)),
        ("img/2", ("c",)),
    ]
    joined, _ = rows(Table(files=(str(table),), header=("caption", "image"), group=True))
    assert [row.captions for row in joined] == [('a "quoted" word',), ("b", "c")]
    table.write_bytes(b"image\tcaption\n1.jpg\t\xff\n")
    with pytest.raises(DataError, match="UTF-8"):
        rows(Table(files=(str(table),)))


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
def test_fields_become_numbers_only_where_nothing_is_lost(text: str, value: object) -> None:
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


def test_folders_with_texts_and_folders_as_labels(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a_cat/3.jpeg", "x.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "b/2.txt").write_text("\ufefftwo\n")
    (tmp_path / "b/2.json").write_text('{"score": 1}')
    (tmp_path / "x.txt").write_text(" ")
    (tmp_path / "x.json").write_text("[")
    good, bad = rows(Folder(folders=(str(tmp_path),)))
    assert good == [Record("b/2", f"{tmp_path}/b/2.JPG", ("two",), {"score": 1}, "b/2.JPG")]
    assert [(row.origin, row.reason) for row in bad] == [
        ("x.webp", "bad-json"),
        ("a_cat/3.jpeg", "no-caption"),
        ("b/1.png", "no-caption"),
    ]
    (tmp_path / "x.json").unlink()
    labeled, _ = rows(
        Folder(folders=(str(tmp_path),), caption_from="folder", template="a photo of a {}")
    )
    assert [row.captions for row in labeled][1:] == [
        ("a photo of a a cat",),
        ("a photo of a b",),
        ("a photo of a b",),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no picture in"):
        rows(Folder(folders=(f"{tmp_path}/empty",)))


def test_coco(tmp_path: Path) -> None:
    content = {
        "images": [
            {"id": n, "file_name": name}
            for n, name in ((9, "9.jpg"), (4, "4.jpg"), (5, "../5.jpg"))
        ],
        "annotations": [
            {"id": 30, "image_id": 9, "caption": "third\n"},
            {"id": 2, "image_id": 9, "caption": " first "},
            {"id": 1, "image_id": 5, "caption": "x"},
        ],
    }
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(content))
    good, bad = rows(Coco(files=(str(file),), pictures="pics"))
    assert good == [
        Record("9", "pics/9.jpg", ("first", "third"), {"image_id": 9}, "captions.json image 9")
    ]
    assert [row.reason for row in bad] == ["no-caption", "bad-path"]
    for wrong in ("[]", "{", '{"images": [{"id": "x"}]}'):
        file.write_text(wrong)
        with pytest.raises(DataError, match="is no file of COCO captions"):
            rows(Coco(files=(str(file),), pictures="pics"))


@pytest.mark.parametrize(
    "text",
    [
        "1.jpg#0\tA child .\n1.jpg#1\tB | c, d .\n2.jpg#0\tE\n",
        "image_name| comment_number| comment\n1.jpg| 0| A child .\n1.jpg| 1   B | c, d .\n2.jpg| 0| E\n",
        'image,caption\n1.jpg,A child .\n1.jpg,"B | c, d ."\n2.jpg,E\n',
    ],
)
def test_flickr_lists_in_their_three_forms(tmp_path: Path, text: str) -> None:
    file = tmp_path / "list"
    file.write_text(text + "broken line\n")
    good, bad = rows(Flickr(files=(str(file),), pictures="p"))
    assert [(row.key, row.picture, row.captions) for row in good] == [
        ("1", "p/1.jpg", ("A child .", "B | c, d .")),
        ("2", "p/2.jpg", ("E",)),
    ]
    assert [row.reason for row in bad] == ["bad-row"]


def _parquet(path: Path, count: int = 10, **more: list[object]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns: dict[str, list[object]] = {
        "key": [f"k{number}" for number in range(count)],
        "jpg": [picture(number) for number in range(count)],
        "caption": [f"caption {number}" for number in range(count)],
        "similarity": [number / count for number in range(count)],
    }
    kept = {name: values for name, values in (columns | more).items() if values}
    parquet.write_table(pyarrow.table(kept), path, row_group_size=4)


def test_parquet_rows_come_out_of_any_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    _parquet(path, exif=[b"x"] * 10, status=["success"] * 10)
    source = Parquet(files=(str(path),))
    records = list(source())
    assert [row.key for row in records if isinstance(row, Record)] == [
        f"k{number}" for number in range(10)
    ]
    for chosen in ([0], [3, 4], [5, 9], list(range(10))):
        wanted = [
            row
            for number, row in enumerate(records)
            if number in chosen and isinstance(row, Record)
        ]
        assert list(samples_of(wanted, source, check=True)) == [
            {
                "__key__": f"k{number}",
                "png": picture(number),
                "txt": f"caption {number}",
                "json": {"similarity": number / 10, "status": "success"},
            }
            for number in chosen
        ]


def test_parquet_structs_lists_and_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "hf.parquet"
    good = {"bytes": picture(1), "path": "x.png"}
    _parquet(
        path,
        3,
        key=[],
        jpg=[],
        image=[good, {"bytes": b"no", "path": ""}, good],
        caption=[["a", " ", "b"], ["c"], [None]],
        similarity=[float("nan"), 1.0, 1.0],
    )
    source = Parquet(files=(str(path),))
    found = list(
        samples_of([row for row in source() if isinstance(row, Record)], source, check=False)
    )
    assert found[0] == {
        "__key__": "hf/000000",
        "png": picture(1),
        "txt": "a",
        "json": {"similarity": None, "captions": ["a", "b"]},
    }
    assert [row.reason for row in found[1:] if isinstance(row, LeftOut)] == [
        "no-picture",
        "no-caption",
    ]


def test_parquet_without_pictures_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    _parquet(path, 3, jpg=[])
    with pytest.raises(
        DataError, match=r"no column of picture bytes.*lies beside \.tar files.*vlmoe data index"
    ):
        rows(Parquet(files=(str(path),)))
    path.write_text("hello")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        rows(Parquet(files=(str(path),)))


def test_without_pyarrow_the_error_names_the_package(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from data_pipeline.preparing.importers.parquet import Parquet\n"
        "list(Parquet(files=('x.parquet',))())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "pip install 'vlmoe[parquet]'" in done.stderr
