"""Labels files: lines, counts, repeated labels."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import strategies as st

from data_pipeline.common.errors import DataError
from data_pipeline.content.captions import clean_caption
from pretrain.evaluate.labels import read_labels
from tests.support.properties import check_property, num_examples

SEPARATORS = ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\x1d", "\x1e"]
"""Where `str.splitlines` splits, besides line feeds and carriage returns."""


@pytest.fixture(autouse=True)
def _log_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def labels_of(path: Path, content: str) -> tuple[str, ...]:
    path.write_bytes(content.encode())
    return read_labels(str(path))


@num_examples
def test_one_label_per_line(tmp_path: Path, examples: int) -> None:
    def check(lines: list[list[str]], end: str) -> None:
        texts = ["".join(parts) for parts in lines]
        expected = [caption for text in texts if (caption := clean_caption(text))]
        assert labels_of(tmp_path / "l.txt", end.join(["x", *texts])) == ("x", *expected)

    parts = st.lists(st.sampled_from(["a", "b", " ", "é", *SEPARATORS]), max_size=6)
    ends = st.sampled_from(["\n", "\r\n", "\r"])
    check_property(check, examples, st.lists(parts, max_size=6), ends)


def test_separators_inside_of_a_line_are_spaces(tmp_path: Path) -> None:
    for separator in SEPARATORS:
        assert labels_of(tmp_path / "l.txt", f"a{separator}b\nc\n") == ("a b", "c")
    assert labels_of(tmp_path / "l.txt", "\ufeffa\r\nb") == ("a", "b")


def test_the_number_of_labels_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(labels_of(tmp_path / "l.txt", "a fox\nan owl\n\n")) == 2
    [record] = caplog.records
    assert "l.txt: 2 labels" in record.getMessage()


def test_repeated_labels_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels_of(tmp_path / "l.txt", "a fox\nan owl\nA  Fox\ncaf\u00e9\ncafe\u0301\n")
    assert "l.txt: 3 labels" in caplog.text
    assert "2 of 5 lines repeat" in caplog.text
    assert "'a fox' in line 1, 'A Fox' in line 3" in caplog.text
    assert "Unicode forms" not in caplog.text


@pytest.mark.parametrize("other", ["ｆｏｘ 1", "fox\u200c 1", "Fox, 1.", "fox\ufe0f1"])
def test_similar_labels_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    assert labels_of(tmp_path / "l.txt", f"fox 1\nowl\n{other}\nf\u00f3x 1\n!\n?")[2] == other
    assert "2 labels differ from another only in" in caplog.text
    assert "in line 3" in caplog.text and "lines repeat" not in caplog.text


def test_flags_of_parts_of_a_country_are_not_similar(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    codes = ("gbeng", "gbsct", "gbwls")
    tags = ["".join(chr(0xE0000 + ord(char)) for char in code) for code in codes]
    content = "\n".join(f"\U0001f3f4{tag}\U000e007f" for tag in tags)
    assert len(labels_of(tmp_path / "l.txt", content)) == 3
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_invalid_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"l\.txt contains no caption"):
        labels_of(tmp_path / "l.txt", " \n\n\u200b")
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"l\.txt is not UTF-8"):
        read_labels(str(tmp_path / "l.txt"))
