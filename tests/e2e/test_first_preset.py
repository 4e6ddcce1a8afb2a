"""The commands of a first run on one's own images, from files to captions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from pretrain.train.jsonl import read_rows
from tests.support.command_server import CommandRunner
from tests.support.shape_dataset import COLORS, SHAPES, SIZES, render_shape_png

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

STEPS = 60


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """All 80 images of one shape, with captions in text files beside them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, words in enumerate(itertools.product(SIZES, COLORS, SHAPES)):
        caption = f"a {' '.join(words)}"
        (folder / f"{index:02}.png").write_bytes(render_shape_png(caption, 64))
        (folder / f"{index:02}.txt").write_text(caption)
    return folder


def test_a_first_run_learns_its_pairs(vlmoe: CommandRunner, images: Path) -> None:
    """In 60 of the 500 steps; the vocabulary and the warm-up follow from the data and the steps."""
    folder = images.parent
    shards, tokenizer, run_dir = str(folder / "shards"), str(folder / "t.model"), folder / "run"
    vlmoe(["data", "write", "folder", str(images), "--out", shards]).check()
    vlmoe(["tokenizer", "train", shards, "--out", tokenizer, "--vocab-size", "auto"]).check()
    settings = [
        f"data.train=[{shards}]",
        f"data.tokenizer={tokenizer}",
        f"schedule.total_steps={STEPS}",
        "log.every_steps=1",
        "eval.caption_samples=4",
    ]
    train = ["train", "first", "--out", str(run_dir), *settings]
    output = vlmoe(train, timeout_seconds=200).check().output

    losses = [row["loss/total"] for row in read_rows(run_dir / "metrics.jsonl")]
    assert len(losses) == STEPS and losses[-1] < 0.6 * losses[0]
    (last,) = [line for line in output.splitlines() if f"step {STEPS}/{STEPS} " in line]
    assert "max/mean expert load" in last and "dead experts" not in last

    vlmoe(["eval", str(run_dir), "--shards", shards, "--json", str(folder / "eval.json")]).check()
    result = json.loads((folder / "eval.json").read_text())["shards"]
    assert result["images"] == result["texts"] == 80
    for direction in ("image_to_text", "text_to_image"):
        assert result[direction]["R@10"] > 3 * result["chance"]["R@10"]
    assert "00.png: " in vlmoe(["caption", str(run_dir), str(images / "00.png")]).check().output
