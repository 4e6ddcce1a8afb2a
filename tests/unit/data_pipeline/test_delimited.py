"""CSV and TSV files: dialects, quotation marks, and lines that add up."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import strategies as st

from data_pipeline.common.errors import DataError
from data_pipeline.preparing.importers import delimited
from data_pipeline.preparing.importers.flickr import Flickr
from data_pipeline.preparing.importers.records import Ignored, Record, SkippedRow
from data_pipeline.preparing.importers.table import Table
from tests.support.properties import check_property, num_examples

ROWS = [(f"pics/{index}.jpg", f"picture {index}") for index in range(40)]


def write_rows(path: Path, delimiter: str, captions: dict[int, str], header: str = "") -> str:
    """A file of `ROWS` with some other captions, written without any quoting."""
    lines = [header or delimiter.join(("image", "caption"))]
    for index, (image, caption) in enumerate(ROWS):
        lines.append(delimiter.join((image, captions.get(index, caption))))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read_captions(table: Table) -> list[str]:
    rows = list(table())
    assert not [row for row in rows if isinstance(row, SkippedRow)]
    return [row.captions[0] for row in rows if isinstance(row, Record)]


@pytest.mark.parametrize(
    "captions",
    [
        {10: '"Untitled, oil on canvas', 22: 'a sign that says "open"'},
        {5: '"Mona Lisa" by Leonardo'},
        {9: '"Untitled'},
        {9: '"a" "b', 11: '"', 39: '""'},
    ],
)
def test_a_quotation_mark_is_a_character_in_tab_separated_files(
    captions: dict[int, str], tmp_path: Path
) -> None:
    url = write_rows(tmp_path / "pairs.tsv", "\t", captions)
    expected = [captions.get(index, caption) for index, (_, caption) in enumerate(ROWS)]
    assert read_captions(Table(files=(url,))) == expected
    as_csv = write_rows(tmp_path / "pairs.csv", "\t", captions)
    assert read_captions(Table(files=(as_csv,))) == expected


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({9: '"Untitled'}, r"line 11: not valid CSV.*--quoting none"),
        ({9: '"Untitled', 20: 'a "b'}, r"line 11: not valid CSV.*--quoting none"),
        # Valid CSV by accident: the field ends at the end of another row.
        ({9: '"Untitled', 20: 'open"'}, r"line 11 to line 22, but line 12 looks like a row"),
    ],
)
def test_rows_inside_quotation_marks_are_an_error(
    captions: dict[int, str], message: str, tmp_path: Path
) -> None:
    url = write_rows(tmp_path / "pairs.csv", ",", captions)
    with pytest.raises(DataError, match=message):
        list(Table(files=(url,))())
    expected = [captions.get(index, caption) for index, (_, caption) in enumerate(ROWS)]
    assert read_captions(Table(files=(url,), quoting="none")) == expected


def test_explicit_csv_allows_fields_with_rows(tmp_path: Path) -> None:
    url = write_rows(tmp_path / "pairs.csv", ",", {9: '"Untitled', 20: 'open"'})
    rows = list(Table(files=(url,), quoting="csv")())
    records = [row for row in rows if isinstance(row, Record)]
    assert len(records) == 29 and records[9].inputs == 12
    assert sum(row.inputs for row in rows) == 41


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("filepath\ttitle\na.jpg\tone, two\n", "csv"),
        ("filepath;title\na.jpg;one, two\n", "csv"),
        ("filepath|title\na.jpg|one, two\n", "csv"),
        ("filepath,title\na.jpg,one, two\n".replace("one, two", '"one, two"'), "tsv"),
        ("sep=;\nfilepath;title\na.jpg;one, two\n", "csv"),
        ('"filepath"\t"title"\n"a.jpg"\t"one, two"\n', "tsv"),
        ('"filepath";"title"\r\n"a.jpg";"one, two"\r\n', "csv"),
        ("filepath\ttitle\ra.jpg\tone, two\r", "tsv"),
        ('\ufefffilepath,title\na.jpg,"one, two"', "csv"),
        ('filepath, title\n\n\na.jpg,"one, two"\n\n', "csv"),
    ],
)
def test_dialects_are_detected(text: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs.{suffix}"
    for encoding in ("utf-8", "utf-16"):
        path.write_text(text, encoding=encoding, newline="")
        assert read_captions(Table(files=(str(path),))) == ["one, two"]


def test_a_header_option_decides_between_delimiters(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("one, two\ta.jpg\n", encoding="utf-8")
    assert read_captions(Table(files=(str(path),), header=("caption", "image"))) == ["one, two"]


def test_rows_with_too_many_fields_say_that_quotes_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("image,caption\na.jpg,one, two\nb.jpg\n", encoding="utf-8")
    rows = list(Table(files=(str(path),))())
    longer, shorter = (row.detail for row in rows if isinstance(row, SkippedRow))
    assert longer.startswith("3 fields, but there are 2 columns") and "double quotes" in longer
    assert shorter == "1 field, but there are 2 columns"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"image,caption\na.jpg,caf\xe9\n", r"line 2 is not UTF-8 \(byte 0xe9\).*Windows-1252"),
        ("image,caption\na.jpg,b\n".encode("utf-16-le"), "null bytes.*UTF-16"),
        (b"a.jpg,one\nb.jpg,two\n", "--header.*--delimiter"),
        (b'{"image": "a.jpg", "caption": "b"}\n', "JSON lines.*as CSV"),
        (b"", "no image column"),
    ],
)
def test_files_that_are_no_table(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(Table(files=(str(path),))())


def test_lists_of_flickr_account_for_every_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text('image,caption\na.jpg,"x\n\na.jpg,y\nnothing\n', encoding="utf-8")
    rows = list(Flickr(files=(str(path),), image_folder="p")())
    assert sum(row.inputs for row in rows) == 5
    assert Counter(row.rule for row in rows if isinstance(row, Ignored)) == {
        "header": 1,
        "blank line": 1,
    }


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_lost_lines_are_found_by_the_second_count(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"pairs.{suffix}"
    write_rows(path, "," if suffix == "csv" else "\t", {})
    real_open = delimited._open_text

    def open_without_a_line(url: str, encoding: str) -> io.StringIO:
        with real_open(url, encoding) as file:
            lines = list(file)
        return io.StringIO("".join(lines[:7] + lines[8:]), newline="")

    monkeypatch.setattr(delimited, "_open_text", open_without_a_line)
    with pytest.raises(DataError, match="has 41 lines, but 40 were read"):
        list(Table(files=(str(path),))())


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@num_examples
def test_every_row_of_a_csv_file_is_accounted_for(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"

    def check(rows: list[tuple[str, str]], delimiter: str) -> None:
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows([("image", "caption"), *rows])
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
        result = list(Table(files=(str(path),), quoting="csv")())
        kept = [row.captions[0] for row in result if isinstance(row, Record)]
        num_skipped = sum(isinstance(row, SkippedRow) for row in result)
        assert len(kept) + num_skipped == len(rows)
        allowed = Counter(caption.strip() for _, caption in rows)
        assert not Counter(kept) - allowed
        physical = text.getvalue().replace("\r\n", "\n").replace("\r", "\n").count("\n")
        assert sum(row.inputs for row in result) == physical

    rows = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6)
    check_property(check, examples, rows, st.sampled_from([",", ";", "\t", "|"]))


@num_examples
def test_any_text_is_read_completely_or_is_an_error(examples: int, tmp_path: Path) -> None:
    paths = {suffix: tmp_path / f"pairs.{suffix}" for suffix in ("csv", "tsv")}
    fragments = st.sampled_from(['"', '""', ",", "\t", ";", "\n", "\r\n", "a.jpg", "x", " ", "é"])

    def check(parts: list[str], suffix: str) -> None:
        delimiter = "," if suffix == "csv" else "\t"
        text = f"image{delimiter}caption\n" + "".join(parts)
        paths[suffix].write_text(text, encoding="utf-8", newline="")
        try:
            result = list(Table(files=(str(paths[suffix]),))())
        except DataError:
            assert suffix == "csv" and '"' in text
            return
        lines = text.replace("\r\n", "\n").split("\n")
        assert sum(row.inputs for row in result) == len(lines) - (lines[-1] == "")

    check_property(check, examples, st.lists(fragments, max_size=40), st.sampled_from(list(paths)))
