"""Text for terminals, and JSON files that are replaced atomically."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common.errors import StorageError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.json_file import write_json
from data_pipeline.common.tables import (
    counted,
    format_bytes,
    format_rows,
    format_table,
    markdown_table,
    truncate,
)


@contextlib.contextmanager
def file_size_limit(max_bytes: int) -> Iterator[None]:
    """Writes fail, as on a full disk, when a file is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_count_has_its_noun_in_singular_or_plural() -> None:
    assert [counted(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    assert [counted(n, "copy", "copies") for n in (1, 2000)] == ["1 copy", "2,000 copies"]


def test_format_table() -> None:
    assert format_table(["name", "count"], [("a", 1234), ("long name", 5)]).splitlines() == [
        "name       count",
        "---------  -----",
        "a          1,234",
        "long name      5",
    ]


def test_alignment_of_each_column() -> None:
    table = format_table(["a", "b", "c"], [("1", "2", "3"), ("11", "22", "33")], align="rl")
    assert table.splitlines()[2:] == [" 1  2   3", "11  22  33"]
    assert format_table(["a", "b"], [], rule=False) == "a  b"


def test_rows_without_a_header() -> None:
    rows = [("steps", 1234), ("  lost", "none")]
    assert format_rows(rows).splitlines() == ["steps   1,234", "  lost  none"]
    assert format_rows([]) == ""


def test_wide_characters_take_two_columns() -> None:
    lines = format_table(["key", "n"], [("日本", 1), ("abcdef", 2)], rule=False).splitlines()
    assert lines == ["key     n", "日本    1", "abcdef  2"]


def test_markdown_table_is_aligned_and_escaped() -> None:
    table = markdown_table(["method", "loss"], [["a|b", "1.0"], ["long name", "12.5 ± 0.1"]])
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --------- | ---------: |"
    assert lines[2].startswith("| a\\|b ")


def test_markdown_table_with_text_columns() -> None:
    lines = markdown_table(["name", "n"], [["a", "10"], ["long name", "1"]], align="l").splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.count("|") for line in lines] == [3] * 4 and ":" not in lines[1]


def test_json_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    for value in (1, 2):
        write_json(path, {"value": value})
    assert json.loads(path.read_text()) == {"value": 2}
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_keeps_the_old_json_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"value": 1})
    with file_size_limit(1000), pytest.raises(StorageError, match=r"report\.json.*too large"):
        write_json(path, {"value": "x" * 5000})
    assert json.loads(path.read_text()) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_file_keeps_names_that_are_not_utf8(tmp_path: Path) -> None:
    value = {"key": "caf\udce9 日本"}
    write_json(tmp_path / "names.json", value, indent=None)
    data = (tmp_path / "names.json").read_bytes()
    assert json.loads(data) == value and "日本" in data.decode()


def test_format_bytes() -> None:
    assert format_bytes(5) == "5 B"
    assert format_bytes(1536) == "1.5 KiB"
    assert format_bytes(3 << 50) == "3072.0 TiB"


def test_escape_control_and_truncate() -> None:
    assert escape_control("a\x1b[2Jb\u202ec\td\ud800") == r"a\x1b[2Jb\u202ec\td\ud800"
    assert escape_control("日本 é\n") == "日本 é\\n"
    assert escape_control("a\nb", lines=True) == "a\nb"
    assert truncate("abcdef", 3) == "abc … (3 more characters)"
    assert truncate("abc", 3) == "abc"
