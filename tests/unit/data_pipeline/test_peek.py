from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import run_data_command
from tests.support.small_shards import make_caption, make_png, make_shards


def printed_keys(output: str) -> list[str]:
    return [line.split()[-1] for line in output.splitlines() if " #" in line]


def keys(start: int, stop: int) -> list[str]:
    return [f"{number:05d}" for number in range(start, stop)]


def test_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path / "a", count=20)
    make_shards(tmp_path / "b", count=20, first=20)

    def peek(*options: str | int) -> list[str]:
        run_data_command("peek", f"{tmp_path}/{{a,b}}", *options)
        return printed_keys(capsys.readouterr().out)

    assert peek() == keys(0, 5)
    assert peek("--first", 9) == keys(0, 9)
    assert peek("--key", "00033") == ["00033"]
    assert peek("--index", 25) == ["00025"]
    assert peek("--shard", 4, "--index", 1) == ["00028"]
    by_name = peek("--shard", "shard-000002.tar", "--first", 99)
    assert by_name == [*keys(14, 20), *keys(34, 40)]

    random = peek("--random", 12, "--seed", 3)
    assert len(set(random)) == 12
    assert peek("--random", 12, "--seed", 3) == random
    assert peek("--random", 12, "--seed", 4) != random
    assert set(peek("--shard", 3, "--random", 4)) < set(keys(20, 27))

    for options, message in (
        (("--shard", "no"), "no shard 'no'"),
        (("--index", 40), "--index 40.*40 samples"),
        (("--index", -1), "--index -1.*40 samples"),
        (("--out", "x.gif"), "--out x.gif.*html"),
    ):
        with pytest.raises(ConfigError, match=message):
            peek(*options)
    with pytest.raises(DataError, match=r"6 shards.*'zz'"):
        peek("--key", "zz")


def test_text_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    malicious = "a \x1b]0;title\x07 fox\u202e"
    samples: list[dict[str, object]] = [
        {
            "__key__": "a",
            "png": make_png(1),
            "txt": "word " * 1000,
            "json": {"text": malicious, "n": 1},
        },
        {"__key__": "b", "jpg": b"no", "txt": b"\xff", "json": b"{"},
        {"__key__": "c", "txt": "x"},
    ]
    manifest = write_shards(samples, tmp_path)
    run_data_command("peek", tmp_path, "--caption-key", "txt", "--caption-key", "json:text")
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\x07" not in output and "\u202e" not in output
    assert r"\u001b]0;title" in output
    assert "png 12 x 12" in output
    assert "… (2,999 more characters)" in output
    assert "cannot be decoded" in output
    assert "invalid-text" in output and "invalid-json" in output
    assert "no image" in output and ": txt" in output

    Path(manifest.shard_url(manifest.shards[0])).unlink()
    run_data_command("peek", tmp_path, "--first", 1)
    assert "shard-000000.tar #0\n  missing-shard" in capsys.readouterr().out


def test_html_sheet(tmp_path: Path) -> None:
    make_shards(tmp_path, count=7)
    run_data_command("peek", tmp_path, "--random", 99, "--out", tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 7
    assert all(make_caption(number) in page for number in range(7))
    assert "default-src 'none'" in page


def test_png_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, count=7)
    run_data_command("peek", tmp_path, "--first", 7, "--out", tmp_path / "sheet.png")
    assert "sheet.png: 7 samples" in capsys.readouterr().out
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet is not None and sheet.shape[:2] == (3 * 204 + 10, 3 * 170 + 10)

    # Seven images of noise in a grid of 3 x 3; the last two cells are blank.
    has_image = []
    for row in range(3):
        for column in range(3):
            y, x = 10 + 204 * row, 10 + 170 * column
            has_image.append(sheet[y : y + 150, x : x + 150].std() > 20)
    assert has_image == [True] * 7 + [False] * 2


def test_images_as_the_model_sees_them(tmp_path: Path) -> None:
    image = np.full((40, 120, 3), 60, np.uint8)
    image[:, 40:80] = 200
    data = bytes(cv2.imencode(".png", image)[1])
    write_shards([{"__key__": "a", "png": data, "txt": "x"}], tmp_path)
    centers = {}
    for mode in ("", "crop", "pad", "squash"):
        options = ["--image-mode", mode] if mode else []
        run_data_command("peek", tmp_path, "--out", tmp_path / "sheet.png", *options)
        sheet = cv2.imread(str(tmp_path / "sheet.png"))
        assert sheet is not None
        image_area = sheet[10:170, 10:170]
        centers[mode] = [int((image_area == value).all(axis=2).sum()) for value in (60, 200, 255)]
    side = 160
    assert centers["crop"] == [0, side * side, 0]
    gray, light, white = centers["pad"]
    assert white > side * side * 0.6 and gray > 1.5 * light > 0
    gray, light, white = centers["squash"]
    assert white == 0 and gray > 1.5 * light > 0
