from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import data
from tests.support.small_shards import caption, make_shards, picture


def keys_shown(text: str) -> list[str]:
    return [line.split()[-1] for line in text.splitlines() if " #" in line]


def test_samples_are_chosen_by_shard_key_number_and_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "a", count=20)
    make_shards(tmp_path / "b", count=20, first=20)
    both = f"{tmp_path}/{{a,b}}"

    def peek(*words: str | int) -> list[str]:
        data("peek", both, *words)
        return keys_shown(capsys.readouterr().out)

    assert peek() == [f"{number:05d}" for number in range(5)]
    assert peek("--first", 9) == [f"{number:05d}" for number in range(9)]
    assert peek("--key", "00033") == ["00033"]
    assert peek("--index", 25) == ["00025"]
    assert peek("--shard", 4, "--index", 1) == ["00028"]
    assert peek("--shard", "shard-000002.tar", "--first", 99) == [
        *(f"000{n}" for n in range(14, 20)),
        *(f"000{n}" for n in range(34, 40)),
    ]
    drawn = peek("--random", 12, "--seed", 3)
    assert len(set(drawn)) == 12 and drawn == peek("--random", 12, "--seed", 3) != peek(
        "--random", 12, "--seed", 4
    )
    assert set(peek("--shard", 3, "--random", 4)) < {f"000{n}" for n in range(20, 27)}
    for words, message in (
        (("--shard", "no"), "there is no shard 'no'"),
        (("--index", 40), "there are 40 samples"),
        (("--index", -1), "there are 40 samples"),
        (("--out", "x.gif"), "ends in .html or .png"),
    ):
        with pytest.raises(ConfigError, match=message):
            peek(*words)
    with pytest.raises(DataError, match="no sample of 6 shards has the key 'zz'"):
        peek("--key", "zz")


def test_text_says_what_a_sample_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a \x1b]0;title\x07 fox\u202e"
    samples: list[dict[str, object]] = [
        {"__key__": "a", "png": picture(1), "txt": "word " * 1000, "json": {"evil": evil, "n": 1}},
        {"__key__": "b", "jpg": b"no", "txt": b"\xff", "json": b"{"},
        {"__key__": "c", "txt": "x"},
    ]
    manifest = write_shards(samples, tmp_path)
    data("peek", tmp_path, "--caption-key", "txt", "--caption-key", "json:evil")
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and "\u202e" not in said
    assert (
        "png 12 x 12" in said and "… (2,999 more characters)" in said and r"\u001b]0;title" in said
    )
    assert "the picture cannot be decoded" in said and "bad-text" in said and "bad-json" in said
    assert "no picture among its files: txt" in said
    Path(manifest.shard_url(manifest.shards[0])).unlink()
    data("peek", tmp_path, "--first", 1)
    assert "shard-000000.tar #0\n  missing-shard" in capsys.readouterr().out


def test_sheets_show_every_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, count=7)
    data("peek", tmp_path, "--random", 99, "--out", tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 7
    assert all(caption(number) in page for number in range(7))
    assert "default-src 'none'" in page
    data("peek", tmp_path, "--first", 7, "--out", tmp_path / "sheet.png")
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet is not None and sheet.shape[:2] == (3 * 204 + 10, 3 * 170 + 10)
    # Six pictures in two rows and one in the third: noise where they are, white beside the last.
    assert [
        sheet[10 + 204 * row : 160 + 204 * row, 10 + 170 * column : 160 + 170 * column].std() > 20
        for row in range(3)
        for column in range(3)
    ] == [True] * 7 + [False] * 2
    assert "sheet.png: 7 samples" in capsys.readouterr().out
